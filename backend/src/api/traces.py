"""What the agent did for the user, run by run."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter
from pydantic import Field

from src.agent import traces
from src.api.common import MISTAKES, Db, Limit, Offset, Out, UserId, signed_in

router = APIRouter(prefix="/api/traces", tags=["traces"], dependencies=signed_in, responses=MISTAKES)


class Step(Out):
    """`args` is JSON as text, as the model sent it."""

    tool_name: str | None
    args: str | None
    decision: str | None
    output: str | None
    duration_ms: float | None
    created_at: datetime | None


class Trace(Out):
    id: str
    conversation_id: str | None
    name: str | None
    status: str | None
    started_at: datetime | None
    finished_at: datetime | None
    steps: Annotated[list[Step], Field(default_factory=list)]


@router.get("")
def list_traces(
    db: Db,
    user_id: UserId,
    limit: Limit = 20,
    offset: Offset = 0,
    conversation_id: UUID | None = None,
) -> list[Trace]:
    """The newest first."""
    of = None if conversation_id is None else str(conversation_id)
    return [
        Trace.model_validate(found.trace).model_copy(
            update={"steps": [Step.model_validate(step) for step in found.steps]}
        )
        for found in traces.newest(db, user_id, limit, offset, of)
    ]
