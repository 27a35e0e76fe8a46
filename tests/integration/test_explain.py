"""`rollout explain`: for every cause both answers side by side, what the stores hold now, and commands that exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from rollout.cli import app
from rollout.commands_evidence import _explain_text
from rollout.control import Control
from rollout.errors import UsageError
from rollout.explain import MENDS, explain
from src.tools.rag_tools.migration.causes import Cause
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.store import Chunk
from tests.support.control import control_on
from tests.support.planted import K, Planted, planting
from tests.support.routers import add_users, router_on

pytestmark = pytest.mark.migration

NEWEST = "SELECT max(id) FROM shadow_diffs"
COMMAND = re.compile(r"`rollout ([a-z\-]+)([^`]*)`")
Harm = Callable[[Planted, Chunk, int, int], None]


@pytest.fixture
def planted(configured_database: Any, tmp_path: Path) -> Iterator[Planted]:
    with router_on(configured_database, tmp_path) as router, planting(configured_database, router) as made:
        for user in add_users(configured_database, 2):
            made.add(user, [made.unit() for _ in range(K + 3)])
        made.to(Stage.SHADOW)
        made.settle_down()
        yield made


@pytest.fixture
def control(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    with control_on(tmp_path, monkeypatch) as made:
        yield made


def nothing(planted: Planted, chunk: Chunk, user: int, other: int) -> None:
    pass


def gone_from_pgvector(planted: Planted, chunk: Chunk, user: int, other: int) -> None:
    planted.gone(Store.PGVECTOR, user, [chunk.document_id])


def gone_from_faiss(planted: Planted, chunk: Chunk, user: int, other: int) -> None:
    planted.gone(Store.FAISS, user, [chunk.document_id])


def owed(planted: Planted, chunk: Chunk, user: int, other: int) -> None:
    planted.owe(Store.PGVECTOR, user, [chunk.document_id])


def content_changed(planted: Planted, chunk: Chunk, user: int, other: int) -> None:
    planted.rewrite(chunk, user)


def vector_changed(planted: Planted, chunk: Chunk, user: int, other: int) -> None:
    planted.turn(chunk, user, planted.near(chunk, 0.1))


def owner_swapped(planted: Planted, chunk: Chunk, user: int, other: int) -> None:
    planted.give_away(chunk, user, other)


@pytest.mark.parametrize(
    ("cause", "harm", "proves"),
    [
        (Cause.MATCH, nothing, "both answers name the same chunks"),
        (Cause.MISSING_IN_PGVECTOR, gone_from_pgvector, "{chunk}: pgvector holds no such chunk now"),
        (Cause.MISSING_IN_FAISS, gone_from_faiss, "{chunk}: faiss holds no such chunk now"),
        (Cause.STALE, owed, "{chunk}: pgvector holds no such chunk now"),
        (Cause.CONTENT_DRIFT, content_changed, "{chunk}: its text in faiss is not its text in pgvector"),
        (Cause.VECTOR_DRIFT, vector_changed, "{chunk}: its vectors differ, their cosine is 0.9"),
        (Cause.OWNER_MISMATCH, owner_swapped, "{chunk}: pgvector gives it to user {other}"),
    ],
)
def test_each_cause_is_shown_with_both_lists_its_proof_and_what_mends_it(
    planted: Planted, control: Control, cause: Cause, harm: Harm, proves: str
) -> None:
    user, other = planted.held[Store.FAISS]
    chunk = next(iter(planted.held[Store.FAISS][user].values()))
    question = planted.near(chunk)
    harm(planted, chunk, user, other)
    assert planted.compare(user, question) is cause
    found = explain(control, newest(planted))
    assert (found["cause"], found["user_id"], found["mend"]) == (cause, user, MENDS[cause])
    served = [place for place in found["chunks"] if place["served_rank"]]
    shadow = [place for place in found["chunks"] if place["shadow_rank"]]
    assert [place["served_rank"] for place in served] == list(range(1, K + 1))
    assert sorted(place["shadow_rank"] for place in shadow) == list(range(1, K + 1))
    assert any(line.startswith(proves.format(chunk=chunk.id, other=other)) for line in found["proof"]), found["proof"]
    text = [line for line in _explain_text(found) if isinstance(line, str)]
    assert f"mend: {MENDS[cause]}" in text
    assert [line for line in text if line.startswith("proof: ")] == [f"proof: {line}" for line in found["proof"]]


def test_what_was_mended_since_is_said_to_be(planted: Planted, control: Control) -> None:
    user = next(iter(planted.held[Store.FAISS]))
    chunk = next(iter(planted.held[Store.FAISS][user].values()))
    question = planted.near(chunk)
    planted.owe(Store.PGVECTOR, user, [chunk.document_id])
    planted.compare(user, question)
    control.router.settler.run(at_once=True)
    found = explain(control, newest(planted))
    assert found["proof"] == [
        "both stores hold every chunk for this user now: it was settled since, or the scan was not exact"
    ]
    assert {row["state"] for rows in found["ledger"].values() for row in rows} == {"done"}


def test_there_is_nothing_to_explain_about_a_diff_that_is_not_there(planted: Planted, control: Control) -> None:
    with pytest.raises(UsageError, match="there is no diff 4711"):
        explain(control, 4711)


@pytest.mark.parametrize("cause", list(Cause))
def test_whatever_is_said_to_mend_it_are_commands_and_options_that_exist(cause: Cause) -> None:
    commands: Any = typer.main.get_command(app)
    for name, options in COMMAND.findall(MENDS[cause]):
        known = {option for parameter in commands.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z\-]+", options)) <= known


def newest(planted: Planted) -> int:
    with planted.database.connect() as connection:
        (number,) = connection.execute(NEWEST).fetchone()
    return int(number)
