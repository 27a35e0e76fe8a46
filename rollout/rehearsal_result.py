"""What a rehearsal has seen, in numbers, and what of it would be a reason not to go."""

from __future__ import annotations

from collections import Counter
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from rollout.rehearsal import DELETES, UPLOADS
from src.tools.rag_tools.migration.causes import EXPLAINED, Cause
from src.tools.rag_tools.migration.guard import ACTOR
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.store import legacy_chunk_id

if TYPE_CHECKING:
    from rollout.rehearsal_run import Rehearsal

CHANGE_SECONDS = 2.0
KNOWN_SHARE = 0.95
RIGHT_SHARE = 0.99
"""Of the comparisons while pgvector was spoiled, so many must have been explained rightly."""
SPOILED = "live 10, spoiled"
"""The stage of what is asked from the fault until the guard has gone back; what is missed then is the fault's."""

DIFFS = """
SELECT cause, count(*), count(*) FILTER (WHERE overlap_at_k = 1) FROM shadow_diffs
WHERE transition_id = %s GROUP BY cause
"""
LATENCY = """
SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (
    ORDER BY CASE served_by WHEN %(store)s THEN served_ms ELSE shadow_ms END)
FROM shadow_diffs WHERE transition_id = %(transition_id)s AND shadow_ms IS NOT NULL
"""
LEGACY = "SELECT docstore_id, status, reason, user_id, document_id FROM legacy_chunks"
CHUNKS = "SELECT id, user_id, document_id FROM document_chunks"
DELETED = "SELECT id FROM documents WHERE status = 'deleted'"


def result(rehearsal: Rehearsal, lost: list[Any]) -> dict[str, Any]:
    """Everything that was seen, and the verdict. `lost`: documents uploaded meanwhile that nobody finds any more."""
    answers = _answers(rehearsal)
    chunks = _chunks(rehearsal)
    stages = [_stage(rehearsal, stage) for stage in rehearsal.stages]
    failures = [
        *rehearsal.failed,
        *([f"{answers['failed']} answers failed"] if answers["failed"] else []),
        *([f"{answers['foreign']} answers held a foreign chunk"] if answers["foreign"] else []),
        *([f"{answers['deleted']} answers held a deleted document"] if answers["deleted"] else []),
        *([] if answers["known_share"] >= KNOWN_SHARE else [f"known chunks found: {answers['known_share']:.1%}"]),
        *([] if chunks["balanced"] else ["legacy chunks do not add up"]),
        *([f"uploads not found afterwards: {lost}"] if lost else []),
        *[f"{each['name']}: saved directory lacks {each['saved']['missing']} chunks" for each in stages
          if each["saved"] and each["saved"]["missing"]],
        *_failures_of_the_fault(rehearsal.fault),
        *([] if answers["total"] >= rehearsal.queries else [f"only {answers['total']} queries"]),
        *([] if answers["least_in_flight_at_a_change"] else ["no query was in flight at one of the changes"]),
        *([] if len(rehearsal.uploads) >= UPLOADS else [f"only {len(rehearsal.uploads)} of {UPLOADS} uploads"]),
        *([] if len(rehearsal.deleted) >= DELETES else [f"only {len(rehearsal.deleted)} of {DELETES} deletes"]),
    ]  # fmt: skip
    return {
        "verdict": "fail" if failures else "pass",
        "failures": failures,
        "stages": stages,
        "answers": answers,
        "chunks": chunks,
        "fault": rehearsal.fault,
        "uploads": {"made": len(rehearsal.uploads), "missing": lost},
        "deletes": len(rehearsal.deleted),
        "provider": rehearsal.provider,
    }


def _failures_of_the_fault(fault: dict[str, Any]) -> list[str]:
    if not fault:
        return ["no fault was rehearsed"]
    guard, repaired, share = fault["guard"], fault["repaired"], fault["right_share"]
    unseen = Cause.MISSING_IN_PGVECTOR.value not in fault["comparisons"]
    after = repaired["differences_afterwards"]
    return [
        *([] if guard["actor"] == ACTOR else [f"not the guard but {guard['actor']} went back from a spoiled pgvector"]),
        *([f"processes late behind the guard: {', '.join(guard['late'])}"] if guard["late"] else []),
        *(["chunks were taken from pgvector, and no comparison missed one"] if unseen else []),
        *([] if share >= RIGHT_SHARE else [f"differences with the right cause: {share:.2%}; wrong {fault['wrong']}"]),
        *([f"{repaired['left']} documents could not be repaired"] if repaired["left"] else []),
        *([f"{after} differences after the repair"] if after else []),
    ]


