"""The command `rollout` in processes of its own, each with its own settings, folder and streams.

Loading what it stands on takes seconds. So one process loads it once, and every command is a child that is forked
from it and reads its settings anew.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV")
WIDTH = "240"


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        found: dict[str, Any] = json.loads(self.out)
        assert found["exit_code"] == self.code
        return found

    def __str__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


@dataclass
class Commands:
    """Runs commands one after the other."""

    process: subprocess.Popen[str]
    scratch: Path

    def __call__(self, folder: Path, environment: Mapping[str, str], *arguments: str) -> Ended:
        """`rollout` with these arguments in `folder`, with nothing of this process' settings."""
        out, err = self.scratch / "out", self.scratch / "err"
        request = {
            "arguments": arguments,
            "folder": str(folder),
            "environment": {**base_environment(), "COLUMNS": WIDTH, **environment},
            "streams": {"1": str(out), "2": str(err)},
        }
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        code = int(stdout.readline())
        return Ended(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def base_environment() -> dict[str, str]:
    """Nothing of this process' settings; the project is found wherever the command runs."""
    path = f"{ROOT / 'backend'}{os.pathsep}{ROOT}"
    return {name: os.environ[name] for name in KEPT if name in os.environ} | {"PYTHONPATH": path}


@contextmanager
def commands_ready(scratch: Path) -> Iterator[Commands]:
    environment = {**base_environment(), "COLUMNS": WIDTH}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Commands(process, scratch)
        process.communicate()
    assert process.returncode == 0


def _serve() -> None:
    import typer.rich_utils  # noqa: F401  of --help

    from rollout import cli, import_sql, quarantine, repair, saved, status, steps, verify  # noqa: F401  loads them all

    # Else each child copies all of it, by looking through it for garbage at its end.
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            # Ends like any other process, by the way out of this function.
            _become(json.loads(line))
            cli.main()
        _, status_of_child = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status_of_child)}\n")


def _become(request: dict[str, Any]) -> None:
    for number, path in request["streams"].items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), int(number))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = ["rollout", *request["arguments"]]
    _read_settings()


def _read_settings() -> None:
    from src.config import settings
    from src.tools.rag_tools.migration.settings import migration_settings

    for shared in (settings, migration_settings):
        for name, value in type(shared)():
            setattr(shared, name, value)


if __name__ == "__main__":
    _serve()
