"""Documents over HTTP: what is acknowledged, what is refused, and that nothing is left of a refusal."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from src.tools import rag_tools
from src.tools.rag_tools.store import StoreError
from tests.support import files
from tests.support.backend import Backend, User, away, running_backend
from tests.support.database import Database

LIMIT = 100_000
TRAIN = b"The train to Zurich leaves at a quarter past eight."
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


@pytest.fixture
def backend(configured_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    with running_backend(tmp_path, monkeypatch, MAX_UPLOAD_BYTES=LIMIT) as running:
        yield running


@pytest.fixture
def ada(backend: Backend) -> User:
    return backend.user("ada")


@pytest.fixture
def bob(backend: Backend) -> User:
    return backend.user("bob")


def test_an_upload_is_answered_as_the_old_release_did_and_found_once_indexed(backend: Backend, ada: User) -> None:
    answer = ada.upload("notes.txt", TRAIN)
    assert answer.status_code == 200, answer.text
    document_id = answer.json()["document_id"]
    assert answer.json() == {
        "status": "success",
        "filename": "notes.txt",
        "detail": "File received and is being processed in the background.",
        "document_id": document_id,
    }
    backend.indexed()
    shown = ada.get(f"/api/documents/{document_id}").json()
    assert (shown["status"], shown["progress"], shown["reason"]) == ("ready", 100, None)
    (hit,) = ada.get("/api/search", params={"q": "When does the train go?"}).json()
    assert hit["document_id"] == document_id
    assert hit["file_name"] == "notes.txt"
    assert hit["content"] == TRAIN.decode()
    assert 0 < hit["similarity"] <= 1


@pytest.mark.parametrize(
    ("name", "content", "content_type"),
    [
        ("a.pdf", files.pdf(["The cat sleeps on the warm roof."]), "application/pdf"),
        ("a.docx", files.word(["The cat sleeps on the warm roof."]), DOCX),
        ("a.MD", b"# The cat\n\nThe cat sleeps on the warm roof.", "text/markdown"),
        ("no suffix", b"The cat sleeps on the warm roof.", "text/plain; charset=utf-8"),
    ],
)
def test_each_type_is_read_by_its_suffix_or_else_its_content_type(
    backend: Backend, ada: User, name: str, content: bytes, content_type: str
) -> None:
    assert ada.upload(name, content, content_type).status_code == 200
    backend.indexed()
    (hit,) = ada.get("/api/search", params={"q": "Where does the cat sleep?"}).json()
    assert "warm roof" in hit["content"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd.txt", "passwd.txt"),
        ("..\\..\\boot.txt", "boot.txt"),
        ("/etc/notes.txt", "notes.txt"),
        ("🚂 Fahrplan ü.txt", "🚂 Fahrplan ü.txt"),
        ("%41dvice'; DROP TABLE documents; --.txt", "%41dvice'; DROP TABLE documents; --.txt"),
        ("right\u202etxt.exe.txt", "righttxt.exe.txt"),
        ("x" * 300 + ".txt", "x" * 251 + ".txt"),
        ("...", "document"),
    ],
)
def test_a_name_is_only_shown_and_never_used_on_the_disk(backend: Backend, ada: User, given: str, shown: str) -> None:
    answer = ada.upload(given, TRAIN)
    assert answer.status_code == 200, answer.text
    assert answer.json()["filename"] == shown
    (listed,) = ada.get("/api/documents").json()
    assert listed["filename"] == shown
    (path, *_) = (path for path in backend.files() if path.suffix == ".txt")
    assert len(path.stem) == 32
    assert set(path.stem) <= set("0123456789abcdef")


@pytest.mark.parametrize("name", [b"nul\0byte.txt", b"\xff\xfe.txt", b"\xed\xa0\x80.txt", b""])
def test_a_name_that_is_no_text_is_cleaned_or_refused(ada: User, name: bytes) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="' + name + b'"\r\n'
        b"Content-Type: text/plain\r\n\r\n" + TRAIN + b"\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x", **ada.headers}
    answer = ada.client.post("/api/upload", content=body, headers=headers)
    assert answer.status_code in (200, 400, 415, 422), answer.text
    print(answer.text)
    listed = ada.get("/api/documents").json()
    assert len(listed) == (answer.status_code == 200)
    assert "\0" not in "".join(one["filename"] for one in listed)


@pytest.mark.parametrize(
    ("name", "content_type"),
    [
        ("a.exe", "application/pdf"),
        ("a.html", "text/html"),
        ("a", "application/octet-stream"),
        ("../../x", "application/x-sh"),
    ],
)
def test_a_type_we_cannot_read_is_refused_and_leaves_nothing(
    backend: Backend, ada: User, name: str, content_type: str
) -> None:
    answer = ada.upload(name, TRAIN, content_type)
    assert answer.status_code == 415
    assert ".pdf" in answer.json()["detail"]
    assert backend.files() == []
    assert ada.get("/api/documents").json() == []


def test_a_form_without_a_file_is_refused(ada: User) -> None:
    assert ada.post("/api/upload").status_code == 422
    assert ada.post("/api/upload", data={"file": "text"}).status_code == 422
    assert ada.post("/api/upload", files={"other": ("a.txt", TRAIN)}).status_code == 422
    broken = {"Content-Type": "multipart/form-data", **ada.headers}
    assert ada.client.post("/api/upload", content=b"--x", headers=broken).status_code == 400


def test_a_file_above_the_limit_is_refused_and_leaves_nothing(backend: Backend, ada: User) -> None:
    for size in (LIMIT + 1, 3 * LIMIT):
        answer = ada.upload("large.txt", b"x" * size)
        assert answer.status_code == 413, answer.text
        assert "detail" in answer.json()
    assert backend.files() == []
    assert ada.get("/api/documents").json() == []
    assert ada.upload("fits.txt", b"x " * (LIMIT // 2)).status_code == 200


def test_a_body_that_does_not_say_its_length_is_cut_off_at_the_limit(backend: Backend, ada: User) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\nContent-Type: text/plain\r\n\r\n'
    sent: list[int] = []

    def body() -> Iterator[bytes]:
        yield head
        while len(sent) < 1000:
            sent.append(1)
            yield b"x" * 65_536

    headers = {"Content-Type": "multipart/form-data; boundary=x", **ada.headers}
    assert ada.client.post("/api/upload", content=body(), headers=headers).status_code == 413
    assert backend.files() == []


@pytest.mark.parametrize(
    ("name", "content", "tells"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\t ", "no text"),
        ("cut.pdf", files.pdf(["One page."])[:200], "damaged"),
        ("secret.pdf", files.encrypted_pdf(files.pdf(["One page."]), user="x"), "password"),
        ("no.docx", b"this is no archive", "damaged"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_fails_with_a_reason_that_names_it(
    backend: Backend, ada: User, name: str, content: bytes, tells: str
) -> None:
    document_id = ada.upload(name, content).json()["document_id"]
    backend.indexed()
    shown = ada.get(f"/api/documents/{document_id}").json()
    assert shown["status"] == "failed"
    assert tells in shown["reason"]
    assert name in shown["reason"]
    assert ada.get("/api/search", params={"q": "page"}).json() == []


def test_two_users_with_one_file_name_keep_two_files(backend: Backend, ada: User, bob: User) -> None:
    ada.upload("same.txt", b"The parrot of Ada speaks French.")
    bob.upload("same.txt", b"The parrot of Bob speaks Danish.")
    backend.indexed()
    for user, language in ((ada, "French"), (bob, "Danish")):
        (hit,) = user.get("/api/search", params={"q": "What does the parrot speak?", "k": 20}).json()
        assert language in hit["content"]


def test_a_deleted_document_is_gone_with_its_file_and_stays_gone(backend: Backend, ada: User) -> None:
    document_id = ada.upload("notes.txt", TRAIN).json()["document_id"]
    backend.indexed()
    assert ada.delete(f"/api/documents/{document_id}").status_code == 204
    assert ada.delete(f"/api/documents/{document_id}").status_code == 204
    assert ada.get(f"/api/documents/{document_id}").status_code == 404
    assert ada.get("/api/documents").json() == []
    assert ada.get("/api/search", params={"q": "train"}).json() == []
    assert backend.files() == []


def test_nobody_sees_searches_or_deletes_anothers_document(backend: Backend, ada: User, bob: User) -> None:
    document_id = ada.upload("notes.txt", TRAIN).json()["document_id"]
    backend.indexed()
    path = f"/api/documents/{document_id}"
    assert bob.get(path).status_code == 404
    assert bob.delete(path).status_code == 404
    assert bob.get("/api/documents").json() == []
    assert bob.get("/api/search", params={"q": TRAIN.decode()}).json() == []
    assert ada.get(path).json()["status"] == "ready"


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"q": ""},
        {"q": " \t"},
        {"q": "\0"},
        {"q": "x" * 8_001},
        {"q": "x", "k": 0},
        {"q": "x", "k": 21},
        {"q": "x", "k": "many"},
    ],
)
def test_a_search_without_a_usable_question_is_refused(ada: User, query: dict[str, object]) -> None:
    answer = ada.get("/api/search", params=query)
    assert answer.status_code == 422
    assert "detail" in answer.json()


@pytest.mark.parametrize("question", ["nul\0byte train", "🚂", "'; --", "x" * 8_000, "%", "a\ud83db"])
def test_a_search_for_any_text_is_answered(backend: Backend, ada: User, question: str) -> None:
    ada.upload("notes.txt", TRAIN)
    backend.indexed()
    given = question.encode("utf-8", "surrogatepass")
    answer = ada.get("/api/search", params={"q": given})
    assert answer.status_code in (200, 422), answer.text


@pytest.mark.parametrize("document_id", ["0", "-1", "2147483648", "9" * 30, "x", "1.5", "%00"])
def test_an_id_that_cannot_be_one_is_refused(ada: User, document_id: str) -> None:
    assert ada.get(f"/api/documents/{document_id}").status_code in (404, 422)
    assert ada.delete(f"/api/documents/{document_id}").status_code in (404, 422)


def test_without_postgresql_an_upload_is_refused_and_its_file_removed(
    backend: Backend, ada: User, configured_database: Database
) -> None:
    assert ada.upload("before.txt", TRAIN).status_code == 200
    backend.indexed()
    before = backend.files()
    with away(configured_database):
        answer = ada.upload("notes.txt", TRAIN)
        assert answer.status_code == 503
        assert "PostgreSQL" in answer.json()["detail"]
        assert backend.files() == before
        listed = ada.get("/api/documents")
        assert listed.status_code == 503
        assert "database" in listed.json()["detail"]
    assert [one["filename"] for one in ada.get("/api/documents").json()] == ["before.txt"]


def test_a_store_that_refuses_leaves_no_file(backend: Backend, ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise StoreError("the disk is full")

    monkeypatch.setattr(rag_tools.service(), "receive", refuse)
    assert ada.upload("notes.txt", TRAIN).status_code == 503
    assert backend.files() == []


def test_a_failure_after_the_acknowledgement_changes_neither_answer_nor_later_uploads(
    backend: Backend, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = rag_tools.service()
    real, broken = documents.index, threading.Event()

    def once(document_id: int, *, answered: bool = False) -> None:
        if not broken.is_set():
            broken.set()
            raise RuntimeError("out of the blue")
        real(document_id, answered=answered)

    monkeypatch.setattr(documents, "index", once)
    first = ada.upload("first.txt", TRAIN)
    second = ada.upload("second.txt", TRAIN)
    assert (first.status_code, second.status_code) == (200, 200)
    backend.indexed()
    statuses = {one["filename"]: one["status"] for one in ada.get("/api/documents").json()}
    assert statuses == {"first.txt": "received", "second.txt": "ready"}


def test_uploads_at_once_are_all_kept(backend: Backend, ada: User, bob: User) -> None:
    people = [ada, bob] * 6
    with ThreadPoolExecutor(6) as threads:
        answers = threads.map(
            lambda number: people[number].upload("same.txt", f"Item {number} of many.".encode()),
            range(len(people)),
        )
        assert {answer.status_code for answer in answers} == {200}
    backend.indexed()
    for user in (ada, bob):
        listed = user.get("/api/documents").json()
        assert [one["status"] for one in listed] == ["ready"] * 6
        assert len(user.get("/api/search", params={"q": "item", "k": 20}).json()) == 6
