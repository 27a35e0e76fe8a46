"""A secret in a document, in a question and in a password, through all that works and all that fails.

It may be in the chunks, the journal and the uploads, which are there to hold it, and nowhere else: not in a line of the
log at its most talkative, in no other table, no metric, no file, and in nothing that on-call is shown.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import httpx2
import openai
import psycopg
import pytest
import structlog
from langchain_core.embeddings import Embeddings

from rollout import hold
from rollout.explain import explain
from rollout.logs import log_to
from rollout.status import status
from src import log as logs
from src.database import Role
from src.tools import rag_tools
from src.tools.rag_tools.embeddings import EmbeddingError, embed_texts
from src.tools.rag_tools.migration.stages import Stage
from src.tools.rag_tools.store import StoreError
from src.utils.context import acting_as
from tests.support import files
from tests.support.backend import Backend, User, running_backend
from tests.support.control import control_on
from tests.support.database import Database
from tests.support.routers import set_stage
from tests.support.sessions import wait_until

pytestmark = pytest.mark.migration

DOCUMENT, QUESTION, PASSWORD, WRONG = "zibeline", "quetzalcoatlus", "xylophagous-Beetle-9", "yttrium-Yacht-8"
SECRETS = (DOCUMENT, QUESTION, PASSWORD, WRONG)
TEXT = f"The {DOCUMENT} coat hangs in the hall. It was bought in a shop by the harbour, and it is worn on Sundays."
ASKED = f"Where does the {QUESTION} hang its coat?"

# There to hold what a user wrote.
TABLES = {"document_chunks"}
FOLDERS = {"uploads", "faiss_index"}


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def backend(
    configured_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: io.StringIO
) -> Iterator[Backend]:
    """Its log is what production writes, at its most talkative."""
    with configured_database.connect(Role.ROLLOUT) as connection:
        hold.set_held(connection, True, actor="test", reason="the guard would go back at the first difference")
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    with running_backend(tmp_path, monkeypatch) as running:
        with redirect_stdout(written):
            logs.configure("DEBUG")
        yield running
    root.handlers[:] = before[0]
    root.setLevel(before[1])


@pytest.fixture
def ada(backend: Backend) -> User:
    account = {"email": "ada@example.org", "username": "ada", "password": PASSWORD}
    made = backend.client.post("/auth/register", json=account)
    assert made.status_code == 201, made.text
    assert login(backend, WRONG).status_code == 401
    return User(backend.client, made.json()["id"], login(backend, PASSWORD).json()["access_token"])


def login(backend: Backend, password: str) -> Any:
    return backend.client.post("/auth/login", json={"username": "ada", "password": password})


def test_a_secret_is_only_where_it_belongs(
    backend: Backend,
    ada: User,
    configured_database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: io.StringIO,
) -> None:
    document_id = live_on_both_stores(backend, ada, configured_database)
    for act in (differences, failing_stores, unreadable_files, failing_embeddings, refused_requests):
        act(backend, ada, configured_database)
    shown = as_on_call(tmp_path, monkeypatch)
    exposed = backend.client.get("/metrics").text
    assert ada.delete(f"/api/documents/{document_id}").status_code == 204
    lines = written.getvalue().splitlines()
    events = {json.loads(line)["event"] for line in lines}
    for expected in EVENTS:
        assert expected in events, f"{expected} was not provoked"
    for secret in SECRETS:
        assert [line for line in lines if secret in line] == []
        assert secret not in exposed
        assert secret not in shown
    assert tables_with(configured_database, SECRETS) <= TABLES
    assert folders_with(tmp_path, SECRETS) <= FOLDERS
    assert tables_with(configured_database, [PASSWORD, WRONG, QUESTION]) == set()
    assert folders_with(tmp_path, [PASSWORD, WRONG, QUESTION]) == set()


EVENTS = {
    "document.receive.done",
    "document.index.done",
    "document.index.failed",
    "document.delete.done",
    "chunking.read.failed",
    "embedding.request.failed",
    "rag.shadow_diff",
    "shadow.read.failed",
    "shadow.compare.failed",
    "read.fallback.used",
    "write.secondary.failed",
    "settle.apply.failed",
    "http.request.refused",
    "http.request.failed",
}


# -- what is done


def live_on_both_stores(backend: Backend, ada: User, database: Database) -> int:
    """Uploaded while FAISS served, and asked for since pgvector does."""
    to(database, Stage.DUALWRITE)
    document_id = int(ada.upload("coat.md", TEXT.encode()).json()["document_id"])
    backend.indexed()
    to(database, Stage.LIVE, 100)
    ask(ada)
    with acting_as(ada.id):
        assert DOCUMENT in rag_tools.query_uploaded_documents(ASKED)
    compared(database, 2)
    return document_id


def differences(_backend: Backend, ada: User, database: Database) -> None:
    """Another content, another owner, nothing at all, and a comparison that breaks."""
    longer = "UPDATE document_chunks SET content = content || ' And the other coat?'"
    for number, statement in enumerate(
        (longer, "UPDATE document_chunks SET user_id = 7777", "DELETE FROM document_chunks"), 3
    ):
        with undone(database, statement):
            ask(ada)
            compared(database, number)
    with undone(database, "ALTER TABLE shadow_diffs ADD CHECK (event ->> 'k' IS NULL) NOT VALID"):
        ask(ada)
        drops = rag_tools.service().shadow
        while not drops.drops:
            pass


def failing_stores(backend: Backend, ada: User, database: Database) -> None:
    """Pgvector can be read no more, and takes no write of this content."""
    with permissions(database, "SELECT"):
        ask(ada)
        compared(database, 6)
    with undone(database, f"ALTER TABLE document_chunks ADD CHECK (content NOT LIKE '%{DOCUMENT}%') NOT VALID"):
        # FAISS serves: what pgvector refuses stays owed.
        to(database, Stage.LIVE, 0)
        ada.upload("second.md", f"{TEXT} Twice.".encode())
        backend.indexed()
        rag_tools.service().settler.run(at_once=True)
        # Pgvector serves, nobody was told yet: the upload fails.
        to(database, Stage.LIVE, 100)
        path = backend.uploads / "third.md"
        path.write_text(f"{TEXT} Thrice.", encoding="utf-8")
        with acting_as(ada.id), pytest.raises(StoreError):
            rag_tools.update_vector_store(str(path))
    rag_tools.service().settler.run(at_once=True)


def unreadable_files(backend: Backend, ada: User, _database: Database) -> None:
    """Each of them quotes the secret where its reader stumbles."""
    broken = f"<w:document xmlns:w='urn:w'><w:p>{DOCUMENT}<{DOCUMENT}></w:p>".encode()
    for name, content in (
        ("broken.md", TEXT.encode() + b"\xff\xfe"),
        ("broken.pdf", f"%PDF-1.4\n1 0 obj\n<< /{DOCUMENT} {DOCUMENT}\n".encode()),
        ("content.pdf", files.pdf_with_content(f"BT ({DOCUMENT}) Tj {DOCUMENT} << /{DOCUMENT} ET".encode())),
        ("objects.pdf", files.pdf([TEXT]).replace(b"/Type", f"/{DOCUMENT} {DOCUMENT}".encode(), 2)),
        ("broken.docx", files.word_xml(broken)),
        ("zip.docx", b"PK\x03\x04" + DOCUMENT.encode()),
        ("locked.pdf", files.encrypted_pdf(files.pdf([TEXT]), user=PASSWORD)),
    ):
        answer = ada.post("/api/upload", files={"file": (name, content, content_type(name))})
        assert answer.status_code == 200, answer.text
    backend.indexed()


def failing_embeddings(backend: Backend, ada: User, _database: Database) -> None:
    """A service that quotes what it refuses, as those that validate with pydantic do."""
    service = rag_tools.service()
    working = service.embeddings
    for refusal in (quoting_422, quoting_400, quoting_500, RuntimeError):
        service.embeddings = Quoting(refusal)
        ada.upload("refused.md", TEXT.encode())
        backend.indexed()
        assert ada.get("/api/search", params={"q": ASKED}).status_code in (422, 503)
        with acting_as(ada.id):
            assert rag_tools.query_uploaded_documents(ASKED).startswith("Error querying documents")
        service.settler.run(at_once=True)
    service.embeddings = working
    service.settler.run(at_once=True)


def refused_requests(backend: Backend, ada: User, _database: Database) -> None:
    """Too long, of the wrong form, without a token, and one that breaks in the middle."""
    assert ada.get("/api/search", params={"q": QUESTION * 2_000}).status_code == 422
    assert ada.get("/api/search", params={"q": ASKED, "k": QUESTION}).status_code == 422
    assert ada.post("/api/chat", json={"message": ASKED, "conversation_id": {QUESTION: QUESTION}}).status_code == 422
    assert ada.post("/api/chat", json={"message": ASKED}).status_code == 503
    assert backend.client.get("/api/search", params={"q": ASKED}).status_code == 401
    assert ada.upload(f"{DOCUMENT}.exe", TEXT.encode()).status_code == 415
    account = {"email": "no address", "username": "x", "password": PASSWORD}
    assert backend.client.post("/auth/register", json=account).status_code == 422
    assert backend.client.get(f"/{QUESTION}", params={"password": PASSWORD}).status_code == 404
    service = rag_tools.service()
    search = service.search
    service.search = lambda *_: 1 / 0  # type: ignore[assignment, method-assign]
    try:
        assert ada.get("/api/search", params={"q": ASKED}).status_code == 500
    finally:
        service.search = search  # type: ignore[method-assign]


def as_on_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Status and every difference explained, as the command shows them."""
    with control_on(folder, monkeypatch) as control:
        with control.connection() as connection:
            diffs = [row[0] for row in connection.execute("SELECT id FROM shadow_diffs")]
        assert diffs
        return json.dumps([status(control), *(explain(control, each) for each in diffs)], default=str)


