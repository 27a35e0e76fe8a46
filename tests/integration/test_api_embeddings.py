"""Uploads and searches while the embedding service misbehaves, with its real client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from src.tools import rag_tools
from src.tools.rag_tools.embeddings import OPENAI_RETRIES
from tests.support.backend import Backend, User, running_backend
from tests.support.database import Database
from tests.support.openai_server import (
    CutStream,
    Fault,
    OpenAIServer,
    RateLimited,
    ServerError,
    TooFew,
    WrongDimension,
)

TRAIN = b"The train to Zurich leaves at eight."
ALL = OPENAI_RETRIES + 1
"""As often as the client tries."""


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        yield running


@pytest.fixture
def backend(
    configured_database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: OpenAIServer,
) -> Iterator[Backend]:
    settings = {
        "EMBEDDING_PROVIDER": "openai",
        "OPENAI_API_KEY": SecretStr(server.api_key),
        "OPENAI_BASE_URL": server.base_url,
    }
    with running_backend(tmp_path, monkeypatch, **settings) as running:
        yield running


@pytest.fixture
def ada(backend: Backend) -> User:
    return backend.user("ada")


def test_a_rate_limit_and_a_fault_are_waited_out(backend: Backend, server: OpenAIServer, ada: User) -> None:
    server.misbehave(RateLimited(), ServerError())
    document_id = ada.upload("notes.txt", TRAIN).json()["document_id"]
    backend.indexed()
    assert ada.get(f"/api/documents/{document_id}").json()["status"] == "ready"
    server.misbehave(RateLimited())
    assert len(ada.get("/api/search", params={"q": TRAIN.decode()}).json()) == 1


@pytest.mark.parametrize(
    "faults",
    [
        [ServerError()] * ALL,
        [RateLimited()] * ALL,
        [CutStream()] * ALL,
        [WrongDimension()],
        [TooFew()],
    ],
    ids=["fault", "rate limit", "cut stream", "wrong dimension", "too few"],
)
def test_an_acknowledged_upload_waits_until_the_service_is_back(
    backend: Backend, server: OpenAIServer, ada: User, faults: list[Fault]
) -> None:
    server.misbehave(*faults)
    answer = ada.upload("notes.txt", TRAIN)
    assert answer.status_code == 200
    backend.indexed()
    path = f"/api/documents/{answer.json()['document_id']}"
    assert ada.get(path).json()["status"] in ("received", "indexing")
    rag_tools.service().index(answer.json()["document_id"], answered=True)
    assert ada.get(path).json()["status"] == "ready"
    assert len(ada.get("/api/search", params={"q": TRAIN.decode()}).json()) == 1


def test_a_search_that_cannot_be_embedded_says_so_and_quotes_nobody(server: OpenAIServer, ada: User) -> None:
    server.misbehave(*[ServerError()] * ALL)
    answer = ada.get("/api/search", params={"q": "train"})
    assert answer.status_code == 503
    assert "embedding service" in answer.json()["detail"]
    assert "127.0.0.1" not in answer.text
    server.api_key = "sk-another"
    answer = ada.get("/api/search", params={"q": "train"})
    assert answer.status_code == 503
    assert "sk-" not in answer.text
