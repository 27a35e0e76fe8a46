"""The quarantine: what is listed, what a file on the disk suggests, and on-call's decisions, all or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog

from rollout import quarantine
from rollout.errors import UsageError
from rollout.owners import Position, assign_owners
from rollout.quarantine import Action, Choice, DecisionsRefusedError, Group, Outcome, from_csv
from src.database import Role
from src.tools.rag_tools.chunking import split
from src.tools.rag_tools.embeddings import embed_query
from src.tools.rag_tools.migration import ledger
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import Stage, Store
from tests.support.files import numbered
from tests.support.old_release import OldRelease
from tests.support.routers import HashEmbeddings, add_users, router_on, set_stage, write_note

pytestmark = pytest.mark.migration

STORED = "SELECT docstore_id, document_id, user_id, ordinal, status, reason FROM legacy_chunks ORDER BY docstore_id"
LEDGER = (
    "SELECT document_id, store, wanted, state, next_attempt_at::text FROM vector_ledger ORDER BY document_id, store"
)


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


def everything(connection: psycopg.Connection[Any]) -> list[list[Any]]:
    versions = "SELECT version, actor, counts FROM owner_assignments ORDER BY version"
    return [connection.execute(statement).fetchall() for statement in (STORED, LEDGER, versions)]


def chunks_of(connection: psycopg.Connection[Any], document_id: int) -> list[tuple[str, int]]:
    """(docstore id, ordinal), by ordinal."""
    return connection.execute(
        "SELECT docstore_id, ordinal FROM legacy_chunks WHERE document_id = %s ORDER BY ordinal", (document_id,)
    ).fetchall()


def texts_found(router: Router, user_id: int, text: str) -> list[str]:
    return sorted(hit.content for hit in router.search(user_id, embed_query(HashEmbeddings(), text), 50))


# -- the list


def test_each_run_in_quarantine_is_a_group_with_its_reason_and_the_documents_of_that_name(
    old: OldRelease, users: list[int], bulk: psycopg.Connection[Any]
) -> None:
    ada, ben, _ = users
    first, ids = old.upload(ada, "x.pdf", ["one", "two"])
    old.upload(ada, "served.pdf", ["three"])
    second, others = old.upload(ben, "x.pdf", ["four"])
    lost = old.add_chunks("uploads/lost.pdf", ["five"])
    old.assign()
    groups = quarantine.listing(bulk)
    assert [(group.name, group.source, group.chunks, group.reason) for group in groups] == [
        (ids[0], "uploads/x.pdf", 2, "several_users"),
        (others[0], "uploads/x.pdf", 1, "several_users"),
        (lost[0], "uploads/lost.pdf", 1, "no_row"),
    ]
    told = [(one.document_id, one.user_id, one.username, one.owns_chunks) for one in groups[0].candidates]
    assert told == [(first, ada, "user0", False), (second, ben, "user1", False)]
    assert groups[2].candidates == ()


def test_runs_of_two_assignments_stay_two_groups_although_their_positions_are_the_same(
    bulk: psycopg.Connection[Any],
) -> None:
    """Saving without deleted chunks counts positions anew."""
    for names in (("a0", "a1"), ("b0", "b1")):
        chunks = [Position(at, name, "uploads/x.pdf") for at, name in enumerate(names)]
        assign_owners(bulk, chunks, actor="test", execute=True)
    assert [(group.name, group.chunks) for group in quarantine.listing(bulk)] == [("a0", 2), ("b0", 2)]


def test_the_file_on_the_disk_is_evidence_for_the_last_upload_of_its_name_only(
    old: OldRelease, users: list[int], bulk: psycopg.Connection[Any]
) -> None:
    ada, ben, _ = users
    groups = []
    rows = []
    for user, sentence in ((ada, "Of ada. "), (ben, "Of ben. ")):
        path = write_note(old.directory, "report.md", numbered(200, sentence))
        pieces = [piece.content for piece in split(path, "uploads/report.md")]
        row, ids = old.upload(user, "report.md", pieces)
        groups.append(ids[0])
        rows.append(row)
        old.add_chunks("uploads/between.pdf", ["something else"])
    old.assign()
    found = {
        (group.name, one.document_id): one.matched
        for group in quarantine.listing(bulk, uploads=old.uploads, contents=old.contents())
        for one in group.candidates
    }
    assert found == {
        (groups[0], rows[0]): None,
        (groups[0], rows[1]): 0.0,
        (groups[1], rows[0]): None,
        (groups[1], rows[1]): 1.0,
    }
    assert [one.status for one in quarantine.listing(bulk)] == ["quarantined"] * 4


def test_a_file_that_was_replaced_by_this_release_is_no_evidence(
    old: OldRelease, database: Any, users: list[int], bulk: psycopg.Connection[Any]
) -> None:
    for user in users[:2]:
        old.upload(user, "x.md", [f"of {user}"])
    old.assign()
    with database.connect() as connection:
        connection.execute(
            "INSERT INTO documents (user_id, filename, path, status) VALUES (%s, 'x.md', 'uploads/x.md', 'received')",
            (users[2],),
        )
    write_note(old.directory, "x.md", f"of {users[1]}")
    matched = {
        one.matched
        for group in quarantine.listing(bulk, uploads=old.uploads, contents=old.contents())
        for one in group.candidates
    }
    assert matched == {None}


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"], ids=["gone", "empty", "unreadable"])
def test_a_file_that_cannot_be_read_suggests_nothing_and_stops_nothing(
    content: bytes | None, old: OldRelease, users: list[int], bulk: psycopg.Connection[Any]
) -> None:
    for user in users[:2]:
        old.upload(user, "x.md", [f"of {user}"])
    old.assign()
    if content is not None:
        old.uploads.mkdir()
        (old.uploads / "x.md").write_bytes(content)
    (group,) = quarantine.listing(bulk, uploads=old.uploads, contents=old.contents())
    assert {one.matched for one in group.candidates} == {None}


def test_no_text_of_a_chunk_is_listed_or_logged(
    old: OldRelease, users: list[int], bulk: psycopg.Connection[Any]
) -> None:
    for user in users[:2]:
        old.upload(user, "x.md", ["a private sentence"])
    old.assign()
    write_note(old.directory, "x.md", "a private sentence")
    with structlog.testing.capture_logs() as logs:
        groups = quarantine.listing(bulk, uploads=old.uploads, contents=old.contents())
    assert [one.matched for one in groups[0].candidates] == [None, 1.0]
    assert "private" not in repr((groups, logs))


# -- assign


@pytest.fixture
def disputed(old: OldRelease, users: list[int], bulk: psycopg.Connection[Any]) -> tuple[int, int, list[Group]]:
    """Two users' uploads of one name, in quarantine: (ada's document, ben's document, groups)."""
    ada, ben, _ = users
    first, _ = old.upload(ada, "x.md", ["of ada: one", "of ada: two"])
    old.add_chunks("uploads/lost.md", ["of nobody known"])
    second, _ = old.upload(ben, "x.md", ["of ben: one"])
    old.assign()
    groups = quarantine.listing(bulk)
    assert [group.chunks for group in groups] == [2, 1, 1]
    return first, second, groups


