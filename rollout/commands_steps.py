"""Commands about the stage: where the rollout is, whether it may go on, going on, going back, and the fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rollout.options import Acknowledge, Execute, Json, Percent, Reason, To, named_target, overrides
from rollout.output import Answer, failures, say, table

if TYPE_CHECKING:
    from rollout.gates import Gate
    from rollout.steps import Stepped

Override = Annotated[
    list[str] | None,
    typer.Option("--override", help="CRITERION=REASON: pass over one that does not pass; recorded with the step."),
]


def status(as_json: Json = False) -> None:
    """Where the rollout is: stage, fleet, what is owed and why, quarantine, comparisons.

    Changes nothing and needs no store but PostgreSQL. Look here first, whatever happened.
    """
    with failures("status", as_json):
        from rollout.control import control
        from rollout.status import status as look

        with control() as made:
            found = look(made)
        say(Answer("status", found, _status_text(found)), as_json)


def check(to: To = None, percent: Percent = None, acknowledge: Acknowledge = None, as_json: Json = False) -> None:
    """May I go on? The gate of the next step, after the last one of the removal: value, threshold and what to do.

    Changes nothing, but for a sentinel document that is written through both stores and deleted again.
    Exit code 0: it passes; 3: it fails; 4: evidence is missing or too old; 5: a precondition is missing.
    """
    with failures("check", as_json):
        from rollout import steps
        from rollout.control import control
        from rollout.transitions import next_target

        with control() as made:
            view = made.view()
            target = named_target(to, percent, view.stage, next_target(view, made.profile))
            gate = steps.check_forward(made, view, target, acknowledged=acknowledge)
        say(Answer("check", gate.as_dict(), gate_text(gate), gate.exit_code), as_json)


def advance(
    to: To = None,
    percent: Percent = None,
    execute: Execute = False,
    reason: Reason = "",
    acknowledge: Acknowledge = None,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """One step forward, if its gate passes; the gate is evaluated now and recorded with the step.

    Then waits until every process acts on it. Of two people who step at once one is refused.
    """
    with failures("advance", as_json):
        from rollout import steps
        from rollout.control import actor, control
        from rollout.transitions import next_target

        given = overrides(override or [])
        with control() as made:
            view = made.view()
            stepped = steps.advance(
                made,
                target=named_target(to, percent, view.stage, next_target(view, made.profile)),
                execute=execute,
                actor=actor(),
                reason=reason or "advance",
                acknowledged=acknowledge,
                overrides=given,
            )
        say(Answer("advance", stepped.as_dict(), _stepped_text(stepped)), as_json)


def rollback(
    to: To = None,
    percent: Percent = None,
    execute: Execute = False,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """One step back; no gate holds it up. Within `live`, to no user at all unless --percent says how many.

    Without --execute: where it goes, whether FAISS holds everything and the command that makes it so, and
    what would be lost. From `complete`, FAISS is first given what it is owed.
    """
    with failures("rollback", as_json):
        from rollout import steps
        from rollout.control import actor, control
        from rollout.transitions import previous_target

        with control() as made:
            view = made.view()
            stepped = steps.roll_back(
                made,
                target=named_target(to, percent, view.stage, previous_target(view)),
                execute=execute,
                actor=actor(),
                reason=reason or "rollback",
            )
        say(Answer("rollback", stepped.as_dict(), _stepped_text(stepped)), as_json)


def instances_list(as_json: Json = False) -> None:
    """The backend processes: the transition that each acts on, and when it was last heard."""
    with failures("instances list", as_json):
        from rollout import instances
        from rollout.control import control

        with control() as made:
            rows = instances.listing(made)
        say(Answer("instances list", {"instances": rows}, [_fleet_table(rows)]), as_json)


def instances_forget(
    instance: Annotated[str, typer.Argument(help="Its id, or the beginning of it, as `rollout instances list` shows.")],
    execute: Execute = False,
    as_json: Json = False,
) -> None:
    """Take a process that is gone or stuck out of the fleet, so that steps no longer wait for it.

    First make sure that it does not run any more: what it would still write, no step has waited for.
    One that was heard of within the last ten seconds is alive and is not forgotten.
    """
    with failures("instances forget", as_json):
        from rollout import instances
        from rollout.control import control

        with control() as made:
            gone = instances.forget(made, instance, execute=execute)
        did = "forgot" if execute else "would forget (add --execute)"
        text = f"{did} {gone['instance']}: process {gone['pid']} on {gone['host']}"
        say(Answer("instances forget", {"executed": execute, **gone}, [text]), as_json)


def gate_text(gate: Gate) -> list[Any]:
    rows = [[each.name, each.value, each.threshold, each.verdict] for each in gate.criteria]
    if not rows:
        return [f"no gate stands before {gate.target}"]
    todo = [f"{each.name}: {each.todo}" for each in gate.criteria if each.verdict != "pass" and each.todo]
    return [table(f"gate to {gate.target}: {gate.verdict}", ["criterion", "value", "needed", "verdict"], rows), *todo]


def _stepped_text(stepped: Stepped) -> list[Any]:
    text = [*(gate_text(stepped.gate) if stepped.gate.criteria else []), *stepped.notes]
    if stepped.transition_id is None:
        return [*text, f"would go to {stepped.target}; add --execute to go"]
    text.append(f"transition {stepped.transition_id}: {stepped.target}")
    text += [f"not arrived yet: {each}" for each in stepped.late] or ["every process has arrived"]
    return text


def _status_text(found: dict[str, Any]) -> list[Any]:
    shadow = f", shadow reads at rate {found['shadow_sample_rate']}" if found["shadow"] else ""
    text: list[Any] = [
        f"stage {found['stage']} at {found['read_percent']} percent (transition {found['transition']}){shadow}",
        f"reads {' or '.join(found['reads'])}, writes {' and '.join(found['writes'])}",
        f"forward: {found['forward'] or 'nothing'}; back: {found['back'] or 'nothing'}",
        *([found["hold"]] if found["hold"] else []),
        _fleet_table(found["fleet"]),
        owed_table(found["owed"]),
        *_undecided_text(found["undecided"]),
    ]
    for name in ("failing", "documents", "legacy", "causes", "transitions"):
        if found[name]:
            text.append(table(name, list(found[name][0]), [list(row.values()) for row in found[name]]))
    return text


def _undecided_text(found: int | str) -> list[str]:
    """`found`: how many chunks have no decision, or why that is not known."""
    if found == 0:
        return []
    if isinstance(found, str):
        return [f"the FAISS directory could not be read: {found}"]
    return [
        f"{found} chunks that the old release wrote are nobody's yet and served to nobody: `rollout assign-owners`"
        " says whose they would be, and decides with --execute"
    ]


def _fleet_table(rows: list[dict[str, Any]]) -> Any:
    if not rows:
        return "no backend process has reported"
    columns = ["instance", "host", "pid", "transition", "silent s", "halted", "state"]
    return table(
        "fleet",
        columns,
        [
            [each["instance"], each["host"], each["pid"], each["transition"], each["silent_seconds"],
             each["halted"] or "", each["state"]]
            for each in rows
        ],
    )  # fmt: skip


def owed_table(rows: list[dict[str, Any]]) -> Any:
    if not rows:
        return "nothing is owed"
    return table("owed", list(rows[0]), [list(row.values()) for row in rows])
