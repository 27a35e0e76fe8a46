"""A made installation is one that the old release could have left, and its truth is the truth."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from rollout.installation import (
    PLANS,
    USERS,
    Fate,
    FolderInUseError,
    Installation,
    Plan,
    legacy_add,
    legacy_chunks,
    make_installation,
)
from rollout.installation_files import (
    FileTypeError,
    WriterMissingError,
    reference_text,
    write_file,
)
from rollout.installation_rows import LEGACY_HEAD
from src.models import Conversation, Message, User, UserFact

pytestmark = [
    pytest.mark.migration,
    # The old release's emulation needs the old package, whose import announces its end.
    pytest.mark.filterwarnings("ignore:.langchain-community. is being sunset:DeprecationWarning"),
]

TABLES = {
    "alembic_version",
    "conversation_memories",
    "conversations",
    "documents",
    "messages",
    "oauth_accounts",
    "passkeys",
    "password_reset_tokens",
    "pending_actions",
    "trace_steps",
    "traces",
    "user_facts",
    "users",
}
FEW = (
    Plan("ada", "heaps.docx", ("heapq",)),
    Plan("ben", "glob.pdf", ("glob",)),
    Plan("ben", "glob.pdf", ("fnmatch",)),
)


class HashedEmbeddings(Embeddings):
    """Unit vectors that only the text decides; near texts are not near."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        digest = hashlib.sha256(text.encode()).digest()
        vector = np.random.default_rng(int.from_bytes(digest)).normal(size=1536)
        return [float(value) for value in vector / np.linalg.norm(vector)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return make_installation(tmp_path_factory.mktemp("made"), HashedEmbeddings())


@pytest.fixture
def rows(made: Installation) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(made.directory / "victus.db")) as connection:
        yield connection


def opened(directory: Path) -> Any:
    from langchain_community.vectorstores import FAISS

    return FAISS.load_local(str(directory / "faiss_index"), HashedEmbeddings(), allow_dangerous_deserialization=True)


def in_order(store: Any) -> list[tuple[str, Document]]:
    """Docstore id and chunk of each position."""
    names = [store.index_to_docstore_id[at] for at in range(store.index.ntotal)]
    return [(name, store.docstore.search(name)) for name in names]


def runs(store: Any) -> list[tuple[str, list[str]]]:
    """Source and docstore ids of each maximal run of positions with one source."""
    grouped = groupby(in_order(store), key=lambda entry: entry[1].metadata["source"])
    return [(source, [name for name, _ in entries]) for source, entries in grouped]


def documents(rows: sqlite3.Connection) -> dict[str, list[int]]:
    """User ids of the rows of each path, in order of the rows."""
    found: dict[str, list[int]] = {}
    for path, user_id in rows.execute("SELECT path, user_id FROM documents ORDER BY id"):
        found.setdefault(path, []).append(user_id)
    return found


def dump(directory: Path) -> list[str]:
    with closing(sqlite3.connect(directory / "victus.db")) as connection:
        return list(connection.iterdump())


def texts(directory: Path) -> list[str]:
    return [chunk.page_content for _, chunk in in_order(opened(directory))]


# --- the index


def test_the_index_opens_and_holds_exactly_the_chunks_that_were_uploaded(
    made: Installation,
) -> None:
    store = opened(made.directory)
    uploaded = [name for upload in made.uploads for name in upload.docstore_ids]
    assert [name for name, _ in in_order(store)] == uploaded
    assert len(set(uploaded)) == len(uploaded) == len(store.docstore._dict)


def test_the_index_is_a_flat_one_of_unit_vectors_with_1536_values(made: Installation) -> None:
    index = opened(made.directory).index
    assert type(index).__name__ == "IndexFlatL2"
    vectors = index.reconstruct_n(0, index.ntotal)
    assert vectors.shape[1] == 1536
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_each_chunk_names_its_file_as_the_old_release_did_and_no_user(made: Installation) -> None:
    store = opened(made.directory)
    for upload in made.uploads:
        for name in upload.docstore_ids:
            metadata = store.docstore.search(name).metadata
            assert metadata["source"] == upload.source
            assert metadata["file_name"] == Path(upload.source).name
            assert "user_id" not in metadata
            assert ("page" in metadata) == upload.source.endswith(".pdf")


def test_the_old_release_finds_a_chunk_by_its_own_text(made: Installation) -> None:
    store = opened(made.directory)
    name = made.uploads[3].docstore_ids[2]
    content = store.docstore.search(name).page_content
    ((found, distance),) = store.similarity_search_with_score(content, k=1)
    assert found.page_content == content
    assert distance == pytest.approx(0.0, abs=1e-6)


