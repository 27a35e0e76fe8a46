"""Whose request it is: the same in threads, in streams and beside others, and nobody's afterwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import anyio
import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.responses import StreamingResponse

from src.auth.middleware import IdentityMiddleware
from src.auth.tokens import issue_token
from src.utils.context import IdentityUnsetError, get_user_id

KEY = "k" * 40
MANY = 40


def headers(user_id: int) -> dict[str, str]:
    return {"Authorization": f"Bearer {issue_token(user_id, KEY, timedelta(hours=1))}"}


def whoever() -> int | None:
    try:
        return get_user_id()
    except IdentityUnsetError:
        return None


@pytest.fixture
def app() -> FastAPI:
    """Endpoints of each kind that FastAPI knows, each telling who it runs for."""
    app = FastAPI()
    app.add_middleware(IdentityMiddleware, key=KEY)
    together: asyncio.Event = asyncio.Event()
    waiting: list[int] = []

    @app.get("/api/thread")
    def in_a_thread() -> list[Any]:
        return [get_user_id(), threading.get_ident()]

    @app.get("/api/together")
    async def beside_others() -> int:
        """Answers when all requests have come as far as this."""
        waiting.append(1)
        if len(waiting) == MANY:
            together.set()
        await asyncio.wait_for(together.wait(), 30)
        return get_user_id()

    @app.get("/api/stream")
    def as_a_stream() -> StreamingResponse:
        def lines() -> Iterator[str]:
            for _ in range(5):
                yield f"{get_user_id()}\n"

        return StreamingResponse(lines())

    @app.get("/api/async-stream")
    async def as_an_async_stream() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            for _ in range(5):
                await asyncio.sleep(0)
                yield f"{get_user_id()}\n"

        return StreamingResponse(lines())

    @app.get("/api/failing")
    def failing() -> None:
        raise RuntimeError(str(get_user_id()))

    @app.get("/open")
    def for_everybody() -> int | None:
        return whoever()

    return app


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("path", ["/api/stream", "/api/async-stream"])
def test_a_stream_runs_for_its_user_to_the_end(client: TestClient, path: str) -> None:
    assert client.get(path, headers=headers(7)).text.split() == ["7"] * 5


def test_threads_that_serve_many_users_never_mix_them_up(client: TestClient) -> None:
    def ask(user_id: int) -> Any:
        return client.get("/api/thread", headers=headers(user_id)).json()

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(1, 201)))
    assert [user_id for user_id, _ in answers] == list(range(1, 201))
    assert len({thread for _, thread in answers}) < 200  # threads were used again


def test_requests_on_one_loop_at_the_same_time_keep_their_users(app: FastAPI) -> None:
    async def ask_all() -> list[int]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = (client.get("/api/together", headers=headers(n)) for n in range(1, MANY + 1))
            return [answer.json() for answer in await asyncio.gather(*asked)]

    assert anyio.run(ask_all) == list(range(1, MANY + 1))


def test_nobody_is_left_behind_for_the_next_request(client: TestClient) -> None:
    for path in ("/api/thread", "/api/stream", "/api/failing"):
        client.get(path, headers=headers(7))
        assert client.get("/open").json() is None
        assert client.get("/api/thread").status_code == 401


def test_a_token_sent_to_an_open_path_makes_nobody(client: TestClient) -> None:
    assert client.get("/open", headers=headers(7)).json() is None


def test_in_a_plain_thread_the_context_is_lost_and_that_is_an_error() -> None:
    from src.utils.context import acting_as

    with acting_as(7), ThreadPoolExecutor(1) as thread:
        assert thread.submit(whoever).result() is None
