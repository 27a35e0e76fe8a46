"""The life of an uploaded document: received, indexing, ready, failed, deleted.

A document is immutable and its id is never used again; deleting it is final. Each change of status is a
compare-and-set, and `received` is committed before anything else happens, so a process that dies leaves
a row from which `resume` goes on. The row of a deleted document stays, emptied, as its tombstone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from src.tools.rag_tools import faults, kept
from src.tools.rag_tools.chunking import DocumentUnreadableError, Piece, split
from src.tools.rag_tools.embeddings import EmbeddingError, EmbeddingRefusedError, embed_query, embed_texts
from src.tools.rag_tools.giants import LOOK_SECONDS
from src.tools.rag_tools.pgvector_store import (
    Connection,
    PgvectorStore,
    Pool,
    check_extension,
    check_role,
    unavailable,
)
from src.tools.rag_tools.store import Chunk, DocumentGoneError, Hit, StoreError, Vector, chunk_id, normalise_text

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings

log = structlog.get_logger(__name__)

RESUME_SECONDS = 5.0
RESUME_BATCH = 50

RECEIVE = """
INSERT INTO documents (user_id, filename, path, status, created_at, updated_at)
VALUES (%s, %s, %s, 'received', now(), now()) RETURNING id
"""
LOAD = "SELECT id, user_id, filename, path, status, error FROM documents WHERE id = %s"
READY = """
UPDATE documents SET status = 'ready', error = NULL, updated_at = now()
WHERE id = %s AND status IN ('received', 'indexing') RETURNING id
"""
GIVE_UP = """
UPDATE documents SET status = 'failed', error = %s, updated_at = now()
WHERE id = %s AND status IN ('received', 'indexing') RETURNING id
"""
TOMBSTONE = """
UPDATE documents
SET status = 'deleted', filename = '', error = NULL, deleted_at = now(), updated_at = now()
WHERE id = %s AND user_id = %s AND status <> 'deleted' RETURNING path
"""
# Touched as they are taken: no other process takes them for a minute, and those that fail do not hold up the rest.
UNFINISHED = """
UPDATE documents SET updated_at = now() WHERE id IN (
    SELECT id FROM documents
    WHERE status IN ('received', 'indexing') AND updated_at < now() - interval '60 seconds'
    ORDER BY updated_at, id LIMIT %s FOR UPDATE SKIP LOCKED)
RETURNING id, user_id, filename, path, status, error
"""
HALF_DELETED = """
UPDATE documents SET updated_at = now() WHERE id IN (
    SELECT id FROM documents
    WHERE status = 'deleted' AND path <> '' AND updated_at < now() - interval '60 seconds'
    ORDER BY updated_at, id LIMIT %s FOR UPDATE SKIP LOCKED)