def test_users_have_a_few_some_and_most_of_the_chunks(made: Installation) -> None:
    chunks = Counter(made.expected.values())
    assert 1_000 <= len(made.uploaded_by) <= 4_000
    assert chunks[made.users["ben"]] < 10
    assert chunks[made.users["ada"]] > len(made.uploaded_by) / 2
    assert chunks[made.users["ada"]] >= 1_000
    assert 20 <= chunks[made.users["eve"]] < 100 < chunks[made.users["cleo"]]


# --- the truth about it


def test_every_chunk_has_one_fate(made: Installation) -> None:
    lists = [made.expected.keys(), *made.quarantined.values()]
    assert sum(len(names) for names in lists) == len(made.uploaded_by)
    assert set().union(*lists) == made.uploaded_by.keys()
    assert all(made.quarantined.values())


def test_an_expected_owner_is_who_really_uploaded_the_chunk(made: Installation) -> None:
    assert made.expected.items() <= made.uploaded_by.items()
    assert set(made.expected.values()) == set(made.users.values())


def test_what_is_expected_is_what_the_rules_give(made: Installation, rows: sqlite3.Connection) -> None:
    """The rules once more, in their plainest form, from nothing but what is on the disk."""
    owners = documents(rows)
    living = {user_id for (user_id,) in rows.execute("SELECT id FROM users")}
    all_runs = runs(opened(made.directory))
    times = Counter(source for source, _ in all_runs)

    def fate(source: str) -> Fate:
        claims = owners.get(source, [])
        if not claims:
            return Fate.NO_ROW
        if len(set(claims)) > 1:
            return Fate.SEVERAL_USERS
        if times[source] > len(claims):
            return Fate.MORE_RUNS_THAN_ROWS
        return Fate.OWNED if claims[0] in living else Fate.MISSING_USER

    found = {name: fate(source) for source, names in all_runs for name in names}
    owned = {name: owners[source][0] for source, names in all_runs for name in names if found[name] is Fate.OWNED}
    assert owned == made.expected
    for reason, names in made.quarantined.items():
        assert names == {name for name, decided in found.items() if decided is reason}


def test_one_user_sent_a_name_twice_with_others_between_and_twice_in_succession(
    made: Installation, rows: sqlite3.Connection
) -> None:
    times = Counter(source for source, _ in runs(opened(made.directory)))
    owners = documents(rows)
    assert (times["uploads/notes.docx"], len(owners["uploads/notes.docx"])) == (2, 2)
    assert (times["uploads/plan.docx"], len(owners["uploads/plan.docx"])) == (1, 2)
    assert (times["uploads/draft.docx"], len(owners["uploads/draft.docx"])) == (2, 1)


def test_two_users_sent_different_files_of_one_name_and_the_second_overwrote_the_first(
    made: Installation, rows: sqlite3.Connection
) -> None:
    source = "uploads/report.pdf"
    first, second = (upload for upload in made.uploads if upload.source == source)
    assert first.user_id != second.user_id
    assert documents(rows)[source] == [first.user_id, second.user_id]
    on_disk = [chunk.page_content for chunk in legacy_chunks(made.directory, source)]
    store = opened(made.directory)
    kept = {
        upload.user_id: [store.docstore.search(name).page_content for name in upload.docstore_ids]
        for upload in (first, second)
    }
    assert kept[second.user_id] == on_disk
    assert kept[first.user_id] != on_disk


def test_each_document_row_is_the_one_of_its_upload(made: Installation, rows: sqlite3.Connection) -> None:
    found = rows.execute("SELECT id, user_id, path FROM documents ORDER BY id").fetchall()
    assert found == [
        (upload.document_id, upload.user_id, upload.source) for upload in made.uploads if upload.document_id is not None
    ]


# --- the database and the files


def test_the_database_stands_at_the_old_releases_last_revision_with_rows_in_every_table(
    rows: sqlite3.Connection,
) -> None:
    names = {name for (name,) in rows.execute("SELECT name FROM sqlite_master WHERE type='table'")}
    assert names - {"sqlite_sequence"} == TABLES
    assert rows.execute("SELECT version_num FROM alembic_version").fetchall() == [(LEGACY_HEAD,)]
    for table in TABLES:
        assert rows.execute(f"SELECT count(*) FROM {table}").fetchone()[0] > 0, table


def test_nothing_refers_to_what_is_not_there_but_the_document_of_the_user_who_is_gone(
    made: Installation, rows: sqlite3.Connection
) -> None:
    dangling = rows.execute("PRAGMA foreign_key_check").fetchall()
    (gone,) = (upload for upload in made.uploads if upload.fate is Fate.MISSING_USER)
    assert [(table, row) for table, row, *_ in dangling] == [("documents", gone.document_id)]


