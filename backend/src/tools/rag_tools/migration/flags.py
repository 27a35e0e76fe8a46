"""The flags in force: the last stage change, what is owed, what is being deleted, as this process knows them.

One statement a second brings all of it, so it is consistent, and reports which transition this process acts
on: the oldest among the one it adopted and those that requests in flight began under. What the process did
itself is added at once, and a poll that began earlier does not take it away. What is owed is only ever added
between polls: to believe too much owed costs a read from the other store, to believe too little loses a document.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import psycopg
import structlog

from src.tools.rag_tools.migration.ledger import WRITES
from src.tools.rag_tools.migration.stages import (
    ROUTING,
    Stage,
    Store,
    UnknownStageError,
    parse_stage,
)
from src.tools.rag_tools.migration.targeting import sample_rate, serving_store
from src.tools.rag_tools.pgvector_store import Connection, Pool, unavailable
from src.tools.rag_tools.store import StoreError

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
STALE_SECONDS = 30.0
DEAD_SECONDS = 60.0

POLL = """
WITH latest AS (
    SELECT id, stage, read_percent, read_threshold, shadow_sample_rate
    FROM rollout_transitions ORDER BY id DESC LIMIT 1
), written AS (
    SELECT jsonb_array_elements_text(%(writes)s::jsonb -> stage) AS store FROM latest
), beat AS (
    INSERT INTO rollout_instances (instance, host, pid, transition_id, halted, without_faiss)
    VALUES (%(instance)s, %(host)s, %(pid)s, %(acts_on)s, %(halted)s, %(without_faiss)s)
    ON CONFLICT (instance) DO UPDATE
    SET transition_id = excluded.transition_id, halted = excluded.halted,
        without_faiss = excluded.without_faiss, seen_at = clock_timestamp()
), counted AS (
    INSERT INTO rollout_counts (transition_id, since, name, count)
    SELECT %(acts_on)s, date_bin('10 seconds', clock_timestamp(), 'epoch'), key, value::bigint
    FROM jsonb_each_text(%(counts)s::jsonb)
    ON CONFLICT (transition_id, since, name) DO UPDATE
    SET count = rollout_counts.count + excluded.count
)
SELECT latest.*,
    (SELECT coalesce(jsonb_agg(DISTINCT jsonb_build_array(l.user_id, l.store)), '[]')
     FROM vector_ledger l JOIN documents d ON d.id = l.document_id AND d.status = 'ready'
     WHERE l.state <> 'done' AND l.wanted = 'present' AND (SELECT count(*) FROM written) = 2) AS owed,
    (SELECT coalesce(array_agg(DISTINCT l.document_id), '{}')
     FROM vector_ledger l JOIN written USING (store)
     WHERE l.state <> 'done' AND l.wanted = 'absent') AS hidden,
    (SELECT coalesce(max(version), 0) FROM owner_assignments) AS owners_version
FROM latest
"""
FORGET = "DELETE FROM rollout_instances WHERE instance = %s"


class FlagsUnknownError(StoreError):
    """This process has no flags that it may act on; it must not serve or write."""


class HaltedError(StoreError):
    """This process has stopped writing; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class View:
    """What a request acts on from its beginning to its end."""

    transition_id: int
    stage: Stage
    read_percent: int
    read_threshold: float
    sample_rate: float
    owed: Mapping[int, frozenset[Store]] = field(default_factory=dict)
    hidden: frozenset[int] = frozenset()
    owners_version: int = 0
    fetched_at: float = 0.0

    def serving(self, user_id: int) -> Store:
        """The store that is authoritative for this user's reads and writes; asks the flag where users differ."""
        reads = ROUTING[self.stage].reads
        return reads[0] if len(reads) == 1 else serving_store(self, user_id)

    def plan(self, user_id: int) -> Plan:
        """Everything that one request of this user needs to know, by one evaluation of the flag."""
        return Plan(self.serving(user_id), ROUTING[self.stage].writes, self.owed.get(user_id, frozenset()))

    def writes(self, user_id: int) -> tuple[Store, ...]:
        return self.plan(user_id).writes

    def reads(self, user_id: int) -> tuple[Store, ...]:
        return self.plan(user_id).reads

    def fallback(self, user_id: int) -> Store | None:
        return self.plan(user_id).fallback


