"""To whom a legacy chunk belongs: a table of cases, and what must hold for every installation."""

from __future__ import annotations

import posixpath
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.owner_report import Known, UserName, build, counts, render
from rollout.owner_rules import Decision, DocumentRow, Earlier, Position, RowState, Status, decide, normal

pytestmark = pytest.mark.migration

ADA, BEN = 1, 2
USERS = {ADA, BEN}


def index(*runs: tuple[str, int], start: int = 0) -> list[Position]:
    """The chunks of an index to which these (source, chunks) were added in order."""
    sources = [source for source, chunks in runs for _ in range(chunks)]
    return [Position(at, f"chunk-{at}", source) for at, source in enumerate(sources, start)]


def row(number: int, user_id: int, path: str, filename: str | None = None, **state: RowState) -> DocumentRow:
    name = posixpath.basename(path) if filename is None else filename
    return DocumentRow(number, user_id, path, name, **state)


def outcome(decisions: Sequence[Decision]) -> list[tuple[str, int | None, str]]:
    """(source, document id, reason) of each run, in order."""
    return [(one.source, one.document_id, one.reason.value) for one in decisions if one.ordinal == 0]


@dataclass(frozen=True)
class Case:
    """`runs`: source and number of chunks; `expected`: document and reason of each run."""

    name: str
    runs: list[tuple[str, int]]
    rows: list[DocumentRow]
    expected: list[tuple[int | None, str]]
    earlier: Earlier = field(default_factory=Earlier)


