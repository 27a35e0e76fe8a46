"""Completion in a real bash: what Tab makes of a command that was begun."""

from __future__ import annotations

import os
import pty
import select
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.commands import base_environment

pytestmark = [
    pytest.mark.migration,
    pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed"),
]
PATIENCE = 60.0


@dataclass
class Bash:
    """An interactive bash on a terminal of its own."""

    terminal: int
    heard: str = ""

    def types(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def hears(self, expected: str) -> bool:
        """Whether it says so, from what was last heard on."""
        end = time.monotonic() + PATIENCE
        while expected not in self.heard and time.monotonic() < end:
            ready, _, _ = select.select([self.terminal], [], [], 1.0)
            if ready:
                self.heard += os.read(self.terminal, 4096).decode(errors="replace")
        found = expected in self.heard
        self.heard = self.heard.partition(expected)[2]
        return found


@pytest.fixture
def bash(tmp_path: Path) -> Iterator[Bash]:
    environment = {**base_environment(), "HOME": str(tmp_path), "PS1": "ready> ", "TERM": "dumb"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
    try:
        yield Bash(terminal)
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def test_tab_completes_commands_options_and_stages_as_the_readme_sets_it_up(bash: Bash) -> None:
    assert bash.hears("ready> ")
    bash.types('eval "$(rollout --show-completion)"\n')
    assert bash.hears("ready> ")
    for begun, completed in [
        ("rollout quar\t", "rollout quarantine "),
        ("dis\t", "discard "),
        ("\x15rollout advance --ex\t", "rollout advance --execute "),
        ("--to ram\t", "--to rampdown "),
        ("\x15rollout diffs --cause owner\t", "rollout diffs --cause owner_mismatch "),
    ]:
        bash.types(begun)
        assert bash.hears(completed), (begun, bash.heard)
