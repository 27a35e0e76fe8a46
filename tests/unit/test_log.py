"""Logs: one JSON object a line, and nothing in it that must not be there."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from sqlalchemy.exc import IntegrityError

from src import log as logs


@pytest.fixture(autouse=True)
def _configured() -> Iterator[None]:
    root, access = logging.getLogger(), logging.getLogger("uvicorn.access")
    before = (root.handlers[:], root.level, access.propagate)
    yield
    structlog.reset_defaults()
    root.handlers[:], access.propagate = before[0], before[2]
    root.setLevel(before[1])


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """`error` after it was raised here."""
    with pytest.raises(type(error)) as caught:
        raise error from cause
    return caught.value


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_our_events_and_those_of_libraries_are_json_with_the_requests_id(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure()
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger("ours").info("upload.receive.done", document_id=7)
        logging.getLogger("theirs").warning("about %s", "this")
    ours, theirs = lines(capsys)
    assert (ours["event"], ours["document_id"], ours["level"]) == ("upload.receive.done", 7, "info")
    assert (theirs["event"], theirs["logger"]) == ("about this", "theirs")
    assert {ours["request_id"], theirs["request_id"]} == {"r1"}
    assert str(ours["timestamp"]).endswith("Z")


@pytest.mark.parametrize(
    ("fields", "secret"),
    [
        ({"password": "hunter2"}, "hunter2"),
        ({"access_token": "hunter2"}, "hunter2"),
        ({"headers": {"Authorization": "hunter2"}}, "hunter2"),
        ({"url": "postgresql://ada:hunter2@db/victus"}, "hunter2"),
        ({"url": "postgresql:///x?user=a&password=hunter2&host=b"}, "hunter2"),
        ({"why": "refused Bearer hunter2-hunter2"}, "hunter2"),
        ({"why": ["key sk-proj-0123456789abcdef is wrong"]}, "0123456789"),
        ({"why": "token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"}, "c2lnbmF0dXJl"),
    ],
)
def test_a_secret_is_masked_by_its_name_or_by_its_form(
    capsys: pytest.CaptureFixture[str], fields: dict[str, object], secret: str
) -> None:
    logs.configure()
    structlog.get_logger().info("something.was.done", **fields)
    out = capsys.readouterr().out
    assert secret not in out
    assert "***" in out


def test_an_address_with_a_port_is_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    structlog.get_logger().info("on http://127.0.0.1:8000 and redis://cache:6379/0")
    assert "127.0.0.1:8000 and redis://cache:6379/0" in capsys.readouterr().out


def test_a_failure_is_told_without_the_values_that_it_quotes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure()
    driver = ValueError("duplicate key value\nDETAIL: Key (email)=(ada@example.org) already exists.")
    error = IntegrityError("INSERT INTO users VALUES (?)", ("ada@example.org",), driver)
    structlog.get_logger().error("account.make.failed", exc_info=raised(error))
    (line,) = lines(capsys)
    assert "ada@example.org" not in json.dumps(line)
    assert line["exception"][0]["says"] == "duplicate key value"
    assert "test_log.py" in line["exception"][0]["at"][-1]


def test_the_cause_of_a_failure_is_told_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    error = raised(RuntimeError("cannot keep it"), OSError(28, "No space left"))
    structlog.get_logger().error("keep.failed", exc_info=error)
    logging.getLogger("theirs").error("also here", exc_info=error)
    for line in lines(capsys):
        assert [one["type"] for one in line["exception"]] == ["RuntimeError", "OSError"]


def test_uvicorns_access_log_is_off_because_it_holds_the_questions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    access = logging.getLogger("uvicorn.access")
    access.addHandler(logging.StreamHandler(sys.stdout))
    logs.configure()
    access.setLevel(logging.INFO)
    access.info('"%s"', "GET /api/search?q=private")
    assert capsys.readouterr().out == ""


def test_long_values_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    structlog.get_logger().info("something.was.done", reason="x" * 100_000)
    assert len(capsys.readouterr().out) < 2_000
