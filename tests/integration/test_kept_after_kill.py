"""kill -9 at each step of keeping a result: afterwards it is whole or absent."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from src.tools.rag_tools import kept
from src.tools.rag_tools.store import Chunk, chunk_id
from tests.support.openai_server import hashed_vectors

KEEP_AND_DIE = """
import os, signal, sys
from pathlib import Path
from src.tools.rag_tools import kept
from tests.integration.test_kept_after_kill import chunks

setattr(os, sys.argv[1], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
kept.keep(Path(sys.argv[2]), chunks("killed"))
"""


def chunks(content: str) -> list[Chunk]:
    [vector] = hashed_vectors([content])
    return [Chunk(chunk_id(7, 0, content), 7, 0, content, {}, vector)]


def content(kept_now: list[Chunk] | None) -> str | None:
    return kept_now[0].content if kept_now else None


@pytest.mark.parametrize(("step", "survivor"), [("fsync", None), ("link", None), ("unlink", "killed")])
def test_a_killed_writer_leaves_all_or_nothing(tmp_path: Path, step: str, survivor: str | None) -> None:
    place = kept.kept_path(tmp_path / "a.pdf")
    killed = subprocess.run([sys.executable, "-c", KEEP_AND_DIE, step, str(place)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert content(kept.load(place, 7)) == survivor
    assert len(list(tmp_path.glob("*.part"))) == 1

    assert content(kept.keep(place, chunks("retried"))) == (survivor or "retried")
    kept.forget(place)
    assert list(tmp_path.iterdir()) == []
