"""Owners decided and stored: on LangChain's own files, a real PostgreSQL, and what the backend then serves."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.errors import LockNotAvailable

from alembic import command
from rollout import owners
from rollout import status as look
from rollout.errors import PreconditionError
from rollout.import_sql import import_sql
from rollout.installation import PLANS, Fate, Installation, Plan, make_installation
from rollout.owners import assign_owners, preview_directory, rows_left_behind
from rollout.schema import alembic_config
from src.database import Role
from src.tools.rag_tools.embeddings import embed_query
from src.tools.rag_tools.migration import ledger
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import Store
from tests.support.control import control_on
from tests.support.old_release import OldRelease
from tests.support.routers import HashEmbeddings, add_users, router_on, write_note

pytestmark = pytest.mark.migration

LEGACY_HEAD = "4f95b897a5b8"


@pytest.fixture
def old(database: Any, tmp_path: Path) -> OldRelease:
    return OldRelease(tmp_path, database)


@pytest.fixture
def users(database: Any) -> list[int]:
    return add_users(database, 3)


@pytest.fixture
def bulk(database: Any) -> Iterator[psycopg.Connection[Any]]:
    with database.connect(Role.ROLLOUT, autocommit=True) as connection:
        yield connection


def stored(database: Any) -> dict[str, tuple[int | None, int | None, int, str, str]]:
    """(document, user, ordinal, status, reason) by docstore id."""
    with database.connect() as connection:
        rows = connection.execute(
            "SELECT docstore_id, document_id, user_id, ordinal, status, reason FROM legacy_chunks"
        )
        return {name: tuple(rest) for name, *rest in rows}


def owed(database: Any) -> dict[tuple[int, str], tuple[int, str, str, bool]]:
    """(user, wanted, state, waits for backfill) by document and store."""
    with database.connect() as connection:
        rows = connection.execute(
            "SELECT document_id, store, user_id, wanted, state, next_attempt_at = 'infinity' FROM vector_ledger"
        )
        return {(document, store): tuple(rest) for document, store, *rest in rows}


def versions(database: Any) -> list[tuple[int, str, dict[str, Any]]]:
    with database.connect() as connection:
        return list(connection.execute("SELECT version, actor, counts FROM owner_assignments ORDER BY version"))


def texts_found(router: Router, user_id: int, text: str) -> list[str]:
    hits = router.search(user_id, embed_query(HashEmbeddings(), text), 50)
    return sorted(hit.content for hit in hits)


# -- one run


def test_what_is_decided_is_stored_with_what_the_ledger_owes(old: OldRelease, database: Any, users: list[int]) -> None:
    ada, ben, _ = users
    first, ids = old.upload(ada, "x.pdf", ["one", "two"])
    second, others = old.upload(ben, "y.pdf", ["three"])
    lost = old.add_chunks("uploads/lost.pdf", ["four"])
    report = old.assign()
    assert stored(database) == {
        ids[0]: (first, ada, 0, "assigned", "path"),
        ids[1]: (first, ada, 1, "assigned", "path"),
        others[0]: (second, ben, 0, "assigned", "path"),
        lost[0]: (None, None, 0, "quarantined", "no_row"),
    }
    assert owed(database) == {
        (document, store): (user, "present", state, waits)
        for document, user in ((first, ada), (second, ben))
        for store, state, waits in (("faiss", "done", False), ("pgvector", "owed", True))
    }
    ((version, actor, kept),) = versions(database)
    assert (version, actor) == (report.version, "test")
    assert (kept["assigned"], kept["quarantined"]) == (3, 1)


def test_a_dry_run_tells_the_same_and_changes_nothing(old: OldRelease, database: Any, users: list[int]) -> None:
    old.upload(users[0], "x.pdf", ["one", "two"])
    old.add_chunks("uploads/lost.pdf", ["three"])
    dry = old.assign(execute=False)
    assert (stored(database), owed(database), versions(database)) == ({}, {}, [])
    told, done = dry.as_dict(), old.assign().as_dict()
    changed = {key for key in told if told[key] != done[key]}
    assert changed == {"executed", "version"}


def test_the_backend_serves_a_chunk_to_its_owner_and_one_without_owner_to_nobody(
    old: OldRelease, database: Any, users: list[int]
) -> None:
    ada, ben, cleo = users
    old.upload(ada, "x.pdf", ["of ada"])
    old.upload(ben, "y.pdf", ["of ben"])
    for user in (ada, ben):
        old.upload(user, "shared.pdf", [f"shared by {user}"])
    old.add_chunks("uploads/lost.pdf", ["of nobody known"])
    with router_on(database, old.directory) as router:
        assert [texts_found(router, user, "of ada") for user in users] == [[], [], []]
        old_version = router.flags.view().owners_version
        old.assign()
        router.refresh()
        assert router.flags.view().owners_version > old_version
        assert texts_found(router, ada, "of ada") == ["of ada"]
        assert texts_found(router, ben, "of ada") == ["of ben"]
        assert texts_found(router, cleo, "shared by") == []


def test_the_background_loop_leaves_the_backlog_to_backfill(
    old: OldRelease, database: Any, users: list[int], bulk: psycopg.Connection[Any]
) -> None:
    document, _ = old.upload(users[0], "x.pdf", ["one"])
    old.assign()
    assert ledger.claim(bulk, limit=10, stores=[Store.PGVECTOR]) == []
    (entry,) = ledger.claim(bulk, limit=10, stores=[Store.PGVECTOR], at_once=True)
    assert entry.document_id == document


def test_a_file_that_is_gone_is_told_and_is_no_reason_to_lose_chunks(old: OldRelease, users: list[int]) -> None:
    old.upload(users[0], "x.md", ["one"])
    gone, _ = old.upload(users[0], "y.md", ["two"])
    write_note(old.directory, "x.md", "one")
    report = old.assign(uploads=old.uploads)
    assert [line.document_id for line in report.documents_without_file] == [gone]
    assert report.assigned == 2


# -- again, and after the old release came back


def test_a_second_run_changes_nothing(old: OldRelease, database: Any, users: list[int]) -> None:
    old.upload(users[0], "x.pdf", ["one"])
    old.add_chunks("uploads/lost.pdf", ["two"])
    old.assign()
    before = stored(database), owed(database), versions(database)
    report = old.assign()
    assert (report.version, report.chunks) == (None, 0)
    assert report.decided_before == {"assigned": 1, "quarantined": 1}
    assert (stored(database), owed(database), versions(database)) == before


def test_a_decision_stands_although_a_row_turns_up_later(old: OldRelease, database: Any, users: list[int]) -> None:
    (lost,) = old.add_chunks("uploads/lost.pdf", ["one"])
    old.assign()
    old.add_row(users[0], "lost.pdf")
    old.assign()
    assert stored(database)[lost][3:] == ("quarantined", "no_row")


def test_only_what_the_old_release_wrote_since_is_decided(old: OldRelease, database: Any, users: list[int]) -> None:
    ada = users[0]
    first, ids = old.upload(ada, "x.pdf", ["one", "two"])
    old.assign()
    before = stored(database)
    second, added = old.upload(ada, "x.pdf", ["three"])
    report = old.assign()
    after = stored(database)
    assert report.assigned == 1
    assert {name: after[name] for name in ids} == before
    assert first != second
    assert after[added[0]] == (second, ada, 0, "assigned", "path")


def test_the_status_counts_what_the_old_release_wrote_since_until_it_is_decided(
    old: OldRelease, configured_database: Any, users: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with control_on(tmp_path, monkeypatch) as made:
        assert look.status(made)["undecided"] == 0
        old.upload(users[0], "x.pdf", ["one", "two"])
        assert look.status(made)["undecided"] == 2
        old.assign()
        assert look.status(made)["undecided"] == 0
        with router_on(configured_database, tmp_path) as router:
            path = write_note(tmp_path, "a.md", "This release wrote it.")
            router.index(router.receive(users[0], path, path.name))
            router.stores.faiss.save()
        assert look.status(made)["undecided"] == 0
        old.upload(users[0], "y.pdf", ["three"])
        assert look.status(made)["undecided"] == 1


def test_the_status_is_told_although_the_faiss_directory_cannot_be_read(
    configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faiss_index").mkdir()
    (tmp_path / "faiss_index" / "index.pkl").write_bytes(b"cut short")
    with control_on(tmp_path, monkeypatch) as made:
        found = look.status(made)
    assert "index.pkl" in found["undecided"]
    assert (found["stage"], found["owed"]) == ("off", [])


def test_an_upload_again_without_a_row_of_its_own_is_quarantined(
    old: OldRelease, database: Any, users: list[int]
) -> None:
    old.upload(users[0], "x.pdf", ["one"])
    old.assign()
    (added,) = old.add_chunks("uploads/x.pdf", ["two"])
    old.assign()
    assert stored(database)[added][3:] == ("quarantined", "more_runs_than_rows")


# -- uploads to this release, and deletions


def test_an_upload_to_this_release_is_no_row_of_the_old_one(old: OldRelease, database: Any, users: list[int]) -> None:
    ada, ben, _ = users
    old.index.mkdir()
    with router_on(database, old.directory) as router:
        new = router.receive(ben, write_note(old.directory, "note.md", "of ben, uploaded now"), "note.md")
        router.index(new)
        router.stores.faiss.save()
    with old.opened() as store:
        assert list(store.base_positions()) == []
    mine, ids = old.upload(ada, "note.md", ["of ada, uploaded long ago"])
    report = old.assign()
    assert stored(database) == {ids[0]: (mine, ada, 0, "assigned", "path")}
    assert new not in [line.document_id for line in report.documents_without_chunks]


def test_a_document_whose_deletion_has_begun_gets_no_chunk_back(
    old: OldRelease, database: Any, users: list[int]
) -> None:
    document, (chunk,) = old.upload(users[0], "x.pdf", ["one"])
    with database.connect() as connection:
        connection.execute("UPDATE documents SET status = 'deleted', filename = '' WHERE id = %s", (document,))
        ledger.withdraw(connection, document, users[0])
    report = old.assign()
    assert stored(database) == {chunk: (None, None, 0, "discarded", "deleted")}
    assert {wanted for _, wanted, _, _ in owed(database).values()} == {"absent"}
    assert report.discarded == 1


def test_a_document_deleted_for_good_leaves_its_chunks_in_quarantine(
    old: OldRelease, database: Any, users: list[int]
) -> None:
    document, (chunk,) = old.upload(users[0], "x.pdf", ["one"])
    with router_on(database, old.directory) as router:
        router.delete(users[0], document)
    old.assign()
    assert stored(database) == {chunk: (None, None, 0, "quarantined", "no_row")}


def test_a_deletion_waits_until_the_decision_is_stored(
    old: OldRelease, database: Any, users: list[int], bulk: psycopg.Connection[Any]
) -> None:
    document, _ = old.upload(users[0], "x.pdf", ["one"])
    delete = "UPDATE documents SET status = 'deleted' WHERE id = %s"
    with database.connect(Role.APP, autocommit=True) as backend:
        backend.execute("SET lock_timeout = '50ms'")
        with bulk.transaction():
            assign_owners(bulk, old.positions(), actor="test", execute=True)
            with pytest.raises(LockNotAvailable):
                backend.execute(delete, (document,))
        backend.execute(delete, (document,))


# -- two at once, and a crash


def test_the_second_of_two_runs_at_once_is_told_to_wait(
    old: OldRelease, database: Any, users: list[int], bulk: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    old.upload(users[0], "x.pdf", ["one"])
    monkeypatch.setattr(owners, "LOCK_TIMEOUT", "50ms")
    with bulk.transaction():
        assign_owners(bulk, old.positions(), actor="first", execute=True)
        with pytest.raises(PreconditionError, match="another command decides about owners"):
            old.assign()
    assert [actor for _, actor, _ in versions(database)] == ["first"]


def test_the_backend_reads_the_owners_while_a_run_holds_the_lock(
    old: OldRelease, database: Any, users: list[int], bulk: psycopg.Connection[Any]
) -> None:
    old.upload(users[0], "x.pdf", ["one"])
    with router_on(database, old.directory) as router, bulk.transaction():
        assign_owners(bulk, old.positions(), actor="test", execute=True)
        assert router.refresh().owners_version == 0


def test_a_run_that_loses_its_connection_leaves_nothing(
    old: OldRelease, database: Any, users: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    old.upload(users[0], "x.pdf", ["one"])

    def killed(connection: Any, *_: object) -> int:
        with psycopg.connect(database.superuser_conninfo(), autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s, 10000)", (connection.info.backend_pid,))
        connection.execute("SELECT 1")
        return 0

    with monkeypatch.context() as patched:
        patched.setattr(owners, "record_version", killed)
        with pytest.raises(psycopg.OperationalError):
            old.assign()
    assert (stored(database), owed(database), versions(database)) == ({}, {}, [])
    assert old.assign().assigned == 1


# -- databases that are not ready


def test_a_dry_run_needs_none_of_our_tables_and_the_real_one_says_that_they_are_missing(
    old: OldRelease, database: Any, users: list[int]
) -> None:
    command.downgrade(alembic_config(database.url(Role.OWNER)), LEGACY_HEAD)
    old.upload(users[0], "x.pdf", ["one"])
    with database.connect(autocommit=True) as connection:
        positions = old.positions()
        assert assign_owners(connection, positions, actor="test", execute=False).assigned == 1
        with pytest.raises(PreconditionError, match="alembic upgrade head"):
            assign_owners(connection, positions, actor="test", execute=True)


# -- a whole installation, against the truth about it

FATES = {
    "no_row": Fate.NO_ROW,
    "missing_user": Fate.MISSING_USER,
    "several_users": Fate.SEVERAL_USERS,
    "more_runs_than_rows": Fate.MORE_RUNS_THAN_ROWS,
}
# Short texts instead of the long ones: the rules look at names and order alone.
SHORT = tuple(Plan(plan.user, plan.filename, ("glob",), plan.fate, plan.row) for plan in PLANS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return make_installation(tmp_path_factory.mktemp("made") / "installation", HashEmbeddings(), plans=SHORT)


def test_every_chunk_of_an_installation_gets_the_owner_or_the_reason_that_is_true(
    made: Installation, database: Any, bulk: psycopg.Connection[Any], tmp_path: Path
) -> None:
    copy = replace(made, directory=tmp_path / "copy")
    shutil.copytree(made.directory, copy.directory)
    import_sql(copy.database_url, database.conninfo(Role.ROLLOUT), execute=True)
    left_behind = rows_left_behind(bulk, copy.database_url)
    OldRelease(copy.directory, database).assign(left_behind=left_behind)
    decided = stored(database)
    assert {name: user for name, (_, user, *_) in decided.items() if user is not None} == made.expected
    quarantined: dict[Fate, set[str]] = {}
    for name, (*_, status, reason) in decided.items():
        if status == "quarantined":
            quarantined.setdefault(FATES[reason], set()).add(name)
    assert quarantined == made.quarantined
    rows = {upload.docstore_ids[0]: upload.document_id for upload in made.uploads if upload.fate is Fate.OWNED}
    firsts = {name: document for name, (document, _, ordinal, *_) in decided.items() if document and ordinal == 0}
    assert firsts.items() <= rows.items()


def test_a_file_of_a_user_who_is_gone_does_not_become_that_of_a_namesake(
    database: Any, tmp_path: Path, bulk: psycopg.Connection[Any]
) -> None:
    """Both sent minutes.docx, one after the other: in the index that is one run."""
    plans = [Plan("finn", "minutes.docx", ("glob",)), Plan("ada", "minutes.docx", ("fnmatch",))]
    made = make_installation(tmp_path / "installation", HashEmbeddings(), plans=plans)
    import_sql(made.database_url, database.conninfo(Role.ROLLOUT), execute=True)
    old = OldRelease(made.directory, database)
    (row,) = left_behind = rows_left_behind(bulk, made.database_url)
    assert row.id == made.uploads[0].document_id
    report = old.assign(left_behind=left_behind)
    assert [(line.reason, line.chunks) for line in report.unserved] == [("several_users", len(made.uploaded_by))]


def test_the_report_on_the_old_files_tells_what_the_real_run_will_do_and_touches_nothing(
    made: Installation,
) -> None:
    before = contents_of(made)
    report = preview_directory(made.database_url, made.index, uploads=made.directory / "uploads")
    assert contents_of(made) == before
    owners_told = {line.user_id: line.kept for line in report.users if line.kept}
    assert owners_told == {user: list(made.expected.values()).count(user) for user in made.users.values()}
    assert {line.reason: line.chunks for line in report.unserved} == {
        reason: len(made.quarantined[fate]) for reason, fate in FATES.items()
    }
    assert report.documents_without_file == ()


def contents_of(made: Installation) -> dict[str, bytes]:
    return {
        path.relative_to(made.directory).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(made.directory.rglob("*"))
        if path.is_file()
    }
