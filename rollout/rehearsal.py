"""The whole cut-over on a copy of an installation, under traffic from processes of its own.

The installation is copied and never changed. Everything runs in a working folder: a PostgreSQL of its own, the
copied files, the logs. Dying in the middle leaves that folder, and a server that the next start adopts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.errors import PreconditionError, RolloutError

QUERIES = 1_000
PROCESSES = 2
UPLOADS = 20
DELETES = 5
REFUSED = "refused.json"
"""Why the copy could not be rehearsed at all, and the exit code of that."""
ENVIRONMENT_OF_ITS_OWN = (
    "DATABASE_ADMIN_URL",
    "DATABASE_ROLLOUT_URL",
    "ROLLOUT_PROFILE",
    "FAISS_INDEX_PATH",
    "UPLOAD_DIR",
)
PROVIDER = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "EMBEDDING_PROVIDER", "EMBEDDING_MODEL")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is rehearsed. `legacy` None: an installation is made first."""

    work: Path
    legacy: Path | None
    queries: int = QUERIES
    embed: bool = False
    seed: int = 0


def rehearse(plan: Plan, tell: Callable[[str], None]) -> dict[str, Any]:
    """Prepare the copy, then run the rehearsal in a process whose environment points at it.

    Raises PreconditionError where `legacy` is no installation or `work` is in use, RolloutError with the exit code
    of what the copy was refused for, or where the process died.
    """
    _refuse_used(plan)
    plan.work.mkdir(parents=True, exist_ok=True)
    if plan.legacy is None:
        _make(plan, tell)
    else:
        _copy(plan.legacy, plan.work, tell)
        _read(plan.work / "faiss_index")
    result = plan.work / "result.json"
    command = [
        sys.executable,
        "-m",
        "rollout.rehearsal_run",
        str(plan.queries),
        str(plan.seed),
        _provider(plan),
    ]
    with (plan.work / "rehearsal.log").open("w", encoding="utf-8") as log:
        process = subprocess.run(  # noqa: S603 - our own module
            command, cwd=plan.work, env=environment(plan), check=False, stdout=log
        )
    if (refused := plan.work / REFUSED).exists():
        raise _as_it_was(refused)
    if not result.exists():
        raise RolloutError(f"the rehearsal ended early (exit code {process.returncode}); its logs are in {plan.work}")
    return {**json.loads(result.read_text(encoding="utf-8")), "work": str(plan.work)}


def _read(index: Path) -> None:
    """Of the copy, and before a server is started for it. PreconditionError where it cannot be opened."""
    from src.tools.rag_tools.migration.faiss_files import open_files
    from src.tools.rag_tools.store import StoreError

    try:
        open_files(index)
    except StoreError as error:
        raise PreconditionError(f"{error} (found in a copy; the installation is as it was)") from error


def _as_it_was(refused: Path) -> RolloutError:
    told = json.loads(refused.read_text(encoding="utf-8"))
    error = RolloutError(f"{told['error']} (found in a copy; the installation is as it was)")
    error.exit_code = told["exit_code"]
    return error


def _refuse_used(plan: Plan) -> None:
    """What an earlier rehearsal left would pass for the result of this one."""
    if plan.legacy is not None and plan.work.resolve().is_relative_to(plan.legacy.resolve()):
        raise PreconditionError(f"{plan.work} lies in {plan.legacy}, which is never changed; name another --work")
    if plan.work.exists() and (not plan.work.is_dir() or any(plan.work.iterdir())):
        raise PreconditionError(f"{plan.work} is not an empty folder; name a new one with --work, or delete it")


def environment(plan: Plan) -> dict[str, str]:
    """Ours, less what points at the real installation; nothing is embedded elsewhere unless asked."""
    dropped = set(ENVIRONMENT_OF_ITS_OWN) | (set() if plan.embed else set(PROVIDER))
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    made = {} if plan.embed else {"EMBEDDING_PROVIDER": "local"}
    return {
        **kept,
        **made,
        "DATABASE_URL": f"embedded:{plan.work / 'postgres'}",
        "FAISS_INDEX_PATH": "faiss_index",
        "UPLOAD_DIR": "uploads",
        "ROLLOUT_PROFILE": "rehearsal",
        "ROLLOUT_ACTOR": "rehearsal",
        "GUARD_SECONDS": "0.5",
    }