# -- by themselves


def test_what_a_command_logs_of_a_refused_row_does_not_quote_it(database: Database) -> None:
    with database.connect(Role.APP) as connection, pytest.raises(psycopg.errors.NotNullViolation) as caught:
        connection.execute("INSERT INTO user_facts (user_id, value) VALUES (NULL, %s)", (DOCUMENT,))
    assert DOCUMENT in str(caught.value), "PostgreSQL names the row"
    stream = io.StringIO()
    log_to(stream)
    try:
        dsn = f"postgresql://ada:{PASSWORD}@db/victus"
        structlog.get_logger().error("shadow.compare.failed", dsn=dsn, exc_info=caught.value)
    finally:
        structlog.reset_defaults()
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["exception"][0]["type"] == "NotNullViolation"
    assert not [secret for secret in SECRETS if secret in line]


@pytest.mark.parametrize("kind", ["422", "400", "500", "unknown"])
def test_what_an_embedding_service_says_of_a_text_is_not_repeated(kind: str) -> None:
    refusals: dict[str, Callable[[str], Exception]]
    refusals = {"422": quoting_422, "400": quoting_400, "500": quoting_500, "unknown": RuntimeError}
    with pytest.raises(EmbeddingError) as caught, structlog.testing.capture_logs() as events:
        embed_texts(Quoting(refusals[kind]), [TEXT])
    assert DOCUMENT not in str(caught.value)
    assert events
    assert DOCUMENT not in json.dumps(events, default=str)


