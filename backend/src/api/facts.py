"""The facts that the agent keeps about the user: to look at, and to take back."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter
from sqlalchemy import delete, select

from src.api.common import MISTAKES, Db, Limit, Offset, Out, RowId, UserId, signed_in
from src.api.errors import NotFoundError
from src.models import UserFact

router = APIRouter(prefix="/api/facts", tags=["facts"], dependencies=signed_in, responses=MISTAKES)


class Fact(Out):
    id: int
    key: str
    value: str | None
    last_updated: datetime | None


@router.get("")
def list_facts(db: Db, user_id: UserId, limit: Limit = 100, offset: Offset = 0) -> list[Fact]:
    rows = db.scalars(
        select(UserFact).where(UserFact.user_id == str(user_id)).order_by(UserFact.id).limit(limit).offset(offset)
    )
    return [Fact.model_validate(row) for row in rows]


@router.delete("/{fact_id}", status_code=204)
def delete_fact(fact_id: RowId, db: Db, user_id: UserId) -> None:
    own = (UserFact.id == fact_id, UserFact.user_id == str(user_id))
    found = db.scalar(delete(UserFact).where(*own).returning(UserFact.id))
    db.commit()
    if found is None:
        raise NotFoundError(f"there is no fact {fact_id}")