def test_the_backends_own_models_read_the_rows(made: Installation) -> None:
    engine = create_engine(made.database_url)
    with Session(engine) as session:
        users = {user.username: user.id for user in session.scalars(select(User))}
        facts = Counter(fact.user_id for fact in session.scalars(select(UserFact)))
        conversations = Counter(row.user_id for row in session.scalars(select(Conversation)))
        said = Counter(row.role for row in session.scalars(select(Message)))
    engine.dispose()
    assert users == made.users == {name: number for number, name in enumerate(USERS, 1)}
    assert facts == {str(user_id): 3 for user_id in users.values()}
    assert conversations == dict.fromkeys(users.values(), 3)
    assert said["user"] >= said["assistant"] > 50


def test_every_uploaded_name_is_one_file_and_nothing_else_lies_about(made: Installation) -> None:
    assert {path.name for path in made.directory.iterdir()} == {
        "victus.db",
        "uploads",
        "faiss_index",
    }
    assert {path.name for path in made.index.iterdir()} == {"index.faiss", "index.pkl"}
    assert {f"uploads/{path.name}" for path in (made.directory / "uploads").iterdir()} == {
        upload.source for upload in made.uploads
    }


def test_the_text_tells_nothing_about_this_machine(made: Installation) -> None:
    text = "\n".join(texts(made.directory))
    assert sys.base_prefix + os.sep not in text
    assert str(made.directory) not in text
    assert os.environ["PATH"] not in text
    assert "environ({" not in text
    assert not re.search(r"0x[0-9a-f]{8}", text)


# --- making it


def test_the_same_seed_makes_the_same_installation(tmp_path: Path) -> None:
    one = make_installation(tmp_path / "one", HashedEmbeddings(), seed=7, plans=FEW)
    other = make_installation(tmp_path / "other", HashedEmbeddings(), seed=7, plans=FEW)
    assert one.uploads == other.uploads
    assert in_order(opened(one.directory)) == in_order(opened(other.directory))
    assert dump(one.directory) == dump(other.directory)
    assert time.strftime("%Y-%m-%d", time.gmtime()) not in "".join(dump(one.directory))


def test_another_seed_makes_other_ids_of_the_same_texts(tmp_path: Path) -> None:
    one = make_installation(tmp_path / "one", HashedEmbeddings(), seed=1, plans=FEW)
    other = make_installation(tmp_path / "other", HashedEmbeddings(), seed=2, plans=FEW)
    assert not one.uploaded_by.keys() & other.uploaded_by.keys()
    assert texts(one.directory) == texts(other.directory)


def test_progress_is_told_after_each_upload(tmp_path: Path) -> None:
    told: list[str] = []
    make_installation(tmp_path / "made", HashedEmbeddings(), progress=told.append, plans=FEW)
    assert [line.split(":")[0] for line in told] == [f"uploads/{plan.filename}" for plan in FEW]
    assert told[-1].endswith("(3/3)")


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "victus.db").write_text("precious")
    with pytest.raises(FolderInUseError, match="not an empty folder"):
        make_installation(tmp_path, HashedEmbeddings(), plans=FEW)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("module", "filename", "package"),
    [("fpdf", "a.pdf", "fpdf2"), ("docx", "a.docx", "python-docx")],
)
def test_without_the_packages_that_write_files_the_error_names_the_extra(
    module: str, filename: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(WriterMissingError, match=rf"^{package} is not installed.*extra `dev`"):
        write_file(tmp_path / filename, "text")


def test_a_file_of_a_type_that_the_old_release_refused_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileTypeError, match=r"notes\.txt ends in '\.txt'"):
        write_file(tmp_path / "notes.txt", "text")


@pytest.mark.parametrize("filename", ["heaps.pdf", "heaps.docx"])
def test_what_is_read_back_from_a_written_file_is_its_text(filename: str, tmp_path: Path) -> None:
    text = reference_text(("heapq",))
    write_file(tmp_path / filename, text)
    chunks = legacy_chunks(tmp_path, filename)
    words = [word for chunk in chunks for word in chunk.page_content.split()]
    assert set(words) == set(text.split())


def test_the_old_release_adds_to_an_index_that_is_there(tmp_path: Path) -> None:
    made = make_installation(tmp_path, HashedEmbeddings(), plans=FEW)
    write_file(tmp_path / "uploads" / "shapes.docx", reference_text(("struct",)))
    added = legacy_add(tmp_path, "uploads/shapes.docx", HashedEmbeddings())
    assert added
    assert [name for name, _ in in_order(opened(tmp_path))] == [*made.uploaded_by, *added]


def test_the_old_release_begins_an_index_with_the_first_upload(tmp_path: Path) -> None:
    (tmp_path / "faiss_index").mkdir()
    write_file(tmp_path / "shapes.docx", reference_text(("struct",)))
    added = legacy_add(tmp_path, "shapes.docx", HashedEmbeddings())
    assert [name for name, _ in in_order(opened(tmp_path))] == added


def test_the_plans_name_only_modules_that_every_python_has() -> None:
    assert {module for plan in PLANS for module in plan.modules} <= set(sys.stdlib_module_names)
