"""The chat part of OpenAI's protocol on the loopback server: scripted answers, streamed or whole.

    with ChatServer() as server:
        server.script(Call("recall_fact", key="city"), Say("You live in Graz."))
        ... the real client with base_url=server.base_url ...
        assert server.chats[1].body["messages"][-1]["role"] == "tool"

Faults (`server.misbehave`) are those of the embeddings. A request with nothing left in the script is
answered with `server.default`.
"""

from __future__ import annotations

import json
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.support.openai_server import (
    ROUTES,
    Embed,
    Fault,
    OpenAIServer,
    Reply,
    Request,
    hashed_vectors,
)

CHAT = "/v1/chat/completions"
CREATED = 1_700_000_000


@dataclass(frozen=True)
class Say:
    """The model says this; streamed, a word at a time."""

    text: str

    def message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": self.text}

    def deltas(self) -> Iterator[dict[str, Any]]:
        words = self.text.split(" ")
        for number, word in enumerate(words):
            yield {"content": word if number == 0 else f" {word}"}

    finish_reason = "stop"


class Call:
    """The model calls a tool with these arguments; several calls in one turn with `also`."""

    finish_reason = "tool_calls"

    def __init__(self, name: str, /, *, also: Sequence[Call] = (), **args: Any) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = [(name, args)]
        for other in also:
            self.calls += other.calls

    def _entries(self) -> list[dict[str, Any]]:
        return [
            {
                "id": f"call_{uuid.uuid4().hex}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(args)},
            }
            for name, args in self.calls
        ]

    def message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": None, "tool_calls": self._entries()}

    def deltas(self) -> Iterator[dict[str, Any]]:
        for index, entry in enumerate(self._entries()):
            yield {"tool_calls": [{"index": index, **entry}]}


Turn = Say | Call


class ChatServer(OpenAIServer):
    """OpenAI's server with chat; `chats` are the chat requests it got."""

    def __init__(self, embed: Embed = hashed_vectors, api_key: str = "sk-test") -> None:
        super().__init__(embed, api_key)
        self.default: Turn = Say("All right.")
        self._script: deque[Turn] = deque()

    def script(self, *turns: Turn) -> None:
        """The next chat requests that are answered at all get these turns, in this order."""
        self._script.extend(turns)

    def __enter__(self) -> ChatServer:
        super().__enter__()
        return self

    @property
    def chats(self) -> list[Request]:
        return [request for request in self.requests if request.path == CHAT]

    def turn(self) -> Turn:
        return self._script.popleft() if self._script else self.default


def _chat(server: OpenAIServer, request: Request, fault: Fault) -> Reply:
    assert isinstance(server, ChatServer)
    turn = server.turn()
    model = request.body["model"]
    if request.body.get("stream"):
        return Reply(200, b"".join(_events(turn, model)), {"X-Stream": "yes"})
    choice = {"index": 0, "message": turn.message(), "finish_reason": turn.finish_reason}
    whole = {**_frame("chat.completion", model), "choices": [choice], "usage": _usage()}
    return Reply(200, json.dumps(whole).encode())


def _events(turn: Turn, model: str) -> Iterator[bytes]:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *turn.deltas()]
    for delta in deltas:
        yield _event(model, delta, None)
    yield _event(model, {}, turn.finish_reason)
    yield b"data: [DONE]\n\n"


def _event(model: str, delta: dict[str, Any], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {**_frame("chat.completion.chunk", model), "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n".encode()


def _frame(kind: str, model: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": CREATED, "model": model}


def _usage() -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


ROUTES["POST", CHAT] = _chat