RETURNING id, user_id, filename, path, status, error
"""
OF_USER = "SELECT id FROM documents WHERE user_id = %s AND status <> 'deleted' ORDER BY id"
SHARED_PATH = """
SELECT 1 FROM documents WHERE path = %s AND id <> %s AND status NOT IN ('deleted', 'failed') LIMIT 1
"""
UNSTORED = "SELECT id FROM documents WHERE id = ANY (%s) AND status IN ('received', 'indexing')"
HAS_DOCUMENTS = """
SELECT 1 FROM documents WHERE user_id = %s AND status IN ('received', 'indexing', 'ready') LIMIT 1
"""


class DocumentNotFoundError(Exception):
    """The user has no document of that id."""


class UploadMissingError(StoreError):
    """The file of an upload is gone before any store had its chunks."""


@dataclass(frozen=True, slots=True)
class Document:
    """A row of `documents`. `path` is where the upload lies; empty once a deletion is finished."""

    id: int
    user_id: int
    filename: str
    path: str
    status: str
    error: str | None


class Documents:
    """Uploads, searches and deletions of documents on PostgreSQL alone.

    Start it before use (or use it as a context manager), close it after. Thread-safe.
    """

    def __init__(self, pool: Pool, embeddings: Embeddings) -> None:
        self.pool = pool
        self.embeddings = embeddings
        self.pgvector = PgvectorStore(pool)
        self._closing = threading.Event()
        self._loops: list[threading.Thread] = []

    # -- life of the service

    def start(self, *, loops: bool = True) -> None:
        """Check role and extension, then begin to finish what a crash left. Raises StoreError."""
        with unavailable("start"), self.pool.connection() as connection:
            check_role(connection)
            check_extension(connection)
            self.pgvector.giants.load(connection)
        if loops:
            self._loop("resume", RESUME_SECONDS, self.resume)
            self._loop("giants", LOOK_SECONDS, self.look_for_giants)

    def close(self) -> None:
        """Stop the background loops; in-flight calls finish."""
        self._closing.set()
        for thread in self._loops:
            thread.join()

    def __enter__(self) -> Documents:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def status(self) -> dict[str, Any]:
        """What `/readyz` shows: which part is not ready, and why."""
        try:
            with unavailable("status"), self.pool.connection() as connection:
                connection.execute("SELECT 1")
        except StoreError as error:
            return {"ready": False, "reason": str(error)}
        return {"ready": True}

    # -- uploads

    def receive(self, user_id: int, path: Path, filename: str) -> int:
        """Record an upload whose file is at `path`; returns the document's id.

        From here on it is not lost. Raises StoreError (nothing recorded) when PostgreSQL or the disk refuse.
        """
        fsync(path)
        with self._transaction("upload", "upload.intent") as connection:
            row = connection.execute(RECEIVE, (user_id, filename, str(path))).fetchone()
            document_id = int(row[0])  # type: ignore[index]  # INSERT ... RETURNING gives a row
            self._intend(connection, document_id, user_id)
        log.info("document.receive.done", document_id=document_id, user_id=user_id)
        return document_id

    def index(self, document_id: int, *, answered: bool = False) -> None:
        """Parse, chunk, embed and store a received document; returns once its owner can find it.

        `answered`: somebody was told already that it is received; then a store that is away, or an
        embedding service that is, leaves it for later instead of failing it.
        Raises DocumentUnreadableError, EmbeddingError, StoreError, DocumentGoneError.
        """
        document = self.load(document_id)
        try:
            chunks = self.prepare(document)
        except (DocumentUnreadableError, EmbeddingRefusedError) as error:
            return self._abandon(document, error)
        except (EmbeddingError, StoreError) as error:
            return self._leave(document, error) if answered else self._abandon(document, error)
        try:
            self._store(document, chunks, answered=answered)
        except DocumentGoneError:
            self.forget(document)
            raise
        log.info("document.index.done", document_id=document_id, chunks=len(chunks))
        return None

    def prepare(self, document: Document) -> list[Chunk]:
        """The document's chunks with their vectors: those kept from an earlier attempt, else made now.

        Embedding a text twice gives two vectors that differ a little, so the first result is the only one.
        Raises DocumentGoneError for a document that was deleted or given up, UploadMissingError without its file.
        """
        if document.status in ("deleted", "failed"):
            raise gone(document)
        place = kept_path(document)
        return kept.load(place, document.id) or kept.keep(place, self._make_chunks(document))

    def forget(self, document: Document) -> None:
        """Remove what was kept for the stores: they have it, or will never want it."""
        if document.path:
            kept.forget(kept_path(document))

    def load(self, document_id: int) -> Document:
        """The row of that id; DocumentNotFoundError where there is none."""
        with self._transaction("read", "document.load") as connection:
            row = connection.execute(LOAD, (document_id,)).fetchone()
        if row is None:
            raise DocumentNotFoundError(f"there is no document {document_id}")
        return Document(*row)

    # -- reads

    def query(self, user_id: int, text: str, k: int) -> list[Hit]:
        """The k chunks of the user's own nearest to `text`. Raises EmbeddingError, StoreError."""
        return self.search(user_id, embed_query(self.embeddings, text), k)

    def search(self, user_id: int, vector: Vector, k: int) -> list[Hit]:
        return self.pgvector.search(user_id, vector, k)

    def has_documents(self, user_id: int) -> bool:
        with self._transaction("read", "document.any") as connection:
            return connection.execute(HAS_DOCUMENTS, (user_id,)).fetchone() is not None

    # -- deletes

    def delete(self, user_id: int, document_id: int) -> None:
        """Delete the user's document for good; no answer holds it afterwards. Doing it twice is no error.

        Raises DocumentNotFoundError where the user has no such document, StoreError when PostgreSQL is away.
        """
        with self._transaction("delete", "delete.intent") as connection:
            row = connection.execute(TOMBSTONE, (document_id, user_id)).fetchone()
            if row is not None:
                self._withdraw(connection, document_id, user_id)
        document = self.load(document_id)
        if document.user_id != user_id:
            raise DocumentNotFoundError(f"there is no document {document_id}")
        self._erase(document)
        log.info("document.delete.done", document_id=document_id, user_id=user_id)

    def delete_all(self, user_id: int) -> None:
        """Delete every document of the user for good; before the user's own row goes. Raises StoreError."""
        with self._transaction("delete", "delete.list") as connection:
            rows = connection.execute(OF_USER, (user_id,)).fetchall()
        for (document_id,) in rows:
            self.delete(user_id, document_id)

    def look_for_giants(self) -> None:
        """Learn whose searches go by the copy of their vectors, and make it where it is wanted. Raises StoreError."""
        with unavailable("look for giants"):
            self.pgvector.giants.look()

    # -- after a crash

    def resume(self) -> None:
        """Go on with every document that a dead process left unfinished."""
        self._each(UNFINISHED, lambda document: self.index(document.id, answered=True))
        self._resume_deletes()

    def _resume_deletes(self) -> None:
        self._each(HALF_DELETED, self._erase)

    def _each(self, statement: str, step: Callable[[Document], None]) -> None:
        with self._transaction("resume", "resume.list") as connection:
            rows = connection.execute(statement, (RESUME_BATCH,)).fetchall()
        for document in (Document(*row) for row in rows):
            if self._closing.is_set():
                return
            try:
                step(document)
            except (StoreError, EmbeddingError, DocumentUnreadableError) as error:
                log.warning("document.resume.failed", document_id=document.id, error=str(error))
            except Exception as error:  # one document must not hold up the others
                log.exception("document.resume.broken", document_id=document.id, error=str(error))

    def sweep(self, folder: Path) -> None:
        """Remove what a dead process kept in `folder` and had no time to remove. Raises StoreError."""
        found = kept.results_in(folder)
        with self._transaction("sweep", "sweep.list") as connection:
            needed = self._unstored(connection, list(found.values()))
        for path, document_id in found.items():
            if document_id not in needed:
                kept.forget(path)

    # -- what a migration adds to, each called inside the caller's transaction or after its commit

    def _intend(self, connection: Connection, document_id: int, user_id: int) -> None:
        """Recorded with the `received` row."""

    def _withdraw(self, connection: Connection, document_id: int, user_id: int) -> None:
        """Recorded with the tombstone, or with giving up."""

    def _unstored(self, connection: Connection, documents: list[int]) -> set[int]:
        """Those of these documents that may still need the result of embedding them."""
        return {row[0] for row in connection.execute(UNSTORED, (documents,))}

    def _store(self, document: Document, chunks: list[Chunk], *, answered: bool) -> None:
        """Bring the chunks to where they are served from, and set `ready`."""
        try:
            self.pgvector.upsert(document.user_id, document.id, chunks)
        except DocumentGoneError:
            raise
        except StoreError as error:
            if answered:
                raise
            self._abandon(document, error)
        with self._transaction("upload", "upload.ready") as connection:
            changed = connection.execute(READY, (document.id,)).fetchone() is not None
        self._settled(document, changed)
        self.forget(document)

    def _found_ready(self, document: Document) -> None:
        """Acknowledge what another process has made ready; DocumentGoneError where it was deleted."""
        self._settled(document, changed=False)

    def _erase(self, document: Document) -> None:
        self.pgvector.delete(document.user_id, document.id)
        self._erase_files(document)

    # -- parts

    def _make_chunks(self, document: Document) -> list[Chunk]:
        pieces = _read(document)
        vectors = embed_texts(self.embeddings, [piece.content for piece in pieces])
        return [
            Chunk(
                chunk_id(document.id, ordinal, piece.content),
                document.id,
                ordinal,
                piece.content,
                {**piece.metadata, "file_name": document.filename},
                vector,
            )
            for ordinal, (piece, vector) in enumerate(zip(pieces, vectors, strict=True))
        ]

    def _settled(self, document: Document, changed: bool) -> None:
        """Another process may have finished first: finding it `ready` is success, `deleted` is not."""
        if changed:
            return
        now = self.load(document.id)
        if now.status != "ready":
            raise gone(now)

    def _abandon(self, document: Document, error: Exception) -> None:
        """Give up and raise `error`, unless another process has made the document ready meanwhile."""
        if self._give_up(document, str(error)):
            raise error
        self._found_ready(document)

    def _leave(self, document: Document, error: Exception) -> None:
        """Raise `error`, which settling mends, unless another process has brought the document to an end."""
        now = self.load(document.id)
        if now.status in ("deleted", "failed"):
            raise gone(now) from error
        if now.status != "ready":
            raise error
        self._found_ready(document)

    def _give_up(self, document: Document, reason: str) -> bool:
        """Fail a document that nobody was told is received, or that cannot be read; False where it is too late."""
        with self._transaction("upload", "upload.give_up") as connection:
            row = connection.execute(GIVE_UP, (normalise_text(reason), document.id)).fetchone()
            if row is not None:
                self._withdraw(connection, document.id, document.user_id)
        if row is None:
            return False
        self.forget(document)
        log.warning("document.index.failed", document_id=document.id, error=reason)
        return True

    def _erase_files(self, document: Document) -> None:
        """Remove the kept result, and the upload unless another document has the same path.

        The legacy release took file names as they were sent: a path that leads out of its folder is no upload.
        """
        if not document.path:
            return
        self.forget(document)
        with self._transaction("delete", "delete.shared") as connection:
            shared = connection.execute(SHARED_PATH, (document.path, document.id)).fetchone()
        if ".." in Path(document.path).parts:
            log.warning("document.delete.file_left", document_id=document.id)
        elif shared is None:
            with _on_disk(Path(document.path), "delete.file"):
                Path(document.path).unlink(missing_ok=True)
        with self._transaction("delete", "delete.path") as connection:
            connection.execute("UPDATE documents SET path = '' WHERE id = %s", (document.id,))

    @contextlib.contextmanager
    def _transaction(self, doing: str, point: str) -> Iterator[Connection]:
        with (
            unavailable(doing),
            faults.point(point),
            self.pool.connection() as connection,
            connection.transaction(),
        ):
            yield connection

    def _loop(self, name: str, seconds: float, step: Any) -> None:
        """Run `step` every `seconds` in a thread until close; a failure is logged and tried again."""

        def run() -> None:
            while not self._closing.wait(seconds):
                try:
                    step()
                except Exception as error:
                    log.exception(f"documents.{name}.failed", error=str(error))

        thread = threading.Thread(target=run, name=f"documents-{name}", daemon=True)
        self._loops.append(thread)
        thread.start()


def gone(document: Document) -> DocumentGoneError:
    return DocumentGoneError(f"document {document.id} is {document.status}; nothing more is written for it")


def kept_path(document: Document) -> Path:
    """Where the document's parsed and embedded chunks wait until they are stored."""
    return kept.kept_path(Path(document.path), document.id)


def fsync(path: Path) -> None:
    """Make the file and its name in the folder durable. Raises StoreError."""
    with _on_disk(path, "upload.fsync"):
        for place in (path, path.parent):
            _sync(place)


@contextlib.contextmanager
def _on_disk(path: Path, point: str) -> Iterator[None]:
    """One operation on the file; what the system refuses is told as a StoreError."""
    try:
        with faults.point(point):
            yield
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror}; free the disk, or correct the path or its rights, then try again"
        ) from error


def _read(document: Document) -> list[Piece]:
    """The pieces of the uploaded file. Raises DocumentUnreadableError, StoreError where the disk is at fault."""
    path = Path(document.path)
    with _on_disk(path, "upload.parse"):
        try:
            return split(path, document.path)
        except FileNotFoundError as error:
            raise UploadMissingError(
                f"{path}, the upload of document {document.id}, is not there;"
                " put it back and settle again, or delete the document"
            ) from error


def _sync(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
