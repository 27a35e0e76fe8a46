"""kill -9 of a process that writes: at every fault point, before the operation and after it, and at any time.

Which points an operation has is found by running it once. FAULTS=full kills more often; FAULTS_SEED repeats the
random times of a run.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable

import pytest

from src.database import Role
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from tests.acceptance.faults.conftest import FULL
from tests.acceptance.faults.site import Site
from tests.acceptance.faults.tally import Tally
from tests.acceptance.faults.victim import Accident
from tests.acceptance.faults.victims import Ended

pytestmark = [pytest.mark.migration, pytest.mark.timeout(0 if FULL else 280)]

STAGES = (Stage.OFF, Stage.DUALWRITE, Stage.LIVE, Stage.COMPLETE)
AT_RANDOM = 60 if FULL else 12
BACKFILL = ["backfill.batch", "backfill.lock", "backfill.copy", "backfill.done", "kept.forget"]
LEAST, LEAST_WITHIN = 5, 200
"""So often, at least, each point is killed at; so many kills, at least, fall between the first point and the answer."""
DONE: list[Tally] = []

Attempt = Callable[[Accident | None, float | None], Ended]
Choose = Callable[[list[Accident]], list[Accident]]
Record = Callable[[str, object], None]


@pytest.fixture(params=STAGES, ids=str)
def staged(site: Site, request: pytest.FixtureRequest) -> Site:
    """In a stage, with a document that both stores have."""
    site.go_to(Stage.DUALWRITE)
    with site.router() as router:
        site.uploaded(router)
    if request.param is not Stage.DUALWRITE:
        site.go_to(request.param)
    return site


def accidents(points: list[str]) -> list[Accident]:
    """Before and after each, each as often as it comes."""
    return [
        Accident(point, points[: at + 1].count(point), before)
        for at, point in enumerate(points)
        for before in (True, False)
    ]


def killed_at_each_point(attempt: Attempt, tally: Tally, choose: Choose) -> float:
    """Returns how many seconds the operation takes undisturbed."""
    whole = attempt(None, None)
    assert whole.error is None, whole.error
    assert whole.points
    for accident in choose(accidents(whole.points)):
        ended = attempt(accident, None)
        assert ended.killed, f"never came to {accident}: {ended}"
        tally.add(accident.point, within=ended.within)
    return whole.seconds


def everyone(found: list[Accident]) -> list[Accident]:
    return found


def every_other(found: list[Accident]) -> list[Accident]:
    """What follows the answer to a POST, settling does as well: a part of it is enough but in a full run."""
    return found if FULL else [accident for at, accident in enumerate(found) if at < 4 or at % 4 in (0, 3)]


def first_times(found: list[Accident]) -> list[Accident]:
    """How often an operation on many documents comes to a point depends on what was left by those killed before."""
    return [accident for accident in found if accident.time == 1]


def killed_at_random(attempt: Attempt, seconds: float, tally: Tally) -> None:
    seed = int(os.environ.get("FAULTS_SEED", random.randrange(2**32)))
    print(f"FAULTS_SEED={seed}")
    chance = random.Random(seed)
    for _ in range(AT_RANDOM):
        ended = attempt(None, chance.uniform(0, seconds))
        tally.add("any time", within=ended.killed and ended.within)


def in_both_stores(site: Site) -> None:
    """Whatever the stage left for later: once a stage writes both stores, both hold the same."""
    site.settled_and_whole()
    if len(ROUTING[site.stage].writes) < len(Store):
        site.go_to(Stage.DUALWRITE if site.stage is Stage.OFF else Stage.RAMPDOWN)
        site.settled_and_whole()


@pytest.mark.parametrize("kind", ["upload", "post"])
def test_no_kill_in_an_upload_loses_or_halves_one(staged: Site, kind: str, record_property: Record) -> None:
    tally = Tally(f"kill -9 in {kind}")

    def attempt(accident: Accident | None, kill_after: float | None) -> Ended:
        return staged.upload(accident, kind=kind, kill_after=kill_after)[1]

    seconds = killed_at_each_point(attempt, tally, every_other if kind == "post" else everyone)
    killed_at_random(attempt, seconds, tally)
    in_both_stores(staged)
    tally.record(record_property)
    DONE.append(tally)


def test_no_kill_in_a_deletion_brings_a_document_back_or_leaves_a_half(staged: Site, record_property: Record) -> None:
    tally = Tally("kill -9 in delete")
    with staged.router() as router:
        there = [staged.uploaded(router) for _ in range(40 + AT_RANDOM)]

    def attempt(accident: Accident | None, kill_after: float | None) -> Ended:
        return staged.delete(there.pop(), accident, kill_after)

    seconds = killed_at_each_point(attempt, tally, everyone)
    killed_at_random(attempt, seconds, tally)
    in_both_stores(staged)
    tally.record(record_property)
    DONE.append(tally)


def test_no_kill_of_a_backfill_halves_a_document(site: Site, record_property: Record) -> None:
    tally = Tally("kill -9 in backfill")
    site.go_to(Stage.OFF)
    request = site.request("backfill", bulk=site.database.conninfo(Role.ROLLOUT))
    for _ in range(3):
        with site.router() as router:
            legacy = [site.uploaded(router) for _ in range(20)]
        site.go_to(Stage.DUALWRITE)

        def attempt(accident: Accident | None, kill_after: float | None) -> Ended:
            return site.victims.run(request, accident, kill_after)

        for accident in first_times(accidents(BACKFILL)):
            ended = attempt(accident, None)
            assert ended.killed, f"never came to {accident}: {ended}"
            tally.add(accident.point, within=ended.within)
        whole = attempt(None, None)
        assert whole.error is None, whole.error
        assert set(whole.points) == set(BACKFILL)
        assert legacy
        in_both_stores(site)
        site.go_to(Stage.OFF)
    tally.record(record_property)
    DONE.append(tally)


def test_every_point_was_killed_at_often_enough() -> None:
    """Over the tests above, which ran in this process."""
    if len(DONE) < 3 * len(STAGES) + 1:
        pytest.skip("only a part of this module ran")
    places = sum((tally.places for tally in DONE), Counter[str]())
    assert {place: count for place, count in places.items() if count < LEAST} == {}
    assert sum(tally.within for tally in DONE) >= LEAST_WITHIN


def owe(site: Site, router: Router) -> None:
    """An upload that was only received, and a deletion that was only intended: `router` is a HalfRouter."""
    leaving = site.uploaded(router)
    site.received(router)
    router.delete(leaving.user, leaving.id or 0)
    leaving.deleting = leaving.deleted = True
