"""The migration's metrics for Prometheus; they go when FAISS goes. No text, no user id is a label."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from src.tools.rag_tools.migration.stages import Stage

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

READS = Counter("rag_reads", "Reads by the store that was asked and what came of it.", ["store", "outcome"])
WRITES = Counter("rag_writes", "Writes by store and what came of it.", ["store", "outcome"])
STORE_SECONDS = Histogram("rag_store_seconds", "How long a store took to answer.", ["store"], buckets=SECONDS)
FALLBACKS = Counter("rag_fallbacks", "Reads answered by FAISS because pgvector failed.")
COMPARISONS = Counter("rag_shadow_comparisons", "Shadow comparisons by cause.", ["cause"])
DROPPED = Counter("rag_shadow_dropped", "Shadow reads that did not fit the queue.")
OWED = Gauge("rag_owed_entries", "Ledger entries owed, by store.", ["store"], multiprocess_mode="mostrecent")
OWED_AGE = Gauge("rag_owed_oldest_seconds", "Age of the oldest owed entry.", ["store"], multiprocess_mode="mostrecent")
ASIDE = Gauge("rag_set_aside_entries", "Ledger entries set aside.", ["store"], multiprocess_mode="mostrecent")
QUARANTINED = Gauge("rag_quarantined_chunks", "Legacy chunks in quarantine.", multiprocess_mode="mostrecent")
STAGE = Gauge("rag_stage", "1 for the stage in force.", ["stage"], multiprocess_mode="mostrecent")
READ_PERCENT = Gauge("rag_read_percent", "Percent of users read from pgvector.", multiprocess_mode="mostrecent")
TRANSITION = Gauge("rag_transition", "The transition that this process acts on.", multiprocess_mode="livemin")
NEWEST = Gauge("rag_newest_transition", "The newest transition that is known here.", multiprocess_mode="livemax")
HALTED = Gauge("rag_halted", "1 where this process has stopped writing.", multiprocess_mode="livemax")
GATE_VALUE = Gauge("rag_gate_value", "What the guard measured last.", ["criterion"], multiprocess_mode="mostrecent")


def show_stage(stage: Stage, percent: int, *, acts_on: int, newest: int, halted: bool) -> None:
    """Set the gauges of the flags in force."""
    for each in Stage:
        STAGE.labels(each.value).set(each is stage)
    READ_PERCENT.set(percent)
    # Of several workers behind one address the oldest and the newest are told: they differ where one is stuck.
    TRANSITION.set(acts_on)
    NEWEST.set(newest)
    HALTED.set(halted)
