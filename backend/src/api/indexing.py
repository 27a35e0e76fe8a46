"""Making uploads searchable after they were acknowledged, on a few threads of this process.

An upload's intent is committed before it gets here, so this is only for speed: whatever fails here, or
is still waiting when the process ends, the settle loop of some process does later.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import structlog
from structlog.contextvars import bound_contextvars, get_contextvars

from src.tools.rag_tools.chunking import DocumentUnreadableError
from src.tools.rag_tools.documents import DocumentNotFoundError, Documents
from src.tools.rag_tools.embeddings import EmbeddingError
from src.tools.rag_tools.store import StoreError

EXPECTED = (DocumentUnreadableError, DocumentNotFoundError, EmbeddingError, StoreError)

log = structlog.get_logger(__name__)


class Indexing:
    """The threads. Close it before the document service."""

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="index")

    def close(self) -> None:
        """What has begun is finished; what waits is left to the settle loop."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, documents: Documents, document_id: int) -> None:
        """Index the document soon; returns at once, and never fails: the upload is safe already."""
        request_id = get_contextvars().get("request_id")
        try:
            self._threads.submit(_index, documents, document_id, request_id)
        except RuntimeError:
            log.info("upload.index.left", document_id=document_id)  # closing


def _index(documents: Documents, document_id: int, request_id: str | None) -> None:
    with bound_contextvars(request_id=request_id):
        try:
            documents.index(document_id, answered=True)
        except EXPECTED as error:
            log.warning("upload.index.failed", document_id=document_id, kind=type(error).__name__)
        except Exception:  # the boundary of the thread: nobody else sees it
            log.exception("upload.index.broken", document_id=document_id)
