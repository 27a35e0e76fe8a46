"""Accounts: making one, logging in, and whether one is still open.

Each act is one transaction. `users` has unique e-mail addresses and names, so two registrations at
once leave one account.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import structlog
from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from src.auth.errors import AccountClosedError, AccountExistsError, LoginRefusedError
from src.auth.passwords import hash_password, is_outdated, is_password
from src.auth.throttle import Throttle
from src.auth.tokens import issue_token
from src.config import Settings
from src.models import User
from src.models.columns import utc_now

FRESH_SECONDS = 30.0

log = structlog.get_logger(__name__)


def register(db: Session, email: str, username: str, password: str, full_name: str | None = None) -> User:
    """A new account. Raises AccountExistsError."""
    taken = AccountExistsError("this e-mail address or name is taken: log in, or choose another")
    same = or_(func.lower(User.email) == email.lower(), func.lower(User.username) == username.lower())
    if db.scalars(select(User.id).where(same)).first() is not None:
        raise taken
    user = User(
        email=email.lower(),
        username=username,
        hashed_password=hash_password(password),
        full_name=full_name,
    )
    db.add(user)
    try:
        db.commit()
    except IntegrityError as error:
        db.rollback()
        raise taken from error
    log.info("auth.register.done", user_id=user.id)
    return user


def log_in(db: Session, settings: Settings, throttle: Throttle, login: str, password: str, address: str) -> str:
    """A token for whoever knows the password. `login` is an e-mail address or a name.

    Raises LoginRefusedError, TooManyAttemptsError.
    """
    account = login.lower()
    throttle.begin(account, address)
    user = db.scalars(select(User).where(_is_login(login)).order_by(User.id)).first()
    stored = user.hashed_password if user is not None and user.is_active else None
    db.rollback()  # no connection is held while the hash is computed
    if not is_password(password, stored) or user is None or stored is None:
        log.info("auth.login.refused")
        raise LoginRefusedError("wrong name or password: check both, then try again")
    throttle.succeeded(account, address)
    user.last_login = utc_now()
    if is_outdated(stored):
        user.hashed_password = hash_password(password)
    db.commit()
    log.info("auth.login.done", user_id=user.id)
    key, lifetime = settings.SECRET_KEY.get_secret_value(), timedelta(minutes=settings.TOKEN_MINUTES)
    return issue_token(user.id, key, lifetime)


def _is_login(login: str) -> ColumnElement[bool]:
    """Exactly as written; an e-mail address also in lower case, as new accounts are stored."""
    if "@" in login:
        return User.email.in_([login, login.lower()])
    return User.username == login


class OpenAccounts:
    """Whether the account of a valid token is still open, asked of the database now and then.

    A closed account is locked out within half a minute. While the database is away, an account that
    this process has seen open stays open until its token ends, so that an outage does not stop
    searches that can be answered without it; one that it has never seen is an error of the database.
    Thread-safe.
    """

    def __init__(self, sessions: sessionmaker[Session], clock: Callable[[], float] = time.monotonic) -> None:
        self.sessions = sessions
        self.clock = clock
        self._seen: dict[int, float] = {}
        self._lock = threading.Lock()

    def is_fresh(self, user_id: int) -> bool:
        """Seen open within the last half minute; costs nothing."""
        return self.clock() - self._seen.get(user_id, float("-inf")) < FRESH_SECONDS

    def check(self, user_id: int) -> None:
        """Ask the database. Raises AccountClosedError, or the driver's error about a stranger."""
        begun = self.clock()
        try:
            is_open = self._ask(user_id)
        except (DBAPIError, PoolTimeoutError):
            if user_id not in self._seen:
                raise
            log.warning("auth.account.unchecked", user_id=user_id)
            return
        with self._lock:
            if is_open:
                self._seen[user_id] = begun
            else:
                self._seen.pop(user_id, None)
        if not is_open:
            raise AccountClosedError("this account is closed: ask whoever runs the service")

    def _ask(self, user_id: int) -> bool:
        with self.sessions() as db:
            return bool(db.scalar(select(User.is_active).where(User.id == user_id)))
