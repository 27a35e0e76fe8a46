"""Facts that the agent remembers about the user it talks to, in SQL.

The agent reads the answers as text, so their wording is part of the contract, errors included.
Each call is one transaction: a process that dies in it has stored all of the fact or nothing.
"""

from __future__ import annotations

import structlog
from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from src.database import SessionLocal
from src.models import User, UserFact
from src.models.columns import utc_now
from src.utils.context import get_user_id

log = structlog.get_logger(__name__)


def remember_fact(key: str, value: str) -> str:
    """Stores `value` under `key` for the current user, over what was there."""
    try:
        user_id = get_user_id()
        with SessionLocal() as db:
            return _store(db, user_id, key, value)
    except Exception as error:  # the agent needs an answer, whatever went wrong
        log.exception("memory.remember.failed")
        return f"Error remembering fact: {error}"


def recall_fact(key: str) -> str:
    """What is stored under `key` for the current user."""
    try:
        user_id = get_user_id()
        with SessionLocal() as db:
            fact = db.query(UserFact).filter(_is_fact(user_id, key)).first()
            if fact is None:
                return f"Fact not found. I don't have a stored fact for '{key}'."
            return f"The stored fact for '{key}' is: '{fact.value}'"
    except Exception as error:  # the agent needs an answer, whatever went wrong
        log.exception("memory.recall.failed")
        return f"Error recalling fact: {error}"


def _store(db: Session, user_id: int, key: str, value: str) -> str:
    _hold_user(db, user_id)
    fact = db.query(UserFact).filter(_is_fact(user_id, key)).first()
    if fact is None:
        db.add(UserFact(user_id=str(user_id), key=key, value=value))
        db.commit()
        return f"Remembered new fact: '{key}' set to '{value}'."
    fact.value = value
    fact.last_updated = utc_now()
    db.commit()
    return f"Updated fact '{key}' to '{value}'."


def _hold_user(db: Session, user_id: int) -> None:
    """Lets one writer at a time at this user's facts, until the transaction ends.

    The legacy table has no unique constraint on user and key, and may hold duplicates already, so
    the database cannot refuse a second row by itself. A write, not SELECT FOR UPDATE, because it
    serialises on SQLite too; it changes nothing, so inserts that refer to the user do not wait.
    """
    db.execute(
        update(User)
        .where(User.id == user_id)
        .values(last_login=User.last_login)
        .execution_options(synchronize_session=False)
    )


def _is_fact(user_id: int, key: str) -> ColumnElement[bool]:
    """Of duplicates that the legacy release left, the oldest: the one it answered with."""
    oldest = select(func.min(UserFact.id)).where(UserFact.user_id == str(user_id), UserFact.key == key)
    return UserFact.id == oldest.scalar_subquery()
