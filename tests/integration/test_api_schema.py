"""Requests made from the published schema, valid and not: none may be a fault of the service."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from pydantic import SecretStr
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from tests.support.backend import Backend, running_backend
from tests.support.database import Database
from tests.support.openai_chat import ChatServer

EXAMPLES = 8
SEED = 20261122
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def backend(configured_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    with ChatServer() as server:
        chat = {"OPENAI_API_KEY": SecretStr(server.api_key), "OPENAI_BASE_URL": server.base_url}
        with running_backend(tmp_path, monkeypatch, **chat) as running:
            yield running


def already_running(app: Any) -> Any:
    """The app without its lifespan, which schemathesis would open a second time and not close."""

    async def without(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("it is open already")
        await app(scope, receive, send)

    return without


def test_no_request_made_from_the_schema_is_a_fault_of_the_service(backend: Backend) -> None:
    ada = backend.user("ada")
    ada.upload("notes.txt", b"Some text.")
    schema = schemathesis.openapi.from_asgi("/openapi.json", already_running(backend.client.app))
    statuses: dict[int, int] = {}
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @seed(SEED)
            @bounded
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                answer = case.call(headers=ada.headers)
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                case.validate_response(answer, checks=[not_a_server_error])

            with contextlib.suppress(Unsatisfiable):  # where nothing is sent, nothing can be wrong
                ask()
    print(f"seed {SEED}, answers by status: {dict(sorted(statuses.items()))}")
    assert sum(statuses.values()) >= 12 * EXAMPLES
    assert {200, 401, 404, 422} & set(statuses) >= {200, 422}
