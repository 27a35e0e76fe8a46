"""Accounts over HTTP: who gets in, who does not, and what a refusal gives away."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from structlog.testing import capture_logs

from src.auth.throttle import BY_BOTH
from src.auth.tokens import issue_token
from src.database import SessionLocal
from src.models import User as Row
from tests.support.backend import PASSWORD, SECRET_KEY, Backend, away, running_backend
from tests.support.database import Database

ADA = {"email": "Ada@Example.org", "username": "ada", "password": PASSWORD}
HOUR = timedelta(hours=1)
PROTECTED = [
    ("POST", "/api/upload"),
    ("GET", "/api/documents"),
    ("GET", "/api/documents/1"),
    ("DELETE", "/api/documents/1"),
    ("GET", "/api/search?q=x"),
    ("POST", "/api/conversations"),
    ("GET", "/api/conversations"),
    ("GET", "/api/conversations/00000000-0000-4000-8000-000000000000"),
    ("DELETE", "/api/conversations/00000000-0000-4000-8000-000000000000"),
    ("POST", "/api/chat"),
    ("GET", "/api/facts"),
    ("DELETE", "/api/facts/1"),
    ("GET", "/api/traces"),
]


@pytest.fixture
def backend(configured_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    with running_backend(tmp_path, monkeypatch) as running:
        yield running


def register(backend: Backend, **changes: Any) -> Any:
    return backend.client.post("/auth/register", json={**ADA, **changes})


def login(backend: Backend, username: str, password: str = PASSWORD) -> Any:
    return backend.client.post("/auth/login", json={"username": username, "password": password})


def test_an_account_logs_in_by_name_and_by_address_in_any_case(backend: Backend) -> None:
    made = register(backend)
    assert made.status_code == 201
    assert made.json() == {"id": made.json()["id"], "email": "ada@example.org", "username": "ada"}
    for name in ("ada", "ada@example.org", "ADA@example.ORG"):
        answer = login(backend, name)
        assert answer.status_code == 200
        assert (answer.json()["token_type"], answer.json()["expires_in"]) == ("bearer", 3600)
    with SessionLocal() as db:
        row = db.scalars(select(Row)).one()
        assert row.hashed_password is not None
        assert row.hashed_password.startswith("$argon2id$")
        assert row.last_login is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"email": "ada@example.org", "username": "other"},
        {"email": "ADA@example.org", "username": "other"},
        {"email": "other@example.org", "username": "ada"},
        {"email": "other@example.org", "username": "ADA"},
    ],
)
def test_a_taken_address_or_name_is_refused(backend: Backend, changes: dict[str, str]) -> None:
    assert register(backend).status_code == 201
    assert register(backend, **changes).status_code == 409


def test_two_registrations_at_once_leave_one_account(backend: Backend) -> None:
    with ThreadPoolExecutor(4) as threads:
        statuses = sorted(threads.map(lambda _: register(backend).status_code, range(4)))
    assert statuses == [201, 409, 409, 409]


@pytest.mark.parametrize(
    "changes",
    [
        {"email": "no address"},
        {"email": "a@b"},
        {"email": "a@b@c.org"},
        {"email": "x" * 250 + "@b.org"},
        {"email": "nul\0@example.org"},
        {"username": "with@sign"},
        {"username": "x"},
        {"username": "sp ace"},
        {"username": "nul\0byte"},
        {"password": "pa$$"},
        {"password": "x" * 1025},
        {"password": None},
        {"full_name": "x" * 201},
    ],
)
def test_a_registration_that_cannot_be_kept_is_refused_without_repeating_it(
    backend: Backend, changes: dict[str, Any]
) -> None:
    answer = register(backend, **changes)
    assert answer.status_code == 422
    assert PASSWORD not in answer.text
    assert str(changes.get("password") or "no password") not in answer.text


def test_lone_surrogates_anywhere_do_no_harm(backend: Backend) -> None:
    headers = {"Content-Type": "application/json"}
    for field in ("email", "username", "password", "full_name"):
        body = {**ADA, field: "\ud800" + ADA.get(field, "Ada")}
        answer = backend.client.post("/auth/register", content=json.dumps(body), headers=headers)
        assert answer.status_code in (201, 409, 422), (field, answer.text)
        answer = backend.client.post("/auth/login", content=json.dumps(body), headers=headers)
        assert answer.status_code in (200, 401, 422), (field, answer.text)


def test_a_refused_login_does_not_say_whether_the_account_exists(backend: Backend) -> None:
    register(backend)
    with SessionLocal.begin() as db:
        db.add(Row(email="oauth@example.org", username="oauth", provider="google"))
        db.add(Row(email="old@example.org", username="old", hashed_password="$2b$12$abc"))
    refused = [login(backend, name, "wrong password") for name in ("ada", "nobody", "oauth", "old")]
    assert {answer.status_code for answer in refused} == {401}
    assert len({answer.text for answer in refused}) == 1


def test_after_five_failures_even_the_right_password_has_to_wait(backend: Backend) -> None:
    register(backend)
    for _ in range(BY_BOTH):
        assert login(backend, "ada", "wrong password").status_code == 401
    refused = login(backend, "ada")
    assert refused.status_code == 429
    assert 0 < int(refused.headers["Retry-After"]) <= 300
    register(backend, email="bob@example.org", username="bob")
    assert login(backend, "bob").status_code == 200


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_without_a_token_nothing_below_api_is_answered(backend: Backend, method: str, path: str) -> None:
    answer = backend.client.request(method, path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "/auth/login" in answer.json()["detail"]


def test_every_route_below_api_is_in_that_list(backend: Backend) -> None:
    app: Any = backend.client.app
    paths = app.openapi()["paths"]
    known = {(method, path.split("?")[0].count("/")) for method, path in PROTECTED}
    for path, methods in paths.items():
        for method, operation in methods.items():
            if path.startswith("/api/"):
                assert (method.upper(), path.count("/")) in known
                assert operation["security"] == [{"HTTPBearer": []}]


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic YWRhOmFkYQ==",
        "Bearer x.y.z",
        f"Bearer {issue_token(1, 'o' * 40, HOUR)}",
        f"Bearer {issue_token(1, SECRET_KEY, HOUR, now=time.time() - 7200)}",
        f"Token {issue_token(1, SECRET_KEY, HOUR)}",
    ],
)
def test_what_is_no_token_of_ours_lets_nobody_in(backend: Backend, header: str) -> None:
    register(backend)
    answer = backend.client.get("/api/facts", headers={"Authorization": header})
    assert answer.status_code == 401


def test_two_tokens_in_one_request_let_nobody_in(backend: Backend) -> None:
    ada, bob = backend.user("ada"), backend.user("bob")
    headers = [("Authorization", f"Bearer {user.token}") for user in (ada, bob)]
    assert backend.client.get("/api/facts", headers=headers).status_code == 401


def test_a_token_in_the_query_or_a_cookie_is_not_looked_at(backend: Backend) -> None:
    token = backend.user("ada").token
    query, cookie = {"access_token": token, "token": token}, {"Cookie": f"token={token}"}
    assert backend.client.get("/api/facts", params=query, headers=cookie).status_code == 401


def test_the_account_of_a_valid_token_must_exist_and_be_open(backend: Backend) -> None:
    ada = backend.user("ada")
    for user_id in (ada.id + 1000, 2**31 - 1):
        headers = {"Authorization": f"Bearer {issue_token(user_id, SECRET_KEY, HOUR)}"}
        assert backend.client.get("/api/facts", headers=headers).status_code == 401
    with SessionLocal.begin() as db:
        db.execute(update(Row).where(Row.id == ada.id).values(is_active=False))
    answer = ada.get("/api/facts")
    assert answer.status_code == 401
    assert "closed" in answer.json()["detail"]
    assert login(backend, "ada").status_code == 401


def test_an_outage_of_the_database_is_no_wrong_password(backend: Backend, configured_database: Database) -> None:
    ada = backend.user("ada")
    with away(configured_database):
        for answer in (login(backend, "ada"), register(backend), ada.get("/api/facts")):
            assert answer.status_code == 503
            assert "database is away" in answer.json()["detail"]
    assert ada.get("/api/facts").status_code == 200


def test_no_password_token_or_question_is_logged(backend: Backend) -> None:
    with capture_logs() as logs:
        ada = backend.user("ada")
        login(backend, "ada", "wrong password")
        ada.get("/api/search", params={"q": "a private question"})
        ada.get("/api/search", params={"q": ""})
        backend.client.get("/api/facts", headers={"Authorization": "Bearer x.y.z"})
    told = json.dumps(logs, default=str)
    assert "http.request.done" in told
    for secret in (PASSWORD, "wrong password", ada.token, "private question", SECRET_KEY, "x.y.z"):
        assert secret not in told
