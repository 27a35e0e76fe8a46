"""One step forward or back: where it goes, what forbids it, and the row that makes it so.

A step is a row of the append-only record. It is inserted in the transaction that has checked the rules, with
the id after the one that was read, so of two people who step at once the primary key refuses the second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollout.errors import RefusedError
from rollout.profiles import Profile
from src.tools.rag_tools.migration import transitions
from src.tools.rag_tools.migration.flags import View
from src.tools.rag_tools.migration.stages import ORDER, ROUTING, Stage, Store
from src.tools.rag_tools.migration.transitions import (
    Instance,
    StepRefusedError,
    Target,
    fleet,
    goes_back,
    owed_entries,
    ramps,
    threshold,
)
from src.tools.rag_tools.pgvector_store import Connection

__all__ = [
    "Instance", "StillOwedError", "Target", "check_target", "default_percent", "fleet", "goes_back", "laggards",
    "next_target", "owed_entries", "previous_target", "set_aside", "step", "threshold", "wait_for_fleet",
]  # fmt: skip

ASIDE = "SELECT document_id FROM vector_ledger WHERE store = %s AND state = 'aside' ORDER BY document_id"


class StillOwedError(RefusedError):
    """A store that the step needs whole is owed something."""


def next_target(view: View, profile: Profile) -> Target | None:
    """The step forward from where the rollout is; None at the end."""
    if ramps(view.stage):
        percent = next((step for step in profile.ramp if step > view.read_percent), None)
        if percent is not None:
            return Target(view.stage, percent)
    position = ORDER.index(view.stage) + 1
    return _entering(ORDER[position], profile) if position < len(ORDER) else None


def previous_target(view: View) -> Target | None:
    """The step back: within the ramp to 0 percent first; None at the beginning."""
    if ramps(view.stage) and view.read_percent > 0:
        return Target(view.stage, 0)
    position = ORDER.index(view.stage) - 1
    if position < 0:
        return None
    stage = ORDER[position]
    return Target(stage, default_percent(stage))


def check_target(view: View, target: Target, profile: Profile) -> None:
    """RefusedError unless `target` is one step from where the rollout is."""
    if ramps(view.stage) and target.stage is view.stage:
        following = next_target(view, profile)
        if target.percent < view.read_percent or target == following:
            return
    if target in (next_target(view, profile), previous_target(view)):
        return
    here = Target(view.stage, view.read_percent)
    raise RefusedError(
        f"{target} is not one step from {here}; one step forward is {next_target(view, profile)},"
        f" one back is {previous_target(view)}"
    )


def laggards(instances: Sequence[Instance], transition_id: int, profile: Profile) -> list[Instance]:
    """The live processes that do not act on `transition_id` yet."""
    return transitions.laggards(instances, transition_id, profile.dead_seconds)


def set_aside(connection: Connection, store: Store) -> list[int]:
    """The documents whose entry for the store was set aside."""
    return [int(row[0]) for row in connection.execute(ASIDE, (store,))]


def step(
    connection: Connection,
    view: View,
    target: Target,
    profile: Profile,
    *,
    actor: str,
    reason: str,
    evidence: Mapping[str, Any],
    sample_rate: float | None = None,
) -> int:
    """Insert the transition after `view`; returns its id. RefusedError where a rule or another person forbids."""
    try:
        return transitions.step(
            connection,
            view,
            target,
            actor=actor,
            reason=reason,
            evidence=evidence,
            sample_rate=sample_rate,
            dead_seconds=profile.dead_seconds,
        )
    except transitions.StillOwedError as error:
        raise StillOwedError(str(error)) from error
    except StepRefusedError as error:
        raise RefusedError(str(error)) from error


def wait_for_fleet(
    look: Callable[[], list[Instance]],
    transition_id: int,
    profile: Profile,
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> list[Instance]:
    """Wait until every live process acts on the transition; returns those that still do not."""
    end = clock() + seconds
    while (late := laggards(look(), transition_id, profile)) and clock() < end:
        pause(0.1)
    return late


def default_percent(stage: Stage) -> int:
    """The percent of a stage without a ramp; 0 for the ramp itself."""
    return 100 if ROUTING[stage].reads == (Store.PGVECTOR,) else 0


def _entering(stage: Stage, profile: Profile) -> Target:
    return Target(stage, profile.ramp[0] if ramps(stage) else default_percent(stage))
