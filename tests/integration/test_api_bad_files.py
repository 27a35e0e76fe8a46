"""Files that cannot be read, sent over HTTP: each is refused or fails with a reason, and nothing of it is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support import files
from tests.support.backend import Backend, User, running_backend
from tests.support.database import Database

WORD = "word/document.xml"
BAD: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "encrypted PDF": ("a.pdf", lambda: files.encrypted_pdf(files.pdf(), user="x"), "password"),
    "encrypted DOCX": ("a.docx", lambda: bytes.fromhex("d0cf11e0a1b11ae1") + bytes(512), "password"),
    "empty PDF": ("a.pdf", lambda: b"", "empty"),
    "empty DOCX": ("a.docx", lambda: b"", "empty"),
    "empty text": ("a.txt", lambda: b"", "empty"),
    "scanned PDF": ("a.pdf", lambda: files.pdf_with_content(b"0 0 m 9 9 l S"), "OCR"),
    "DOCX without text": ("a.docx", lambda: files.word([""]), "no text"),
    "blank text": ("a.md", lambda: b" \n\0\0\t\n", "no text"),
    "truncated PDF": ("a.pdf", lambda: files.pdf()[:300], "damaged"),
    "truncated DOCX": ("a.docx", lambda: files.word()[:-200], "damaged"),
    "zip bomb": ("a.docx", lambda: files.zipped({WORD: files.word_xml(b" " * 20 * 2**20)}), "times its size"),
    "larger zip bomb": ("a.docx", lambda: files.zipped({WORD: files.word_xml(b" " * 40 * 2**20)}), "at most"),
    "PDF bomb": ("a.pdf", lambda: files.pdf_with_content(b" " * 80_000_000), "more than"),
    "entity bomb": ("a.docx", lambda: files.zipped({WORD: b'<!DOCTYPE w [<!ENTITY a "&b;">]><w>&a;</w>'}), "damaged"),
    "a picture as PDF": ("a.pdf", lambda: b"\x89PNG\r\n\x1a\n" + bytes(64), "damaged"),
    "a program as text": ("a.txt", lambda: b"\x7fELF\x02\x01\x01" + b"\xff" * 64, "UTF-8"),
    "a lone surrogate": ("a.txt", lambda: b"text \xed\xa0\x80 text", "UTF-8"),
    "half a character": ("a.txt", lambda: "text \U0001f511".encode()[:-1], "UTF-8"),
    "UTF-16 cut in half": ("a.txt", lambda: "\ufefftext".encode("utf-16-le")[:-1], "utf-16"),
}
"""What is sent, and what its owner is told."""


@pytest.fixture
def backend(configured_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    with running_backend(tmp_path, monkeypatch) as running:
        yield running


def sent(backend: Backend, ada: User) -> list[str]:
    """What is wrong with what became of the files, by file."""
    wrong = []
    for what, (name, content, told) in BAD.items():
        answer = ada.upload(name, content())
        backend.indexed()
        shown: Any = ada.get(f"/api/documents/{answer.json()['document_id']}").json()
        if shown["status"] != "failed" or told not in shown["reason"] or name not in shown["reason"]:
            wrong.append(f"{what}: {shown['status']}, {shown['reason']}")
    return wrong


def chunks(database: Database) -> int:
    with psycopg.connect(database.superuser_conninfo()) as superuser:
        row = superuser.execute("SELECT count(*) FROM document_chunks").fetchone()
    assert row is not None
    return int(row[0])


def test_each_file_that_cannot_be_read_fails_with_a_reason_to_act_on_and_leaves_no_chunk(
    backend: Backend, configured_database: Database
) -> None:
    ada = backend.user("ada")
    assert sent(backend, ada) == []
    assert chunks(configured_database) == 0
    assert [path.name for path in backend.files() if path.name.endswith((".npz", ".half"))] == []
    assert ada.get("/api/search", params={"q": "text"}).json() == []
    assert ada.upload("good.txt", b"A file that can be read.").status_code == 200
    backend.indexed()
    assert len(ada.get("/api/search", params={"q": "file"}).json()) == 1, "the next one is served as ever"


# migration
@pytest.mark.migration
def test_where_both_stores_are_written_neither_keeps_anything_of_such_a_file(
    backend: Backend, configured_database: Database
) -> None:
    from src.tools import rag_tools
    from src.tools.rag_tools.migration.stages import Stage
    from tests.support.routers import set_stage

    with configured_database.connect(autocommit=True) as connection:
        set_stage(connection, Stage.DUALWRITE)
    router = rag_tools.service()
    router.refresh()
    assert sent(backend, backend.user("ada")) == []
    router.settler.run(at_once=True)
    assert chunks(configured_database) == 0
    assert router.stores.faiss.users() == []
    with configured_database.connect() as connection:
        states = connection.execute("SELECT DISTINCT wanted, state FROM vector_ledger").fetchall()
    assert states == [("absent", "done")]


# end of migration


def test_a_file_of_200_megabytes_is_refused_by_its_declared_length(backend: Backend) -> None:
    ada = backend.user("ada")
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(200 * 2**20), **ada.headers}
    answer = ada.client.post("/api/upload", content=b"--x", headers=headers)
    assert answer.status_code == 413
    assert backend.files() == []
    assert ada.get("/api/documents").json() == []
