"""Over a thousand attempts to reach what is another user's, on pgvector alone: the backend as it stays.

Every attempt runs as a stranger, who must not get there, and as the owner, who must. The table of attempts
follows the published schema, so an endpoint that nobody thought of here is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from src.embedded import EmbeddedServer
from src.tools import rag_tools
from src.tools.rag_tools.documents import Documents
from tests.support.scope import Attempt, World, by_kind, failures, world_on
from tests.support.scope_agent import agent_attempts
from tests.support.scope_context import context_attempts
from tests.support.scope_http import ACTS, IDS, id_attempts, ids_in, named_attempts, operations, schema_of
from tests.support.scope_names import name_attempts
from tests.support.scope_pool import SCOPED, pool_attempts
from tests.support.scope_statements import (
    giant_attempts,
    statement_attempts,
    without_predicate,
    without_row_level_security,
)
from tests.support.scope_tells import tell_attempts
from tests.support.scope_tokens import token_attempts

pytestmark = pytest.mark.xdist_group("tenant scope")

FEWEST = 1_000
STATEMENTS = [*statement_attempts(), *giant_attempts()]
TABLE: dict[str, Callable[[dict[str, Any]], Iterator[Attempt]]] = {
    "ids": id_attempts,
    "tells": tell_attempts,
    "named": named_attempts,
    "tokens": lambda _schema: token_attempts(),
    "names": lambda _schema: name_attempts(),
    "agent": lambda _schema: agent_attempts(),
    "context": lambda _schema: context_attempts(),
    "pool": lambda _schema: pool_attempts(),
    "statements": lambda _schema: iter(STATEMENTS),
}
"""Who makes attempts, from the published schema."""


@pytest.fixture(scope="module")
def world(
    postgres: EmbeddedServer, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """The backend on PostgreSQL alone, whatever else this release may serve from."""
    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(rag_tools, "Service", Documents)
        with world_on(postgres, template_database, tmp_path_factory.mktemp("scope")) as running:
            yield running


@pytest.mark.parametrize("family", list(TABLE))
def test_what_a_user_has_is_reached_by_its_owner_and_by_nobody_else(world: World, family: str) -> None:
    attempts = list(TABLE[family](schema_of(world)))
    wrong = failures(world, attempts)
    print(f"{family}: {len(attempts)} attempts, {by_kind(attempts)}")
    assert not wrong, "\n".join(wrong)


def test_without_the_predicate_row_level_security_still_holds(world: World) -> None:
    with without_predicate():
        wrong = failures(world, STATEMENTS)
    assert not wrong, "\n".join(wrong)


def test_without_row_level_security_the_predicate_still_holds(world: World) -> None:
    with without_row_level_security(world.database):
        wrong = failures(world, [*STATEMENTS, *pool_attempts(SCOPED)])
    assert not wrong, "\n".join(wrong)


def test_without_both_every_statement_leaks_so_it_is_they_that_hold(world: World) -> None:
    with without_predicate(), without_row_level_security(world.database):
        wrong = failures(world, STATEMENTS)
    assert wrong == [f"{attempt.kind}: {attempt.name}: reached by a stranger" for attempt in STATEMENTS]


def test_there_are_a_thousand_attempts_and_they_cover_every_operation_and_id_of_the_schema(world: World) -> None:
    schema = schema_of(world)
    assert set(ACTS) == set(operations(schema)), "an operation of the API without attempts: add it to ACTS"
    assert set(IDS) == set(ids_in(schema)), "an id in the API that nobody forges: add it to IDS"
    attempts = [attempt for family in TABLE.values() for attempt in family(schema)]
    print(f"{len(attempts)} attempts, each as a stranger and as the owner: {by_kind(attempts)}")
    assert len(attempts) >= FEWEST
    named = [f"{attempt.kind}: {attempt.name}" for attempt in attempts]
    assert len(set(named)) == len(named)
