"""Routers on a test's database and directory, one for each process that the test pretends to have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from langchain_core.embeddings import Embeddings

from src.database import Role
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.settings import MigrationSettings
from src.tools.rag_tools.migration.stages import Stage
from src.tools.rag_tools.pgvector_store import open_pool
from tests.support.embeddings import HashEmbeddings, NoisyEmbeddings
from tests.support.seeds import add_users, write_note

__all__ = ["HashEmbeddings", "NoisyEmbeddings", "add_users", "router_on", "set_stage", "write_note"]


@contextmanager
def router_on(
    database: Any,
    directory: Path,
    *,
    loops: bool = False,
    embeddings: Embeddings | None = None,
    connections: int = 4,
    **settings: Any,
) -> Iterator[Router]:
    """A started router; without `loops` the test decides when it polls and settles."""
    pool = open_pool(database.conninfo(Role.APP), connections, name="test")
    with pool:
        router = Router(
            pool,
            embeddings or HashEmbeddings(),
            settings=MigrationSettings(FAISS_INDEX_PATH=directory / "faiss_index", **settings),
        )
        router.start(loops=loops)
        try:
            yield router
        finally:
            router.close()


def set_stage(connection: psycopg.Connection[Any], stage: Stage, percent: int = 0) -> int:
    """The next transition, without gates."""
    return int(
        connection.execute(
            "INSERT INTO rollout_transitions"
            " (id, stage, read_percent, read_threshold, shadow_sample_rate, actor, reason)"
            " SELECT max(id) + 1, %s, %s, %s, 1, 'test', 'test' FROM rollout_transitions RETURNING id",
            (stage, percent, percent),
        ).fetchone()[0]
    )