def _answers(rehearsal: Rehearsal) -> dict[str, Any]:
    lines = rehearsal.observed.lines
    asked = [line["known"] for line in lines if line.get("known") is not None and line["stage"] != SPOILED]
    around = [
        line["ms"]
        for line in lines
        if any(line["begun"] < end + CHANGE_SECONDS and line["begun"] + line["ms"] / 1000 > begun
               for begun, end in rehearsal.changes)
    ]  # fmt: skip
    return {
        "total": len(lines),
        "failed": sum("failed" in line for line in lines),
        "first_failures": [line["failed"] for line in lines if "failed" in line][:5],
        "foreign": sum(bool(line.get("foreign")) for line in lines),
        "deleted": sum(bool(line.get("deleted")) for line in lines),
        "known_share": round(sum(asked) / len(asked), 4) if asked else 0.0,
        "around_changes": len(around),
        "least_in_flight_at_a_change": min((_in_flight(rehearsal, *change) for change in rehearsal.changes), default=0),
        "slowest_around_a_change_ms": round(max(around, default=0.0), 1),
    }


def _in_flight(rehearsal: Rehearsal, begun: float, end: float) -> int:
    """How many queries were asked or under way while a step was taken and the fleet arrived."""
    return sum(line["begun"] < end and line["begun"] + line["ms"] / 1000 > begun for line in rehearsal.observed.lines)


def _chunks(rehearsal: Rehearsal) -> dict[str, Any]:
    """Every legacy chunk is where it belongs, in quarantine, or deleted with its document."""
    with rehearsal.control.connection() as connection:
        rows = connection.execute(LEGACY).fetchall()
        held = {row[0]: (row[1], row[2]) for row in connection.execute(CHUNKS)}
        deleted = {int(row[0]) for row in connection.execute(DELETED)}
    migrated = gone = 0
    quarantined: Counter[str] = Counter()
    for docstore_id, status, reason, user_id, document_id in rows:
        there = held.get(legacy_chunk_id(docstore_id))
        if status != "assigned":
            quarantined[reason] += there is None
        elif document_id in deleted:
            gone += there is None
        else:
            migrated += there == (user_id, document_id)
    total = rehearsal.legacy
    return {
        "legacy": total,
        "migrated": migrated,
        "quarantined": sum(quarantined.values()),
        "quarantined_by_reason": dict(quarantined),
        "deleted": gone,
        "balanced": total == migrated + gone + sum(quarantined.values()),
    }


def _stage(rehearsal: Rehearsal, stage: dict[str, Any]) -> dict[str, Any]:
    lines = rehearsal.observed.of(stage["name"])
    parameters = {"transition_id": stage["transition"]}
    with rehearsal.control.connection() as connection:
        diffs = connection.execute(DIFFS, (stage["transition"],)).fetchall()
        latency = {
            store.value: (connection.execute(LATENCY, {**parameters, "store": store}).fetchone() or (None,))[0]
            for store in Store
        }
    total = sum(count for _, count, _ in diffs)
    return {
        **stage,
        "queries": len(lines),
        "users": len({line["user"] for line in lines}),
        "answer_ms": _percentiles([line["ms"] for line in lines]),
        "store_ms": {
            store: None if not ms else {"p50": round(ms[0], 2), "p99": round(ms[1], 2)} for store, ms in latency.items()
        },
        "comparisons": total,
        "agreement": round(sum(same for _, _, same in diffs) / total, 4) if total else None,
        "explained": round(sum(n for cause, n, _ in diffs if Cause(cause) in EXPLAINED) / total, 4) if total else None,
        "causes": {cause: count for cause, count, _ in diffs},
    }


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2)}
