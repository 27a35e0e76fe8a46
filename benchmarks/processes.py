"""Whole backend processes: from start to ready, and a stage change until every one of them acts on it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks.bench import Bench, Row, ms, say
from benchmarks.loading import _url
from benchmarks.site import ROOT
from benchmarks.timing import spread
from src.database import Role

FLEET = 3
ACTING = """
SELECT count(*) FILTER (WHERE transition_id = (SELECT max(id) FROM rollout_transitions)), count(*)
FROM rollout_instances WHERE seen_at > clock_timestamp() - interval '10 seconds'
"""
STEPS = (("live", 1), ("live", 10), ("live", 50), ("live", 100))


def run(bench: Bench) -> list[Row]:
    return [_ready(bench), _stepping(bench)]


def _environment(bench: Bench) -> dict[str, str]:
    return {
        **os.environ,
        "DATABASE_URL": _url(bench, bench.loaded, Role.APP),
        "FAISS_INDEX_PATH": str(bench.moved),
        "SECRET_KEY": "b" * 40,
        "EMBEDDING_PROVIDER": "local",
        "UPLOAD_DIR": str(bench.site.folder / "uploads"),
        "LOG_LEVEL": "WARNING",
    }


def _start(bench: Bench, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.backends", what], cwd=ROOT, env=_environment(bench),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _ready(bench: Bench) -> Row:
    say("a process to ready in `complete`")
    bench.site.step(bench.loaded, "complete")
    found = []
    for _ in range(bench.rounds):
        process = _start(bench, "http")
        if process.stdout is None:
            raise AssertionError("started with pipes")
        found.append(json.loads(process.stdout.readline()))
        process.communicate("stop\n")
    seconds = statistics.median(each["seconds"] for each in found)
    imported = sorted({name for each in found for name in each["imported"]})
    return Row(
        "a process to ready, stage complete", "<= 2 s; neither faiss nor langchain-community imported",
        f"{seconds:.2f} s, imported: {', '.join(imported) or 'neither'}", "-", "-",
        seconds <= 2 and not imported, {"ours_s": seconds},
    )  # fmt: skip


def _stepping(bench: Bench) -> Row:
    say(f"a stage change until {FLEET} processes act on it")
    bench.site.step(bench.loaded, "live", 0, 0.0)
    fleet = [_start(bench, "asking") for _ in range(FLEET)]
    answers: list[list[Any]] = [[] for _ in fleet]
    readers = [
        threading.Thread(target=_read, args=(process, into)) for process, into in zip(fleet, answers, strict=True)
    ]
    for reader in readers:
        reader.start()
    with bench.site.connect(bench.loaded) as connection:
        _until_acting(connection)
        time.sleep(2)  # what is usual, before the first step
        changes = []
        for stage, percent in STEPS:
            begun = time.time()
            bench.site.step(bench.loaded, stage, percent, 0.0)
            _until_acting(connection)
            changes.append((begun, time.time() - begun))
            time.sleep(1)  # what is usual again, before the next
    for process in fleet:
        if process.stdin is not None:
            process.stdin.close()
    for process, reader in zip(fleet, readers, strict=True):
        process.wait(60)
        reader.join()
    return _judged([each for some in answers for each in some], changes)


def _judged(answers: list[Any], changes: list[tuple[float, float]]) -> Row:
    """Around a change: from one second before it until one after everybody acts on it."""
    around = [
        milliseconds
        for at, milliseconds, _ in answers
        if any(begun - 1 <= at <= begun + took + 1 for begun, took in changes)
    ]
    failed = sum(1 for *_, good in answers if not good)
    found, slowest, took = spread(around), max(around), max(took for _, took in changes)
    return Row(
        f"a stage change until all {FLEET} processes act on it", "<= 2 s; no failed answer, none slower than 3 x p99",
        f"{took:.2f} s, {failed} failed of {len(answers)}, slowest {ms(slowest)} ({slowest / found.p99:.1f} x p99)",
        "-", "-", took <= 2 and not failed and slowest <= 3 * found.p99,
        {"ours_s": took, "failed": failed, "p99_ms": found.p99, "slowest_ms": slowest},
    )  # fmt: skip


def _read(process: subprocess.Popen[str], into: list[Any]) -> None:
    if process.stdout is not None:
        into += [json.loads(line) for line in process.stdout]


def _until_acting(connection: Any) -> None:
    deadline = time.monotonic() + 120
    while (row := connection.execute(ACTING).fetchone()) and not (row[0] == row[1] == FLEET):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{row} processes act on the last transition")
        time.sleep(0.01)  # only their polls tell
