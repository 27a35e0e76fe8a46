"""kill -9 of PostgreSQL's own process, in a write and in the backfill, and again after it was started again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from src import embedded
from src.database import Role, url_of
from src.embedded import EmbeddedServer
from src.tools.rag_tools.migration.stages import Stage
from tests.acceptance.faults.site import Site
from tests.acceptance.faults.tally import Tally
from tests.acceptance.faults.victim import Accident
from tests.acceptance.faults.victims import Victims
from tests.support.database import Database

pytestmark = pytest.mark.migration

IN_A_WRITE = ["upload.intent", "journal.commit", "pgvector.present", "ledger.mark", "upload.ready"]
IN_A_BACKFILL = ["backfill.lock", "backfill.copy", "backfill.batch"]
TIMES = 2


@pytest.fixture
def server(server_folder: Path) -> Iterator[EmbeddedServer]:
    """One that may be killed."""
    from alembic.config import Config

    from alembic import command
    from tests.conftest import ROOT

    made = embedded.start(server_folder / "server")
    made.create_database("attacked")
    config = Config(ROOT / "alembic.ini")
    config.attributes["url"] = url_of(made.conninfo(Role.OWNER, "attacked"))
    command.upgrade(config, "head")
    yield made
    embedded.leave(server_folder / "server")


@pytest.fixture
def doomed(server: EmbeddedServer, victims: Victims, tmp_path: Path) -> Site:
    return Site(Database(server, "attacked"), victims, tmp_path / "uploads", tmp_path / "faiss_index")


def test_postgres_killed_in_a_write_or_a_backfill_loses_nothing(
    doomed: Site, server: EmbeddedServer, record_property: Callable[[str, object], None]
) -> None:
    tally = Tally("kill -9 of PostgreSQL")
    for _ in range(TIMES):
        doomed.go_to(Stage.DUALWRITE)
        for point in IN_A_WRITE:
            for before in (True, False):
                accident = Accident(point, before=before, what="kill other", pid=server.pid)
                ended = doomed.upload(accident)[1]
                assert "killed it" in ended.lines
                assert ended.acknowledged is not None or (ended.error or "").startswith("error StoreError"), ended
                tally.add(f"upload: {point}", within=ended.acknowledged is None)
                embedded.start(server.home)
        doomed.settled_and_whole()
        doomed.go_to(Stage.OFF)
        with doomed.router() as router:
            for _ in range(9):
                doomed.uploaded(router)
        doomed.go_to(Stage.DUALWRITE)
        for point in IN_A_BACKFILL:
            request = doomed.request("backfill", bulk=doomed.database.conninfo(Role.ROLLOUT))
            ended = doomed.victims.run(request, Accident(point, what="kill other", pid=server.pid))
            assert "killed it" in ended.lines
            assert (ended.error or "").startswith("error "), ended
            tally.add(f"backfill: {point}", within=True)
            embedded.start(server.home)
        doomed.settled_and_whole()
    tally.record(record_property)
