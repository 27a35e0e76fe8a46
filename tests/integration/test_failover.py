"""PostgreSQL restored to an earlier moment: writes stop, and what FAISS still has comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings

from rollout import recover
from rollout.control import Control
from rollout.profiles import PRODUCTION
from src.database import Role
from src.tools.rag_tools.migration.flags import HaltedError
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.settings import migration_settings
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.pgvector_store import open_pool
from tests.support.routers import HashEmbeddings, add_users, router_on, set_stage, write_note
from tests.support.seeds import restore

pytestmark = pytest.mark.migration


def upload(router: Router, user_id: int, directory: Path, name: str) -> int:
    document_id = router.receive(user_id, write_note(directory, name, f"text of {name}"), name)
    router.index(document_id)
    return document_id


def lose_transition(database: Any) -> None:
    with database.connect(autocommit=True) as connection:
        connection.execute("ALTER TABLE rollout_transitions DISABLE TRIGGER append_only")
        connection.execute("DELETE FROM rollout_transitions WHERE id = (SELECT max(id) FROM rollout_transitions)")
        connection.execute("ALTER TABLE rollout_transitions ENABLE TRIGGER append_only")


def recovered(database: Any, directory: Path, monkeypatch: pytest.MonkeyPatch) -> recover.Recovery:
    monkeypatch.setattr(migration_settings, "FAISS_INDEX_PATH", directory / "faiss_index")
    embeddings: Embeddings = HashEmbeddings()
    with open_pool(database.conninfo(Role.ROLLOUT), 4, name="recover") as pool:
        control = Control(pool, PRODUCTION, embeddings)
        dry = recover.recover(control, execute=False, actor="test")
        report = recover.recover(control, execute=True, actor="test")
        again = recover.recover(control, execute=True, actor="test")
        control.router.close()
    assert (dry.restored, dry.deleted) == (report.restored, report.deleted)
    assert (again.restored, again.deleted) == ([], [])
    return report


def test_a_process_that_finds_postgres_behind_the_journal_stops_writing_and_none_starts(
    database: Any, tmp_path: Path
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        kept = upload(router, owner, tmp_path, "kept.md")
        upload(router, owner, tmp_path, "lost.md")
        restore(database, kept)
        router.refresh()
        assert router.flags.halted
        assert router.status()["ready"] is False
        with pytest.raises(HaltedError, match="rollout recover"):
            upload(router, owner, tmp_path, "new.md")
        assert len(router.query(owner, "text of kept.md", 3)) > 0
        with pytest.raises(HaltedError), router_on(database, tmp_path):
            pass


def test_recovery_brings_back_lost_uploads_and_deletions_and_gives_no_id_twice(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        with database.connect(autocommit=True) as connection:
            set_stage(connection, Stage.DUALWRITE)
        router.refresh()
        first = upload(router, owner, tmp_path, "first.md")
        lost = upload(router, owner, tmp_path, "lost.md")
        lost_and_deleted = upload(router, owner, tmp_path, "gone.md")
        router.delete(owner, lost_and_deleted)
        restore(database, first)
    report = recovered(database, tmp_path, monkeypatch)
    assert (report.restored, report.deleted) == ([lost], [lost_and_deleted])
    with router_on(database, tmp_path) as router:
        assert upload(router, owner, tmp_path, "new.md") > lost_and_deleted
        router.settler.run(at_once=True)
        for store in Store:
            found = {hit.document_id for hit in router.stores.search((store,), owner, _ask(router), 9, frozenset())}
            assert lost in found
            assert lost_and_deleted not in found
        assert router.load(lost).filename == "lost.md"


def test_a_deletion_that_postgres_forgot_is_a_deletion_again(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        document_id = upload(router, owner, tmp_path, "first.md")
        router.delete(owner, document_id)
    with database.connect(autocommit=True) as connection:
        connection.execute("UPDATE documents SET status = 'ready', filename = 'first.md' WHERE id = %s", (document_id,))
        connection.execute("UPDATE vector_ledger SET wanted = 'present', state = 'done'")
    report = recovered(database, tmp_path, monkeypatch)
    assert report.deleted == [document_id]
    with router_on(database, tmp_path) as router:
        router.settler.run(at_once=True)
        assert router.load(document_id).status == "deleted"
        assert router.query(owner, "text of first.md", 3) == []


def test_a_lost_transition_halts_the_fleet_until_recovery_goes_past_it(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_users(database, 1)
    with router_on(database, tmp_path) as router:
        with database.connect(autocommit=True) as connection:
            set_stage(connection, Stage.DUALWRITE)
            seen = set_stage(connection, Stage.SHADOW)
        router.refresh()
        lose_transition(database)
        router.refresh()
        assert router.flags.halted
    assert recovered(database, tmp_path, monkeypatch).transition == seen + 1
    with router_on(database, tmp_path) as router:
        view = router.flags.view()
        assert (view.transition_id, view.stage, router.flags.halted) == (seen + 1, Stage.DUALWRITE, None)


@pytest.mark.parametrize(
    ("stage", "percent"), [(Stage.OFF, 0), (Stage.DUALWRITE, 0), (Stage.LIVE, 100), (Stage.COMPLETE, 100)]
)
def test_documents_that_go_with_their_user_are_deleted_from_both_stores(
    database: Any, tmp_path: Path, stage: Stage, percent: int
) -> None:
    """One user's row is removed and takes the documents with it; another one's documents are deleted first."""
    removed, leaving, staying = add_users(database, 3)
    with router_on(database, tmp_path) as router, database.connect(autocommit=True) as connection:
        set_stage(connection, Stage.DUALWRITE)
        router.refresh()
        for user, name in ((removed, "a.md"), (leaving, "b.md"), (staying, "c.md")):
            upload(router, user, tmp_path, name)
        set_stage(connection, stage, percent)
        router.refresh()
        connection.execute("DELETE FROM users WHERE id = %s", (removed,))
        router.delete_all(leaving)
        router.refresh()
        assert [router.query(user, "text of a.md", 3) for user in (removed, leaving)] == [[], []]
        router.settler.run(stores=list(Store), at_once=True)
        for store in Store:
            held = [
                len(router.stores.search((store,), user, _ask(router), 9, frozenset()))
                for user in (removed, leaving, staying)
            ]
            assert held == [0, 0, 1]


def _ask(router: Router) -> Any:
    import numpy as np

    return np.array(router.embeddings.embed_query("text of lost.md"), np.float32)
