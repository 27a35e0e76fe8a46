"""Document search: what the agent and the API call. Identity comes from the request's context.

One service per process, opened by `lifespan` (or by the first call) and closed at its end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.tools.rag_tools.embeddings import EmbeddingError, LaterEmbeddings, embedder_later
from src.tools.rag_tools.migration.router import Router as Service
from src.utils.context import get_user_id

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings

TOP_K = 3
WARM_SECONDS = 1.0

_lock = threading.Lock()
_service: Service | None = None


class IdentityMismatchError(Exception):
    """A call named another user than the one who is authenticated."""


def open_service(embeddings: Embeddings | None = None) -> Service:
    """Make and start this process's service. Raises DocumentsNeedPostgresError on SQLite, StoreError."""
    from src.config import settings
    from src.database import Role, conninfo
    from src.tools.rag_tools.pgvector_store import open_pool

    with ExitStack() as undone:
        pool = undone.enter_context(open_pool(conninfo(Role.APP), settings.DATABASE_POOL_SIZE, name="documents"))
        made = embeddings or embedder_later()
        service = Service(pool, made)
        undone.callback(service.close)
        service.start()
        service.sweep(settings.UPLOAD_DIR)
        undone.pop_all()
    if isinstance(made, LaterEmbeddings):
        # Soon after it is ready: the first question should not wait for what a start does not.
        warming = threading.Timer(WARM_SECONDS, _warm, (made,))
        warming.daemon = True
        warming.start()
    return service


def _warm(embeddings: LaterEmbeddings) -> None:
    """What is wrong with the provider is told to whoever asks it."""
    with suppress(EmbeddingError):
        embeddings.warm()


@contextmanager
def lifespan(embeddings: Embeddings | None = None) -> Iterator[Service]:
    """The service for as long as the backend runs; closing drains, saves and leaves the fleet."""
    global _service
    service = open_service(embeddings)
    _service = service
    try:
        yield service
    finally:
        _service = None
        with service.pool:
            service.close()


def service() -> Service:
    """The running service; opened by the first caller outside a `lifespan`."""
    global _service
    with _lock:
        if _service is None:
            _service = open_service()
        return _service


def status() -> dict[str, Any]:
    """Whether documents can be served, and which part is not ready."""
    if _service is None:
        return {"ready": False, "reason": "the document service has not started"}
    return _service.status()


def update_vector_store(file_path: str, user_id: int | None = None) -> int:
    """Make the file at `file_path` searchable for its owner; returns the document's id once it is.

    `user_id` is for jobs outside a request; inside one it must be the authenticated user.
    Raises IdentityUnsetError, DocumentUnreadableError, EmbeddingError, StoreError.
    """
    owner, path = _owner(user_id), Path(file_path)
    documents = service()
    document_id = documents.receive(owner, path, path.name)
    documents.index(document_id)
    return document_id


def query_uploaded_documents(query: str) -> str:
    """Search the user's uploaded documents; returns the relevant passages with their file names."""
    try:
        user_id, documents = get_user_id(), service()
        hits = documents.query(user_id, query, TOP_K)
        if not hits and not documents.has_documents(user_id):
            return "No documents have been uploaded yet. Please upload a document first."
    except Exception as error:  # noqa: BLE001 - the boundary: the agent relies on text, whatever failed
        return f"Error querying documents: {error}"
    passages = (f"--- (Source: {hit.metadata.get('file_name')}) ---\n{hit.content}" for hit in hits)
    return "Relevant information from documents:\n" + "\n\n".join(passages)


def delete_document(document_id: int) -> None:
    """Delete one of the user's documents for good. Raises IdentityUnsetError, DocumentNotFoundError."""
    user_id = get_user_id()
    service().delete(user_id, document_id)


def delete_all_documents() -> None:
    """Delete all of the user's documents for good, as when the user leaves. Raises IdentityUnsetError."""
    service().delete_all(get_user_id())


def _owner(user_id: int | None) -> int:
    from src.utils.context import IdentityUnsetError

    try:
        authenticated = get_user_id()
    except IdentityUnsetError:
        if user_id is None:
            raise
        return user_id
    if user_id not in (None, authenticated):
        raise IdentityMismatchError(f"user {authenticated} cannot upload for user {user_id}")
    return authenticated