def test_an_assigned_group_is_served_to_the_documents_owner_and_to_nobody_else(
    old: OldRelease, database: Any, users: list[int], bulk: psycopg.Connection[Any], disputed: Any
) -> None:
    first, _, groups = disputed
    with router_on(database, old.directory) as router:
        assert texts_found(router, users[0], "of ada: one") == []
        outcome = quarantine.assign(bulk, groups[0].name, first, actor="grace")
        router.refresh()
        assert texts_found(router, users[0], "of ada: one") == ["of ada: one", "of ada: two"]
        assert [texts_found(router, user, "of ada: one") for user in users[1:]] == [[], []]
    assert outcome == Outcome(2, 2, 0, (first,))
    assert [group.name for group in quarantine.listing(bulk)] == [group.name for group in groups[1:]]


def test_an_assignment_is_recorded_with_who_decided_what(bulk: psycopg.Connection[Any], disputed: Any) -> None:
    first, _, groups = disputed
    quarantine.assign(bulk, groups[0].name, first, actor="grace")
    *_, (actor, counts) = bulk.execute("SELECT actor, counts FROM owner_assignments ORDER BY version")
    assert actor == "grace"
    assert counts["decided"] == [{"group": groups[0].name, "action": "assign", "document_id": first}]
    reasons = bulk.execute("SELECT DISTINCT reason FROM legacy_chunks WHERE document_id = %s", (first,)).fetchall()
    assert reasons == [("by_hand",)]


