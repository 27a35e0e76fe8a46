"""The gate `removal`: whether FAISS may be taken out of the code for good. There is no way back past it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from rollout.control import Control
from rollout.evidence_checks import farewell_checks
from rollout.gates import Check, Criterion, Gate, Verdict, evaluate
from rollout.transitions import next_target
from src.tools.rag_tools.migration.flags import View

REMOVAL = "removal"
ARCHIVE = """
SELECT path, chunks, restored_at, transition_id = %s FROM faiss_archives
ORDER BY restored_at IS NULL, id DESC LIMIT 1
"""
PROCESSES = """
SELECT host || ':' || pid, without_faiss FROM rollout_instances
WHERE seen_at > clock_timestamp() - make_interval(secs => %s) ORDER BY 1
"""


def removal_gate(control: Control, view: View, overrides: Mapping[str, str] | None = None) -> Gate:
    """Evaluate it now."""
    return evaluate(REMOVAL, removal_checks(control, view), overrides or {})


def removal_checks(control: Control, view: View) -> Mapping[str, Check]:
    """Of the gate before, what must still hold; the soak is now that of the last stage."""
    before = farewell_checks(control, view)
    return {
        "stage": partial(_stage, control, view),
        **{name: before[name] for name in ("fleet", "owed", "soak")},
        "archive": partial(_archive, control, view),
        "code": partial(_code, control),
    }


def _stage(control: Control, view: View) -> Criterion:
    following = next_target(view, control.profile)
    return Criterion(
        "stage", "has everybody left FAISS?", str(view.stage), "the last stage",
        Verdict.PASS if following is None else Verdict.FAIL,
        "" if following is None else f"the next step is {following}: `rollout check`", precondition=True,
    )  # fmt: skip


def _archive(control: Control, view: View) -> Criterion:
    """Written after the last step: what FAISS held when it was left."""
    with control.connection() as connection:
        row = connection.execute(ARCHIVE, (view.transition_id,)).fetchone()
    question, needed = "is there an archive that was opened again?", "written in this stage and restored once"
    todo = "run `rollout archive FILE.tar --execute`, then the same with --restore FOLDER"
    if row is None:
        return Criterion("archive", question, "none", needed, Verdict.INCONCLUSIVE, todo)
    path, chunks, restored, present = row
    value = f"{path}, {chunks} chunks, {'restored' if restored else 'never restored'}"
    value += "" if present else ", written before the last step"
    return Criterion(
        "archive", question, value, needed, Verdict.PASS if restored and present else Verdict.INCONCLUSIVE,
        "" if restored and present else todo, chunks,
    )  # fmt: skip


def _code(control: Control) -> Criterion:
    """Each process says so itself with every poll; one of an earlier release cannot."""
    with control.connection() as connection:
        rows = connection.execute(PROCESSES, (control.profile.dead_seconds,)).fetchall()
    needing = [name for name, without in rows if not without]
    verdict = Verdict.FAIL if needing else Verdict.PASS if rows else Verdict.INCONCLUSIVE
    return Criterion(
        "code", "does every process run code that does without FAISS?",
        f"{len(rows) - len(needing)} of {len(rows)} processes", "all, and at least one", verdict,
        f"restart {', '.join(needing)} with this release" if needing else "" if rows else "start the backend",
        len(rows),
    )  # fmt: skip
