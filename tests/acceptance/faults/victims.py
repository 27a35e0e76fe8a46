"""Victims, each a process of its own, from one process that has loaded everything once.

That process has one thread and no connection, so it may fork; a victim is ready in a tenth of a second. It answers
each request with how the victim ended and with the lines that the victim wrote.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.acceptance.faults.victim import Accident

ROOT = Path(__file__).resolve().parents[3]
HUNG_SECONDS = 60.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Ended:
    """A victim that has ended, or is `stopped`. `signal`: what killed it, 0 where it came to its end."""

    pid: int
    signal: int
    stopped: bool
    seconds: float
    lines: tuple[str, ...]

    @property
    def killed(self) -> bool:
        return self.signal == signal.SIGKILL

    @property
    def acknowledged(self) -> int | None:
        """The document that it answered for."""
        return next((int(line.split()[1]) for line in self.lines if line.startswith("ack ")), None)

    @property
    def error(self) -> str | None:
        return next((line for line in self.lines if line.startswith(("error ", "unexpected "))), None)

    @property
    def points(self) -> list[str]:
        """The points that it came to, in order, each as often as it came there."""
        return [line[2:] for line in self.lines if line.startswith("> ")]

    @property
    def within(self) -> bool:
        """Whether it had come to the first point and had not answered yet."""
        return bool(self.points) and self.acknowledged is None and "end" not in self.lines

    @property
    def place(self) -> str:
        """Where it was, for a table: the last thing that it told."""
        told = [line for line in self.lines if line[:1] in "<>"]
        return told[-1] if told else "-"


@dataclass
class Victims:
    """Where victims come from."""

    process: subprocess.Popen[str]

    def run(self, request: dict[str, Any], accident: Accident | None = None, kill_after: float | None = None) -> Ended:
        """Until it ends or stops. `kill_after`: kill -9 so many seconds after it begins."""
        asked = {**request, "accident": None if accident is None else asdict(accident), "kill_after": kill_after}
        return self._ask({"run": asked})

    def go_on(self, stopped: Ended) -> Ended:
        """SIGCONT, and how it ended."""
        return self._ask({"go_on": stopped.pid})

    def _ask(self, question: dict[str, Any]) -> Ended:
        stdin, stdout = _streams(self.process)
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        return Ended(**{**answer, "lines": tuple(answer["lines"])})


@contextmanager
def victims_ready() -> Iterator[Victims]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV") if name in os.environ}
    environment = {**kept, **ONE_THREAD, "PYTHONPATH": f"{ROOT / 'backend'}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        yield Victims(process)
        process.communicate()
    assert process.returncode == 0


def _streams(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


# -- the process that forks


class _Child:
    """A victim, seen from the process that forked it."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.kill_after: float | None = request["kill_after"]
        self.began = time.monotonic()
        self.pipe, told = os.pipe()
        self.text = b""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _become(request, told)
        os.close(told)

    def follow(self) -> dict[str, Any]:
        """Read what it tells until it ends, stops, or is to be killed."""
        seen, kill_at = 0, time.monotonic() + HUNG_SECONDS
        while True:
            left = max(kill_at - time.monotonic(), 0)
            if not select.select([self.pipe], [], [], left)[0]:
                os.kill(self.pid, signal.SIGKILL)
                kill_at += HUNG_SECONDS
                continue
            some = os.read(self.pipe, 65_536)
            self.text += some
            if not some:
                os.close(self.pipe)
                _, status = os.waitpid(self.pid, 0)
                return self._answer(signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, stopped=False)
            lines = self.text.split(b"\n")
            if self.kill_after is not None and b"begin" in lines[seen:]:
                self.began, kill_at = time.monotonic(), time.monotonic() + self.kill_after
            if b"stopping" in lines[seen:]:
                os.waitpid(self.pid, os.WUNTRACED)
                return self._answer(signal=0, stopped=True)
            seen = len(lines) - 1

    def _answer(self, **outcome: Any) -> dict[str, Any]:
        lines = self.text.decode().splitlines()
        self.text = self.text.replace(b"stopping\n", b"")
        return {"pid": self.pid, **outcome, "seconds": time.monotonic() - self.began, "lines": lines}


def _become(request: dict[str, Any], told: int) -> None:
    from tests.acceptance.faults.victim import Accident, Victim

    try:
        accident = None if request["accident"] is None else Accident(**request["accident"])
        Victim(lambda line: _tell(told, line), accident).run(request)
    finally:
        # Nothing that the forking process registered for its own end is to run here.
        os._exit(0)


def _tell(told: int, line: str) -> None:
    os.write(told, f"{line[:2_000]}\n".encode())


def _serve() -> None:
    import structlog

    import tests.acceptance.faults.victim  # noqa: F401  loads everything, once

    def drop(*_: Any) -> Any:
        raise structlog.DropEvent

    structlog.configure(processors=[drop])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    stopped: dict[int, _Child] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "run" in question:
            child = _Child(question["run"])
        else:
            child = stopped.pop(question["go_on"])
            os.kill(child.pid, signal.SIGCONT)
        answer = child.follow()
        if answer["stopped"]:
            stopped[child.pid] = child
        answers.write(json.dumps(answer) + "\n")
    # A test that failed may have left one asleep, which would hold on to our streams.
    for child in stopped.values():
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)


if __name__ == "__main__":
    _serve()
