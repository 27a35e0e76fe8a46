"""Embedding through the real OpenAI client against a loopback server, and with the local model."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.embeddings import Embeddings
from pydantic import SecretStr
from structlog.testing import capture_logs

from src.config import Settings
from src.tools.rag_tools import embeddings
from src.tools.rag_tools.embeddings import (
    EmbeddingError,
    EmbeddingRefusedError,
    EmbeddingUnavailableError,
    LocalEmbeddings,
    batches,
    embed_query,
    embed_texts,
    embedder,
    embedder_later,
)
from src.tools.rag_tools.store import InvalidVectorError
from tests.support import files
from tests.support.embeddings import HashEmbeddings
from tests.support.openai_server import (
    Constant,
    CutStream,
    Fault,
    Gate,
    Healthy,
    InvalidJson,
    OpenAIServer,
    RateLimited,
    ServerError,
    TooFew,
    WrongDimension,
    hashed_vectors,
)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        yield running


def settings_for(server: OpenAIServer, **changed: Any) -> Settings:
    values: dict[str, Any] = {
        "EMBEDDING_PROVIDER": "openai",
        "OPENAI_API_KEY": SecretStr(server.api_key),
        "OPENAI_BASE_URL": server.base_url,
    }
    return Settings(**{"_env_file": None} | values | changed)


@pytest.fixture
def client(server: OpenAIServer) -> Embeddings:
    return embedder(settings_for(server))


@pytest.fixture
def impatient(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> Embeddings:
    """A client that asks once only."""
    monkeypatch.setattr(embeddings, "OPENAI_RETRIES", 0)
    return embedder(settings_for(server))


def test_texts_come_back_as_checked_vectors_in_their_order(server: OpenAIServer, client: Embeddings) -> None:
    texts = ["one", "two", "drei, 東京"]
    vectors = embed_texts(client, texts)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, hashed_vectors(texts))
    [request] = server.requests
    assert request.path == "/v1/embeddings"
    assert request.body["model"] == "text-embedding-3-small"
    assert request.body["input"] == texts


def test_a_query_gives_one_vector(client: Embeddings) -> None:
    vector = embed_query(client, "what is owed?")
    assert vector.shape == (1536,)
    np.testing.assert_array_equal(vector, hashed_vectors(["what is owed?"])[0])


def test_no_texts_need_no_request(server: OpenAIServer, client: Embeddings) -> None:
    assert embed_texts(client, []).shape == (0, 1536)
    assert server.requests == []


def test_many_texts_are_sent_in_several_requests_and_stay_in_order(server: OpenAIServer, client: Embeddings) -> None:
    texts = [f"text {number}" for number in range(600)]
    np.testing.assert_array_equal(embed_texts(client, texts), hashed_vectors(texts))
    assert [len(request.texts) for request in server.requests] == [256, 256, 88]
    assert server.embedded() == texts


def test_no_table_of_tokens_is_downloaded(client: Embeddings, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tiktoken was asked")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    monkeypatch.setattr(tiktoken, "encoding_for_model", refuse)
    assert len(embed_texts(client, ["text"])) == 1


@given(st.lists(st.text(max_size=3_000), max_size=30), st.integers(1, 8), st.integers(1, 9_000))
def test_batches_lose_nothing_and_keep_to_the_limits(texts: list[str], most: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "MAX_REQUEST_TEXTS", most)
        patch.setattr(embeddings, "MAX_REQUEST_BYTES", size)
        made = list(batches(texts))
    assert [text for batch in made for text in batch] == texts
    for batch in made:
        assert 0 < len(batch) <= most
        assert len(batch) == 1 or sum(len(text.encode()) for text in batch) <= size


def test_a_passing_fault_is_tried_again(server: OpenAIServer, client: Embeddings) -> None:
    server.misbehave(RateLimited(), ServerError(500), ServerError(503))
    np.testing.assert_array_equal(embed_texts(client, ["a"]), hashed_vectors(["a"]))
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (RateLimited(), "limits our rate: wait, or raise the quota"),
        (ServerError(500), "failed: try again later"),
        (ServerError(503), "failed: try again later"),
        (CutStream(), "cannot be reached or does not answer"),
        (InvalidJson(), "gave no usable answer: check OPENAI_BASE_URL"),
        (TooFew(), "gave 1 vectors for 2 texts"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Fault) else "",
)
def test_a_fault_that_stays_is_explained(
    server: OpenAIServer, impatient: Embeddings, fault: Fault, advice: str
) -> None:
    server.misbehave(fault)
    with pytest.raises(EmbeddingError, match=advice) as caught:
        embed_texts(impatient, ["a", "b"])
    assert type(caught.value) is EmbeddingError
    np.testing.assert_array_equal(embed_texts(impatient, ["a"]), hashed_vectors(["a"]))


def test_a_failure_names_its_cause_and_is_logged(server: OpenAIServer, impatient: Embeddings) -> None:
    import openai

    server.misbehave(ServerError())
    with capture_logs() as logs, pytest.raises(EmbeddingError) as caught:
        embed_query(impatient, "a")
    assert isinstance(caught.value.__cause__, openai.InternalServerError)
    assert [(entry["event"], entry["kind"]) for entry in logs] == [("embedding.request.failed", "EmbeddingError")]


def test_a_service_that_does_not_answer_is_given_up(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "OPENAI_RETRIES", 0)
    monkeypatch.setattr(embeddings, "OPENAI_TIMEOUT_SECONDS", 0.1)
    gate = Gate()
    server.misbehave(gate)
    try:
        with pytest.raises(EmbeddingError, match="cannot be reached or does not answer"):
            embed_query(embedder(settings_for(server)), "a")
        assert gate.reached.wait(30)
    finally:
        gate.release.set()


def test_a_slow_answer_is_still_an_answer(server: OpenAIServer, client: Embeddings) -> None:
    gate = Gate()
    server.misbehave(gate)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(embed_query(client, "a")))
    asking.start()
    assert gate.reached.wait(30)
    gate.release.set()
    asking.join()
    np.testing.assert_array_equal(answers[0], hashed_vectors(["a"])[0])


def test_a_service_that_is_down_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "OPENAI_RETRIES", 0)
    with OpenAIServer() as server:
        client = embedder(settings_for(server))
    with pytest.raises(EmbeddingError, match="cannot be reached"):
        embed_query(client, "a")


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (WrongDimension(3072), "dimension 3072, 1536 needed"),
        (Constant(math.nan), r"vector 0 \(1 of 2\) has length nan"),
        (Constant(0.0), r"vector 0 \(1 of 2\) has length 0"),
        (Constant(math.inf), r"vector 0 \(1 of 2\) has length inf"),
    ],
)
def test_a_bad_vector_is_refused(server: OpenAIServer, client: Embeddings, fault: Fault, what: str) -> None:
    server.misbehave(fault)
    with pytest.raises(InvalidVectorError, match=what):
        embed_texts(client, ["a", "b"])


def test_a_bad_vector_in_a_later_request_is_refused_too(server: OpenAIServer, client: Embeddings) -> None:
    server.misbehave(Healthy(), Constant(math.nan))
    with pytest.raises(InvalidVectorError):
        embed_texts(client, [str(number) for number in range(300)])


@pytest.mark.parametrize("blank", ["", " \n\t", "\u3000"])
def test_a_blank_text_is_refused_before_anything_is_sent(server: OpenAIServer, client: Embeddings, blank: str) -> None:
    with pytest.raises(EmbeddingRefusedError, match="text 2 of 3 is blank"):
        embed_texts(client, ["a", blank, "b"])
    with pytest.raises(EmbeddingRefusedError, match="blank"):
        embed_query(client, blank)
    assert server.requests == []


def test_a_question_too_long_for_the_model_is_refused(server: OpenAIServer, client: Embeddings) -> None:
    with pytest.raises(EmbeddingRefusedError, match="refused the text"):
        embed_query(client, "word " * 9_000)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        ({"OPENAI_API_KEY": SecretStr("sk-wrong")}, "refused the key: check OPENAI_API_KEY"),
        ({"EMBEDDING_MODEL": "text-embedding-9"}, "check EMBEDDING_MODEL and OPENAI_BASE_URL"),
    ],
)
def test_a_wrong_setting_is_named(server: OpenAIServer, changed: dict[str, Any], advice: str) -> None:
    with pytest.raises(EmbeddingUnavailableError, match=advice):
        embed_query(embedder(settings_for(server, **changed)), "a")
    assert len(server.requests) == 1


@pytest.mark.parametrize("key", [None, SecretStr(""), SecretStr("  ")])
def test_without_a_key_the_way_out_is_named(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, key: SecretStr | None
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EmbeddingUnavailableError) as caught:
        embedder(settings_for(server, OPENAI_API_KEY=key))
    assert str(caught.value) == ("no key for OpenAI's embeddings: set OPENAI_API_KEY, or EMBEDDING_PROVIDER=local")


def test_the_key_is_in_no_message(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = embedder(settings_for(server, OPENAI_API_KEY=SecretStr("sk-planted-secret")))
    with capture_logs() as logs, pytest.raises(EmbeddingError) as caught:
        embed_query(client, "a")
    assert "planted" not in f"{caught.value}{logs}{client!r}"


def test_importing_this_module_does_not_import_the_openai_client() -> None:
    check = "import sys, src.tools.rag_tools.embeddings; sys.exit('langchain_openai' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.fixture(scope="module")
def local() -> Embeddings:
    return embedder(Settings(_env_file=None, EMBEDDING_PROVIDER="local"))


def test_the_local_model_finds_what_is_meant(local: Embeddings) -> None:
    texts = [
        "Boil the noodles in salted water and add the sauce.",
        "The bank closes its accounts at the end of the quarter.",
        "The train to Zurich leaves at a quarter past eight.",
    ]
    question = embed_query(local, "How do I cook pasta?")
    assert int(np.argmax(embed_texts(local, texts) @ question)) == 0


def test_local_vectors_are_256_values_of_length_1_and_then_zeros(local: Embeddings) -> None:
    vectors = embed_texts(local, ["a text", "Grüße, 東京 😀", "\u200b"])
    assert vectors.shape == (3, 1536)
    assert not vectors[:, 256:].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[:, :256], axis=1), 1, atol=1e-6)


def test_padding_changes_no_distance(local: Embeddings) -> None:
    vectors = embed_texts(local, [files.FIRST, files.SECOND])
    short = vectors[:, :256]
    assert vectors[0] @ vectors[1] == pytest.approx(float(short[0] @ short[1]))


def test_a_local_vector_does_not_depend_on_its_neighbours(local: Embeddings) -> None:
    together = embed_texts(local, ["a", files.numbered(12), "b c"])
    alone = np.vstack([embed_texts(local, [text]) for text in ["a", files.numbered(12), "b c"]])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_a_text_that_embeds_to_nothing_locally_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Blank:
        def embed(self, texts: list[str]) -> Any:
            return np.array([[1.0] * 256, [0.0] * 256])

    monkeypatch.setattr(embeddings, "_wordllama", Blank)
    with pytest.raises(EmbeddingRefusedError, match="text 2 of 2 holds nothing that the local"):
        embed_texts(LocalEmbeddings(), ["a", "b"])


def test_without_the_local_model_installed_the_way_out_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embeddings._wordllama.cache_clear()
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(EmbeddingUnavailableError, match=r"install the extra `local` \(wordllama\)"):
        LocalEmbeddings()


def test_loading_the_local_model_changes_no_logging_and_asks_no_network() -> None:
    check = (
        "import logging, socket, sys\n"
        "def refuse(*_): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = refuse\n"
        "from src.tools.rag_tools.embeddings import LocalEmbeddings\n"
        "LocalEmbeddings()\n"
        "assert 'wordllama' in sys.modules\n"
        f"assert (logging.root.handlers, logging.root.level) == ([], {logging.WARNING})\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_provider_made_later_is_made_once_and_what_is_missing_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[HashEmbeddings] = []

    def make(_: Any) -> HashEmbeddings:
        made.append(HashEmbeddings())
        return made[-1]

    monkeypatch.setattr("src.tools.rag_tools.embeddings.embedder", make)
    later = embedder_later(Settings(EMBEDDING_PROVIDER="openai", OPENAI_API_KEY=SecretStr("key")))
    assert made == []
    assert later.embed_query("a") == later.embed_documents(["a"])[0]
    assert len(made) == 1
    with pytest.raises(EmbeddingUnavailableError, match="OPENAI_API_KEY"):
        embedder_later(Settings(EMBEDDING_PROVIDER="openai", OPENAI_API_KEY=None))
