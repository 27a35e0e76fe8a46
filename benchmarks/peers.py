"""The peers' side: a process of their own packages, told what to measure in lines of JSON.

langchain-postgres wants an older pgvector than this project, so the peers live in `.venv-bench`, which
`make bench` makes from `benchmarks/requirements.lock`.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-bench/bin/python"


class PeersMissingError(Exception):
    """The peers' packages are not installed."""


class Peers:
    """Starts the process at the first question and ends it at the end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if not PYTHON.exists():
            raise PeersMissingError(f"{PYTHON} is missing; run `make bench`, which installs the peers")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(30)

    def ask(self, what: str, **arguments: Any) -> Any:
        """The answer of `benchmarks.peer_worker`'s function of that name."""
        process = self._started()
        if process.stdin is None or process.stdout is None:
            raise AssertionError("started with pipes")
        print(json.dumps([what, arguments]), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peers' process ended while it measured {what}")
        return json.loads(line)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [str(PYTHON), "-m", "benchmarks.peer_worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            )  # fmt: skip
        return self._process
