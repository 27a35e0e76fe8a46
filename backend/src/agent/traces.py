"""A row in `traces` for each run of the agent, and one in `trace_steps` for each tool call.

Each write is a transaction of its own. A process that dies in a run leaves a trace that says `running`
and was never finished, with the steps that it got to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from src.models import Trace, TraceStep
from src.models.columns import new_id, utc_now


class Outcome(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Decision(StrEnum):
    """What became of a tool call that the model asked for."""

    EXECUTED = "executed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Recorded:
    trace: Trace
    steps: list[TraceStep]


def begin(db: Session, user_id: int, conversation_id: str, model: str) -> str:
    """A new trace, committed; returns its id."""
    trace_id = new_id()
    db.add(
        Trace(
            id=trace_id,
            user_id=user_id,
            conversation_id=conversation_id,
            name="chat",
            status=Outcome.RUNNING,
            metadata_json=json.dumps({"model": model}),
        )
    )
    db.commit()
    return trace_id


def finish(db: Session, trace_id: str, outcome: Outcome) -> None:
    db.execute(update(Trace).where(Trace.id == trace_id).values(status=outcome, finished_at=utc_now()))
    db.commit()


def newest(db: Session, user_id: int, limit: int, offset: int, conversation_id: str | None = None) -> list[Recorded]:
    """The user's traces with their steps in order, the newest trace first."""
    wanted = select(Trace).where(Trace.user_id == user_id)
    if conversation_id is not None:
        wanted = wanted.where(Trace.conversation_id == conversation_id)
    traces = db.scalars(wanted.order_by(Trace.started_at.desc(), Trace.id).limit(limit).offset(offset)).all()
    steps: Sequence[TraceStep] = db.scalars(
        select(TraceStep).where(TraceStep.trace_id.in_([trace.id for trace in traces])).order_by(TraceStep.id)
    ).all()
    return [Recorded(one, [step for step in steps if step.trace_id == one.id]) for one in traces]