@dataclass(frozen=True, slots=True)
class Plan:
    """Whom one request asks and writes. A provider may answer otherwise a moment later, so it is asked once."""

    serving: Store
    written: tuple[Store, ...]
    owing: frozenset[Store]

    @property
    def writes(self) -> tuple[Store, ...]:
        """The stores to write, the serving one first."""
        return tuple(sorted(self.written, key=lambda store: store is not self.serving))

    @property
    def reads(self) -> tuple[Store, ...]:
        """The stores to read: the serving one unless it owes this user something; both where both owe."""
        if len(self.written) == 1:
            return (self.serving,)
        if len(self.owing) == len(Store):
            return tuple(Store)
        return (self.serving.other,) if self.serving in self.owing else (self.serving,)

    @property
    def fallback(self) -> Store | None:
        """Whom to ask where the serving store fails; None where nobody else holds everything."""
        return self.serving.other if len(self.written) == len(Store) and not self.owing else None


@dataclass(frozen=True, slots=True)
class Begun:
    """When a fetch began: after which of this process's notes, and on its clock. What it brings is as old as that."""

    after: int
    at: float


class Flags:
    """This process's view of the flags, the requests in flight under it, and its place in the fleet."""

    def __init__(self, pool: Pool, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.pool = pool
        self.instance = uuid.uuid4()
        self.clock = clock
        self._lock = threading.Lock()
        self._view: View | None = None
        self._halted: str | None = None
        self._reported = 0
        self._in_flight: Counter[int] = Counter()
        self._sequence = 0
        self._noted: dict[int, int] = {}
        self._hid: dict[int, int] = {}
        self._counts: Counter[str] = Counter()

    # -- requests

    def count(self, name: str) -> None:
        """Count something that a gate asks about; the next poll adds it to the fleet's counts."""
        with self._lock:
            self._counts[name] += 1

    @contextmanager
    def request(self, *, write: bool = False) -> Iterator[View]:
        """The view for one request; the fleet's next step waits until it is over."""
        with self._lock:
            view = self._current()
            if write and self._halted is not None:
                raise HaltedError(self._halted)
            self._in_flight[view.transition_id] += 1
        try:
            yield view
        finally:
            with self._lock:
                self._in_flight[view.transition_id] -= 1
                self._in_flight += Counter()

    def view(self) -> View:
        with self._lock:
            return self._current()

    @property
    def halted(self) -> str | None:
        return self._halted

    @property
    def acts_on(self) -> int:
        """The oldest transition that this process still acts on; a request in flight may hold it back."""
        with self._lock:
            return self._acts_on()

    @property
    def is_reported(self) -> bool:
        """Whether the fleet knows that this process acts on the newest transition that it adopted."""
        with self._lock:
            return self._view is None or self._reported >= self._view.transition_id

    def halt(self, reason: str) -> None:
        """Stop writing until this process is started again."""
        with self._lock:
            self._halt(reason)

    def note_owed(self, user_id: int, stores: frozenset[Store]) -> None:
        """What this process has just seen owed to a user: known to its next request.

        Two requests may note in another order than they looked, so a note takes nothing away; the next poll does.
        """
        with self._lock:
            view = self._current()
            self._noted[user_id] = self._next()
            self._view = replace(view, owed=_together(view.owed, {user_id: stores}))

    def note_deleted(self, document_id: int) -> None:
        """A document whose deletion this process has committed is in none of its answers from here on."""
        with self._lock:
            view = self._current()
            self._hid[document_id] = self._next()
            self._view = replace(view, hidden=view.hidden | {document_id})

    # -- the poll

    def poll(self) -> View:
        """Fetch and adopt. Raises StoreError where PostgreSQL is away: the flags before stay in force."""
        begun, row = self.fetch()
        return self.adopt(begun, row)

    def fetch(self) -> tuple[Begun, tuple[object, ...]]:
        """One round trip; reports what this process acted on when it began."""
        with self._lock:
            begun, acts_on, halted = Begun(self._sequence, self.clock()), self._acts_on(), self._halted
            counts, self._counts = self._counts, Counter()
            without_faiss = self._without_faiss(acts_on)
        parameters = {
            "instance": self.instance,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "acts_on": acts_on,
            "halted": halted,
            "without_faiss": without_faiss,
            "writes": WRITES,
            "counts": json.dumps(counts),
        }
        try:
            with unavailable("poll of the flags"), self.pool.connection() as connection:
                row = connection.execute(POLL, parameters).fetchone()
        except StoreError as error:
            with self._lock:
                self._counts += counts
            if isinstance(error.__cause__, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedColumn):
                raise FlagsUnknownError(
                    "the migration's tables are missing or older than this release; run `alembic upgrade head` with"
                    " DATABASE_ADMIN_URL set"
                ) from error
            raise
        self._reported = acts_on
        if row is None:
            raise FlagsUnknownError(
                "rollout_transitions is empty, so the stage is unknown; restore its rows from a backup"
            )
        return begun, row

    def adopt(self, begun: Begun, row: tuple[object, ...]) -> View:
        """Take what a fetch brought, and keep what this process has learnt since the fetch began."""
        fresh = self._parse(begun, row)
        with self._lock:
            if self._view is not None and fresh.transition_id < self._view.transition_id:
                self._halt(
                    f"the database is at transition {fresh.transition_id}, this process acted on"
                    f" {self._view.transition_id}: PostgreSQL lost commits in a failover."
                    " Writes are stopped; follow RUNBOOK.md, 'PostgreSQL failed over', then restart"
                )
                self._view = replace(self._view, hidden=self._view.hidden | fresh.hidden)
                return self._view
            self._view = self._merge(begun, fresh)
            return self._view

    def leave(self) -> None:
        """Take this process out of the fleet; called at a graceful stop."""
        try:
            with unavailable("leave"), self.pool.connection() as connection:
                connection.execute(FORGET, (self.instance,))
        except StoreError as error:
            log.warning("flags.leave.failed", error=str(error))

    # -- parts, all but the parsing under the lock

    def _current(self) -> View:
        if self._view is None:
            raise FlagsUnknownError("the flags have not been read yet; the process is not ready")
        return self._view

    def _acts_on(self) -> int:
        adopted = [] if self._view is None else [self._view.transition_id]
        return min([*adopted, *self._in_flight], default=0)

    def _without_faiss(self, acts_on: int) -> bool:
        """Whether nothing that this process does, requests in flight included, asks or writes FAISS."""
        if self._view is None or self._view.transition_id != acts_on:
            return False
        routing = ROUTING[self._view.stage]
        return Store.FAISS not in routing.reads + routing.writes

    def _parse(self, begun: Begun, row: tuple[object, ...]) -> View:
        """Without the lock: a provider may take its time over the sample rate, and requests go on meanwhile."""
        number, name, percent, threshold, rate, owed, hidden, owners = row
        try:
            stage = parse_stage(str(name))
        except UnknownStageError as error:
            with self._lock:
                self._halt(str(error))
            raise FlagsUnknownError(str(error)) from error
        view = View(
            int(number), stage, int(percent), float(threshold), float(rate),  # type: ignore[call-overload, arg-type]
            _by_user(owed), frozenset(hidden), int(owners), begun.at,  # type: ignore[call-overload]
        )  # fmt: skip
        return replace(view, sample_rate=sample_rate(view))

    def _merge(self, begun: Begun, fresh: View) -> View:
        self._noted = {user: noted for user, noted in self._noted.items() if noted > begun.after}
        self._hid = {document: noted for document, noted in self._hid.items() if noted > begun.after}
        mine = {} if self._view is None else {user: self._view.owed.get(user, frozenset()) for user in self._noted}
        return replace(fresh, owed=_together(fresh.owed, mine), hidden=fresh.hidden.union(self._hid))

    def _halt(self, reason: str) -> None:
        if self._halted != reason:
            log.error("flags.adopt.halted", reason=reason)
        self._halted = reason

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence


def owners_version(row: tuple[object, ...]) -> int:
    """The owner assignment that a fetch brought, for taking it over before the rest is adopted."""
    return int(row[-1])  # type: ignore[call-overload, no-any-return]


def needs_faiss(row: tuple[object, ...]) -> bool:
    """Whether the stage that a fetch brought writes FAISS; one that this release does not know serves nobody."""
    return str(row[1]) in {stage for stage, routing in ROUTING.items() if Store.FAISS in routing.writes}


def is_stale(view: View, now: float) -> bool:
    return now - view.fetched_at > STALE_SECONDS


def _together(
    owed: Mapping[int, frozenset[Store]], more: Mapping[int, frozenset[Store]]
) -> dict[int, frozenset[Store]]:
    return {**owed, **{user: owed.get(user, frozenset()) | stores for user, stores in more.items() if stores}}


def _by_user(pairs: object) -> dict[int, frozenset[Store]]:
    owed: dict[int, set[Store]] = {}
    for user, store in pairs:  # type: ignore[attr-defined]
        owed.setdefault(int(user), set()).add(Store(store))
    return {user: frozenset(stores) for user, stores in owed.items()}


def latest(connection: Connection) -> View:
    """The last transition as the database has it, without what is owed; for commands."""
    row = connection.execute(
        "SELECT id, stage, read_percent, read_threshold, shadow_sample_rate"
        " FROM rollout_transitions ORDER BY id DESC LIMIT 1"
    ).fetchone()
    if row is None:
        raise FlagsUnknownError("rollout_transitions is empty, so the stage is unknown; restore its rows")
    number, name, percent, threshold, rate = row
    return View(number, parse_stage(name), percent, threshold, rate)
