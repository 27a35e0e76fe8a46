"""The table of stages is what was agreed, and no single step on it lets an answer miss a write."""

from __future__ import annotations

from itertools import pairwise

import pytest

from src.tools.rag_tools.migration.stages import (
    ORDER,
    ROUTING,
    Routing,
    Stage,
    Store,
    UnknownStageError,
    parse_stage,
)

pytestmark = pytest.mark.migration

AGREED = {
    "off": ("faiss", False, "faiss"),
    "dualwrite": ("faiss", False, "faiss pgvector"),
    "shadow": ("faiss", True, "faiss pgvector"),
    "live": ("faiss pgvector", True, "faiss pgvector"),
    "rampdown": ("pgvector", False, "faiss pgvector"),
    "complete": ("pgvector", False, "pgvector"),
}


def test_each_stage_routes_as_agreed() -> None:
    made = {
        stage.value: (" ".join(routing.reads), routing.shadow, " ".join(routing.writes))
        for stage, routing in ROUTING.items()
    }
    assert made == AGREED


def test_the_stages_follow_each_other_from_faiss_alone_to_pgvector_alone() -> None:
    assert list(ORDER) == list(AGREED)
    assert set(ROUTING) == set(Stage)


@pytest.mark.parametrize("stage", Stage)
def test_a_stage_reads_no_store_that_it_does_not_write(stage: Stage) -> None:
    assert set(ROUTING[stage].reads) <= set(ROUTING[stage].writes)


@pytest.mark.parametrize(("one", "other"), list(pairwise(ORDER)))
def test_processes_one_step_apart_miss_none_of_each_others_writes(one: Stage, other: Stage) -> None:
    assert compatible(ROUTING[one], ROUTING[other])


def test_processes_further_apart_may_miss_writes_which_is_why_a_step_waits_for_the_fleet() -> None:
    assert not compatible(ROUTING[Stage.OFF], ROUTING[Stage.LIVE])
    assert not compatible(ROUTING[Stage.LIVE], ROUTING[Stage.COMPLETE])
    assert not compatible(ROUTING[Stage.OFF], ROUTING[Stage.COMPLETE])


def test_the_other_of_the_other_store_is_the_store_itself() -> None:
    assert [store.other for store in Store] == [Store.PGVECTOR, Store.FAISS]
    assert [store.other.other for store in Store] == list(Store)


@pytest.mark.parametrize("stage", Stage)
def test_a_known_name_is_its_stage(stage: Stage) -> None:
    assert parse_stage(stage.value) is stage


@pytest.mark.parametrize("name", ["", "Off", "OFF", "live ", "shadow2", "contracted"])
def test_a_name_from_another_release_is_refused_with_the_names_that_are_known(name: str) -> None:
    with pytest.raises(UnknownStageError, match="off, dualwrite, shadow, live, rampdown, complete") as refused:
        parse_stage(name)
    assert repr(name) in str(refused.value)


def compatible(one: Routing, other: Routing) -> bool:
    """Whether everything that either may read is written by the other."""
    return set(one.reads) <= set(other.writes) and set(other.reads) <= set(one.writes)
