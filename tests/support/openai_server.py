"""A small server on loopback that speaks OpenAI's protocol, for tests with the real client.

    with OpenAIServer() as server:
        server.misbehave(RateLimited(), Healthy(), ServerError())
        ... a client with base_url=server.base_url and api_key=server.api_key ...
        assert len(server.requests) == 4

Each request takes one fault off the queue; with none left it is answered as OpenAI would. A further
endpoint is a function from Request and Fault to Reply in ROUTES.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Embed = Callable[[Sequence[str]], Matrix]

DIMENSION = 1536
MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 8192
MAX_REQUEST_TOKENS = 300_000
GATE_SECONDS = 60.0


def hashed_vectors(texts: Sequence[str]) -> Matrix:
    """One random direction a text, the same for the same text on every machine: shape (n, 1536)."""
    rows = [np.random.default_rng(_seed(text)).standard_normal(DIMENSION) for text in texts]
    matrix = np.array(rows).reshape(len(texts), DIMENSION)
    unit: Matrix = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Request:
    """What a client asked; `body` is the JSON it sent, None for a GET."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any

    @property
    def texts(self) -> list[str]:
        """The texts to embed; token arrays, which the API takes as well, as their JSON."""
        given = self.body["input"]
        inputs = [given] if isinstance(given, str) else given
        return [one if isinstance(one, str) else json.dumps(one) for one in inputs]


