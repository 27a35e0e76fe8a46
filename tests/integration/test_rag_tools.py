"""The entry points as the agent and the API call them: their words, whose documents they see, what they refuse."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.config import settings
from src.database import DocumentsNeedPostgresError, Role
from src.tools import rag_tools
from src.tools.rag_tools import kept
from src.tools.rag_tools.chunking import DocumentUnreadableError
from src.tools.rag_tools.documents import DocumentNotFoundError
from src.tools.rag_tools.embeddings import EmbeddingError
from src.tools.rag_tools.pgvector_store import RoleError
from src.utils.context import IdentityUnsetError, acting_as
from tests.support.embeddings import HashEmbeddings, NoisyEmbeddings
from tests.support.seeds import add_users, write_note

NOTHING = "No documents have been uploaded yet. Please upload a document first."


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the process runs: everything that it writes by default lies here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "UPLOAD_DIR", tmp_path / "uploads")
    return tmp_path


@pytest.fixture
def service(configured_database: Any, folder: Path) -> Iterator[Any]:
    with rag_tools.lifespan(HashEmbeddings()) as opened:
        yield opened


@pytest.fixture
def ann(configured_database: Any) -> int:
    return add_users(configured_database, 2)[0]


@pytest.fixture
def bob(ann: int) -> int:
    return ann + 1


def statuses(database: Any) -> dict[int, str]:
    with database.connect() as connection:
        return dict(connection.execute("SELECT id, status FROM documents ORDER BY id").fetchall())


def passage(name: str, text: str) -> str:
    return f"--- (Source: {name}) ---\n{text}"


# -- the words


def test_what_is_found_is_told_in_the_words_that_callers_rely_on(service: Any, folder: Path, ann: int) -> None:
    with acting_as(ann):
        rag_tools.update_vector_store(str(write_note(folder, "tides.md", "The tide turns at four.")))
        answer = rag_tools.query_uploaded_documents("The tide turns at four.")
    assert answer == "Relevant information from documents:\n" + passage("tides.md", "The tide turns at four.")


def test_the_three_nearest_passages_are_told_the_nearest_first(service: Any, folder: Path, ann: int) -> None:
    texts = {f"{number}.md": f"Note {number}." for number in range(5)}
    with acting_as(ann):
        for name, text in texts.items():
            rag_tools.update_vector_store(str(write_note(folder, name, text)))
        answer = rag_tools.query_uploaded_documents("Note 3.")
    head, _, body = answer.partition("\n")
    assert head == "Relevant information from documents:"
    passages = body.split("\n\n")
    assert passages[0] == passage("3.md", "Note 3.")
    assert len(passages) == len(set(passages)) == 3
    assert set(passages) <= {passage(name, text) for name, text in texts.items()}


def test_with_nothing_uploaded_the_answer_asks_for_a_document(service: Any, ann: int) -> None:
    with acting_as(ann):
        assert rag_tools.query_uploaded_documents("anything") == NOTHING


def test_the_documents_of_others_are_nothing_uploaded(service: Any, folder: Path, ann: int, bob: int) -> None:
    with acting_as(bob):
        rag_tools.update_vector_store(str(write_note(folder, "a.md", "Bob's.")))
    with acting_as(ann):
        assert rag_tools.query_uploaded_documents("Bob's.") == NOTHING


def test_a_document_that_failed_or_was_deleted_is_nothing_uploaded(service: Any, folder: Path, ann: int) -> None:
    with acting_as(ann):
        with pytest.raises(DocumentUnreadableError):
            rag_tools.update_vector_store(str(write_note(folder, "a.pdf", "no PDF")))
        document_id = rag_tools.update_vector_store(str(write_note(folder, "b.md", "A note.")))
        rag_tools.delete_document(document_id)
        assert rag_tools.query_uploaded_documents("A note.") == NOTHING


def test_a_document_that_is_still_being_read_is_not_called_missing(service: Any, folder: Path, ann: int) -> None:
    path = write_note(folder, "a.md", "A note.")
    service.receive(ann, path, path.name)
    with acting_as(ann):
        assert rag_tools.query_uploaded_documents("A note.") != NOTHING


def test_a_failure_is_told_as_text(configured_database: Any, folder: Path, ann: int) -> None:
    embeddings = NoisyEmbeddings()
    embeddings.away = EmbeddingError("the embedding service is away")
    with rag_tools.lifespan(embeddings), acting_as(ann):
        answer = rag_tools.query_uploaded_documents("anything")
    assert answer == "Error querying documents: the embedding service is away"


# -- whose


def test_without_an_identity_nothing_is_done_and_nothing_is_opened(configured_database: Any, folder: Path) -> None:
    path = write_note(folder, "a.md", "A note.")
    answer = rag_tools.query_uploaded_documents("A note.")
    assert answer.startswith("Error querying documents: no user is set for this request")
    with pytest.raises(IdentityUnsetError):
        rag_tools.update_vector_store(str(path))
    with pytest.raises(IdentityUnsetError):
        rag_tools.delete_document(1)
    assert statuses(configured_database) == {}
    assert rag_tools.status() == {"ready": False, "reason": "the document service has not started"}
    assert {each.name for each in folder.iterdir()} == {"uploads"}


def test_nobody_uploads_for_somebody_else(
    service: Any, configured_database: Any, folder: Path, ann: int, bob: int
) -> None:
    path = str(write_note(folder, "a.md", "A note."))
    with acting_as(ann):
        with pytest.raises(rag_tools.IdentityMismatchError, match=f"user {ann} cannot upload for user {bob}"):
            rag_tools.update_vector_store(path, user_id=bob)
        assert statuses(configured_database) == {}
        rag_tools.update_vector_store(path, user_id=ann)
    assert list(statuses(configured_database).values()) == ["ready"]


def test_a_job_outside_a_request_names_the_owner(service: Any, folder: Path, ann: int, bob: int) -> None:
    rag_tools.update_vector_store(str(write_note(folder, "a.md", "A note.")), user_id=bob)
    with acting_as(bob):
        assert "A note." in rag_tools.query_uploaded_documents("A note.")
    with acting_as(ann):
        assert rag_tools.query_uploaded_documents("A note.") == NOTHING


def test_nobody_deletes_the_document_of_somebody_else(service: Any, folder: Path, ann: int, bob: int) -> None:
    with acting_as(bob):
        document_id = rag_tools.update_vector_store(str(write_note(folder, "a.md", "Bob's.")))
    with acting_as(ann):
        for missing in (document_id, document_id + 1):
            with pytest.raises(DocumentNotFoundError, match=f"there is no document {missing}"):
                rag_tools.delete_document(missing)
    with acting_as(bob):
        assert "Bob's." in rag_tools.query_uploaded_documents("Bob's.")
        rag_tools.delete_document(document_id)
        rag_tools.delete_document(document_id)
        assert rag_tools.query_uploaded_documents("Bob's.") == NOTHING


def test_a_user_who_leaves_leaves_nothing_behind(
    service: Any, configured_database: Any, folder: Path, ann: int, bob: int
) -> None:
    for user in (ann, bob):
        with acting_as(user):
            for number in range(2):
                rag_tools.update_vector_store(str(write_note(folder, f"{user}-{number}.md", f"Note {number}.")))
    with acting_as(ann):
        rag_tools.delete_all_documents()
        assert rag_tools.query_uploaded_documents("Note 1.") == NOTHING
    with acting_as(bob):
        assert "Note 1." in rag_tools.query_uploaded_documents("Note 1.")
    assert {path.name.partition("-")[0] for path in (folder / "uploads").iterdir()} == {str(bob)}


def test_the_model_has_no_argument_by_which_it_could_name_a_user() -> None:
    assert list(inspect.signature(rag_tools.query_uploaded_documents).parameters) == ["query"]
    assert list(inspect.signature(rag_tools.delete_document).parameters) == ["document_id"]


# -- the service


def test_status_says_whether_documents_can_be_served(configured_database: Any, folder: Path) -> None:
    with rag_tools.lifespan(HashEmbeddings()):
        assert rag_tools.status()["ready"] is True
    assert rag_tools.status()["ready"] is False


def test_on_sqlite_documents_say_what_they_need(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "DATABASE_URL", "sqlite:///victus.db")
    with pytest.raises(DocumentsNeedPostgresError, match="embedded:PATH"), rag_tools.lifespan(HashEmbeddings()):
        pass
    with acting_as(1):
        answer = rag_tools.query_uploaded_documents("anything")
        with pytest.raises(DocumentsNeedPostgresError):
            rag_tools.update_vector_store(str(write_note(folder, "a.md", "A note.")))
    assert answer.startswith("Error querying documents: documents need PostgreSQL with pgvector")


def test_a_start_that_fails_leaves_nothing_running(
    configured_database: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "DATABASE_URL", configured_database.url(Role.OWNER))
    before = set(threading.enumerate())
    for _ in range(2):
        with pytest.raises(RoleError, match="victus_app"), rag_tools.lifespan(HashEmbeddings()):
            pass
    assert set(threading.enumerate()) <= before
    assert rag_tools.status()["ready"] is False


def test_callers_who_come_first_at_once_open_one_service(
    configured_database: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rag_tools, "embedder_later", HashEmbeddings)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(rag_tools.service())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    try:
        assert len(found) == 4
        assert len({id(each) for each in found}) == 1
    finally:
        monkeypatch.setattr(rag_tools, "_service", None)
        with found[0].pool:
            found[0].close()


def test_a_start_removes_what_a_dead_process_kept_and_nobody_needs(
    configured_database: Any, folder: Path, ann: int
) -> None:
    with rag_tools.lifespan(HashEmbeddings()) as service:
        path = write_note(folder, "a.md", "A note.")
        waiting = service.receive(ann, path, path.name)
        service.prepare(service.load(waiting))
        needed = kept.kept_path(path, waiting)
        orphan = kept.kept_path(path, waiting + 1)
        orphan.write_bytes(needed.read_bytes())
    with rag_tools.lifespan(HashEmbeddings()):
        assert needed.exists()
        assert not orphan.exists()
