"""How every command ends: one envelope on stdout, the causes on stderr, and an exit code that says of what kind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
import typer
from rich.console import Console

from rollout.control import actor
from rollout.errors import InconclusiveError, PreconditionError, RefusedError, RolloutError, UsageError
from rollout.output import Answer, failures, printable, progress, say, table
from rollout.profiles import profile_in_force
from src.database import DocumentsNeedPostgresError
from src.tools.rag_tools.embeddings import EmbeddingUnavailableError
from src.tools.rag_tools.store import StoreError

pytestmark = pytest.mark.migration


@contextmanager
def ends_with(code: int) -> Iterator[None]:
    with pytest.raises(typer.Exit) as ended:
        yield
    assert ended.value.exit_code == code


@pytest.fixture(autouse=True)
def _no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROLLOUT_PROFILE", raising=False)


def test_profile_and_actor_may_stand_in_the_file_of_settings_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("ROLLOUT_PROFILE=rehearsal\nROLLOUT_ACTOR=ada\n")
    assert (profile_in_force().name, actor()) == ("rehearsal", "ada")
    monkeypatch.setenv("ROLLOUT_PROFILE", "production")
    monkeypatch.setenv("ROLLOUT_ACTOR", "")
    assert profile_in_force().name == "production"
    assert "@" in actor()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("u"), 2),
        (RefusedError("r"), 3),
        (InconclusiveError("i"), 4),
        (PreconditionError("p"), 5),
        (DocumentsNeedPostgresError("d"), 5),
        (StoreError("s"), 5),
        (EmbeddingUnavailableError("e"), 5),
        (RolloutError("x"), 1),
        (ZeroDivisionError("z"), 1),
        (AssertionError(), 1),
    ],
)
def test_an_error_has_the_exit_code_of_its_kind_and_is_an_envelope_too(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with ends_with(code), failures("check", as_json=True):
        raise error
    shown = capsys.readouterr()
    envelope = json.loads(shown.out)
    assert (envelope["version"], envelope["command"], envelope["exit_code"]) == (1, "check", code)
    assert envelope["error"] == (str(error) or "AssertionError")
    assert "rollout: " in shown.err


def test_only_what_nobody_expected_shows_where_it_happened(capsys: pytest.CaptureFixture[str]) -> None:
    with ends_with(1), failures("check", as_json=False):
        raise ZeroDivisionError("a bug")
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert shown.out == ""
    with ends_with(5), failures("check", as_json=False):
        raise PreconditionError("no pgvector")
    assert "Traceback" not in capsys.readouterr().err


def test_the_causes_are_told_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    store = StoreError("the journal could not be written")
    store.__cause__ = OSError("no space left")
    with ends_with(5), failures("check", as_json=False):
        raise PreconditionError(str(store)) from store
    assert capsys.readouterr().err.splitlines() == [
        "rollout: the journal could not be written",
        "  because: no space left",
    ]


def test_interrupted_it_says_so_and_exits_one(capsys: pytest.CaptureFixture[str]) -> None:
    with ends_with(1), failures("backfill", as_json=True):
        raise KeyboardInterrupt
    assert "goes on from there" in json.loads(capsys.readouterr().out)["error"]


def test_the_envelope_keeps_its_keys_whatever_a_command_calls_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    say(Answer("assign-owners", {"version": 17, "command": "?", "exit_code": 9, "profile": "?", "kept": 3}), True)
    assert json.loads(capsys.readouterr().out) == {
        "version": 1, "command": "assign-owners", "exit_code": 0, "profile": "production", "kept": 3,
    }  # fmt: skip


def test_an_answer_may_end_with_an_exit_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with ends_with(3), failures("verify", as_json=True):
        say(Answer("verify", {"differences": 2}, exit_code=3), True)
    assert json.loads(capsys.readouterr().out)["exit_code"] == 3


def test_sets_dates_and_broken_names_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    say(Answer("backfill", {"owners": {2, 1}, "name": "\udcff.pdf", "none": None}), True)
    assert json.loads(capsys.readouterr().out)["owners"] == [1, 2]


def test_a_profile_other_than_that_of_production_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(Answer("status", {}, ["stage off"]), False)
    assert capsys.readouterr().out == "stage off\n"
    monkeypatch.setenv("ROLLOUT_PROFILE", "rehearsal")
    say(Answer("status", {}, ["stage off"]), False)
    assert capsys.readouterr().out == "profile: rehearsal\nstage off\n"
    with ends_with(2), failures("status", as_json=False):
        monkeypatch.setenv("ROLLOUT_PROFILE", "lenient")
        say(Answer("status", {}), False)


def test_what_would_steer_the_terminal_is_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b]0;owned\x07[bold]b\nc.pdf"
    assert "\x1b" not in printable(name)
    say(Answer("list", {}, [table(name, ["file"], [[name]]), f"one\n{name}"]), False)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[bold]" in out
    with ends_with(5), failures("list", as_json=False):
        raise PreconditionError(name)
    assert "\x1b" not in capsys.readouterr().err


def test_progress_is_on_stderr_and_no_line_is_written_twice(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress("backfill")
    for done in range(1_001):
        show(done, 1_000)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 11
    assert shown.err.splitlines()[-1] == "backfill 1000/1000"


def test_progress_of_nothing_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    progress("backfill")(0, 0)
    assert capsys.readouterr().err == "backfill 0/0\n"


def test_a_narrow_terminal_cuts_nothing_off_and_keeps_what_names_the_row_whole() -> None:
    group = "66b62087-61a5-4f0e-9d3c-0d9a3cf5c1aa"
    console = Console(width=80, file=StringIO())
    console.print(table("held", ["group", "source", "why"], [[group, "uploads/" + "long" * 30 + ".pdf", "no_row"]]))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert group in printed
    assert "…" not in printed
    assert len(re.findall(r"[long]", printed.partition("why")[2].partition(group)[2])) >= 120
