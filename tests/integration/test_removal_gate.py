"""The gate `removal` on a real database: what each process says of itself, the archive, and the soak of the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout import archive, steps
from rollout.control import Control
from rollout.errors import PreconditionError
from rollout.gates import Gate, Verdict, require
from rollout.removal_checks import removal_gate
from rollout.transitions import Target
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import Stage
from tests.support.control import EASY, control_on
from tests.support.routers import add_users, router_on, set_stage, write_note

pytestmark = pytest.mark.migration

WITHOUT = "SELECT without_faiss FROM rollout_instances WHERE instance = %s"
OLD_CODE = """
INSERT INTO rollout_instances (instance, host, pid, transition_id, seen_at)
SELECT gen_random_uuid(), 'older.example', 7, max(id), clock_timestamp() - make_interval(secs => %s)
FROM rollout_transitions
"""


@pytest.fixture
def router(configured_database: Any, tmp_path: Path) -> Iterator[Router]:
    """A process in `complete`, with one document in both stores."""
    (user,) = add_users(configured_database, 1)
    with configured_database.connect(autocommit=True) as connection:
        set_stage(connection, Stage.RAMPDOWN, 100)
    with router_on(configured_database, tmp_path) as made:
        made.index(made.receive(user, write_note(tmp_path, "note.md", "The tide turns at four."), "note.md"))
        to(configured_database, made, Stage.COMPLETE)
        yield made


@pytest.fixture
def control(router: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    with control_on(tmp_path, monkeypatch) as made:
        yield made


def to(database: Any, router: Router, stage: Stage) -> None:
    """The step, on which the process acts, and has said so."""
    with database.connect(autocommit=True) as connection:
        set_stage(connection, stage, 100)
    router.refresh()
    router.refresh()


def archived(control: Control, folder: Path) -> None:
    archive.write(control, folder / "faiss.tar")
    archive.restore(control, folder / "faiss.tar", folder / "restored")


def gate(control: Control) -> Gate:
    return removal_gate(control, control.view())


def verdict(control: Control, name: str) -> Verdict:
    return next(each.verdict for each in gate(control).criteria if each.name == name)


def test_after_the_last_soak_with_an_archive_that_opens_again_faiss_may_be_removed(
    control: Control, tmp_path: Path
) -> None:
    assert gate(control).verdict is Verdict.INCONCLUSIVE
    archived(control, tmp_path)
    passed = gate(control)
    require(passed)
    assert {each.name for each in passed.criteria} == {"stage", "fleet", "owed", "soak", "archive", "code"}
    assert steps.check_forward(control, control.view(), None).as_dict() == passed.as_dict(), "`rollout check` asks it"


def test_an_archive_counts_only_once_it_was_restored(control: Control, tmp_path: Path) -> None:
    assert verdict(control, "archive") is Verdict.INCONCLUSIVE
    archive.write(control, tmp_path / "faiss.tar")
    assert verdict(control, "archive") is Verdict.INCONCLUSIVE
    archive.restore(control, tmp_path / "faiss.tar", tmp_path / "restored")
    assert verdict(control, "archive") is Verdict.PASS
    archive.write(control, tmp_path / "again.tar")
    assert verdict(control, "archive") is Verdict.PASS, "a second one takes nothing away"


def test_an_archive_of_before_the_last_step_is_not_of_what_faiss_held_at_the_end(
    control: Control, router: Router, configured_database: Any, tmp_path: Path
) -> None:
    archived(control, tmp_path)
    to(configured_database, router, Stage.RAMPDOWN)
    to(configured_database, router, Stage.COMPLETE)
    assert verdict(control, "archive") is Verdict.INCONCLUSIVE


def test_before_the_last_stage_nothing_makes_up_for_it(
    control: Control, router: Router, configured_database: Any, tmp_path: Path
) -> None:
    to(configured_database, router, Stage.RAMPDOWN)
    archived(control, tmp_path)
    assert verdict(control, "stage") is Verdict.FAIL
    assert verdict(control, "code") is Verdict.FAIL
    with pytest.raises(PreconditionError, match="the next step is complete"):
        require(gate(control))
    following = steps.check_forward(control, control.view(), None)
    assert following.target == Target(Stage.COMPLETE, 100), "and `rollout check` asks about the next step"


def test_the_soak_is_that_of_the_last_stage(control: Control, tmp_path: Path) -> None:
    control.profile = replace(EASY, long_soak=3_600.0)
    archived(control, tmp_path)
    assert {each.name for each in gate(control).criteria if not each.holds} == {"soak"}


def test_a_process_of_an_earlier_release_needs_faiss_until_it_is_dead(
    control: Control, configured_database: Any, tmp_path: Path
) -> None:
    archived(control, tmp_path)
    with configured_database.connect(autocommit=True) as connection:
        connection.execute(OLD_CODE, (3_600,))
        assert verdict(control, "code") is Verdict.PASS
        connection.execute(OLD_CODE, (1,))
    code = next(each for each in gate(control).criteria if each.name == "code")
    assert (code.verdict, code.value) == (Verdict.FAIL, "1 of 2 processes")
    assert "restart older.example:7" in code.todo


def test_without_any_process_nobody_knows_what_code_runs(control: Control, router: Router) -> None:
    router.flags.leave()
    assert verdict(control, "code") is Verdict.INCONCLUSIVE


def test_a_process_does_without_faiss_once_nothing_in_flight_began_under_a_stage_that_asks_it(
    router: Router, configured_database: Any
) -> None:
    def says() -> bool:
        router.refresh()
        with configured_database.connect() as connection:
            return bool(connection.execute(WITHOUT, (router.flags.instance,)).fetchone()[0])

    assert says()
    to(configured_database, router, Stage.RAMPDOWN)
    assert not says()
    with router.flags.request():
        to(configured_database, router, Stage.COMPLETE)
        assert not says()
    assert says()