@dataclass(frozen=True)
class Reply:
    """`cut`: the connection closes in the middle of the body."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False


class Fault:
    """What goes wrong with one request; this one lets it pass."""

    def instead(self) -> Reply | None:
        """A reply that keeps the request from being handled."""
        return None

    def vectors(self, matrix: Matrix) -> Matrix:
        """What is sent in place of the right vectors."""
        return matrix

    def afterwards(self, reply: Reply) -> Reply:
        """What is sent in place of the right reply."""
        return reply


class Healthy(Fault):
    """Nothing goes wrong: to let requests pass before a fault that follows in the queue."""


@dataclass(frozen=True)
class RateLimited(Fault):
    """429. The client waits as told, so by default a millisecond."""

    headers: Mapping[str, str] = field(default_factory=lambda: {"Retry-After": "1", "retry-after-ms": "1"})

    def instead(self) -> Reply:
        reply = refusal(429, "Rate limit reached for requests", "rate_limit_exceeded")
        return Reply(reply.status, reply.body, self.headers)


@dataclass(frozen=True)
class ServerError(Fault):
    status: int = 500

    def instead(self) -> Reply:
        reply = refusal(self.status, "The server had an error", None)
        return Reply(reply.status, reply.body, {"retry-after-ms": "1"})


class InvalidJson(Fault):
    """200 with a body that is no JSON, as a proxy in between may send."""

    def instead(self) -> Reply:
        return Reply(200, b'{"object": "list", "data": [')


class CutStream(Fault):
    """The right reply, of which only the first half arrives."""

    def afterwards(self, reply: Reply) -> Reply:
        return Reply(reply.status, reply.body, reply.headers, cut=True)


@dataclass(frozen=True)
class WrongDimension(Fault):
    dimension: int = 3072

    def vectors(self, matrix: Matrix) -> Matrix:
        values: Matrix = np.full((len(matrix), self.dimension), self.dimension**-0.5, np.float32)
        return values


@dataclass(frozen=True)
class Constant(Fault):
    """Every value of the first vector is `value`: NaN, infinity, 0."""

    value: float

    def vectors(self, matrix: Matrix) -> Matrix:
        changed = matrix.copy()
        changed[0] = self.value
        return changed


class TooFew(Fault):
    """One vector less than texts."""

    def vectors(self, matrix: Matrix) -> Matrix:
        return matrix[:-1]


@dataclass(frozen=True)
class Gate(Fault):
    """The answer waits: `reached` is set when the request is there, `release` lets it go on."""

    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def instead(self) -> None:
        self.reached.set()
        self.release.wait(GATE_SECONDS)


class OpenAIServer:
    """The server, as a context manager. `embed` gives the vectors of texts, float32 (n, 1536)."""

    def __init__(
        self,
        embed: Embed = hashed_vectors,
        api_key: str = "sk-test",
        models: Sequence[str] = ("text-embedding-3-small",),
    ) -> None:
        self.embed = embed
        self.api_key = api_key
        self.models = models
        self.requests: list[Request] = []
        self._faults: deque[Fault] = deque()
        self._http: ThreadingHTTPServer | None = None

    def __enter__(self) -> OpenAIServer:
        handler = type("Handler", (_Handler,), {"server_of_test": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._http is not None
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def base_url(self) -> str:
        assert self._http is not None
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def misbehave(self, *faults: Fault) -> None:
        """The next requests meet these faults, one each, in this order."""
        self._faults.extend(faults)

    def embedded(self) -> list[str]:
        """Every text that was sent to be embedded, in order."""
        return [text for request in self.requests if request.body for text in request.texts]

    def answer(self, request: Request) -> Reply:
        self.requests.append(request)
        fault = self._faults.popleft() if self._faults else Healthy()
        if (reply := fault.instead()) is not None:
            return reply
        if request.headers.get("authorization") != f"Bearer {self.api_key}":
            return refusal(401, "Incorrect API key provided", "invalid_api_key")
        handle = ROUTES.get((request.method, request.path))
        if handle is None:
            return refusal(404, f"Invalid URL ({request.method} {request.path})", None)
        return fault.afterwards(handle(self, request, fault))


def refusal(status: int, message: str, code: str | None) -> Reply:
    """An error as OpenAI words it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return _json({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode())


def _list_models(server: OpenAIServer, request: Request, fault: Fault) -> Reply:
    models = [{"id": model, "object": "model", "created": 1, "owned_by": "openai"} for model in server.models]
    return _json({"object": "list", "data": models})


def _embeddings(server: OpenAIServer, request: Request, fault: Fault) -> Reply:
    texts, model = request.texts, request.body["model"]
    if model not in server.models:
        return refusal(404, f"The model `{model}` does not exist", "model_not_found")
    tokens = [_token_estimate(text) for text in texts]
    if not texts or not all(texts) or len(texts) > MAX_INPUTS:
        return refusal(400, "'$.input' is invalid", None)
    if max(tokens) > MAX_INPUT_TOKENS:
        return refusal(400, f"maximum context length is {MAX_INPUT_TOKENS} tokens", None)
    if sum(tokens) > MAX_REQUEST_TOKENS:
        return refusal(400, f"maximum request size is {MAX_REQUEST_TOKENS} tokens", None)
    matrix = fault.vectors(server.embed(texts))
    as_sent = _encoder(request.body.get("encoding_format", "float"))
    data = [
        {"object": "embedding", "index": index, "embedding": as_sent(vector)} for index, vector in enumerate(matrix)
    ]
    usage = {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)}
    return _json({"object": "list", "data": data, "model": model, "usage": usage})


def _token_estimate(text: str) -> int:
    """Four bytes a token, as in English."""
    return len(text.encode()) // 4 + 1


def _encoder(encoding_format: str) -> Callable[[Matrix], str | list[float]]:
    match encoding_format:
        case "base64":
            return lambda vector: base64.b64encode(vector.astype("<f4").tobytes()).decode()
        case "float":
            return lambda vector: [float(value) for value in vector]
        case _:
            raise ValueError(f"encoding_format {encoding_format!r} is unknown to OpenAI")


Route = Callable[[OpenAIServer, Request, Fault], Reply]
ROUTES: dict[tuple[str, str], Route] = {
    ("GET", "/v1/models"): _list_models,
    ("POST", "/v1/embeddings"): _embeddings,
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_test: OpenAIServer

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.server_of_test.answer(Request(self.command, self.path, headers, body))
        try:
            self._send(reply)
        except (BrokenPipeError, ConnectionResetError):
            # The client gave up waiting, which is what some tests are about.
            self.close_connection = True

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply.body)))
        # One request a connection: nothing is left open when the test ends.
        self.send_header("Connection", "close")
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body[: len(reply.body) // 2] if reply.cut else reply.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class' name
        """Silent: the requests are in the log of the server."""
