"""From what LangChain's agent streams to what whoever asked is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain.agents.middleware.model_call_limit import ModelCallLimitExceededError
from langchain_core.messages import AIMessage, AIMessageChunk, ToolMessage

from src.agent.errors import AgentFailedError
from src.agent.events import Event, EventKind


def told(stream: Iterator[Any]) -> Iterator[Event | str]:
    """Events of what the agent's stream brings, and as plain text the whole answer once it is there."""
    for mode, part in stream:
        match mode, part:
            case "messages", (AIMessageChunk() as chunk, _):
                if text := str(chunk.text):
                    yield Event(EventKind.TOKEN, {"text": text})
            case "updates", dict():
                for update in part.values():
                    for message in (update or {}).get("messages", []):
                        yield from _told(message)


def _told(message: object) -> Iterator[Event | str]:
    match message:
        case AIMessage(tool_calls=[_, *_] as calls):
            for call in calls:
                yield _tool("called", call["name"], call["id"])
        case AIMessage():
            yield str(message.text)
        case ToolMessage():
            yield _tool("returned", message.name, message.tool_call_id)


def _tool(state: str, name: str | None, call_id: str | None) -> Event:
    return Event(EventKind.TOOL, {"state": state, "name": name, "id": call_id})


def explained(error: Exception) -> str:
    """What whoever asked is told of a failure; its cause is in the log."""
    import openai

    match error:
        case AgentFailedError():
            return str(error)
        case openai.AuthenticationError() | openai.PermissionDeniedError() | openai.NotFoundError():
            return "the language model refused our key or is not known: tell whoever runs the service"
        case openai.RateLimitError():
            return "the language model limits our rate: send the message again in a minute"
        case openai.APITimeoutError():
            return "the language model took too long: send the message again"
        case openai.BadRequestError():
            return "the language model refused the conversation: begin a new one, or say less at once"
        case ModelCallLimitExceededError():
            return "the answer took too many steps: ask for less at once"
        case _:
            return "the answer broke off: send the message again"
