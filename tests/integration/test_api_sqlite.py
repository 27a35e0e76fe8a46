"""On SQLite the relational part works, and everything about documents says what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.support.backend import Backend, User, running_backend, sqlite_database
from tests.support.openai_chat import Call, ChatServer, Say


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ChatServer) -> Iterator[Backend]:
    settings = {"OPENAI_API_KEY": SecretStr(server.api_key), "OPENAI_BASE_URL": server.base_url}
    with (
        sqlite_database(tmp_path, monkeypatch),
        running_backend(tmp_path, monkeypatch, **settings) as running,
    ):
        yield running


@pytest.fixture
def ada(backend: Backend) -> User:
    return backend.user("ada")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/documents"),
        ("GET", "/api/documents/1"),
        ("DELETE", "/api/documents/1"),
        ("GET", "/api/search?q=x"),
    ],
)
def test_documents_say_that_they_need_postgresql(ada: User, method: str, path: str) -> None:
    answer = ada.request(method, path)
    assert answer.status_code == 503
    assert "documents need PostgreSQL with pgvector" in answer.json()["detail"]


def test_an_upload_is_refused_with_the_same_words_and_leaves_nothing(backend: Backend, ada: User) -> None:
    answer = ada.upload("notes.txt", b"text")
    assert answer.status_code == 503
    assert "documents need PostgreSQL with pgvector" in answer.json()["detail"]
    assert backend.files() == []


def test_accounts_conversations_facts_and_chat_work(server: ChatServer, ada: User) -> None:
    server.script(Call("remember_fact", key="city", value="Graz"), Say("Noted."))
    assert ada.chat("I live in Graz.")[-1][0] == "done"
    (fact,) = ada.get("/api/facts").json()
    assert (fact["key"], fact["value"]) == ("city", "Graz")
    assert ada.delete(f"/api/facts/{fact['id']}").status_code == 204
    assert ada.delete(f"/api/facts/{fact['id']}").status_code == 404
    (conversation,) = ada.get("/api/conversations").json()
    assert len(ada.get(f"/api/conversations/{conversation['id']}").json()["messages"]) == 2
    assert ada.get("/api/traces").json()[0]["steps"][0]["tool_name"] == "remember_fact"


def test_the_document_tool_tells_the_model_what_is_missing(server: ChatServer, ada: User) -> None:
    server.script(Call("query_uploaded_documents", query="trains"), Say("I cannot look."))
    assert ada.chat("When does it leave?")[-1][0] == "done"
    told = server.chats[-1].body["messages"][-1]["content"]
    assert told.startswith("Error querying documents: documents need PostgreSQL")


def test_readiness_says_which_part_is_missing(backend: Backend) -> None:
    answer = backend.client.get("/readyz")
    assert answer.status_code == 503
    parts = answer.json()["parts"]
    assert parts["database"] == {"ready": True}
    assert "documents need PostgreSQL" in parts["documents"]["reason"]
    assert backend.client.get("/healthz").status_code == 200


def test_conversations_are_made_listed_and_hidden(ada: User) -> None:
    assert ada.post("/api/conversations").status_code == 201
    named = ada.post("/api/conversations", json={"title": "Trains \0 and ships"}).json()
    assert named["title"] == "Trains   and ships"
    assert ada.post("/api/conversations", json={"title": " "}).status_code == 422
    listed = ada.get("/api/conversations").json()
    assert {one["title"] for one in listed} == {"New Conversation", named["title"]}
    assert ada.delete(f"/api/conversations/{named['id']}").status_code == 204
    assert len(ada.get("/api/conversations").json()) == 1
