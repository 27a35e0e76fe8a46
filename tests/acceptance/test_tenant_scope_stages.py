"""The attempts that reach a store, in every stage of the migration: over a thousand, on both stores.

Each runs as a stranger, who must not get there, and as the owner, who must. It goes with FAISS; what stays is
in test_tenant_scope.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from src.embedded import EmbeddedServer
from src.tools.rag_tools.embeddings import LocalEmbeddings
from src.tools.rag_tools.migration.stages import Stage
from tests.support.scope import World, by_kind, failures, world_on
from tests.support.scope_http import schema_of
from tests.support.scope_stages import (
    LEGACY,
    STAGES,
    legacy_text,
    service,
    stage_attempts,
    to_stage,
    write_legacy_index,
)

pytestmark = [pytest.mark.migration, pytest.mark.xdist_group("tenant scope in stages")]

FEWEST = 1_000


@pytest.fixture(scope="module")
def world(
    postgres: EmbeddedServer, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """A backend with a legacy index, of which nothing is anybody's yet."""
    folder = tmp_path_factory.mktemp("scope")
    vectors = LocalEmbeddings().embed_documents([legacy_text(number) for number in range(LEGACY)])
    write_legacy_index(folder / "faiss_index", np.array(vectors, np.float32))
    with world_on(postgres, template_database, folder) as running:
        to_stage(running, Stage.DUALWRITE, 0)
        yield running


@pytest.mark.parametrize(("stage", "percent"), STAGES)
def test_in_every_stage_a_users_chunks_are_reached_by_their_owner_and_by_nobody_else(
    world: World, stage: Stage, percent: int
) -> None:
    to_stage(world, stage, percent)
    attempts = list(stage_attempts(schema_of(world), stage))
    wrong = failures(world, attempts)
    print(f"{stage} {percent}: {len(attempts)} attempts, {by_kind(attempts)}")
    assert not wrong, "\n".join(wrong)
    assert service().flags.view().stage is stage, "the stage was left meanwhile"


def test_there_are_a_thousand_attempts_in_the_stages(world: World) -> None:
    schema = schema_of(world)
    made = {(stage, percent): len(list(stage_attempts(schema, stage))) for stage, percent in STAGES}
    print(f"{sum(made.values())} attempts: {made}")
    assert sum(made.values()) >= FEWEST
