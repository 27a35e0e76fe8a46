"""One step at a time: which steps there are from every stage and percent, and who moves with one."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.errors import RefusedError, UsageError
from rollout.options import named_target
from rollout.profiles import PRODUCTION
from rollout.transitions import (
    Instance,
    Target,
    check_target,
    goes_back,
    laggards,
    next_target,
    previous_target,
    threshold,
    wait_for_fleet,
)
from src.tools.rag_tools.migration.flags import View
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.migration.targeting import bucket

pytestmark = pytest.mark.migration


def at(stage: str, percent: int = 0, threshold: float | None = None) -> View:
    return View(7, Stage(stage), percent, float(percent) if threshold is None else threshold, 1.0)


def to(stage: str, percent: int = 0) -> Target:
    return Target(Stage(stage), percent)


STEPS = [
    (("off", 0), ("dualwrite", 0), None),
    (("dualwrite", 0), ("shadow", 0), ("off", 0)),
    (("shadow", 0), ("live", 1), ("dualwrite", 0)),
    (("live", 0), ("live", 1), ("shadow", 0)),
    (("live", 1), ("live", 10), ("live", 0)),
    (("live", 5), ("live", 10), ("live", 0)),
    (("live", 10), ("live", 50), ("live", 0)),
    (("live", 50), ("live", 100), ("live", 0)),
    (("live", 100), ("rampdown", 100), ("live", 0)),
    (("rampdown", 100), ("complete", 100), ("live", 0)),
    (("complete", 100), None, ("rampdown", 100)),
]
PLACES = [here for here, _, _ in STEPS]


@pytest.mark.parametrize(("here", "forward", "back"), STEPS)
def test_there_is_one_step_forward_and_one_back(
    here: tuple[str, int], forward: tuple[str, int] | None, back: tuple[str, int] | None
) -> None:
    assert next_target(at(*here), PRODUCTION) == (forward and to(*forward))
    assert previous_target(at(*here)) == (back and to(*back))


@pytest.mark.parametrize(("here", "forward", "back"), STEPS)
def test_every_other_step_is_refused_and_the_refusal_names_the_two_that_there_are(
    here: tuple[str, int], forward: tuple[str, int] | None, back: tuple[str, int] | None
) -> None:
    view = at(*here)
    allowed = {each for each in (forward, back) if each is not None}
    if here[0] == "live":
        allowed |= {("live", percent) for percent in range(here[1])}
    for stage in Stage:
        for percent in range(101):
            if (stage.value, percent) in allowed:
                check_target(view, to(stage, percent), PRODUCTION)
                continue
            with pytest.raises(RefusedError) as refused:
                check_target(view, to(stage, percent), PRODUCTION)
            assert f"one step forward is {forward and to(*forward)}" in str(refused.value)
            assert f"one back is {back and to(*back)}" in str(refused.value)


@pytest.mark.parametrize(("here", "forward", "back"), STEPS)
def test_forward_is_never_back(
    here: tuple[str, int], forward: tuple[str, int] | None, back: tuple[str, int] | None
) -> None:
    if forward is not None:
        assert not goes_back(at(*here), to(*forward))
    if back is not None:
        assert goes_back(at(*here), to(*back))
    assert not goes_back(at(*here), to(*here))


@pytest.mark.parametrize(
    ("given", "here", "expected"),
    [
        ((None, None), ("shadow", 0), None),
        (("live", None), ("shadow", 0), ("live", 1)),
        (("live", None), ("live", 10), ("live", 50)),
        (("live", 10), ("live", 1), ("live", 10)),
        ((None, 10), ("live", 1), ("live", 10)),
        (("rampdown", None), ("live", 100), ("rampdown", 100)),
        (("off", None), ("shadow", 0), ("off", 0)),
    ],
)
def test_a_step_forward_may_be_named_by_stage_by_percent_or_not_at_all(
    given: tuple[str | None, int | None], here: tuple[str, int], expected: tuple[str, int] | None
) -> None:
    view = at(*here)
    found = named_target(*given, view.stage, next_target(view, PRODUCTION))
    assert found == (expected and to(*expected))


def test_back_to_live_is_back_to_nobody() -> None:
    for view in (at("rampdown", 100), at("live", 50)):
        assert named_target("live", None, view.stage, previous_target(view)) == to("live", 0)


def test_a_stage_that_does_not_exist_is_a_mistake_that_names_those_that_do() -> None:
    with pytest.raises(UsageError, match="dualwrite, shadow"):
        named_target("compleet", None, Stage.OFF, None)


# -- who moves


class Users:
    """Stands for a connection on which only the users with ready documents are asked for."""

    def __init__(self, *users: int) -> None:
        self.users = users

    def execute(self, _statement: str) -> list[tuple[int]]:
        return [(user,) for user in self.users]


def reached(view: View, percent: int, *users: int) -> float:
    connection: Any = Users(*users)
    return threshold(connection, view, to("live", percent))


BY_BUCKET = sorted(range(1, 3_000), key=bucket)
LOW, HIGH = BY_BUCKET[len(BY_BUCKET) // 5], BY_BUCKET[len(BY_BUCKET) * 3 // 5]


def test_a_step_to_one_percent_moves_at_least_one_user() -> None:
    found = reached(at("shadow"), 1, HIGH)
    assert View(8, Stage.LIVE, 1, found, 1.0).serving(HIGH) is Store.PGVECTOR
    assert View(8, Stage.LIVE, 1, found, 1.0).serving(BY_BUCKET[-1]) is Store.FAISS


def test_among_many_users_one_percent_is_one_percent() -> None:
    assert reached(at("shadow"), 1, *BY_BUCKET) == 1.0


def test_a_step_without_any_user_is_one() -> None:
    assert reached(at("shadow"), 1) == 1.0


def test_nobody_is_taken_back_by_a_step_forward_whoever_has_joined_since() -> None:
    first = reached(at("shadow"), 1, HIGH)
    assert bucket(LOW) < bucket(HIGH) < first
    second = reached(at("live", 1, first), 10, HIGH, LOW)
    assert second >= first
    for percent in (50, 100):
        assert reached(at("live", 10, second), percent, HIGH, LOW) >= first


def test_a_user_keeps_their_side_on_the_whole_ramp() -> None:
    view, moved = at("shadow"), set[int]()
    for percent in PRODUCTION.ramp:
        view = View(view.transition_id + 1, Stage.LIVE, percent, reached(view, percent, *BY_BUCKET), 1.0)
        now = {user for user in BY_BUCKET if view.serving(user) is Store.PGVECTOR}
        assert now > moved
        moved = now
    assert moved == set(BY_BUCKET)


def test_a_step_back_takes_back() -> None:
    above = at("live", 50, 61.5)
    assert reached(above, 10, *BY_BUCKET) == 10.0
    assert reached(above, 0, *BY_BUCKET) == 0.0
    assert reached(at("rampdown", 100, 100.0), 0, *BY_BUCKET) == 0.0


def test_a_ramp_begun_again_after_going_back_begins_low() -> None:
    assert reached(at("live", 0, 0.0), 1, *BY_BUCKET) == 1.0


# -- the fleet


def process(transition: int, silent: float = 0.5, name: str = "p") -> Instance:
    return Instance(name, "host", 1, transition, None, silent)


def test_a_process_on_any_other_transition_is_late_unless_it_is_dead() -> None:
    fleet = [process(7), process(6, name="before"), process(8, name="beyond"), process(0, name="starting")]
    fleet.append(process(6, PRODUCTION.dead_seconds, "dead"))
    assert [each.instance for each in laggards(fleet, 7, PRODUCTION)] == ["before", "beyond", "starting"]


def test_waiting_ends_when_everybody_has_arrived() -> None:
    looks = iter([[process(6)], [process(6)], [process(7)]])
    pauses: list[float] = []
    assert wait_for_fleet(lambda: next(looks), 7, PRODUCTION, seconds=30, clock=lambda: 0.0, pause=pauses.append) == []
    assert len(pauses) == 2


def test_waiting_ends_when_its_time_is_over_and_names_the_late() -> None:
    now = iter(range(100))
    late = wait_for_fleet(
        lambda: [process(7), process(6, name="late")], 7, PRODUCTION, seconds=5,
        clock=lambda: float(next(now)), pause=lambda _: None,
    )  # fmt: skip
    assert [each.instance for each in late] == ["late"]
