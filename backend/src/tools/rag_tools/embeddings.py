"""Turning texts into vectors: through OpenAI's API, or on this machine without a key.

Owns the choice of provider, the size of requests and what each failure means. Whatever comes back
is checked before anyone stores it. Nothing is written: a process that dies here asks again, but
embedding the same text twice gives slightly different vectors, so a result in use must be kept.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import structlog
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

from src.config import Settings, settings
from src.tools.rag_tools.store import DIMENSION, Vector, check_vectors

if TYPE_CHECKING:
    from wordllama import WordLlamaInference

OPENAI_TIMEOUT_SECONDS = 30.0
OPENAI_RETRIES = 3
MAX_REQUEST_TEXTS = 256
"""OpenAI takes 2,048; fewer keep each request well below the time-out."""
MAX_REQUEST_BYTES = 300_000
"""OpenAI takes 300,000 tokens a request, and a token is at least one byte of UTF-8."""

Question = TypeVar("Question")
Answer = TypeVar("Answer")

_log = structlog.get_logger()


class EmbeddingError(Exception):
    """A text could not be embedded; asking again later may work."""


class EmbeddingUnavailableError(EmbeddingError):
    """The provider is not set up on this installation; somebody has to change a setting."""


class EmbeddingRefusedError(EmbeddingError):
    """This text cannot be embedded, now or later."""


def embedder(settings: Settings = settings) -> Embeddings:
    """The provider that the settings name. Making one takes a while: make it once and keep it.

    Raises EmbeddingUnavailableError.
    """
    match settings.EMBEDDING_PROVIDER:
        case "openai":
            return _openai(settings)
        case "local":
            return LocalEmbeddings()


def embedder_later(settings: Settings = settings) -> LaterEmbeddings:
    """The same, made at its first text or by `warm`: loading it takes longer than all of a process's start.

    Raises EmbeddingUnavailableError at once where a key or a package is missing.
    """
    match settings.EMBEDDING_PROVIDER:
        case "openai":
            _require_key(settings)
        case "local" if find_spec("wordllama") is None:
            raise EmbeddingUnavailableError(
                "the local embedding model is missing: install the extra `local` (wordllama),"
                " or set EMBEDDING_PROVIDER=openai"
            )
        case "local":
            pass
    return LaterEmbeddings(lambda: embedder(settings))


class LaterEmbeddings(Embeddings):
    """A provider that `make` makes once, when it is first asked."""

    def __init__(self, make: Callable[[], Embeddings]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: Embeddings | None = None

    def warm(self) -> Embeddings:
        """Make it now, unless that was done."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.warm().embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        return self.warm().embed_query(text)


def embed_texts(embedder: Embeddings, texts: Sequence[str]) -> NDArray[np.float32]:
    """The vectors of `texts` in their order: float32, shape (n, 1536), each of length 1.

    Raises EmbeddingError, whose subclasses say whether asking again can help, and
    InvalidVectorError where the provider gives other vectors than the stores hold.
    """
    _refuse_blank(texts)
    matrix = np.empty((len(texts), DIMENSION), dtype=np.float32)
    done = 0
    for batch in batches(texts):
        answer = _ask(embedder.embed_documents, batch)
        matrix[done : done + len(batch)] = _checked(answer, len(batch))
        done += len(batch)
    return matrix


