"""Documents: upload, list, look at, delete, search. All of them need PostgreSQL."""

from __future__ import annotations

from datetime import datetime
from pathlib import PurePath
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Query, Request, UploadFile
from pydantic import AfterValidator, BaseModel
from sqlalchemy import select

from src.api import metrics
from src.api.common import (
    MISTAKES,
    Db,
    Limit,
    Offset,
    Out,
    RowId,
    UserId,
    not_blank,
    signed_in,
)
from src.api.errors import NotFoundError
from src.api.indexing import Indexing
from src.api.upload_files import display_name, stored, suffix_for
from src.config import Settings
from src.models import Document as Row
from src.models import DocumentStatus
from src.tools import rag_tools
from src.tools.rag_tools.documents import Documents
from src.tools.rag_tools.store import Hit, normalise_text

LONGEST_QUERY = 8_000
MOST_HITS = 20
DETAIL = "File received and is being processed in the background."
PROGRESS = {
    DocumentStatus.RECEIVED: 10,
    DocumentStatus.INDEXING: 50,
    DocumentStatus.READY: 100,
    DocumentStatus.FAILED: 100,
}

log = structlog.get_logger(__name__)

Question = Annotated[
    str,
    Query(min_length=1, max_length=LONGEST_QUERY),
    AfterValidator(normalise_text),
    AfterValidator(not_blank),
]


def documents() -> Documents:
    """The running service. Raises DocumentsNeedPostgresError on SQLite."""
    return rag_tools.service()


Service = Annotated[Documents, Depends(documents)]

router = APIRouter(
    prefix="/api",
    tags=["documents"],
    dependencies=[*signed_in, Depends(documents)],
    responses=MISTAKES,
)


class Uploaded(BaseModel):
    """The first three are the legacy answer."""

    status: str = "success"
    filename: str
    detail: str = DETAIL
    document_id: int


class Document(Out):
    """`progress`: percent. `reason`: why it failed and what to do, else null."""

    id: int
    filename: str
    status: DocumentStatus
    progress: int
    reason: str | None
    created_at: datetime | None
    updated_at: datetime


class Found(BaseModel):
    """`similarity`: the cosine, at most 1; the nearest first."""

    document_id: int
    file_name: str
    content: str
    similarity: float


@router.post(
    "/upload",
    responses={413: {"description": "too large"}, 415: {"description": "not a type we read"}},
)
def upload(file: UploadFile, request: Request, user_id: UserId, service: Service) -> Uploaded:
    """Keep a PDF, DOCX, text or Markdown file. Once this answers it is not lost, whatever happens."""
    settings: Settings = request.app.state.settings
    name = display_name(file.filename)
    suffix = suffix_for(name, file.content_type)
    with stored(file.file, settings.UPLOAD_DIR, suffix, settings.MAX_UPLOAD_BYTES) as path:
        document_id = service.receive(user_id, path, name)
    metrics.UPLOADS.labels("received").inc()
    indexing: Indexing = request.app.state.indexing
    indexing.submit(service, document_id)
    return Uploaded(filename=name, document_id=document_id)


@router.get("/documents")
def list_documents(db: Db, user_id: UserId, limit: Limit = 100, offset: Offset = 0) -> list[Document]:
    """The user's documents, the newest first; deleted ones are gone."""
    rows = db.scalars(
        select(Row)
        .where(Row.user_id == user_id, Row.status != DocumentStatus.DELETED)
        .order_by(Row.id.desc())
        .limit(limit)
        .offset(offset)
    )
    return [as_document(row) for row in rows]


@router.get("/documents/{document_id}")
def show_document(document_id: RowId, db: Db, user_id: UserId) -> Document:
    """How far the document is, and why it failed if it did."""
    own = (Row.id == document_id, Row.user_id == user_id, Row.status != DocumentStatus.DELETED)
    row = db.scalars(select(Row).where(*own)).first()
    if row is None:
        raise NotFoundError(f"there is no document {document_id}")
    return as_document(row)


@router.delete("/documents/{document_id}", status_code=204)
def delete_document(document_id: RowId, user_id: UserId, service: Service) -> None:
    """Delete the document for good; no answer holds it afterwards."""
    service.delete(user_id, document_id)


@router.get("/search")
def search(
    q: Question, user_id: UserId, service: Service, k: Annotated[int, Query(ge=1, le=MOST_HITS)] = 3
) -> list[Found]:
    """The passages of the user's own documents that are nearest to the question in meaning."""
    return [as_found(hit) for hit in service.query(user_id, q, k)]


def as_document(row: Row) -> Document:
    status = DocumentStatus(row.status)
    reason = row.error if status is DocumentStatus.FAILED else None
    return Document(
        id=row.id,
        filename=row.filename,
        status=status,
        progress=PROGRESS[status],
        # The file has a name of ours on disk, which would tell its owner nothing.
        reason=reason and reason.replace(PurePath(row.path).name or "\0", row.filename),
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def as_found(hit: Hit) -> Found:
    return Found(
        document_id=hit.document_id,
        file_name=str(hit.metadata.get("file_name", "")),
        content=hit.content,
        similarity=hit.similarity,
    )
