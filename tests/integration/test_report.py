"""What the page collects from a real database: the same as the commands, and nothing written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from rollout import steps
from rollout.control import Control
from rollout.errors import PreconditionError, UsageError
from rollout.profiles import PRODUCTION
from rollout.report import collect, queries, render
from rollout.report.agreement import agreement
from rollout.status import status
from src.database import Role
from src.tools.rag_tools.migration.stages import Stage
from tests.support import rollouts
from tests.support.control import control_on
from tests.support.rollouts import difference
from tests.support.routers import set_stage
from tests.support.unchanged import contents, files

pytestmark = pytest.mark.migration

ROLLOUT = [sys.executable, "-c", "from rollout.cli import main; main()"]


@pytest.fixture
def poisoned(
    configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, rollouts.Made, Control]]:
    made = rollouts.poisoned(configured_database, tmp_path)
    with control_on(tmp_path, monkeypatch, profile=PRODUCTION) as control:
        yield configured_database, made, control


def test_in_no_stage_does_looking_change_anything(poisoned: tuple[Any, rollouts.Made, Control], tmp_path: Path) -> None:
    database, _, control = poisoned
    for stage, percent in [*((stage, 0) for stage in Stage), (Stage.LIVE, 100)]:
        with database.connect(autocommit=True) as connection:
            set_stage(connection, stage, percent)
        before = contents(database), files(tmp_path)
        found = collect(control)
        render(found)
        assert (contents(database), files(tmp_path)) == before
        assert found.status["stage"] == stage


def test_the_gate_is_that_of_rollout_check_without_what_writes_or_sends(
    poisoned: tuple[Any, rollouts.Made, Control],
) -> None:
    control = poisoned[2]
    found = collect(control)
    asked = steps.check_forward(control, control.view(), None)
    assert found.gate is not None
    assert set(found.left_out) == {"sentinel"}
    names = [each.name for each in asked.criteria if each.name != "sentinel"]
    assert [each.name for each in found.gate.criteria] == names
    verdicts = {each.name: each.verdict for each in asked.criteria}
    assert all(each.verdict == verdicts[each.name] for each in found.gate.criteria)


def test_before_the_first_step_nothing_is_embedded(
    configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            raise AssertionError("a page was shown, and texts were sent")

        embed_query = embed_documents

    with control_on(tmp_path, monkeypatch, embeddings=Refusing()) as control:
        found = collect(control)
    assert set(found.left_out) == {"model"}


def test_the_last_bound_of_the_chart_is_the_one_that_the_gate_compares(
    configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts.healthy(configured_database, tmp_path)
    with control_on(tmp_path, monkeypatch, profile=PRODUCTION) as control:
        # Also where most of the transition lies before the chart begins.
        for span in ("24h", "1h"):
            found = collect(control, span=span)
            assert found.gate is not None
            gate = next(each.value for each in found.gate.criteria if each.name == "agreement")
            last = {cohort: points[-1].bound for cohort, points in agreement(found.series).items()}
            assert gate == ", ".join(f"{cohort} {last[cohort]:.4f}" for cohort in sorted(last))


def test_the_state_is_that_of_rollout_status(poisoned: tuple[Any, rollouts.Made, Control]) -> None:
    control = poisoned[2]
    shown, said = collect(control).status, status(control)
    for volatile in ("fleet", "owed"):
        shown, said = ({**each, volatile: len(each[volatile])} for each in (shown, said))
    assert shown == said


def test_a_leak_is_listed_before_newer_differences_and_explained(
    poisoned: tuple[Any, rollouts.Made, Control],
) -> None:
    database, made, control = poisoned
    with database.connect(autocommit=True) as connection:
        for _ in range(queries.SHOWN_DIFFERENCES):
            difference(connection, made.users[0], "error", served=made.chunks[0], shadow=None, age=1)
    found = collect(control).differences
    assert len(found) == queries.SHOWN_DIFFERENCES
    assert found[0].cause == "owner_mismatch"
    assert found[0].explanation is not None
    assert "question was user 1's" in " ".join(found[0].explanation["proof"])


def test_a_difference_that_cannot_be_read_does_not_hide_the_others(
    poisoned: tuple[Any, rollouts.Made, Control],
) -> None:
    database, made, control = poisoned
    with database.connect(autocommit=True) as connection:
        number = difference(connection, made.users[0], "error", served=made.chunks[0], shadow=None, age=1)
        connection.execute("UPDATE shadow_diffs SET event = '{}' WHERE id = %s", (number,))
    found = {each.id: each for each in collect(control).differences}
    assert found[number].explanation is None
    assert "KeyError" in found[number].failed
    assert sum(each.explanation is not None for each in found.values()) > 1


def test_evidence_that_takes_too_long_is_left_out_and_the_rest_is_shown(
    poisoned: tuple[Any, rollouts.Made, Control], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "TALLIES", "SELECT pg_sleep(60), %(begins)s, %(ends)s, %(bucket)s, %(agreed)s")
    monkeypatch.setattr(queries, "SECONDS", 0.05)
    found = collect(poisoned[2])
    assert "in time" in found.series_failed
    assert found.transitions[0].actor == "guard"
    assert "not read" in render(found)


def test_the_page_reads_in_a_transaction_that_cannot_write(poisoned: tuple[Any, rollouts.Made, Control]) -> None:
    with pytest.raises(PreconditionError, match="read-only"), queries.reading(poisoned[2]) as connection:
        connection.execute("DELETE FROM shadow_diffs")


def test_owners_that_were_assigned_meanwhile_are_taken_over(poisoned: tuple[Any, rollouts.Made, Control]) -> None:
    database, _, control = poisoned
    collect(control)
    with database.connect(autocommit=True) as connection:
        connection.execute("INSERT INTO owner_assignments (actor, counts) VALUES ('bo@ops', '{}')")
    collect(control)
    assert control.faiss.owners_version == 2


def test_a_span_that_is_none_is_refused(poisoned: tuple[Any, rollouts.Made, Control]) -> None:
    with pytest.raises(UsageError, match="10m, 1h, 6h, 24h, 7d, 30d"):
        collect(poisoned[2], span="1y")


# -- the commands


def environment(database: Any, folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "DATABASE_URL": database.url(Role.APP),
        "DATABASE_ROLLOUT_URL": database.url(Role.ROLLOUT),
        "FAISS_INDEX_PATH": str(folder / "faiss_index"),
        "EMBEDDING_PROVIDER": "local",
    }


def test_the_report_is_written_whole_or_what_was_there_stays(database: Any, tmp_path: Path) -> None:
    rollouts.healthy(database, tmp_path)
    file = tmp_path / "report.html"
    file.write_text("the one before")
    settings = environment(database, tmp_path)
    refused = subprocess.run(
        [*ROLLOUT, "report", "report.html", "--span", "1y"],
        cwd=tmp_path,
        env=settings,
        capture_output=True,
        check=False,
    )
    assert (refused.returncode, file.read_text()) == (2, "the one before")
    subprocess.run([*ROLLOUT, "report", "report.html", "--json"], cwd=tmp_path, env=settings, check=True)
    assert "<h1>Rollout: FAISS to pgvector</h1>" in file.read_text(encoding="utf-8")
    assert [each.name for each in tmp_path.glob(".report*")] == []


@contextmanager
def running(database: Any, folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A dashboard in a process of its own, and its address; interrupted at the end."""
    with subprocess.Popen(
        [*ROLLOUT, "dashboard", "--port", "0", *arguments],
        cwd=folder, env=environment(database, folder), stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            said = re.search(r"http://\S+", process.stderr.readline())
            assert said is not None
            yield process, said[0]
        finally:
            process.send_signal(signal.SIGINT)
            process.stderr.read() if process.stderr else None


def test_the_dashboard_serves_until_it_is_interrupted(database: Any, tmp_path: Path) -> None:
    with running(database, tmp_path) as (process, url), urllib.request.urlopen(url) as answer:
        assert b"Rollout: FAISS to pgvector" in answer.read()
    assert process.returncode == 0


def test_with_a_token_the_dashboard_may_be_seen_from_elsewhere_by_whoever_has_it(database: Any, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s" * 64)
    with running(database, tmp_path, "--host", "0.0.0.0", "--token-file", "token") as (_, url):
        here = url.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(here)
        asked = urllib.request.Request(here, headers={"Authorization": f"Bearer {'s' * 64}"})
        with urllib.request.urlopen(asked) as answer:
            assert answer.status == 200


def test_without_a_token_it_does_not_listen_for_others(database: Any, tmp_path: Path) -> None:
    ended = subprocess.run(
        [*ROLLOUT, "dashboard", "--host", "0.0.0.0"], env=environment(database, tmp_path), cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "--token-file" in ended.stderr


def test_a_database_that_goes_away_and_comes_back_is_told_and_shown_again(
    poisoned: tuple[Any, rollouts.Made, Control],
) -> None:
    database, _, control = poisoned
    with psycopg.connect(database.server.superuser_conninfo(), autocommit=True) as server:
        server.execute(f'ALTER DATABASE "{database.name}" ALLOW_CONNECTIONS false')
        server.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", [database.name]
        )
        control.pool.timeout = 0.2
        with pytest.raises(PreconditionError):
            collect(control)
        server.execute(f'ALTER DATABASE "{database.name}" ALLOW_CONNECTIONS true')
    control.pool.timeout = 60
    # A dead connection that nobody has asked for yet is told by the first who does.
    control.pool.check()
    assert collect(control).status["transition"] == 6
