"""POST /auth/register and POST /auth/login."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field, StringConstraints
from sqlalchemy.orm import Session

from src.api.common import Db, Out, Text
from src.auth import accounts
from src.auth.passwords import MAXIMUM_LENGTH, MINIMUM_LENGTH

router = APIRouter(prefix="/auth", tags=["accounts"])

_ADDRESS = re.compile(r"[^\s@\x00-\x1f]+@[^\s@\x00-\x1f]+\.[^\s@.\x00-\x1f]+")


def address(text: str) -> str:
    """Whether an address exists only a message to it can show; this keeps out what cannot be one."""
    if not _ADDRESS.fullmatch(text):
        raise ValueError("this is no e-mail address")
    return text


Email = Annotated[Text, Field(max_length=254), AfterValidator(address)]
# No @, so that no name can pass for somebody's address.
Username = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{1,63}$")]
Password = Annotated[str, StringConstraints(min_length=MINIMUM_LENGTH, max_length=MAXIMUM_LENGTH)]


class Registration(BaseModel):
    email: Email
    username: Username
    password: Password
    full_name: Annotated[Text | None, Field(max_length=200)] = None


class Account(Out):
    id: int
    email: str
    username: str


class Login(BaseModel):
    username: Annotated[Text, Field(max_length=254)]
    """The name or the e-mail address."""
    password: Annotated[str, StringConstraints(max_length=MAXIMUM_LENGTH)]


class Token(BaseModel):
    access_token: str
    token_type: str = "bearer"  # noqa: S105 - the scheme's name
    expires_in: int


@router.post("/register", status_code=201, responses={409: {"description": "taken"}})
def register(body: Registration, db: Db) -> Account:
    """A new account; log in to get a token."""
    user = accounts.register(db, body.email, body.username, body.password, body.full_name)
    return Account.model_validate(user)


@router.post(
    "/login",
    responses={401: {"description": "wrong name or password"}, 429: {"description": "too many failures"}},
)
def login(body: Login, db: Db, request: Request) -> Token:
    """A bearer token; send it as `Authorization: Bearer <token>`."""
    token = _log_in(db, request, body)
    return Token(access_token=token, expires_in=request.app.state.settings.TOKEN_MINUTES * 60)


def _log_in(db: Session, request: Request, body: Login) -> str:
    state, address = request.app.state, request.client.host if request.client else "unknown"
    return accounts.log_in(db, state.settings, state.throttle, body.username, body.password, address)
