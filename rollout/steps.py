"""Going a step forward or back: the gate before it, the step, and the wait until the fleet has arrived."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rollout.control import Control
from rollout.errors import RefusedError
from rollout.evidence_checks import farewell_checks, settled_checks, traffic_checks
from rollout.gates import Check, Gate, evaluate, require
from rollout.hold import require_free
from rollout.install_checks import install_checks
from rollout.removal_checks import removal_gate
from rollout.transitions import (
    Instance,
    StillOwedError,
    Target,
    check_target,
    fleet,
    goes_back,
    next_target,
    previous_target,
    set_aside,
    step,
    wait_for_fleet,
)
from rollout.way_back import way_back
from src.tools.rag_tools.migration.flags import View
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store

FLEET_SECONDS = 30.0
ROUNDS = 4

Checks = Callable[[Control, View, int | None], Mapping[str, Check]]

GATES: dict[Stage, Checks] = {
    Stage.OFF: lambda control, view, acknowledged: {},
    Stage.DUALWRITE: lambda control, view, acknowledged: install_checks(control, acknowledged),
    Stage.SHADOW: lambda control, view, acknowledged: settled_checks(control, view),
    Stage.LIVE: lambda control, view, acknowledged: traffic_checks(control, view),
    Stage.RAMPDOWN: lambda control, view, acknowledged: traffic_checks(control, view),
    Stage.COMPLETE: lambda control, view, acknowledged: farewell_checks(control, view),
}


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step that was taken, or would be: `late` are the processes that had not arrived when waiting ended."""

    target: Target
    gate: Gate
    transition_id: int | None
    late: tuple[Instance, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "to": str(self.target),
            "gate": self.gate.as_dict(),
            "transition": self.transition_id,
            "late": [str(each) for each in self.late],
            "notes": list(self.notes),
        }


def forward(control: Control, view: View) -> Target:
    target = next_target(view, control.profile)
    if target is None:
        raise RefusedError(f"{view.stage} is the last stage; what is left is `rollout remove-faiss`")
    return target


def check(
    control: Control,
    view: View,
    target: Target,
    *,
    acknowledged: int | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Gate:
    """Evaluate the gate to `target` now."""
    return evaluate(target, GATES[target.stage](control, view, acknowledged), overrides or {})


def check_forward(control: Control, view: View, target: Target | None, *, acknowledged: int | None = None) -> Gate:
    """`check` of one step forward, or of the removal after the last. Raises RefusedError for a target that is none."""
    if target is None and next_target(view, control.profile) is None:
        return removal_gate(control, view)
    return check(control, view, _forward_only(control, view, target), acknowledged=acknowledged)


def advance(
    control: Control,
    *,
    target: Target | None,
    execute: bool,
    actor: str,
    reason: str,
    acknowledged: int | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Stepped:
    """Evaluate the gate and, with `execute`, step. Raises what `require` raises, and RefusedError."""
    view = control.view()
    target = _forward_only(control, view, target)
    with control.connection() as connection:
        require_free(connection)
    gate = check(control, view, target, acknowledged=acknowledged, overrides=overrides)
    require(gate)
    if not execute:
        return Stepped(target, gate, None)
    return _go(control, view, target, gate, actor, reason)


def roll_back(control: Control, *, target: Target | None, execute: bool, actor: str, reason: str) -> Stepped:
    """One step back; no gate holds it up, but a store that will serve again is first given what it is owed."""
    view = control.view()
    target = target or previous_target(view)
    if target is None:
        raise RefusedError(
            f"{view.stage} is the first stage, there is nothing to go back to; before the old release is"
            " started, run `rollout save-faiss --execute`"
        )
    check_target(view, target, control.profile)
    if not goes_back(view, target):
        raise RefusedError(f"{target} is a step forward; only `rollout advance` goes there, through its gate")
    gate = Gate(target)
    if not execute:
        return Stepped(target, gate, None, notes=tuple(way_back(control, view, target)))
    for _ in range(ROUNDS):
        for store in set(ROUTING[target.stage].writes) - set(ROUTING[view.stage].writes):
            settle_store(control, store)
        # What is uploaded between settling and the step is settled in the next round.
        with suppress(StillOwedError):
            return _go(control, view, target, gate, actor, reason)
    return _go(control, view, target, gate, actor, reason)


def settle_store(control: Control, store: Store) -> None:
    """Give `store` everything that it is owed; RefusedError naming what fails or was set aside."""
    report = control.router.settler.run(stores=[store], at_once=True)
    with control.connection() as connection:
        aside = set_aside(connection, store)
    reasons = {document: why for (document, _), why in report.failed.items()}
    reasons = {**dict.fromkeys(aside, "set aside, `rollout status` shows why"), **reasons}
    if reasons:
        document, why = min(reasons.items())
        raise RefusedError(
            f"{store} is still owed {len(reasons)} entries, first document {document}: {why}; mend that, run"
            f" `rollout settle --execute --retry-aside --store {store}`, then the same command again"
        )


def _forward_only(control: Control, view: View, target: Target | None) -> Target:
    target = target or forward(control, view)
    check_target(view, target, control.profile)
    if goes_back(view, target):
        raise RefusedError(f"{target} is a step back; `rollout rollback` goes there, and needs no gate")
    return target


def _go(control: Control, view: View, target: Target, gate: Gate, actor: str, reason: str) -> Stepped:
    evidence = {"profile": control.profile.name, "gate": gate.as_dict()}
    with control.connection() as connection:
        number = step(connection, view, target, control.profile, actor=actor, reason=reason, evidence=evidence)
    late = wait_for_fleet(lambda: _fleet(control), number, control.profile, seconds=FLEET_SECONDS)
    return Stepped(target, gate, number, tuple(late))


def _fleet(control: Control) -> list[Instance]:
    with control.connection() as connection:
        return fleet(connection)
