"""What the routes share: who asks, on which session, and which values they may send."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer
from pydantic import AfterValidator, BaseModel, ConfigDict
from sqlalchemy.orm import Session

from src.auth.accounts import OpenAccounts
from src.auth.tokens import LARGEST_ID
from src.database import get_db
from src.tools.rag_tools.store import normalise_text
from src.utils.context import get_user_id

# Only tells OpenAPI; IdentityMiddleware has read the token before this runs.
_bearer = HTTPBearer(auto_error=False)


async def current_user(request: Request) -> int:
    """The authenticated user, whose account is open. Raises IdentityUnsetError, AccountClosedError."""
    user_id = get_user_id()
    accounts: OpenAccounts = request.app.state.accounts
    if not accounts.is_fresh(user_id):
        await run_in_threadpool(accounts.check, user_id)
    return user_id


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("write something that is not only blanks")
    return text


class Out(BaseModel):
    """An answer, made of a row."""

    model_config = ConfigDict(from_attributes=True)


Db = Annotated[Session, Depends(get_db)]
UserId = Annotated[int, Depends(current_user)]
RowId = Annotated[int, Path(ge=1, le=LARGEST_ID)]
Limit = Annotated[int, Query(ge=1, le=200)]
Offset = Annotated[int, Query(ge=0, le=1_000_000)]
Text = Annotated[str, AfterValidator(normalise_text), AfterValidator(not_blank)]
"""Text that every store can hold: NUL becomes a space."""

signed_in = [Security(_bearer), Depends(current_user)]
"""The dependencies of every router below /api."""
MISTAKES: dict[int | str, dict[str, Any]] = {
    401: {"description": "no valid token"},
    404: {"description": "the user has nothing of that id"},
    503: {"description": "PostgreSQL or another service is away"},
}

__all__ = [
    "MISTAKES",
    "Db",
    "Limit",
    "Offset",
    "Out",
    "RowId",
    "Text",
    "UserId",
    "signed_in",
]
