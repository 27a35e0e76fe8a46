"""The backend processes that have reported: listing them, and forgetting one that is gone or stuck.

A process is a row that its own poll writes every second, so one that is alive comes back by itself.
"""

from __future__ import annotations

from typing import Any

from rollout.control import Control
from rollout.errors import RefusedError, UsageError
from rollout.profiles import Profile
from rollout.transitions import Instance, fleet, laggards

ALIVE_SECONDS = 10.0
"""Ten polls: who was heard of since then would be back before a step could go without it."""

FORGET = """
DELETE FROM rollout_instances
WHERE instance = %s AND seen_at < clock_timestamp() - make_interval(secs => %s) RETURNING instance
"""


def described(instances: list[Instance], transition_id: int, profile: Profile) -> list[dict[str, Any]]:
    """Plain data of each: `state` is arrived, late, or dead (not waited for)."""
    late = laggards(instances, transition_id, profile)
    return [
        {
            "instance": each.instance,
            "host": each.host,
            "pid": each.pid,
            "transition": each.transition_id,
            "silent_seconds": round(each.silent, 1),
            "halted": each.halted,
            "state": "late" if each in late else "dead" if each.silent >= profile.dead_seconds else "arrived",
        }
        for each in instances
    ]


def listing(control: Control) -> list[dict[str, Any]]:
    view = control.view()
    with control.connection() as connection:
        return described(fleet(connection), view.transition_id, control.profile)


def forget(control: Control, name: str, *, execute: bool) -> dict[str, Any]:
    """Take the process out of the fleet; `name` is its id or the beginning of it.

    Raises UsageError for none or several of that name, RefusedError for one that is alive.
    """
    rows = listing(control)
    named = [row for row in rows if row["instance"].startswith(name)] if name else []
    if len(named) != 1:
        known = ", ".join(row["instance"] for row in named or rows) or "none"
        raise UsageError(f"{name!r} names {len(named)} processes; give the id of one of these: {known}")
    found = named[0]
    if found["silent_seconds"] < ALIVE_SECONDS:
        raise _alive(found)
    if execute:
        with control.connection() as connection:
            if connection.execute(FORGET, (found["instance"], ALIVE_SECONDS)).fetchone() is None:
                raise _alive(found)
    return found


def _alive(found: dict[str, Any]) -> RefusedError:
    return RefusedError(
        f"process {found['pid']} on {found['host']} ({found['instance']}) was heard of"
        f" {found['silent_seconds']:.0f} s ago, so it is alive and would come back; stop it first"
    )
