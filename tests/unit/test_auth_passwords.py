"""Passwords: what is kept of them, and what an account without one answers."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from argon2 import PasswordHasher
from structlog.testing import capture_logs

from src.auth import passwords
from src.auth.passwords import hash_password, is_outdated, is_password

BCRYPT = "$2b$12$KIXQ4mJ8rV1q8H2p7v9n0eS3tqZ0lJ7l1m7yqJ7v0sZ0k1l2m3n4o"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr(passwords, "_hasher", cheap)


def test_a_password_fits_its_own_hash_only() -> None:
    stored = hash_password("correct horse")
    assert stored.startswith("$argon2id$")
    assert is_password("correct horse", stored)
    assert not is_password("Correct horse", stored)
    assert stored != hash_password("correct horse")


@pytest.mark.parametrize("password", ["nul\0byte", "\ud800", "🚂" * 100, "ü"])
def test_a_password_may_hold_any_character(password: str) -> None:
    assert is_password(password, hash_password(password))


def test_an_unknown_account_costs_one_verification_like_a_known_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hasher = Mock(wraps=PasswordHasher())
    monkeypatch.setattr(passwords, "_hasher", hasher)
    assert not is_password("anything", None)
    hasher.verify.assert_called_once()


@pytest.mark.parametrize("stored", [BCRYPT, "plain text", ""])
def test_a_hash_that_we_cannot_read_lets_nobody_in(stored: str) -> None:
    with capture_logs() as logs:
        assert not is_password("plain text", stored)
    assert all("plain text" not in str(entry) for entry in logs)


def test_a_hash_of_weaker_parameters_is_outdated(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = hash_password("correct horse")
    assert not is_outdated(stored)
    monkeypatch.setattr(passwords, "_hasher", PasswordHasher())
    assert is_outdated(stored)
