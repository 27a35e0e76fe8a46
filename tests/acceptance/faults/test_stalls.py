"""SIGSTOP of a backend in the middle of a write, for longer than its lease and across two stage changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from src.tools.rag_tools.migration.stages import Stage
from tests.acceptance.faults.site import Promised, Site
from tests.acceptance.faults.tally import Tally
from tests.acceptance.faults.victim import Accident
from tests.acceptance.faults.victims import Ended

pytestmark = pytest.mark.migration

WAYS = [
    (Stage.OFF, Stage.DUALWRITE, Stage.SHADOW),
    (Stage.COMPLETE, Stage.RAMPDOWN, Stage.LIVE),
]
UPLOAD = ["document.load", "kept.link", "journal.commit", "pgvector.present", "ledger.mark", "upload.ready"]
REFUSALS = ("DocumentGoneError", "StaleProcessError", "StoreError")
LOCKS = {"journal.commit"}
"""Here the sleeper holds the journal's lock: nobody can write FAISS until it is awake."""


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way))
@pytest.mark.parametrize("given_up", [False, True], ids=["settled by others", "deleted by others"])
def test_a_write_that_slept_through_two_stage_changes_leaves_nothing_inconsistent(
    site: Site, way: tuple[Stage, ...], given_up: bool, record_property: Callable[[str, object], None]
) -> None:
    tally = Tally("SIGSTOP for longer than the lease, two stage changes")
    first, second, third = way
    for point in [point for point in UPLOAD if not given_up or point not in LOCKS]:
        site.go_to(first)
        document, asleep = site.upload(Accident(point, what="stop"))
        if not asleep.stopped:
            assert asleep.error is None, asleep.error
            continue  # this stage does not write that store
        site.go_to(second)
        others(site, document, point, given_up)
        site.go_to(third)
        others(site, document, point, given_up=False)
        awake = site.victims.go_on(asleep)
        judge(site, document, awake)
        site.settled_and_whole()
        tally.add(point, within=True)
    tally.record(record_property)


def others(site: Site, document: Promised, point: str, given_up: bool) -> None:
    """What the other processes do meanwhile."""
    with site.connected() as connection:
        row = connection.execute("SELECT id FROM documents WHERE filename = %s", (document.name,)).fetchone()
    if row is not None and given_up:
        document.id = row[0]
        ended = site.delete(document)
        assert ended.error is None, ended.error
        document.deleted = True
    if point not in LOCKS:
        site.settle()


def judge(site: Site, document: Promised, awake: Ended) -> None:
    """It is told that its document is gone or that it is too late; or the document is there."""
    assert not awake.killed
    if awake.error is not None:
        assert awake.error.split()[1].rstrip(":") in ("DocumentGoneError", "StaleProcessError", "StoreError"), (
            awake.error
        )
    if awake.acknowledged is not None:
        assert not document.deleted or awake.acknowledged != document.id, "acknowledged what others had deleted"
        site.heard(document, awake)


def test_a_process_that_sleeps_over_the_journal_keeps_no_other_from_knowing_the_stage(site: Site) -> None:
    site.go_to(Stage.OFF)
    with site.router() as router:
        asleep = site.upload(Accident("journal.commit", what="stop"))[1]
        router.stores.faiss.journal._writer.execute("PRAGMA busy_timeout = 0")
        transition = site.go_to(Stage.DUALWRITE)
        assert router.refresh().transition_id == transition
        assert router.flags.halted is None
        site.victims.go_on(asleep)
        router.refresh()
        assert router.stores.faiss.journal.note("last_transition") == str(transition)
    site.settled_and_whole()