X = "uploads/x.pdf"
CASES = [
    Case("one upload, one row", [(X, 3)], [row(7, ADA, X)], [(7, "path")]),
    Case("a row without chunks", [(X, 1)], [row(7, ADA, X), row(8, BEN, "uploads/y.pdf")], [(7, "path")]),
    Case("the path in another spelling", [("./uploads//x.pdf", 1)], [row(7, ADA, X)], [(7, "path")]),
    Case("a path from Windows", [("uploads\\x.pdf", 1)], [row(7, ADA, X)], [(7, "path")]),
    Case("an absolute source, a unique filename", [("/srv/uploads/x.pdf", 1)], [row(7, ADA, X)], [(7, "filename")]),
    Case(
        "a filename that stands for two files of one user",
        [("/srv/x.pdf", 1)],
        [row(7, ADA, "a/x.pdf"), row(8, ADA, "b/x.pdf")],
        [(None, "filename_not_unique")],
    ),
    Case(
        "a filename that two users have",
        [("/srv/x.pdf", 1)],
        [row(7, ADA, "a/x.pdf"), row(8, BEN, "b/x.pdf")],
        [(None, "several_users")],
    ),
    Case(
        "a filename that is another row's path",
        [("/srv/x.pdf", 1)],
        [row(7, ADA, X), row(8, BEN, "b/x.pdf", "budget.pdf")],
        [(None, "several_users")],
    ),
    Case(
        "the path goes before the filename",
        [("a/x.pdf", 1)],
        [row(7, ADA, "a/x.pdf"), row(8, BEN, "b/x.pdf")],
        [(7, "path")],
    ),
    Case(
        "by path and by filename they compete for one row",
        [(X, 1), ("/srv/uploads/x.pdf", 1)],
        [row(7, ADA, X)],
        [(None, "more_runs_than_rows")] * 2,
    ),
    Case(
        "one user's uploads of one name, in order",
        [(X, 2), ("uploads/y.pdf", 1), (X, 1)],
        [row(7, ADA, X), row(8, ADA, "uploads/y.pdf"), row(9, ADA, X)],
        [(7, "path"), (8, "path"), (9, "path")],
    ),
    Case(
        "twice in succession is one run, and the first row's",
        [(X, 5)],
        [row(7, ADA, X), row(9, ADA, X)],
        [(7, "path")],
    ),
    Case("two users, one name", [(X, 1)], [row(7, ADA, X), row(8, BEN, X)], [(None, "several_users")]),
    Case(
        "an upload more than there are rows",
        [(X, 1), ("uploads/y.pdf", 1), (X, 1)],
        [row(7, ADA, X), row(8, BEN, "uploads/y.pdf")],
        [(None, "more_runs_than_rows"), (8, "path"), (None, "more_runs_than_rows")],
    ),
    Case("no row", [(X, 1)], [row(8, BEN, "uploads/y.pdf")], [(None, "no_row")]),
    Case("a user who is gone", [(X, 1)], [row(7, 99, X)], [(None, "missing_user")]),
    Case("a user who is gone and one who is not", [(X, 1)], [row(7, 99, X), row(8, ADA, X)], [(None, "several_users")]),
    Case("no source", [("", 2)], [row(7, ADA, "")], [(None, "no_source")]),
    Case(
        "a row without a path",
        [("uploads/x.pdf", 1)],
        [row(7, ADA, "", "x.pdf")],
        [(7, "filename")],
    ),
    Case("deleted, its path not emptied yet", [(X, 1)], [row(7, ADA, X, state=RowState.DELETED)], [(None, "deleted")]),
    Case(
        "one of two uploads is deleted",
        [(X, 1), ("uploads/y.pdf", 1), (X, 1)],
        [row(7, ADA, X, state=RowState.DELETED), row(9, ADA, X)],
        [(None, "deleted"), (None, "no_row"), (9, "path")],
    ),
    Case(
        "a row that was left behind keeps its name from others",
        [(X, 1)],
        [row(7, 99, X, state=RowState.LEFT_BEHIND), row(8, ADA, X)],
        [(None, "several_users")],
    ),
    Case(
        "a row that was left behind owns nothing",
        [(X, 1)],
        [row(7, ADA, X, state=RowState.LEFT_BEHIND)],
        [(None, "row_not_moved")],
    ),
    Case(
        "an upload again: the row of the first is taken",
        [(X, 1)],
        [row(7, ADA, X), row(9, ADA, X)],
        [(9, "path")],
        Earlier(used=frozenset({7})),
    ),
    Case(
        "an upload again without a row",
        [(X, 1)],
        [row(7, ADA, X)],
        [(None, "more_runs_than_rows")],
        Earlier(used=frozenset({7})),
    ),
    Case(
        "an upload of another user after the first is decided",
        [(X, 1)],
        [row(7, ADA, X), row(9, BEN, X)],
        [(None, "several_users")],
        Earlier(used=frozenset({7})),
    ),
    Case(
        "what is in quarantine still competes for the rows",
        [(X, 1)],
        [row(7, ADA, X)],
        [(None, "more_runs_than_rows")],
        Earlier(waiting={"./uploads/x.pdf": 1}),
    ),
    Case(
        "what is in quarantine came first",
        [(X, 1)],
        [row(7, ADA, X), row(9, ADA, X)],
        [(9, "path")],
        Earlier(waiting={X: 1}),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_run_gets_the_row_or_the_reason_that_the_rules_give(case: Case) -> None:
    decisions = decide(index(*case.runs), case.rows, USERS, case.earlier)
    assert [(document, reason) for _, document, reason in outcome(decisions)] == case.expected


def test_ordinals_count_from_0_in_each_document_and_in_each_run_that_got_none() -> None:
    decisions = decide(index((X, 3), ("uploads/lost.pdf", 2)), [row(7, ADA, X)], USERS)
    assert [one.ordinal for one in decisions] == [0, 1, 2, 0, 1]


def test_a_gap_between_positions_ends_a_run() -> None:
    chunks = [*index((X, 2)), *index((X, 2), start=5)]
    decisions = decide(chunks, [row(7, ADA, X), row(8, ADA, X)], USERS)
    assert [one.document_id for one in decisions] == [7, 7, 8, 8]


@pytest.mark.parametrize("path", ["", " ", "\0", "."])
def test_a_path_that_names_nothing_is_nobodys(path: str) -> None:
    (decision,) = decide([Position(0, "a", path)], [row(7, ADA, X)], USERS)
    assert decision.status is Status.QUARANTINED


# -- what must hold for every installation

names = st.sampled_from(["x.pdf", "y.pdf", "z.docx"])
sources = st.builds("{}{}".format, st.sampled_from(["uploads/", "./uploads/", "/srv/uploads/", "uploads\\", ""]), names)
user_ids = st.integers(1, 4)
states = st.sampled_from([RowState.LIVE] * 4 + [RowState.DELETED, RowState.LEFT_BEHIND])
row_lists = st.lists(
    st.builds(
        DocumentRow,
        st.just(0),
        user_ids,
        st.builds("{}{}".format, st.sampled_from(["uploads/", "other/"]), names),
        names,
        states,
    ),
    max_size=8,
).map(lambda rows: [replace(one, id=number) for number, one in enumerate(rows, 1)])
indexes = st.lists(st.tuples(st.one_of(sources, st.just("")), st.integers(1, 3)), max_size=8).map(
    lambda runs: index(*runs)
)


@given(indexes, row_lists, st.sets(user_ids))
def test_every_chunk_is_decided_exactly_once(chunks: list[Position], rows: list[DocumentRow], users: set[int]) -> None:
    decisions = decide(chunks, rows, users)
    assert [(one.position, one.docstore_id, one.source) for one in decisions] == [
        (one.position, one.docstore_id, one.source) for one in chunks
    ]
    for one in decisions:
        assigned = one.status is Status.ASSIGNED
        assert assigned == (one.document_id is not None) == (one.user_id is not None)


@given(indexes, row_lists, st.sets(user_ids))
def test_nothing_is_ever_assigned_to_a_user_without_a_row_of_that_path_or_filename(
    chunks: list[Position], rows: list[DocumentRow], users: set[int]
) -> None:
    by_id = {one.id: one for one in rows}
    for one in decide(chunks, rows, users):
        if one.document_id is None:
            continue
        given_to = by_id[one.document_id]
        assert given_to.user_id == one.user_id
        assert one.user_id in users
        assert given_to.state is RowState.LIVE
        name = posixpath.basename(normal(one.source))
        own = [each for each in rows if each.user_id == one.user_id]
        assert any(normal(one.source) == normal(each.path) for each in own) or any(
            name in (each.filename, posixpath.basename(each.path)) for each in own
        )


@given(indexes, row_lists, st.sets(user_ids))
def test_nothing_is_ever_assigned_where_the_path_is_several_users(
    chunks: list[Position], rows: list[DocumentRow], users: set[int]
) -> None:
    owners: dict[str, set[int]] = {}
    for one in rows:
        owners.setdefault(normal(one.path), set()).add(one.user_id)
    shared = {path for path, several in owners.items() if len(several) > 1}
    assigned = {normal(one.source) for one in decide(chunks, rows, users) if one.user_id is not None}
    assert not assigned & shared


@given(indexes, row_lists, st.sets(user_ids))
def test_a_row_owns_at_most_one_run(chunks: list[Position], rows: list[DocumentRow], users: set[int]) -> None:
    firsts = [
        one.document_id for one in decide(chunks, rows, users) if one.document_id is not None and one.ordinal == 0
    ]
    assert len(firsts) == len(set(firsts))


@given(indexes, row_lists, st.sets(user_ids), st.randoms(use_true_random=False))
def test_the_order_in_which_chunks_and_rows_are_given_does_not_matter(
    chunks: list[Position], rows: list[DocumentRow], users: set[int], chance: random.Random
) -> None:
    expected = decide(chunks, rows, users)
    chance.shuffle(chunks)
    chance.shuffle(rows)
    assert decide(chunks, rows, users) == expected


@given(indexes, row_lists, st.sets(user_ids), st.integers(0, 24))
def test_deciding_in_two_steps_gives_nobody_what_deciding_at_once_gives_to_another(
    chunks: list[Position], rows: list[DocumentRow], users: set[int], at: int
) -> None:
    at_once = {one.docstore_id: one for one in decide(chunks, rows, users)}
    first = decide(chunks[:at], rows, users)
    second = decide(chunks[at:], rows, users, remembered(first))
    for one in (*first, *second):
        other = at_once[one.docstore_id]
        assert one.user_id is None or other.user_id in (None, one.user_id)
    taken = {one.document_id for one in first} - {None}
    assert not taken & {one.document_id for one in second}


def remembered(decisions: Sequence[Decision]) -> Earlier:
    """What a later run finds of these in the database."""
    waiting: dict[str, int] = {}
    for one in decisions:
        if one.status is Status.QUARANTINED and one.ordinal == 0:
            waiting[one.source] = waiting.get(one.source, 0) + 1
    return Earlier(frozenset(one.document_id for one in decisions if one.document_id is not None), waiting)


# -- the report

PEOPLE = {ADA: UserName("ada@example.org", "ada"), BEN: UserName("ben@example.org", "ben")}


def reported(runs: list[tuple[str, int]], rows: list[DocumentRow]) -> tuple[Known, list[Decision]]:
    known = Known(rows, PEOPLE)
    return known, decide(index(*runs), rows, PEOPLE)


def test_a_user_loses_what_is_in_quarantine_under_a_name_of_theirs() -> None:
    rows = [row(7, ADA, X), row(8, BEN, X), row(9, ADA, "uploads/y.pdf"), row(10, 99, "uploads/z.pdf")]
    known, decisions = reported([(X, 4), ("uploads/y.pdf", 2), ("uploads/z.pdf", 1)], rows)
    report = build(decisions, known, uploads=None)
    lines = [(line.username, line.kept, line.lost) for line in report.users]
    assert lines == [("ada", 2, 4), ("ben", 0, 4), (None, 0, 1)]
    assert (report.assigned, report.quarantined, report.discarded, report.chunks) == (2, 5, 0, 7)


def test_the_report_names_each_reason_with_its_sources_largest_first() -> None:
    known, decisions = reported([("a.pdf", 1), ("b.pdf", 3), ("a.pdf", 1)], [])
    (line,) = build(decisions, known, uploads=None).unserved
    assert (line.reason, line.runs, line.chunks) == ("no_row", 3, 5)
    assert [(one.source, one.runs, one.chunks) for one in line.sources] == [("b.pdf", 1, 3), ("a.pdf", 2, 2)]


def test_rows_without_chunks_are_named_but_not_those_whose_chunks_are_in_quarantine() -> None:
    rows = [row(7, ADA, X), row(8, BEN, X), row(9, ADA, "uploads/never-indexed.pdf")]
    known, decisions = reported([(X, 1)], rows)
    report = build(decisions, known, uploads=None)
    assert [line.document_id for line in report.documents_without_chunks] == [9]


def test_a_file_that_is_gone_is_reported_and_keeps_nobody_from_their_chunks(tmp_path: Path) -> None:
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    rows = [row(7, ADA, X), row(8, ADA, "uploads/gone.pdf")]
    known, decisions = reported([(X, 1), ("uploads/gone.pdf", 1)], rows)
    report = build(decisions, known, uploads=tmp_path)
    assert [line.path for line in report.documents_without_file] == ["uploads/gone.pdf"]
    assert report.assigned == 2


def test_the_text_says_who_keeps_what_and_that_nothing_was_changed() -> None:
    known, decisions = reported([(X, 2), ("uploads/lost.pdf", 1)], [row(7, ADA, X)])
    text = render(build(decisions, known, uploads=None))
    assert "3 chunks decided: 2 assigned, 1 quarantined, 0 discarded" in text
    assert "served to nobody, no_row: 1 chunks in 1 runs" in text
    assert "dry run: nothing changed" in text
    (line,) = (line for line in text.splitlines() if "ada@example.org" in line)
    assert line.split() == ["1", "ada", "ada@example.org", "2", "0"]


def test_the_text_shows_the_first_lines_of_a_long_list_and_how_many_are_left() -> None:
    known, decisions = reported([(f"{number}.pdf", 1) for number in range(30)], [])
    text = render(build(decisions, known, uploads=None), shown=20)
    assert "... and 10 more" in text


def test_a_filename_cannot_steer_the_terminal() -> None:
    known, decisions = reported([("uploads/\x1b[2Jx.pdf\n", 1)], [])
    text = render(build(decisions, known, uploads=None))
    assert "\x1b" not in text
    assert "\\x1b[2Jx.pdf\\n" in text


def test_the_json_form_has_no_objects_of_ours() -> None:
    known, decisions = reported([(X, 1), ("no.pdf", 1)], [row(7, ADA, X)])
    told = build(decisions, known, uploads=None).as_dict()
    assert told["chunks"] == 2
    assert told["users"][0] == {"user_id": 1, "email": "ada@example.org", "username": "ada", "kept": 1, "lost": 0}
    assert told["unserved"][0]["sources"] == ({"source": "no.pdf", "runs": 1, "chunks": 1},)


def test_the_short_counts_add_up() -> None:
    _, decisions = reported([(X, 2), ("no.pdf", 1)], [row(7, ADA, X)])
    assert counts(decisions) == {
        "assigned": 2,
        "quarantined": 1,
        "discarded": 0,
        "reasons": {"path": 2, "no_row": 1},
    }