def _provider(plan: Plan) -> str:
    """Where vectors come from: a model only for an installation made here with it, or if asked."""
    return "MODEL" if plan.embed or plan.legacy is None else "STORED"


def _make(plan: Plan, tell: Callable[[str], None]) -> None:
    from rollout.installation import make_installation
    from src.tools.rag_tools.embeddings import LocalEmbeddings

    tell("making an installation as the old release did")
    make_installation(plan.work, LocalEmbeddings(), seed=plan.seed)


def _copy(legacy: Path, work: Path, tell: Callable[[str], None]) -> None:
    """PreconditionError where a part is missing; `uploads` may be empty or absent."""
    for part in ("victus.db", "faiss_index/index.faiss", "faiss_index/index.pkl"):
        if not (legacy / part).is_file():
            raise PreconditionError(
                f"{legacy / part} is missing; name the folder that holds victus.db, uploads/ and faiss_index/"
            )
    tell(f"copying {legacy}")
    for part in ("victus.db-wal", "victus.db-shm"):
        if (legacy / part).is_file():
            shutil.copy2(legacy / part, work / part)
    shutil.copy2(legacy / "victus.db", work / "victus.db")
    for folder in ("uploads", "faiss_index"):
        if (legacy / folder).is_dir():
            shutil.copytree(legacy / folder, work / folder)
    (work / "uploads").mkdir(exist_ok=True)


# -- the processes of the traffic, as the rehearsal sees them


@dataclass
class Talker:
    """One traffic process: commands to its stdin, answers from its stdout."""

    process: subprocess.Popen[str]
    number: int

    def ask(self, **command: Any) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise RolloutError("a traffic process was started without pipes")
        stdin.write(json.dumps(command) + "\n")
        stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise RolloutError(
                f"traffic process {self.number} died (exit code {self.process.wait()}); see traffic-{self.number}.err"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        if self.process.poll() is None and self.process.stdin:
            self.process.stdin.close()
            self.process.wait(timeout=60)


def start_traffic(stack: ExitStack, seed: int, provider: str) -> list[Talker]:
    """Start all, then wait for all: each loads its index at the same time as the others."""
    talkers = []
    for number in range(PROCESSES):
        path = Path(f"traffic-{number}.err")
        errors = stack.enter_context(path.open("w", encoding="utf-8"))
        command = [sys.executable, "-m", "rollout.traffic", str(number), str(seed), provider]
        process = subprocess.Popen(  # noqa: S603 - our own module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
        )
        talker = Talker(process, number)
        stack.callback(talker.stop)
        talkers.append(talker)
    for talker in talkers:
        talker.hear()
    return talkers


@dataclass
class Observed:
    """The queries that the traffic has logged so far."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    offsets: dict[Path, int] = field(default_factory=dict)

    def read(self) -> None:
        for path in Path().glob("traffic-*.jsonl"):
            with path.open(encoding="utf-8") as log:
                log.seek(self.offsets.get(path, 0))
                for line in log:
                    if line.endswith("\n"):
                        self.lines.append(json.loads(line))
                        self.offsets[path] = self.offsets.get(path, 0) + len(line.encode())

    def of(self, stage: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["stage"] == stage]

    def wait(self, stage: str, queries: int, users: set[int], seconds: float) -> None:
        """Until the stage has its queries and every user asked; RolloutError when traffic has stopped."""
        end = time.monotonic() + seconds
        while True:
            self.read()
            seen = self.of(stage)
            if len(seen) >= queries and users <= {line["user"] for line in seen}:
                return
            if time.monotonic() > end:
                raise RolloutError(
                    f"stage {stage}: only {len(seen)} of {queries} queries within {seconds:.0f} s; see traffic-*.err"
                )
            # The traffic writes a file; there is nothing else to wait on.
            time.sleep(0.05)