def test_the_chunks_of_a_second_group_are_numbered_after_those_of_the_first_in_order_of_upload(
    bulk: psycopg.Connection[Any], disputed: Any
) -> None:
    first, _, groups = disputed
    choices = [Choice(group.name, Action.ASSIGN, first) for group in reversed(groups)]
    quarantine.apply(bulk, choices, actor="grace", execute=True)
    numbered_chunks = chunks_of(bulk, first)
    assert [ordinal for _, ordinal in numbered_chunks] == [0, 1, 2, 3]
    names = [name for name, _ in numbered_chunks]
    assert [names[0], names[2], names[3]] == [group.name for group in groups]


def test_pgvector_gets_the_new_chunks_of_a_document_that_it_had_without_them(
    old: OldRelease, database: Any, users: list[int], bulk: psycopg.Connection[Any]
) -> None:
    document, _ = old.upload(users[0], "x.md", ["first"])
    old.add_chunks("uploads/lost.md", ["second"])
    old.assign()
    set_stage(bulk, Stage.DUALWRITE)
    with router_on(database, old.directory) as router:
        router.settler.run(stores=[Store.PGVECTOR], at_once=True)
        assert [chunk.content for chunk in router.stores.pgvector.document(users[0], document)] == ["first"]
        (group,) = quarantine.listing(bulk)
        quarantine.assign(bulk, group.name, document, actor="grace")
        assert ledger.states(bulk, document) == {Store.FAISS: "done", Store.PGVECTOR: "owed"}
        assert ledger.claim(bulk, limit=10, stores=[Store.PGVECTOR]) == []
        router.refresh()
        router.settler.run(stores=[Store.PGVECTOR], at_once=True)
        held = [chunk.content for chunk in router.stores.pgvector.document(users[0], document)]
    assert held == ["first", "second"]


# -- discard


def test_a_discarded_group_is_hidden_and_nothing_of_it_is_erased(
    old: OldRelease, bulk: psycopg.Connection[Any], disputed: Any
) -> None:
    _, _, groups = disputed
    before = old.contents()
    quarantine.discard(bulk, groups[1].name, actor="grace", reason="nobody asked for a year")
    assert groups[1].name not in [group.name for group in quarantine.listing(bulk)]
    (hidden,) = (group for group in quarantine.listing(bulk, discarded=True) if group.status == "discarded")
    assert (hidden.name, hidden.reason) == (groups[1].name, "nobody asked for a year")
    assert old.contents() == before


def test_a_discarded_group_can_be_assigned_after_all(bulk: psycopg.Connection[Any], disputed: Any) -> None:
    first, _, groups = disputed
    quarantine.discard(bulk, groups[0].name, actor="grace", reason="a mistake")
    quarantine.assign(bulk, groups[0].name, first, actor="grace")
    assert [ordinal for _, ordinal in chunks_of(bulk, first)] == [0, 1]


def test_what_was_discarded_is_not_decided_again(old: OldRelease, bulk: psycopg.Connection[Any], disputed: Any) -> None:
    _, _, groups = disputed
    quarantine.discard(bulk, groups[0].name, actor="grace", reason="old")
    before = everything(bulk)
    assert old.assign().chunks == 0
    assert everything(bulk) == before


def test_a_discard_needs_a_reason(bulk: psycopg.Connection[Any], disputed: Any) -> None:
    _, _, groups = disputed
    with pytest.raises(UsageError, match="--reason"):
        quarantine.discard(bulk, groups[0].name, actor="grace", reason=" ")


# -- refusals: left alone


def refused(connection: psycopg.Connection[Any], *choices: Choice) -> str:
    """The message; nothing may have changed."""
    before = everything(connection)
    with pytest.raises(DecisionsRefusedError) as caught:
        quarantine.apply(connection, choices, actor="grace", reason="because", execute=True)
    assert everything(connection) == before
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_an_unknown_group_is_refused(bulk: psycopg.Connection[Any], disputed: Any) -> None:
    first, _, _ = disputed
    assert "group 'nonsense' does not exist" in refused(bulk, Choice("nonsense", Action.ASSIGN, first))


def test_a_chunk_inside_a_group_does_not_name_it(bulk: psycopg.Connection[Any], disputed: Any) -> None:
    first, _, groups = disputed
    ((inside,),) = bulk.execute("SELECT docstore_id FROM legacy_chunks WHERE ordinal = 1")
    assert inside != groups[0].name
    assert "is a chunk inside a group" in refused(bulk, Choice(inside, Action.ASSIGN, first))


