"""Tokens: whose they are, and each way in which one may not be ours."""

from __future__ import annotations

import base64
import json
import time
from datetime import timedelta
from typing import Any

import jwt
import pytest
from pydantic import SecretStr

from src.auth.errors import SecretKeyError, TokenExpiredError, TokenRefusedError
from src.auth.tokens import check_secret_key, issue_token, read_token
from src.config import DEFAULT_SECRET_KEY, Settings

KEY, OTHER_KEY = "k" * 32, "o" * 32
HOUR = timedelta(hours=1)
NOW, DAY = int(time.time()), 86_400


def encoded(claims: dict[str, Any], key: str = KEY, algorithm: str = "HS256") -> str:
    return jwt.encode(claims, key, algorithm)


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_a_token_names_the_user_it_was_issued_for() -> None:
    assert read_token(issue_token(7, KEY, HOUR), KEY) == 7


def test_a_token_ends_when_its_time_is_over() -> None:
    with pytest.raises(TokenExpiredError):
        read_token(issue_token(7, KEY, HOUR, now=NOW - 3601), KEY)


def test_a_token_of_another_key_is_refused() -> None:
    with pytest.raises(TokenRefusedError):
        read_token(issue_token(7, OTHER_KEY, HOUR), KEY)


def test_a_signature_does_not_fit_another_users_claims() -> None:
    ada, bob = issue_token(1, KEY, HOUR).split("."), issue_token(2, KEY, HOUR).split(".")
    with pytest.raises(TokenRefusedError):
        read_token(f"{ada[0]}.{ada[1]}.{bob[2]}", KEY)


@pytest.mark.parametrize("algorithm", ["none", "None", "HS512", "RS256", "ES256"])
def test_the_token_does_not_choose_its_algorithm(algorithm: str) -> None:
    claims = {"sub": "1", "iat": NOW, "exp": NOW + DAY}
    header = part({"alg": algorithm, "typ": "JWT"})
    signature = issue_token(1, KEY, HOUR).split(".")[2]
    for end in ("", signature):
        with pytest.raises(TokenRefusedError):
            read_token(f"{header}.{part(claims)}.{end}", KEY)
    if algorithm == "HS512":
        with pytest.raises(TokenRefusedError):
            read_token(encoded(claims, "k" * 64, "HS512"), "k" * 64)


@pytest.mark.parametrize("missing", ["sub", "iat", "exp"])
def test_a_token_without_one_of_our_claims_is_refused(missing: str) -> None:
    claims: dict[str, Any] = {"sub": "1", "iat": NOW, "exp": NOW + DAY}
    del claims[missing]
    with pytest.raises(TokenRefusedError):
        read_token(encoded(claims), KEY)


@pytest.mark.parametrize("subject", ["", "0", "-1", "1.0", "1 ", "0x1", "١", "2147483648", "9" * 400, "ada", "1;2"])
def test_a_subject_that_is_no_user_id_is_refused(subject: str) -> None:
    with pytest.raises(TokenRefusedError):
        read_token(encoded({"sub": subject, "iat": NOW, "exp": NOW + DAY}), KEY)


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "..", "\0", "é.é.é", "x" * 10_000])
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(TokenRefusedError):
        read_token(token, KEY)


def test_a_token_from_the_future_is_refused() -> None:
    with pytest.raises(TokenRefusedError):
        read_token(issue_token(7, KEY, HOUR, now=NOW + 3600), KEY)


def test_the_default_key_serves_development_only() -> None:
    default = SecretStr(DEFAULT_SECRET_KEY)
    check_secret_key(Settings(ENVIRONMENT="development", SECRET_KEY=default))
    with pytest.raises(SecretKeyError, match="openssl rand"):
        check_secret_key(Settings(ENVIRONMENT="production", SECRET_KEY=default))


@pytest.mark.parametrize("environment", ["development", "production"])
def test_a_short_key_serves_nowhere(environment: str) -> None:
    with pytest.raises(SecretKeyError, match="32 bytes"):
        check_secret_key(Settings(ENVIRONMENT=environment, SECRET_KEY=SecretStr("k" * 31)))
    check_secret_key(Settings(ENVIRONMENT=environment, SECRET_KEY=SecretStr("k" * 32)))


def test_the_strict_environment_is_the_default() -> None:
    assert Settings.model_fields["ENVIRONMENT"].default == "production"
