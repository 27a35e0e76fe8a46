"""POST /api/chat: a message in, the agent's work and words out as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse

from src.agent.events import Event, EventKind
from src.agent.runs import Run, Runner
from src.api.common import MISTAKES, Text, signed_in

MOST_CHARACTERS = 32_000
PING_SECONDS = 15.0
"""Proxies cut connections on which nothing comes; a comment keeps them open."""
LAST = (EventKind.DONE, EventKind.ERROR)

router = APIRouter(prefix="/api/chat", tags=["chat"], dependencies=signed_in, responses=MISTAKES)


class NewMessage(BaseModel):
    message: Annotated[Text, Field(max_length=MOST_CHARACTERS)]
    conversation_id: UUID | None = None
    """None begins a new conversation; the event `status` gives its id."""


@router.post(
    "",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "events `status`, `tool`, `token`, and at last `done` or `error`",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def chat(body: NewMessage, request: Request) -> StreamingResponse:
    """Answer a message in a conversation."""
    events = EventQueue()
    runner: Runner = request.app.state.runner
    conversation_id = None if body.conversation_id is None else str(body.conversation_id)
    run = await run_in_threadpool(runner.start, body.message, conversation_id, events.put)
    return StreamingResponse(
        stream(run, events),
        media_type="text/event-stream",
        # nginx would collect the events otherwise.
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


class EventQueue:
    """Events from the run's thread to the request's loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """From any thread; forgotten where the loop is gone, since nobody listens any more."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def get(self, seconds: float) -> Event | None:
        """The next event; None if none came within `seconds`."""
        try:
            return await asyncio.wait_for(self._queue.get(), seconds)
        except TimeoutError:
            return None


async def stream(run: Run, events: EventQueue, ping: float = PING_SECONDS) -> AsyncGenerator[bytes]:
    """The events as bytes, to the last one. A client that leaves cancels the run."""
    try:
        while True:
            event = await events.get(ping)
            yield b": still here\n\n" if event is None else encoded(event)
            if event is not None and event.kind in LAST:
                return
    finally:
        run.cancelled.set()


def encoded(event: Event) -> bytes:
    """One line of JSON, so nothing in the text can begin another event."""
    return f"event: {event.kind}\ndata: {json.dumps(event.data)}\n\n".encode()
