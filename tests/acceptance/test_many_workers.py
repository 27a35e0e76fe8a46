"""Four workers of uvicorn, in every stage: what one of them does the others know, and none loses anything at its end.

One server serves all tests of this file, one after the other; the last ones end its workers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
from langchain_community.vectorstores import FAISS
from prometheus_client.parser import text_string_to_metric_families

from src.tools.rag_tools.migration.stages import Stage
from src.tools.rag_tools.migration.targeting import bucket
from tests.support.database import Database
from tests.support.embeddings import HashEmbeddings
from tests.support.routers import set_stage
from tests.support.served import SECONDS, STARTED, Line, Served, environment, form, register, served
from tests.support.sessions import wait_until

pytestmark = pytest.mark.migration

WORKERS = 4
# Forward through all, and back to where both stores are written and the other one is asked.
WAY = (
    (Stage.OFF, 0), (Stage.DUALWRITE, 0), (Stage.SHADOW, 0), (Stage.LIVE, 0), (Stage.LIVE, 50), (Stage.LIVE, 100),
    (Stage.RAMPDOWN, 100), (Stage.COMPLETE, 100), (Stage.RAMPDOWN, 100), (Stage.SHADOW, 0),
)  # fmt: skip
ARRIVED = "(SELECT count(*) FROM rollout_instances WHERE transition_id = {}) = {}"
HEARD = "(SELECT count(*) FROM rollout_instances WHERE seen_at > '{}') = {}"
NOTHING_OWED = "NOT EXISTS (SELECT FROM vector_ledger WHERE state <> 'done')"
DIFFS = "SELECT count(*) FROM shadow_diffs WHERE transition_id = %s"
PRESENT = "SELECT pid FROM rollout_instances"
# The first poll may have looked before; the second brings what is so now; at the third that is taken over.
POLLS = 3
TOPICS = (
    "The heron waits where the reeds are thin and the water hardly moves.",
    "Bread rises slowly in a cold kitchen, and tastes of more.",
    "The last tram to the harbour leaves eleven minutes past midnight.",
    "Granite cools deep below the ground, over thousands of years.",
)


@dataclass
class Somebody:
    """An account on one side of the ramp at 50 percent."""

    id: int
    token: str
    kept: dict[int, str] = field(default_factory=dict)


@dataclass
class Fleet:
    """The server, a line to each of its workers, and two users whom the ramp parts."""

    served: Served
    database: Database
    folder: Path
    lines: list[Line]
    people: list[Somebody]
    uploads: int = 0

    def through(self, number: int, somebody: Somebody) -> Line:
        """The line to that worker, now this user's."""
        line = self.lines[number % WORKERS]
        line.token = somebody.token
        return line

    @contextmanager
    def connected(self) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(self.database.superuser_conninfo(), autocommit=True) as connection:
            yield connection

    def go_to(self, stage: Stage, percent: int) -> int:
        """Returns once all workers act on it."""
        with self.connected() as connection:
            number = set_stage(connection, stage, percent)
        wait_until(self.database, ARRIVED.format(number, WORKERS))
        return number

    def upload(self, worker: int, somebody: Somebody) -> int:
        """A new document, which is ready when this returns."""
        self.uploads += 1
        text = f"{TOPICS[self.uploads % len(TOPICS)]} Note {self.uploads} of user {somebody.id}."
        answer = self.through(worker, somebody).ask("POST", "/api/upload", form(f"note-{self.uploads}.txt", text))
        assert answer.status == 200, answer
        document: int = answer.data["document_id"]
        wait_until(self.database, f"(SELECT status FROM documents WHERE id = {document}) = 'ready'")
        somebody.kept[document] = text
        return document

    def found(self, worker: int, somebody: Somebody, text: str) -> list[int]:
        """The documents in the answer, the nearest first; never another's."""
        hits = self.through(worker, somebody).get(f"/api/search?{urlencode({'q': text, 'k': 20})}")
        assert all(f"of user {somebody.id}." in hit["content"] for hit in hits)
        return [hit["document_id"] for hit in hits]

    def delete(self, worker: int, somebody: Somebody, document: int) -> None:
        """Returns once every worker acts on a poll that was begun after it."""
        assert self.through(worker, somebody).ask("DELETE", f"/api/documents/{document}").status == 204
        for _ in range(POLLS):
            with self.connected() as connection:
                (now,) = connection.execute("SELECT clock_timestamp()").fetchone() or ("",)
            wait_until(self.database, HEARD.format(now, WORKERS))
        somebody.kept.pop(document)