def embed_query(embedder: Embeddings, text: str) -> Vector:
    """The vector of a question: float32, shape (1536,), length 1. Raises as embed_texts."""
    _refuse_blank([text])
    vector: Vector = _checked([_ask(embedder.embed_query, text)], 1)[0]
    return vector


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """`texts` in order, in lists that one request may carry; a longer text goes alone."""
    batch: list[str] = []
    size = 0
    for text in texts:
        length = len(text.encode())
        if batch and (len(batch) == MAX_REQUEST_TEXTS or size + length > MAX_REQUEST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += length
    if batch:
        yield batch


class LocalEmbeddings(Embeddings):
    """WordLlama's 256 values, scaled to length 1 and padded with zeros, which moves no distance."""

    def __init__(self) -> None:
        self._model = _wordllama()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raw = np.asarray(self._model.embed(texts), dtype=np.float32)
        lengths = np.linalg.norm(raw, axis=1, keepdims=True)
        if not lengths.all():
            row = int(np.flatnonzero(lengths == 0)[0])
            raise EmbeddingRefusedError(
                f"text {row + 1} of {len(texts)} holds nothing that the local model knows:"
                " leave it out, or use EMBEDDING_PROVIDER=openai"
            )
        padded = np.zeros((len(texts), DIMENSION), dtype=np.float32)
        padded[:, : raw.shape[1]] = raw / lengths
        vectors: list[list[float]] = padded.tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


def _openai(settings: Settings) -> Embeddings:
    _require_key(settings)
    # Importing it takes seconds, which commands that embed nothing should not pay.
    from langchain_openai import OpenAIEmbeddings

    return OpenAIEmbeddings(
        model=settings.EMBEDDING_MODEL,
        openai_api_key=settings.OPENAI_API_KEY,
        openai_api_base=settings.OPENAI_BASE_URL,
        request_timeout=OPENAI_TIMEOUT_SECONDS,
        max_retries=OPENAI_RETRIES,
        chunk_size=MAX_REQUEST_TEXTS,
        # True counts tokens with tiktoken, which downloads its table when first used.
        check_embedding_ctx_length=False,
    )


def _require_key(settings: Settings) -> None:
    if settings.OPENAI_API_KEY is None or not settings.OPENAI_API_KEY.get_secret_value().strip():
        raise EmbeddingUnavailableError(
            "no key for OpenAI's embeddings: set OPENAI_API_KEY, or EMBEDDING_PROVIDER=local"
        )


@functools.cache
def _wordllama() -> WordLlamaInference:
    """WordLlama from the files in its package; its own load() would download the tokenizer."""
    try:
        with _root_logger_taken():
            from safetensors.numpy import load_file
            from tokenizers import Tokenizer
            from wordllama import WordLlamaInference

        package = files("wordllama")
        weights = load_file(str(package / "weights" / "l2_supercat_256.safetensors"))
        vocabulary = package / "tokenizers" / "l2_supercat_tokenizer_config.json"
        tokenizer = Tokenizer.from_str(vocabulary.read_text(encoding="utf-8"))
    except (ImportError, OSError) as error:
        raise EmbeddingUnavailableError(
            f"the local embedding model cannot be loaded ({error}):"
            " install the extra `local` (wordllama), or set EMBEDDING_PROVIDER=openai"
        ) from error
    return WordLlamaInference(weights["embedding.weight"], tokenizer)


@contextmanager
def _root_logger_taken() -> Iterator[None]:
    """WordLlama configures logging when imported, unless the root logger has a handler already."""
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)


def _refuse_blank(texts: Sequence[str]) -> None:
    blank = next((row for row, text in enumerate(texts) if not text.strip()), None)
    if blank is not None:
        raise EmbeddingRefusedError(f"text {blank + 1} of {len(texts)} is blank: leave it out")


def _ask(ask: Callable[[Question], Answer], question: Question) -> Answer:
    """The boundary to the provider: on a broken answer its client fails with any exception."""
    try:
        return ask(question)
    except (EmbeddingError, MemoryError):
        raise
    except Exception as error:
        failure = _explained(error)
        _log.warning("embedding.request.failed", error=_told(error), kind=type(failure).__name__)
        raise failure from error


def _explained(error: Exception) -> EmbeddingError:
    import openai

    told = _told(error)
    match error:
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            return EmbeddingUnavailableError(f"the embedding service refused the key: check OPENAI_API_KEY ({told})")
        case openai.NotFoundError():
            return EmbeddingUnavailableError(
                f"the embedding model was not found: check EMBEDDING_MODEL and OPENAI_BASE_URL ({told})"
            )
        case openai.BadRequestError() | openai.UnprocessableEntityError():
            return EmbeddingRefusedError(f"the embedding service refused the text ({told})")
        case openai.RateLimitError():
            return EmbeddingError(f"the embedding service limits our rate: wait, or raise the quota ({told})")
        case openai.APIConnectionError():
            return EmbeddingError(
                f"the embedding service cannot be reached or does not answer:"
                f" check the network and OPENAI_BASE_URL, then try again ({told})"
            )
        case openai.APIStatusError():
            return EmbeddingError(f"the embedding service failed: try again later ({told})")
        case _:
            return EmbeddingError(f"the embedding service gave no usable answer: check OPENAI_BASE_URL ({told})")


def _told(error: Exception) -> str:
    """What kind of failure it is. Not in the service's words: some quote the text that they refuse."""
    status, code = getattr(error, "status_code", None), getattr(error, "code", None)
    known = isinstance(code, str) and re.fullmatch(r"[a-z_]{1,40}", code)
    return " ".join(str(part) for part in (type(error).__name__, status, code if known else None) if part)


def _checked(answer: Any, expected: int) -> NDArray[np.float32]:
    """EmbeddingError unless there are `expected` vectors, InvalidVectorError for a bad one."""
    if len(answer) != expected:
        raise EmbeddingError(f"the embedding service gave {len(answer)} vectors for {expected} texts: try again")
    return check_vectors(answer, "embedding service")
