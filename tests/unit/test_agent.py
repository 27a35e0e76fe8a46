"""The agent as it is made: its tools, what the model may say to them, and whom they act for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from pydantic import SecretStr

from src.agent.agent import MOST_MODEL_CALLS, SYSTEM_PROMPT, as_messages, build_agent
from src.agent.errors import AgentUnavailableError
from src.agent.events import EventKind
from src.agent.memory import Context, Said
from src.agent.models import chat_model, check_available, summarise
from src.agent.stream import explained, told
from src.agent.tools import agent_tools
from src.config import Settings
from src.models.columns import utc_now
from src.utils.context import IdentityUnsetError, acting_as, get_user_id
from tests.support.openai_chat import Call, ChatServer, Say

ADA = 7
TOOLS = {
    "remember_fact": "src.tools.memory_tools.remember_fact",
    "recall_fact": "src.tools.memory_tools.recall_fact",
    "query_uploaded_documents": "src.tools.rag_tools.query_uploaded_documents",
}


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running


@pytest.fixture
def settings(server: ChatServer) -> Settings:
    return Settings(OPENAI_API_KEY=SecretStr(server.api_key), OPENAI_BASE_URL=server.base_url)


def ask(settings: Settings, text: str = "Hello") -> list[object]:
    """What the agent tells, as the user ADA."""
    agent = build_agent(chat_model(settings))
    with acting_as(ADA):
        stream = agent.stream({"messages": [HumanMessage(text)]}, stream_mode=["messages", "updates"])
        return list(told(stream))


def said(role: str, content: str) -> Said:
    return Said("id", role, content, utc_now())


def test_the_agent_has_the_three_tools_of_the_old_one() -> None:
    assert [tool.name for tool in agent_tools()] == list(TOOLS)


def test_no_tool_takes_a_user() -> None:
    arguments = {tool.name: set(tool.args) for tool in agent_tools()}
    assert arguments == {
        "remember_fact": {"key", "value"},
        "recall_fact": {"key"},
        "query_uploaded_documents": {"query"},
    }


def test_the_model_is_offered_the_tools_and_told_the_rules(server: ChatServer, settings: Settings) -> None:
    ask(settings)
    (request,) = server.chats
    assert [tool["function"]["name"] for tool in request.body["tools"]] == list(TOOLS)
    assert request.body["messages"][0] == {"role": "system", "content": SYSTEM_PROMPT}
    assert "user_id" not in str(request.body)
    assert request.body["model"] == "gpt-4o"


def test_the_answer_comes_word_by_word_and_whole_at_the_end(server: ChatServer, settings: Settings) -> None:
    server.script(Say("You live in Graz."))
    *events, answer = ask(settings)
    assert answer == "You live in Graz."
    assert [event.kind for event in events] == [EventKind.TOKEN] * 4  # type: ignore[attr-defined]
    assert "".join(event.data["text"] for event in events) == answer  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("remember_fact", {"key": "city", "value": "Graz"}),
        ("recall_fact", {"key": "city"}),
        ("query_uploaded_documents", {"query": "trains"}),
    ],
)
def test_a_tool_the_model_calls_is_run_and_its_text_given_back(
    server: ChatServer, settings: Settings, name: str, args: dict[str, str]
) -> None:
    server.script(Call(name, **dict[str, Any](args)), Say("Done."))
    with patch(TOOLS[name], return_value=f"{name} ran") as replaced:
        events = ask(settings)
    replaced.assert_called_once_with(*args.values())
    assert server.chats[1].body["messages"][-1]["content"] == f"{name} ran"
    tools = [event.data for event in events[:2]]  # type: ignore[attr-defined]
    assert [(tool["state"], tool["name"]) for tool in tools] == [("called", name), ("returned", name)]


def test_tools_run_in_other_threads_as_the_user_who_asked(server: ChatServer, settings: Settings) -> None:
    seen: list[tuple[int, int]] = []
    both_run = threading.Barrier(2)

    def recall_fact(key: str) -> str:
        """Notes who it runs for."""
        both_run.wait(30)
        seen.append((get_user_id(), threading.get_ident()))
        return key

    server.script(Call("recall_fact", key="a", also=[Call("recall_fact", key="b")]), Say("Done."))
    with patch("src.tools.memory_tools.recall_fact", recall_fact):
        ask(settings)
    assert {user for user, _ in seen} == {ADA}
    assert len({thread for _, thread in seen}) == 2
    assert threading.get_ident() not in {thread for _, thread in seen}


@pytest.mark.parametrize("forged", [1, "1", None, [1, 2], {"id": 1}])
def test_a_user_that_the_model_names_is_not_heard(server: ChatServer, settings: Settings, forged: object) -> None:
    seen: list[tuple[int, str]] = []

    def recall_fact(key: str) -> str:
        """Notes who it runs for."""
        seen.append((get_user_id(), key))
        return "noted"

    server.script(Call("recall_fact", key="city", user_id=forged, config={"user_id": 1}), Say("Done."))
    with patch("src.tools.memory_tools.recall_fact", recall_fact):
        ask(settings)
    assert seen == [(ADA, "city")]


def test_outside_a_request_a_tool_acts_for_nobody(server: ChatServer, settings: Settings) -> None:
    seen: list[BaseException] = []

    def recall_fact(key: str) -> str:
        """Notes that there is nobody."""
        with pytest.raises(IdentityUnsetError) as unset:
            get_user_id()
        seen.append(unset.value)
        return "nobody"

    server.script(Call("recall_fact", key="city"), Say("Done."))
    with patch("src.tools.memory_tools.recall_fact", recall_fact):
        build_agent(chat_model(settings)).invoke({"messages": [HumanMessage("Hello")]})
    assert len(seen) == 1


def test_a_tool_that_does_not_exist_or_is_called_wrongly_is_told_to_the_model(
    server: ChatServer, settings: Settings
) -> None:
    server.script(Call("drop_tables"), Call("recall_fact", wrong=1), Say("I could not."))
    assert ask(settings)[-1] == "I could not."
    assert "not a valid tool" in server.chats[1].body["messages"][-1]["content"]
    assert "key" in server.chats[2].body["messages"][-1]["content"]


def test_a_model_that_never_stops_calling_tools_is_stopped(server: ChatServer, settings: Settings) -> None:
    server.default = Call("drop_tables")
    with pytest.raises(Exception, match="limit") as stopped:
        ask(settings)
    assert len(server.chats) == MOST_MODEL_CALLS
    assert "too many steps" in explained(stopped.value)


def test_without_a_key_the_reason_says_what_to_set() -> None:
    for key in (None, SecretStr(""), SecretStr("  ")):
        with pytest.raises(AgentUnavailableError, match="OPENAI_API_KEY"):
            check_available(Settings(OPENAI_API_KEY=key))


def test_the_summary_is_written_by_the_small_model_at_temperature_zero(server: ChatServer, settings: Settings) -> None:
    server.script(Say(" They spoke of Graz. "))
    summary = summarise("They met.", [said("user", "I live in Graz.")], settings)
    assert summary == "They spoke of Graz."
    body = server.chats[0].body
    assert (body["model"], body["temperature"]) == ("gpt-4o-mini", 0)
    assert "They met." in body["messages"][1]["content"]
    assert "user: I live in Graz." in body["messages"][1]["content"]


def test_an_empty_summary_is_an_error(server: ChatServer, settings: Settings) -> None:
    server.script(Say("  "))
    with pytest.raises(Exception, match="empty summary"):
        summarise(None, [said("user", "Hello")], settings)


def test_the_model_is_given_the_summary_then_the_window_in_order() -> None:
    window = [said("user", "a"), said("assistant", "b"), said("system", "c"), said("tool", "d")]
    messages = as_messages(Context("They met.", window))
    assert [type(message) for message in messages] == [
        SystemMessage, HumanMessage, AIMessage, SystemMessage, AIMessage,
    ]  # fmt: skip
    assert "They met." in str(messages[0].content)
    assert as_messages(Context(None, [])) == []


def test_a_message_of_an_unknown_role_is_an_error() -> None:
    with pytest.raises(ValueError, match="wizard"):
        as_messages(Context(None, [said("wizard", "x")]))
