"""One run of the agent: from the user's message to the stored answer, told as events while it goes on.

The user's message and the trace are committed before the model is asked; the answer is committed once
it is whole, before `done` is told. A run that fails, is cancelled or dies with its process has stored no
answer, and the message can be sent again. A run takes a thread of its own, with the identity of the
request that it belongs to.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

import structlog
from sqlalchemy.orm import Session, sessionmaker

from src.agent import conversations, traces
from src.agent.errors import AgentBusyError, AgentFailedError, AgentUnavailableError
from src.agent.events import Emit, Event, EventKind
from src.agent.memory import Context, ConversationContextManager
from src.agent.models import chat_model, check_available, summarise
from src.agent.traces import Outcome
from src.config import Settings
from src.models import MessageRole, User
from src.tools.rag_tools.store import normalise_text
from src.utils.context import get_user_id

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """A message that was accepted and not answered yet."""

    user_id: int
    conversation_id: str
    message_id: str
    trace_id: str
    cancelled: threading.Event = field(default_factory=threading.Event)


def prepare(settings: Settings) -> None:
    """Import what a run needs, before there are threads: two threads that first import packages with
    circular imports may each see the other's half of one. Nothing where chat is not set up.
    """
    try:
        chat_model(settings)
    except AgentUnavailableError:
        return
    for module in ("agent", "steps", "stream"):
        import_module(f"src.agent.{module}")


class Runner:
    """The runs of this process, at most `settings.CHAT_WORKERS` at once; one more is refused.

    Close it after use: runs that go on are cancelled, and waited for.
    """

    def __init__(
        self,
        sessions: sessionmaker[Session],
        settings: Settings,
        ended: Callable[[Outcome], None] = lambda _outcome: None,
    ) -> None:
        self.sessions = sessions
        self.settings = settings
        self.ended = ended
        self._room = threading.BoundedSemaphore(settings.CHAT_WORKERS)
        self._threads = ThreadPoolExecutor(settings.CHAT_WORKERS, thread_name_prefix="chat")
        self._runs: dict[str, Run] = {}

    def close(self) -> None:
        for run in list(self._runs.values()):
            run.cancelled.set()
        self._threads.shutdown(wait=True)

    def start(self, text: str, conversation_id: str | None, emit: Emit) -> Run:
        """Accept the current user's message and answer it in the background, telling `emit`.

        Raises AgentUnavailableError, AgentBusyError, ConversationNotFoundError.
        """
        check_available(self.settings)
        if not self._room.acquire(blocking=False):
            raise AgentBusyError(
                f"{self.settings.CHAT_WORKERS} answers are being written already: try again in a moment"
            )
        try:
            run = self._accept(get_user_id(), text, conversation_id)
            self._runs[run.trace_id] = run
            self._threads.submit(contextvars.copy_context().run, self._answer, run, emit)
        except BaseException:
            self._room.release()
            raise
        return run

    def _accept(self, user_id: int, text: str, conversation_id: str | None) -> Run:
        with self.sessions() as db:
            if conversation_id is None:
                conversation_id = conversations.create(db, user_id).id
            message_id = conversations.add_message(db, user_id, conversation_id, MessageRole.USER, text)
            trace_id = traces.begin(db, user_id, conversation_id, self.settings.CHAT_MODEL)
        return Run(user_id, conversation_id, message_id, trace_id)

    def _answer(self, run: Run, emit: Emit) -> None:
        """The thread of a run."""
        outcome = Outcome.FAILED
        try:
            emit(_status("started", run))
            outcome, last = self._outcome(run, emit)
        except Exception as error:  # the boundary: whoever asked is told
            from src.agent.stream import explained

            log.exception("agent.run.failed", trace_id=run.trace_id)
            last = Event(EventKind.ERROR, {"detail": explained(error)})
        finally:
            self._runs.pop(run.trace_id, None)
            self._room.release()
            self._finish(run, outcome)
        emit(last)

    def _outcome(self, run: Run, emit: Emit) -> tuple[Outcome, Event]:
        text = self._write(run, emit)
        if run.cancelled.is_set():
            detail = "the answer was broken off: send the message again"
            return Outcome.CANCELLED, Event(EventKind.ERROR, {"detail": detail})
        with self.sessions() as db:
            message_id = conversations.add_message(
                db, run.user_id, run.conversation_id, MessageRole.ASSISTANT, text,
                {"trace_id": run.trace_id},
            )  # fmt: skip
        done = {"conversation_id": run.conversation_id, "message_id": message_id, "trace_id": run.trace_id}
        return Outcome.DONE, Event(EventKind.DONE, done)

    def _write(self, run: Run, emit: Emit) -> str:
        """Asks the model, telling its words and tool calls; returns the answer."""
        # LangChain takes seconds to import, which only who can chat should pay; see `prepare`.
        from src.agent.agent import as_messages, build_agent
        from src.agent.steps import StepRecorder
        from src.agent.stream import told

        messages = as_messages(self._context(run))
        agent = build_agent(chat_model(self.settings), [StepRecorder(self.sessions, run.trace_id)])
        emit(_status("answering", run))
        answer = ""
        stream = agent.stream({"messages": messages}, stream_mode=["messages", "updates"])
        for event in told(stream):
            if run.cancelled.is_set():
                break
            match event:
                case Event():
                    emit(event)
                case str():
                    answer = event
        if not answer and not run.cancelled.is_set():
            raise AgentFailedError("the model gave no answer: send the message again")
        return normalise_text(answer)

    def _context(self, run: Run) -> Context:
        with self.sessions() as db:
            user = db.get_one(User, run.user_id)
            writer = partial(summarise, settings=self.settings)
            return ConversationContextManager(db, user, run.conversation_id, writer).get_context()

    def _finish(self, run: Run, outcome: Outcome) -> None:
        self.ended(outcome)
        try:
            with self.sessions() as db:
                traces.finish(db, run.trace_id, outcome)
        except Exception:  # the boundary: the run itself is over
            log.exception("agent.trace.unfinished", trace_id=run.trace_id)
        log.info("agent.run.ended", trace_id=run.trace_id, outcome=outcome)


def _status(state: str, run: Run) -> Event:
    data = {
        "state": state,
        "conversation_id": run.conversation_id,
        "message_id": run.message_id,
        "trace_id": run.trace_id,
    }
    return Event(EventKind.STATUS, data)