def test_a_group_that_is_assigned_stays_where_it_is(bulk: psycopg.Connection[Any], disputed: Any) -> None:
    first, second, groups = disputed
    quarantine.assign(bulk, groups[0].name, first, actor="grace")
    assert "is assigned already" in refused(bulk, Choice(groups[0].name, Action.ASSIGN, second))
    assert "is assigned already" in refused(bulk, Choice(groups[0].name, Action.DISCARD))


def test_a_group_is_not_discarded_twice(bulk: psycopg.Connection[Any], disputed: Any) -> None:
    _, _, groups = disputed
    quarantine.discard(bulk, groups[0].name, actor="grace", reason="old")
    assert "is discarded already" in refused(bulk, Choice(groups[0].name, Action.DISCARD))


@pytest.mark.parametrize("document", [None, 999_999, 10**15])
def test_a_document_that_does_not_exist_is_refused(
    document: int | None, bulk: psycopg.Connection[Any], disputed: Any
) -> None:
    _, _, groups = disputed
    assert f"document {document} does not exist" in refused(bulk, Choice(groups[0].name, Action.ASSIGN, document))


def test_a_deleted_document_gets_nothing(
    old: OldRelease, database: Any, users: list[int], bulk: psycopg.Connection[Any], disputed: Any
) -> None:
    first, _, groups = disputed
    with router_on(database, old.directory) as router:
        router.delete(users[0], first)
    assert f"document {first} is deleted" in refused(bulk, Choice(groups[0].name, Action.ASSIGN, first))


def test_a_document_of_this_release_is_whole_and_gets_nothing(
    old: OldRelease, database: Any, users: list[int], bulk: psycopg.Connection[Any], disputed: Any
) -> None:
    _, _, groups = disputed
    with router_on(database, old.directory) as router:
        new = router.receive(users[0], write_note(old.directory, "new.md", "of ada, new"), "new.md")
        waiting = refused(bulk, Choice(groups[0].name, Action.ASSIGN, new))
        router.index(new)
    assert f"document {new} is received" in waiting
    assert "was uploaded to this release" in refused(bulk, Choice(groups[0].name, Action.ASSIGN, new))


def test_a_group_that_is_decided_twice_is_refused(bulk: psycopg.Connection[Any], disputed: Any) -> None:
    first, second, groups = disputed
    choices = [Choice(groups[0].name, Action.ASSIGN, document) for document in (first, second)]
    assert "is decided more than once" in refused(bulk, *choices)


def test_one_bad_decision_stops_all_and_every_bad_one_is_named(
    tmp_path: Path, bulk: psycopg.Connection[Any], disputed: Any
) -> None:
    first, _, groups = disputed
    path = tmp_path / "decisions.csv"
    lines = [f"{groups[0].name},assign,{first}", f"{groups[1].name},assign,999", "nonsense,discard,"]
    path.write_text("\n".join(["group,action,document_id", *lines]))
    message = refused(bulk, *from_csv(path))
    assert "line 3: document 999 does not exist" in message
    assert "line 4: group 'nonsense' does not exist" in message
    assert "line 2" not in message


# -- together


def test_a_file_of_decisions_is_one_version(tmp_path: Path, bulk: psycopg.Connection[Any], disputed: Any) -> None:
    first, second, groups = disputed
    path = tmp_path / "decisions.csv"
    lines = [f"{groups[0].name},assign,{first}", f"{groups[1].name},discard,", f"{groups[2].name},assign,{second}"]
    path.write_text("\n".join(["group,action,document_id", *lines]))
    outcome = quarantine.apply(bulk, from_csv(path), actor="grace", reason="old", execute=True)
    assert outcome == Outcome(2, 3, 1, (first, second))
    assert quarantine.listing(bulk) == []


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(bulk: psycopg.Connection[Any], disputed: Any) -> None:
    first, _, groups = disputed
    before = everything(bulk)
    choices = [Choice(groups[0].name, Action.ASSIGN, first), Choice(groups[1].name, Action.DISCARD)]
    outcome = quarantine.apply(bulk, choices, actor="grace", reason="old", execute=False)
    assert outcome == Outcome(None, 2, 1, (first,))
    assert everything(bulk) == before


def test_no_decisions_are_no_version(bulk: psycopg.Connection[Any], disputed: Any) -> None:
    before = everything(bulk)
    assert quarantine.apply(bulk, [], actor="grace", execute=True) == Outcome(None, 0, 0, ())
    assert everything(bulk) == before
