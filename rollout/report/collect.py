"""Everything the page shows, asked for once. Only reads: a gate is evaluated without what writes or sends."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import structlog

from rollout import hold
from rollout.control import Control
from rollout.errors import RolloutError, UsageError
from rollout.explain import explain
from rollout.gates import Gate, evaluate
from rollout.removal_checks import removal_gate
from rollout.report import queries
from rollout.report.data import SPANS, Difference, Report, Series, Span
from rollout.status import status
from rollout.steps import GATES
from rollout.transitions import next_target
from src.tools.rag_tools.migration.flags import View

log = structlog.get_logger(__name__)

LEFT_OUT = {
    "sentinel": "it writes a document through both stores",
    "model": "it sends stored chunks to the embedding provider",
}
"""Criteria that a page does not ask each time it is shown."""


def collect(control: Control, *, span: str | None = None) -> Report:
    """What there is to see now. `span` names how far back; by itself the whole rollout, a day at most.

    Raises UsageError for a span that is none, PreconditionError where PostgreSQL cannot be asked.
    """
    now, began = queries.clock(control)
    chosen = queries.fitting(now, began) if span is None else named(span)
    view = control.view()
    gate, left_out = _gate(control, view)
    series, found, failed = _evidence(control, now, chosen)
    with control.connection() as connection:
        held = hold.current(connection)
    return Report(
        as_of=now,
        profile=control.profile.name,
        span=chosen,
        threshold=control.profile.agreement,
        p99_ms=control.profile.p99_ms,
        status=status(control),
        gate=gate,
        left_out=left_out,
        hold=held,
        transitions=queries.transitions(control),
        verified=queries.verified(control),
        series=series,
        series_failed=failed,
        differences=[_explained(control, each) for each in found],
    )


def named(name: str) -> Span:
    """The span of that name; UsageError where there is none."""
    for span in SPANS:
        if span.name == name:
            return span
    raise UsageError(f"there is no span {name!r}; there are {', '.join(span.name for span in SPANS)}")


def _gate(control: Control, view: View) -> tuple[Gate | None, dict[str, str]]:
    target = next_target(view, control.profile)
    if target is None:
        return removal_gate(control, view), {}
    _follow_owners(control)
    checks = GATES[target.stage](control, view, None)
    asked = {name: check for name, check in checks.items() if name not in LEFT_OUT}
    return evaluate(target, asked, {}), {name: why for name, why in LEFT_OUT.items() if name in checks}


def _follow_owners(control: Control) -> None:
    """A dashboard lives for days; owners that were assigned meanwhile are taken over."""
    if "router" not in control.__dict__:
        return
    with control.connection() as connection:
        row = connection.execute("SELECT coalesce(max(version), 0) FROM owner_assignments").fetchone()
    version = 0 if row is None else int(row[0])
    if version > (control.faiss.owners_version or 0):
        control.router.load_owners(version)


def _evidence(control: Control, now: datetime, span: Span) -> tuple[Series, list[Difference], str]:
    """Too much of it to read in time costs its own part of the page, not the page."""
    try:
        return queries.series(control, now, span), queries.differences(control, now, span), ""
    except RolloutError as error:
        return Series(), [], str(error)


def _explained(control: Control, difference: Difference) -> Difference:
    """One that cannot be explained (FAISS does not open, a later release wrote it) does not hide the others."""
    try:
        return replace(difference, explanation=explain(control, difference.id))
    except Exception as error:  # noqa: BLE001 - the boundary: one row must not cost the page
        log.warning("report.explain.failed", diff=difference.id, error=repr(error))
        return replace(difference, failed=f"{type(error).__name__}: {error}")
