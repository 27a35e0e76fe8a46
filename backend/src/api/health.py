"""Whether this process lives, and whether it can serve."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker
from starlette.responses import JSONResponse

from src.database import DatabaseError
from src.tools import rag_tools

router = APIRouter(tags=["operations"])

Part = dict[str, Any]


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """200 for as long as the process answers at all; a supervisor restarts it otherwise."""
    return {"status": "alive"}


@router.get("/readyz", responses={503: {"description": "a part is not ready; the answer says which"}})
def readyz(request: Request) -> JSONResponse:
    """200 when every part can serve; else 503, with the parts and their reasons."""
    parts = {
        "database": database_part(request.app.state.sessions),
        "documents": documents_part(request.app.state.documents_off),
    }
    ready = all(part["ready"] for part in parts.values())
    return JSONResponse({"ready": ready, "parts": parts}, status_code=200 if ready else 503)


def database_part(sessions: sessionmaker[Session]) -> Part:
    try:
        with sessions() as db:
            db.execute(text("SELECT 1"))
    except (SQLAlchemyError, DatabaseError) as error:
        return {"ready": False, "reason": f"the database cannot be asked ({type(error).__name__})"}
    return {"ready": True}


def documents_part(off: str | None) -> Part:
    """`off`: why documents are not served here at all, or None."""
    return {"ready": False, "reason": off} if off else rag_tools.status()
