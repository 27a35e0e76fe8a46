"""Commands about evidence and the hold: why two stores differed, and keeping everything as it is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rollout.options import Execute, Json, Reason
from rollout.output import Answer, failures, say, table


def explain(
    diff: Annotated[int, typer.Argument(help="A diff's number, from `rollout diffs`.")], as_json: Json = False
) -> None:
    """Why did the stores differ in this comparison? Both lists, the cause, the proof, and what mends it."""
    with failures("explain", as_json):
        from rollout.control import control
        from rollout.explain import explain as look

        with control() as made:
            found = look(made, diff)
        say(Answer("explain", found, _explain_text(found)), as_json)


def hold(execute: Execute = False, reason: Reason = "", as_json: Json = False) -> None:
    """Keep the rollout where it is: nobody advances, the guard does not act, the backfill stops."""
    _set(True, execute, reason, as_json)


def resume(execute: Execute = False, reason: Reason = "", as_json: Json = False) -> None:
    """End the hold."""
    _set(False, execute, reason, as_json)


def _set(held: bool, execute: bool, reason: str, as_json: bool) -> None:
    command = "hold" if held else "resume"
    with failures(command, as_json):
        from rollout import hold as holds
        from rollout.control import actor, control
        from rollout.errors import UsageError

        if execute and not reason:
            raise UsageError(f"say why, for whoever comes next: rollout {command} --reason '...' --execute")
        with control() as made, made.connection() as connection:
            if execute:
                holds.set_held(connection, held, actor=actor(), reason=reason)
            current = holds.current(connection)
        data = {"held": current is not None, "by": current and current.actor, "reason": current and current.reason}
        text = [f"the rollout is {current}" if current else "the rollout is not held"]
        say(Answer(command, data, text if execute else [*text, "add --execute to change that"]), as_json)


def _explain_text(found: dict[str, Any]) -> list[Any]:
    columns = ["chunk", "document", "served", "similarity", "shadow", "similarity", "owner in faiss", "in pgvector"]
    rows = [
        [
            place["chunk_id"], place["document_id"], place["served_rank"], place["served_similarity"],
            place["shadow_rank"], place["shadow_similarity"], place["faiss_owner"], place["pgvector_owner"],
        ]
        for place in found["chunks"]
    ]  # fmt: skip
    numbers = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in found["numbers"].items()
    )
    return [
        f"diff {found['id']} at {found['at']}: {found['cause']}",
        f"{found['served_by']} answered user {found['user_id']}, {found['shadow']} was asked in the shadow; {numbers}",
        table("chunks", columns, rows),
        *[f"proof: {line}" for line in found["proof"]],
        f"mend: {found['mend']}",
    ]


def recover(execute: Execute = False, as_json: Json = False) -> None:
    """After PostgreSQL lost commits: bring back what FAISS' journal still knows."""
    with failures("recover", as_json):
        from rollout import recover as recovery
        from rollout.control import actor, control

        with control() as made:
            report = recovery.recover(made, execute=execute, actor=actor())
        restored, repeated = ("restored", "repeated") if report.executed else ("would restore", "repeat")
        text = [
            f"PostgreSQL has document ids up to {report.postgres.document} and transition {report.postgres.transition};"
            f" FAISS saw {report.journal.document} and {report.journal.transition}",
            f"{restored} {len(report.restored)} documents, {repeated} {len(report.deleted)} deletions;"
            f" {len(report.ownerless)} belong to users who are gone too"
            + ("" if execute else "; add --execute to do it"),
        ]
        if report.transition is not None:
            text.append(f"transition {report.transition} goes on after the lost ones; restart every backend process")
        say(Answer("recover", report.as_dict(), text), as_json)