# -- parts


class Quoting(Embeddings):
    """Fails, and says of what."""

    def __init__(self, refusal: Callable[[str], Exception]) -> None:
        self.refusal = refusal

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise self.refusal(f"value is not valid, input: {texts[0]!r}")

    def embed_query(self, text: str) -> list[float]:
        raise self.refusal(f"value is not valid, input: {text!r}")


def quoting_422(message: str) -> Exception:
    return openai.UnprocessableEntityError(message, response=response(422), body={"detail": message})


def quoting_400(message: str) -> Exception:
    return openai.BadRequestError(message, response=response(400), body={"message": message, "code": "invalid"})


def quoting_500(message: str) -> Exception:
    return openai.InternalServerError(message, response=response(500), body=None)


def response(code: int) -> httpx2.Response:
    return httpx2.Response(code, request=httpx2.Request("POST", "http://localhost/v1/embeddings"))


def to(database: Database, stage: Stage, percent: int = 0) -> None:
    with database.connect(autocommit=True) as connection:
        set_stage(connection, stage, percent)
    rag_tools.service().refresh()


def ask(ada: User) -> None:
    assert ada.get("/api/search", params={"q": ASKED}).status_code == 200


def compared(database: Database, count: int) -> None:
    wait_until(database, f"(SELECT count(*) FROM shadow_diffs) >= {count}")


@contextmanager
def undone(database: Database, statement: str) -> Iterator[None]:
    """The statement, and afterwards the tables as they were."""
    with psycopg.connect(database.superuser_conninfo(), autocommit=True) as superuser:
        superuser.execute("CREATE TABLE kept AS SELECT * FROM document_chunks")
        superuser.execute(statement)
        try:
            yield
        finally:
            for table in ("document_chunks", "shadow_diffs"):
                superuser.execute(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {table}_check")
                superuser.execute(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {table}_content_check")
                superuser.execute(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {table}_event_check")
            superuser.execute("DELETE FROM document_chunks WHERE document_id IN (SELECT document_id FROM kept)")
            superuser.execute("INSERT INTO document_chunks SELECT * FROM kept")
            superuser.execute("DROP TABLE kept")


@contextmanager
def permissions(database: Database, right: str) -> Iterator[None]:
    with database.connect(Role.OWNER, autocommit=True) as owner:
        owner.execute(f"REVOKE {right} ON document_chunks FROM victus_app")
        yield
        owner.execute(f"GRANT {right} ON document_chunks TO victus_app")


def content_type(name: str) -> str:
    return {
        "md": "text/markdown",
        "pdf": "application/pdf",
        "docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    }[name.rpartition(".")[2]]


def tables_with(database: Database, secrets: tuple[str, ...] | list[str]) -> set[str]:
    with psycopg.connect(database.superuser_conninfo()) as superuser:
        names = [row[0] for row in superuser.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        return {
            name
            for name in names
            for (row,) in superuser.execute(f'SELECT "{name}"::text FROM "{name}"')
            if any(secret in row for secret in secrets)
        }


def folders_with(folder: Path, secrets: tuple[str, ...] | list[str]) -> set[str]:
    return {
        path.relative_to(folder).parts[0]
        for path in folder.rglob("*")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets)
    }
