"""Sixteen people on four workers through PgBouncer while the rollout ramps up, restarts and goes back: nothing fails.

`make load` runs it so for two minutes (LOAD_SECONDS=120). With fewer seconds, fewer people and workers go through the
same steps, for as long as those take. LOAD_SEED repeats what people wish for.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.tools.rag_tools.migration.stages import Stage
from tests.support.bouncer import Bouncer, bouncer, needs_pgbouncer
from tests.support.commands import Ended, commands_ready
from tests.support.load import Crowd, Person, passages
from tests.support.routers import set_stage
from tests.support.served import SERVE, STARTED, Line, Served, environment, register, served

pytestmark = [pytest.mark.migration, needs_pgbouncer]

SECONDS = float(os.environ.get("LOAD_SECONDS", "10"))
SEED = int(os.environ.get("LOAD_SEED", "0"))
LONG = SECONDS >= 120
WORKERS, PEOPLE = (4, 16) if LONG else (2, 6)
LEAST_REQUESTS = 5_000 if LONG else 100
KNOWN_SHARE = 0.95
RAMP = (1, 10, 50, 100)
STEPS = len(RAMP) + 2
INCONCLUSIVE = 4
# One machine serves, stores and asks here; how fast it is at that is for the benchmarks to say.
SLOW = ("--override", "latency=clients, backend and PostgreSQL share the machine")

Rollout = Callable[..., Ended]


@pytest.fixture
def behind(database: Any) -> Iterator[Bouncer]:
    with database.connect(autocommit=True) as connection:
        set_stage(connection, Stage.DUALWRITE)
        set_stage(connection, Stage.SHADOW)
    with bouncer(database) as made:
        yield made


@pytest.fixture
def settings(behind: Bouncer, tmp_path: Path) -> dict[str, str]:
    counts = tmp_path / "counts"
    counts.mkdir()
    return environment(
        behind.database,
        tmp_path,
        DATABASE_URL=behind.url(),
        DATABASE_PREPARE="false",
        PROMETHEUS_MULTIPROC_DIR=str(counts),
    )


@pytest.fixture
def server(settings: dict[str, str], tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, settings, workers=WORKERS, command=SERVE) as made:
        yield made


@pytest.fixture
def rollout(settings: dict[str, str], tmp_path: Path) -> Iterator[Rollout]:
    with commands_ready(tmp_path) as commands:
        rehearsing = {name: value for name, value in settings.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
        yield lambda *arguments: commands(tmp_path, rehearsing | {"ROLLOUT_PROFILE": "rehearsal"}, *arguments)


@pytest.fixture
def crowd(server: Served) -> Iterator[Crowd]:
    made = Crowd([person(server.port, number) for number in range(PEOPLE)])
    made.start()
    yield made
    made.over.set()


def person(port: int, number: int) -> Person:
    line, chance = Line(port), random.Random(SEED * PEOPLE + number)
    user_id, line.token = register(line, f"person{number}")
    line.close()  # the others take their time; a connection is kept for five seconds
    return Person(f"person{number}", user_id, line, chance, passages(chance))


@pytest.mark.timeout(SECONDS + 280)
def test_nothing_fails_for_anybody_across_a_ramp_a_restart_and_a_rollback(
    server: Served, crowd: Crowd, rollout: Rollout, capsys: pytest.CaptureFixture[str]
) -> None:
    pause = SECONDS / STEPS / 2
    for percent in RAMP:
        crowd.wait(pause)
        forward(rollout, crowd, percent)
        crowd.note(f"live at {percent} percent")
    crowd.wait(pause)
    restart(server)
    crowd.note(f"all {WORKERS} workers replaced")
    crowd.wait(pause)
    done(rollout("rollback", "--execute", "--reason", "the load test goes back", "--json"))
    crowd.note("live at 0 percent")
    crowd.wait(max(pause, SECONDS - crowd.seconds))
    seen = crowd.stop()
    with capsys.disabled():
        print(f"\nload: seed {SEED}, {PEOPLE} people, {WORKERS} workers, {crowd.seconds:.0f} s, {seen.total} requests")
        print(*(f"  {line}" for line in crowd.notes), sep="\n")
        print(*(f"  {line}" for line in seen.table()), sep="\n")
        print(
            f"  {len(seen.failed)} failed, {len(seen.foreign)} out of scope, {len(seen.deleted)} of deleted documents;"
            f" the known chunk in {seen.known} of {seen.searches} searches"
        )
    assert seen.failed == [], "\n".join(seen.failed[:20])
    assert seen.foreign == []
    assert seen.deleted == []
    assert seen.known >= KNOWN_SHARE * seen.searches
    assert seen.total >= LEAST_REQUESTS
    assert server.faults() == []
    done(rollout("settle", "--execute", "--json"))
    done(rollout("verify", "--json"))


def forward(rollout: Rollout, crowd: Crowd, percent: int) -> None:
    """One step, as soon as there is evidence enough."""
    while True:
        if percent == RAMP[0]:
            done(rollout("verify", "--json"))
        ended = rollout("advance", "--execute", *SLOW, "--json")
        if ended.code != INCONCLUSIVE:
            break
        assert not crowd.over.is_set()
    assert f"{percent} percent" in done(ended)["to"]


def restart(server: Served) -> None:
    """One worker after the other, while the people go on."""
    before = server.pids
    server.process.send_signal(signal.SIGHUP)
    server.wait_for(STARTED, 2 * WORKERS)
    server.wait_for("service.stop.done", WORKERS)
    assert not set(before) & set(server.pids)


def done(ended: Ended) -> dict[str, Any]:
    assert ended.code == 0, str(ended)
    return ended.json
