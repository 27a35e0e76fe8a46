"""What the page shows, as plain data: collected in one place, rendered in another, made by hand in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from rollout.gates import Gate
from rollout.hold import Hold

MINUTE, HOUR, DAY = 60, 3_600, 86_400


@dataclass(frozen=True, slots=True)
class Span:
    """How far back the charts go, and the width of one bucket; both in seconds."""

    name: str
    words: str
    seconds: int
    bucket: int


SPANS = (
    Span("10m", "10 minutes", 10 * MINUTE, 10),
    Span("1h", "hour", HOUR, MINUTE),
    Span("6h", "6 hours", 6 * HOUR, 10 * MINUTE),
    Span("24h", "24 hours", DAY, 30 * MINUTE),
    Span("7d", "7 days", 7 * DAY, 3 * HOUR),
    Span("30d", "30 days", 30 * DAY, 12 * HOUR),
)
BY_ITSELF = SPANS[:4]
"""A longer one is read only when somebody asks: it may be millions of comparisons."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Comparisons of one bucket, alike in transition, cohort and cause."""

    at: datetime
    transition: int
    cohort: str
    cause: str
    count: int


@dataclass(frozen=True, slots=True)
class Judged:
    """A cohort's comparisons under a transition before the charts begin; stale ones are not judged."""

    transition: int
    cohort: str
    agreed: int
    judged: int


@dataclass(frozen=True, slots=True)
class Latency:
    """How long a store took to answer within a bucket, in milliseconds."""

    at: datetime
    store: str
    p50: float
    p99: float
    count: int


@dataclass(frozen=True, slots=True)
class Count:
    """What the fleet counted within a bucket: reads by store, fallbacks, dropped shadow reads."""

    at: datetime
    name: str
    count: int


@dataclass(frozen=True, slots=True)
class Series:
    """The evidence over time."""

    tallies: Sequence[Tally] = ()
    before: Sequence[Judged] = ()
    latencies: Sequence[Latency] = ()
    counts: Sequence[Count] = ()


@dataclass(frozen=True, slots=True)
class Transition:
    """A row of the record of stage changes; `overridden`: criterion and reason."""

    id: int
    stage: str
    percent: int
    actor: str
    reason: str
    at: datetime
    overridden: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """A comparison in which the stores differed; `failed` says why there is no `explanation` as `rollout explain`'s."""

    id: int
    at: datetime
    transition: int
    user_id: int
    cohort: str
    cause: str
    served_by: str
    overlap: float | None
    explanation: Mapping[str, Any] | None = None
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything on the page. `status` is what `rollout status` shows; `as_of` is the database's time."""

    as_of: datetime
    profile: str
    span: Span
    threshold: float
    p99_ms: float
    status: Mapping[str, Any]
    gate: Gate | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    hold: Hold | None = None
    transitions: Sequence[Transition] = ()
    verified: Sequence[Mapping[str, Any]] = ()
    series: Series = field(default_factory=Series)
    series_failed: str = ""
    differences: Sequence[Difference] = ()

    @property
    def begins(self) -> datetime:
        return self.as_of - timedelta(seconds=self.span.seconds)
