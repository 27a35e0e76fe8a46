"""The record of each tool call, written where LangChain's agent makes it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import structlog
from langchain.agents.middleware import AgentMiddleware
from langchain.agents.middleware.types import AgentState, ToolCallRequest
from langchain_core.messages import ToolMessage
from langgraph.types import Command
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from src.agent.traces import Decision
from src.models import TraceStep
from src.tools.rag_tools.store import normalise_text

LONGEST_OUTPUT = 20_000

log = structlog.get_logger(__name__)


class StepRecorder(AgentMiddleware[AgentState[Any], Any, Any]):
    """Writes a step for each tool call. A step that cannot be written is logged and missing: the
    answer matters more than its record."""

    def __init__(self, sessions: sessionmaker[Session], trace_id: str) -> None:
        super().__init__()
        self.sessions = sessions
        self.trace_id = trace_id

    def wrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]],
    ) -> ToolMessage | Command[Any]:
        begun = time.perf_counter()
        try:
            answer = handler(request)
        except Exception as error:
            self._write(request, Decision.FAILED, type(error).__name__, begun)
            raise
        failed = isinstance(answer, ToolMessage) and answer.status == "error"
        output = str(answer.text) if isinstance(answer, ToolMessage) else None
        self._write(request, Decision.FAILED if failed else Decision.EXECUTED, output, begun)
        return answer

    def _write(self, request: ToolCallRequest, decision: Decision, output: str | None, begun: float) -> None:
        name = normalise_text(request.tool_call["name"])
        step = TraceStep(
            trace_id=self.trace_id,
            tool_name=name,
            args=json.dumps(request.tool_call["args"], default=str),
            decision=decision,
            output=None if output is None else normalise_text(output)[:LONGEST_OUTPUT],
            duration_ms=(time.perf_counter() - begun) * 1000,
        )
        try:
            with self.sessions() as db:
                db.add(step)
                db.commit()
        except SQLAlchemyError as error:
            log.warning("agent.step.unrecorded", trace_id=self.trace_id, tool=name, kind=type(error).__name__)
