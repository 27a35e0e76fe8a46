"""A rehearsal's result for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from rollout.output import table

COLUMNS = (
    "stage",
    "s",
    "queries",
    "answer p50/p99 ms",
    "faiss p99",
    "pgvector p99",
    "agreement",
    "causes",
    "gate",
)
FAULT_COLUMNS = ("cause", "chunks planted", "comparisons", "wrongly so", "what explain says mends it")


def text(result: Mapping[str, Any]) -> list[str | Table]:
    """The stages as a table, then the sums that decide the verdict."""
    answers, chunks = result["answers"], result["chunks"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in chunks["quarantined_by_reason"].items())
    return [
        table("stages", COLUMNS, [_row(stage) for stage in result["stages"]]),
        *(_fault(result["fault"]) if result["fault"] else []),
        f"answers: {answers['total']} in all, {answers['failed']} failed, {answers['foreign']} with a foreign chunk,"
        f" {answers['deleted']} with a deleted document; known chunk found in {answers['known_share']:.1%};"
        f" slowest of {answers['around_changes']} around a change {answers['slowest_around_a_change_ms']} ms",
        f"legacy chunks: {chunks['legacy']} = {chunks['migrated']} migrated + {chunks['quarantined']} quarantined"
        f" + {chunks['deleted']} deleted; quarantine: {reasons or 'empty'}",
        f"uploads: {result['uploads']['made']} made, {len(result['uploads']['missing'])} missing afterwards;"
        f" {result['deletes']} deletes",
        *[f"failed: {failure}" for failure in result["failures"]],
        f"verdict: {result['verdict']} (working folder {result['work']})",
    ]


def _row(stage: Mapping[str, Any]) -> list[object]:
    answer, stores = stage["answer_ms"], stage["store_ms"]
    return [
        stage["name"],
        f"{stage['seconds']:.1f}",
        stage["queries"],
        "" if answer is None else f"{answer['p50']} / {answer['p99']}",
        *("" if stores[name] is None else stores[name]["p99"] for name in ("faiss", "pgvector")),
        "" if stage["agreement"] is None else f"{stage['agreement']:.1%}",
        ", ".join(f"{count} {cause}" for cause, count in stage["causes"].items()),
        "" if stage["gate"] is None else stage["gate"]["verdict"],
    ]


def _fault(fault: Mapping[str, Any]) -> list[str | Table]:
    """What was spoiled on purpose, who noticed, and what mended it."""
    guard, repaired = fault["guard"], fault["repaired"]
    refused = [each for each in fault["refused"]["criteria"] if each["verdict"] == "fail"]
    return [
        table("pgvector spoiled on purpose", FAULT_COLUMNS, [_cause(fault, cause) for cause in fault["comparisons"]]),
        f"{guard['actor']} went back to {guard['to']} after {guard['after_seconds']} s"
        f" (windows of {guard['window_seconds']:g} s): {guard['reason']}",
        f"the gate to {fault['refused']['to']} refused: "
        + "; ".join(f"{each['name']} is {each['value']}, needed {each['threshold']}" for each in refused),
        f"repaired: {repaired['differences']} differences in {repaired['documents']} documents, then"
        f" {repaired['differences_afterwards']}",
    ]


def _cause(fault: Mapping[str, Any], cause: str) -> list[object]:
    explained = fault["explained"].get(cause, {})
    return [
        cause,
        fault["planted"].get(cause, ""),
        fault["comparisons"][cause],
        fault["wrong"].get(cause, 0),
        explained.get("mend", ""),
    ]
