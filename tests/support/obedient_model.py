"""A model on the loopback server that obeys whatever it reads: the worst that a prompt injection can do.

Wherever the last message of the conversation, or of a tool, says `CALL tool {"argument": "value"}`, the
model calls that tool with those arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from tests.support.openai_chat import Call, ChatServer, Say, Turn

_ORDER = re.compile(r"CALL (\w+) (\{[^{}]*\})")


def order(tool: str, **args: Any) -> str:
    """The words that make the model call the tool."""
    return f"CALL {tool} {json.dumps(args)}"


class ObedientServer(ChatServer):
    """Answers by what it was told; there is nothing to script."""

    def __enter__(self) -> ObedientServer:
        super().__enter__()
        return self

    def turn(self) -> Turn:
        body = self.chats[-1].body
        calls = list(_orders(body["messages"])) if body.get("tools") else []
        if not calls:
            return Say("Done.")
        first, *others = [Call(name, **args) for name, args in calls]
        return Call(*first.calls[0][:1], also=others, **first.calls[0][1])


def _orders(messages: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of what came since the model spoke last."""
    for message in reversed(messages):
        if message["role"] == "assistant":
            return
        for name, args in _ORDER.findall(str(message["content"])):
            yield name, json.loads(unquote(args))  # a quote in a file's name arrives as %22
