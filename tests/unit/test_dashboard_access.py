"""Who may see the dashboard: this machine, or whoever has the token; and how often the database is asked."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from rollout.errors import PreconditionError, UsageError
from rollout.report import server
from rollout.report.server import application, bind, read_token, refuse_open

pytestmark = pytest.mark.migration

TOKEN = "t" * 40


class Times:
    """A clock, and how long each collection takes by it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.takes = 0.0
        self.collected = 0
        self.fails = ""


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    made = Times()

    def collect(_: Any, *, span: str | None) -> str:
        made.collected += 1
        made.now += made.takes
        if made.fails:
            raise PreconditionError(made.fails)
        return f"page {made.collected} of {span}"

    monkeypatch.setattr(server, "collect", collect)
    monkeypatch.setattr(server, "render", lambda found, refresh_seconds: found)
    return made


def client(times: Times, token: str | None = None, address: str = "http://127.0.0.1:8787") -> TestClient:
    app = application(None, token, clock=lambda: times.now)  # type: ignore[arg-type]  # never asked
    return TestClient(app, base_url=address)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_an_address_that_others_reach_needs_a_token(host: str) -> None:
    with pytest.raises(UsageError, match="--token-file"):
        refuse_open(host, None)
    refuse_open(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    refuse_open(host, None)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "localhost:8787", "LOCALHOST:1"])
def test_this_machine_is_answered_by_each_of_its_names(times: Times, name: str) -> None:
    assert client(times).get("/", headers={"host": name}).status_code == 200


@pytest.mark.parametrize("name", ["evil.example", "evil.example:8787", "localhost.evil.example", "127.0.0.1.evil", ""])
def test_a_foreign_name_that_points_here_is_refused(times: Times, name: str) -> None:
    answer = client(times).get("/", headers={"host": name})
    assert answer.status_code == 421
    assert times.collected == 0


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(TOKEN)])
def test_the_token_opens_under_any_name(times: Times, header: str) -> None:
    answer = client(times, TOKEN).get("/", headers={"authorization": header, "host": "ops.example"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer x", f"Bearer {TOKEN}x", basic("x"), "Basic !!!", f"Token {TOKEN}", basic("")]
)
def test_without_it_nothing_is_collected_and_a_browser_asks_for_a_password(times: Times, header: str | None) -> None:
    answer = client(times, TOKEN).get("/", headers={} if header is None else {"authorization": header})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")
    assert times.collected == 0


def test_health_needs_no_token_and_asks_nothing(times: Times) -> None:
    answer = client(times, TOKEN).get("/healthz")
    assert (answer.status_code, answer.text, times.collected) == (200, "alive", 0)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_only_reading_is_possible(times: Times, method: str) -> None:
    assert client(times).request(method, "/").status_code == 405


def test_every_answer_forbids_frames_storing_and_foreign_scripts(times: Times) -> None:
    for path in ("/", "/healthz", "/?span=1y"):
        headers = client(times).get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"


def test_many_viewers_cost_one_collection(times: Times) -> None:
    browser = client(times)
    assert {browser.get("/").text for _ in range(5)} == {"page 1 of None"}
    times.now += 10.5
    assert browser.get("/").text == "page 2 of None"
    assert browser.get("/?span=1h").text == "page 3 of 1h"


def test_a_page_that_took_long_is_shown_for_longer(times: Times) -> None:
    browser = client(times)
    times.takes = 8.0
    browser.get("/")
    times.now += 79
    browser.get("/")
    assert times.collected == 1
    times.now += 2
    browser.get("/")
    assert times.collected == 2


def test_a_failure_is_told_with_503_and_not_kept(times: Times) -> None:
    browser = client(times)
    times.fails = "PostgreSQL is away"
    answer = browser.get("/")
    assert answer.status_code == 503
    assert "PostgreSQL is away" in answer.text
    times.fails = ""
    assert browser.get("/").status_code == 200


def test_a_span_that_is_none_is_not_found(times: Times) -> None:
    answer = client(times).get("/?span=1y")
    assert answer.status_code == 404
    assert "10m, 1h, 6h, 24h, 7d, 30d" in answer.text
    assert times.collected == 0


def test_a_token_is_read_without_the_newline_at_its_end(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(file) == TOKEN


@pytest.mark.parametrize("content", [b"", b"short\n", "tokén".encode() * 10])
def test_a_weak_or_unreadable_token_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=str(file)):
        read_token(file)
    with pytest.raises(UsageError, match="none"):
        read_token(tmp_path / "none")


def test_a_port_in_use_is_a_missing_precondition() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(PreconditionError, match="another --port"):
        bind("127.0.0.1", taken.getsockname()[1])