@pytest.fixture(scope="module")
def fleet(postgres: Any, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    database = Database(postgres, f"test_fleet_{os.getpid()}")
    postgres.create_database(database.name, template_database)
    counts = folder / "counts"
    counts.mkdir()
    try:
        settings = environment(database, folder, PROMETHEUS_MULTIPROC_DIR=str(counts), POLL_SECONDS="0.1")
        with served(folder, settings) as made:
            lines = [made.line_to(pid) for pid in made.pids]
            people = [Somebody(*register(lines[0], f"user{number}")) for number in range(8)]
            yield Fleet(made, database, folder, lines, [min(people, key=_bucket), max(people, key=_bucket)])
    finally:
        postgres.drop_database(database.name)


def _bucket(somebody: Somebody) -> float:
    return bucket(somebody.id)


def metrics(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (each.name, frozenset(each.labels.items())): each.value
        for family in text_string_to_metric_families(text)
        for each in family.samples
    }


def test_the_ramp_parts_the_two_users(fleet: Fleet) -> None:
    first, second = fleet.people
    assert bucket(first.id) < 50 <= bucket(second.id)


@pytest.mark.parametrize(("stage", "percent"), WAY, ids=[f"{n}-{s}-{p}" for n, (s, p) in enumerate(WAY)])
def test_what_one_worker_takes_or_deletes_the_others_find_or_miss(fleet: Fleet, stage: Stage, percent: int) -> None:
    """Both users, each through workers of their own; before and after a deletion by yet another worker."""
    if stage is not Stage.OFF:
        fleet.go_to(stage, percent)
    for number, somebody in enumerate(fleet.people):
        document = fleet.upload(number, somebody)
        text = somebody.kept[document]
        found = [fleet.found(worker, somebody, text) for worker in range(WORKERS)]
        assert all(document in answer for answer in found)
        fleet.delete(number + 1, somebody, document)
        found = [fleet.found(worker, somebody, text) for worker in range(WORKERS)]
        assert not any(document in answer for answer in found)
        for worker in range(WORKERS):
            assert fleet.through(worker, somebody).ask("GET", f"/api/documents/{document}").status == 404
        fleet.upload(number + 2, somebody)


def test_each_worker_says_that_it_is_ready_and_in_which_stage(fleet: Fleet) -> None:
    for line in fleet.lines:
        told = line.get("/readyz")
        assert told["ready"] is True
        assert told["parts"]["documents"]["stage"] == WAY[-1][0]


def test_any_worker_answers_for_all_of_them_when_it_is_asked_for_metrics(fleet: Fleet) -> None:
    asked = ("http_requests_total", frozenset({("method", "GET"), ("route", "/healthz"), ("status", "200")}))
    told = [metrics(line.ask("GET", "/metrics").text) for line in fleet.lines]
    before = told[0][asked]
    assert {each[asked] for each in told} == {before}
    for line in fleet.lines:
        line.get("/healthz")
    assert metrics(fleet.lines[-1].ask("GET", "/metrics").text)[asked] == before + WORKERS
    for each in told:
        assert each["rag_transition", frozenset()] == each["rag_newest_transition", frozenset()] == len(WAY)
        assert each["rag_stage", frozenset({("stage", WAY[-1][0].value)})] == 1


def test_a_worker_that_is_killed_is_replaced_and_its_last_transition_is_no_longer_shown(fleet: Fleet) -> None:
    victim = fleet.served.pids[0]
    os.kill(victim, signal.SIGKILL)
    fleet.served.wait_for(STARTED, WORKERS + 1)
    assert victim not in fleet.served.pids
    for line in fleet.lines:
        line.close()
    fleet.lines[:] = [fleet.served.line_to(pid) for pid in fleet.served.pids]
    number = fleet.go_to(Stage.SHADOW, 0)
    told = metrics(fleet.lines[0].ask("GET", "/metrics").text)
    assert told["rag_transition", frozenset()] == number


def test_a_graceful_stop_compares_what_is_queued_saves_faiss_and_leaves_the_fleet(fleet: Fleet) -> None:
    """The shadow hangs on a lock until the stop has begun, so that comparisons are queued in every worker then."""
    wait_until(fleet.database, NOTHING_OWED)
    number = fleet.go_to(Stage.SHADOW, 0)
    workers = set(fleet.served.pids)
    with psycopg.connect(fleet.database.superuser_conninfo()) as locking, fleet.connected() as watching:
        locking.execute("LOCK TABLE document_chunks IN ACCESS EXCLUSIVE MODE")
        asked = 0
        for worker in range(WORKERS):
            for somebody in fleet.people * 2:
                assert set(fleet.found(worker, somebody, TOPICS[0])) == set(somebody.kept)
                asked += 1
        for line in fleet.lines:
            line.close()
        fleet.served.process.send_signal(signal.SIGTERM)
        assert count(watching, number) < asked
        locking.rollback()
        assert fleet.served.process.wait(SECONDS) in (0, -signal.SIGTERM), fleet.served.told()
        assert count(watching, number) == asked
        assert not workers & {pid for (pid,) in watching.execute(PRESENT)}
    kept = {text for somebody in fleet.people for text in somebody.kept.values()}
    assert saved(fleet.folder / "faiss_index") == kept
    assert fleet.served.faults() == []


def count(connection: psycopg.Connection[Any], transition: int) -> int:
    row = connection.execute(DIFFS, (transition,)).fetchone()
    return int(row[0]) if row else 0


def saved(directory: Path) -> set[str]:
    """The texts that the old release would find."""
    opened = FAISS.load_local(str(directory), HashEmbeddings(), allow_dangerous_deserialization=True)
    return {opened.docstore.search(name).page_content for name in opened.index_to_docstore_id.values()}
