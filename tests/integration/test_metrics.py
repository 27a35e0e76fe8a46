"""Every metric of the migration moves when it should, under names and labels that dashboards may rely on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from src.tools.rag_tools.migration import metrics
from src.tools.rag_tools.migration.causes import Cause
from src.tools.rag_tools.migration.guard import Window
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.migration.targeting import bucket
from src.tools.rag_tools.store import StoreError
from tests.support.planted import K, Planted, one_of_each_side, planting
from tests.support.routers import add_users, router_on, write_note

pytestmark = pytest.mark.migration

LABELS: dict[str, tuple[str, ...]] = {
    "rag_reads": ("store", "outcome"),
    "rag_writes": ("store", "outcome"),
    "rag_store_seconds": ("store",),
    "rag_fallbacks": (),
    "rag_shadow_comparisons": ("cause",),
    "rag_shadow_dropped": (),
    "rag_owed_entries": ("store",),
    "rag_owed_oldest_seconds": ("store",),
    "rag_set_aside_entries": ("store",),
    "rag_quarantined_chunks": (),
    "rag_stage": ("stage",),
    "rag_read_percent": (),
    "rag_transition": (),
    "rag_newest_transition": (),
    "rag_halted": (),
    "rag_gate_value": ("criterion",),
}
VALUES: dict[str, set[str]] = {
    "store": {*Store, "faiss+pgvector"},
    "outcome": {"ok", "error", "timeout"},
    "cause": set(Cause),
    "stage": set(Stage),
    "criterion": {field.name for field in fields(Window)},
}
TEXT = "The heron waits where the reeds are thin."
INSERT = "src.tools.rag_tools.migration.stores.insert_chunks"


@pytest.fixture
def planted(database: Any, tmp_path: Path) -> Iterator[Planted]:
    with (
        router_on(database, tmp_path, SHADOW_QUEUE=1, SECONDARY_TIMEOUT_SECONDS=0.05) as router,
        planting(database, router) as made,
    ):
        del router.shadow.offer  # of this router the queue is the real one
        for user in one_of_each_side(add_users(database, 20))[0]:
            made.add(user, [made.unit() for _ in range(4)])
        made.settle_down()
        yield made


@pytest.fixture
def user(planted: Planted) -> int:
    """Whom pgvector serves from 50 percent on."""
    return min(planted.held[Store.FAISS], key=bucket)


class Delta:
    """How far a sample has moved since this was made."""

    def __init__(self, name: str, **labels: str) -> None:
        self.name, self.labels = name, labels
        self.before = sample(name, **labels)

    def __call__(self) -> float:
        return sample(self.name, **self.labels) - self.before


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def upload(router: Router, user: int, directory: Path) -> int:
    document_id = router.receive(user, write_note(directory, "heron.md", TEXT), "heron.md")
    router.index(document_id)
    return document_id


# -- names and labels


def test_names_and_labels_are_these() -> None:
    found = {each._name: each._labelnames for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)}
    assert found == LABELS


def test_no_label_holds_a_user_an_id_or_a_text(planted: Planted, user: int, tmp_path: Path) -> None:
    """Every value of every label is one of a handful, after reads, writes and failures of all kinds."""
    planted.to(Stage.LIVE, 50)
    upload(planted.router, user, tmp_path)
    planted.router.query(user, TEXT, K)
    planted.as_owner("REVOKE SELECT ON document_chunks FROM victus_app")
    planted.router.query(user, TEXT, K)
    planted.router.refresh()
    planted.router.guard.look()
    for family in REGISTRY.collect():
        if not family.name.startswith("rag_"):
            continue
        for each in family.samples:
            labels = {name: value for name, value in each.labels.items() if name != "le"}
            assert set(labels) == set(LABELS[family.name]), each
            assert all(value in VALUES[name] for name, value in labels.items()), each
    assert TEXT.encode() not in generate_latest(REGISTRY)


# -- reads and writes


@pytest.mark.parametrize("store", list(Store))
def test_a_read_counts_for_the_store_that_was_asked_and_its_time_is_observed(
    planted: Planted, user: int, store: Store
) -> None:
    planted.to(Stage.LIVE, 50 if store is Store.PGVECTOR else 0)
    reads = Delta("rag_reads_total", store=store, outcome="ok")
    times = Delta("rag_store_seconds_count", store=store)
    other = Delta("rag_store_seconds_count", store=store.other)
    planted.router.search(user, planted.unit(), K)
    assert (reads(), times(), other()) == (1, 1, 0)


def test_a_read_of_both_stores_counts_as_such(planted: Planted, user: int) -> None:
    planted.to(Stage.LIVE, 50)
    one, other = sorted({chunk.document_id for chunk in planted.held[Store.FAISS][user].values()})
    planted.owe(Store.PGVECTOR, user, [one])
    planted.owe(Store.FAISS, user, [other])
    planted.router.refresh()
    reads = Delta("rag_reads_total", store="faiss+pgvector", outcome="ok")
    planted.router.search(user, planted.unit(), K)
    assert reads() == 1


def test_a_read_that_fails_counts_as_an_error_and_as_a_fallback(planted: Planted, user: int) -> None:
    planted.to(Stage.LIVE, 50)
    planted.as_owner("REVOKE SELECT ON document_chunks FROM victus_app")
    errors = Delta("rag_reads_total", store="pgvector", outcome="error")
    answered, fallbacks = Delta("rag_reads_total", store="faiss", outcome="ok"), Delta("rag_fallbacks_total")
    planted.router.search(user, planted.unit(), K)
    assert (errors(), answered(), fallbacks()) == (1, 1, 1)


def test_a_write_counts_for_both_stores(planted: Planted, user: int, tmp_path: Path) -> None:
    planted.to(Stage.LIVE, 50)
    writes = [Delta("rag_writes_total", store=store, outcome="ok") for store in Store]
    document_id = upload(planted.router, user, tmp_path)
    assert [each() for each in writes] == [1, 1]
    planted.router.delete(user, document_id)
    assert [each() for each in writes] == [2, 2]


@pytest.mark.parametrize("stage", [Stage.SHADOW, Stage.RAMPDOWN])
def test_a_write_that_a_store_refuses_counts_as_its_error(
    planted: Planted, user: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage
) -> None:
    def away(*_: object) -> None:
        raise StoreError("PostgreSQL is away")

    planted.to(stage)
    monkeypatch.setattr(INSERT, away)
    errors = Delta("rag_writes_total", store="pgvector", outcome="error")
    faiss = Delta("rag_writes_total", store="faiss", outcome="ok")
    if stage is Stage.RAMPDOWN:
        with pytest.raises(StoreError):
            upload(planted.router, user, tmp_path)
    else:
        upload(planted.router, user, tmp_path)
    assert (errors(), faiss()) == (1, 0 if stage is Stage.RAMPDOWN else 1)


def test_a_secondary_write_that_hangs_counts_as_a_time_out(
    planted: Planted, user: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    planted.to(Stage.SHADOW)
    monkeypatch.setattr(INSERT, lambda *_: release.wait(30))
    timeouts = Delta("rag_writes_total", store="pgvector", outcome="timeout")
    try:
        upload(planted.router, user, tmp_path)
    finally:
        release.set()
    assert timeouts() == 1


# -- the shadow


def test_comparisons_count_by_cause_and_what_does_not_fit_as_dropped(planted: Planted, user: int) -> None:
    """One read fits the queue and the next does not, for nobody works it off yet."""
    planted.to(Stage.LIVE, 50)
    same = Delta("rag_shadow_comparisons_total", cause="match")
    lacking = Delta("rag_shadow_comparisons_total", cause="missing_in_pgvector")
    dropped = Delta("rag_shadow_dropped_total")
    chunk = next(iter(planted.held[Store.FAISS][user].values()))
    work_off(planted, lambda: planted.router.search(user, planted.near(chunk), K))
    planted.gone(Store.PGVECTOR, user, [chunk.document_id])
    question = planted.near(chunk)
    work_off(planted, lambda: [planted.router.search(user, question, K) for _ in range(2)])
    assert (same(), lacking(), dropped()) == (1, 1, 1)


def test_a_comparison_that_could_not_be_recorded_counts_as_dropped(planted: Planted, user: int) -> None:
    planted.to(Stage.LIVE, 50)
    planted.as_owner("REVOKE INSERT ON shadow_diffs FROM victus_app")
    dropped = Delta("rag_shadow_dropped_total")
    work_off(planted, lambda: planted.router.search(user, planted.unit(), K))
    assert dropped() == 1
    assert planted.router.shadow.causes == {}


# -- what is owed, and where the rollout is


def test_the_guard_shows_what_is_owed_and_how_old_it_is_set_aside_and_quarantined(planted: Planted, user: int) -> None:
    planted.to(Stage.LIVE, 0)
    planted.router.guard.look()
    assert [sample("rag_owed_entries", store=store) for store in Store] == [0, 0]
    one, other = sorted({chunk.document_id for chunk in planted.held[Store.FAISS][user].values()})
    planted.owe(Store.PGVECTOR, user, [one])
    planted.owe(Store.FAISS, user, [one, other])
    planted.as_owner("UPDATE vector_ledger SET state = 'aside' WHERE document_id = %s AND store = 'faiss'", other)
    planted.as_owner(
        "INSERT INTO legacy_chunks (docstore_id, position, source, ordinal, status, reason)"
        " SELECT n::text, n, '', 0, 'quarantined', 'no row' FROM generate_series(1, 7) n"
    )
    planted.router.guard.look()
    assert sample("rag_owed_entries", store="pgvector") == 1
    assert sample("rag_owed_entries", store="faiss") == 1
    assert sample("rag_set_aside_entries", store="faiss") == 1
    assert sample("rag_set_aside_entries", store="pgvector") == 0
    assert sample("rag_owed_oldest_seconds", store="pgvector") >= 3_600
    assert sample("rag_quarantined_chunks") == 7
    planted.as_owner("UPDATE vector_ledger SET state = 'done'")
    planted.router.guard.look()
    assert [sample("rag_owed_entries", store=store) for store in Store] == [0, 0]
    assert [sample("rag_owed_oldest_seconds", store=store) for store in Store] == [0, 0]
    assert sample("rag_set_aside_entries", store="faiss") == 0


@pytest.mark.parametrize(("stage", "percent"), [(Stage.DUALWRITE, 0), (Stage.LIVE, 50), (Stage.COMPLETE, 100)])
def test_the_stage_the_percentage_and_the_transition_are_shown(planted: Planted, stage: Stage, percent: int) -> None:
    planted.to(stage, percent)
    assert {each for each in Stage if sample("rag_stage", stage=each)} == {stage}
    assert sample("rag_read_percent") == percent
    assert sample("rag_transition") == planted.router.flags.view().transition_id
    assert sample("rag_halted") == 0


def test_a_request_in_flight_holds_back_the_transition_that_is_shown(planted: Planted) -> None:
    planted.to(Stage.DUALWRITE)
    before = planted.router.flags.view().transition_id
    with planted.router.flags.request():
        planted.to(Stage.SHADOW)
        assert sample("rag_transition") == before
    planted.router.refresh()
    assert sample("rag_transition") == before + 1


def test_a_process_that_has_stopped_writing_shows_it(planted: Planted) -> None:
    planted.router.flags.halt("PostgreSQL lost commits")
    planted.router.refresh()
    assert sample("rag_halted") == 1


def test_the_guard_shows_what_it_measured(planted: Planted, user: int) -> None:
    planted.to(Stage.LIVE, 50)
    for _ in range(3):
        work_off(planted, lambda: planted.router.search(user, planted.unit(), K))
    planted.router.refresh()
    planted.pass_by(20)
    planted.router.guard.look()
    assert sample("rag_gate_value", criterion="comparisons") == 3
    assert sample("rag_gate_value", criterion="agreements") == 3
    assert sample("rag_gate_value", criterion="errors") == 0
    assert sample("rag_gate_value", criterion="reads") == 3
    assert sample("rag_gate_value", criterion="pgvector_p99_ms") > 0


# -- parts


def work_off(planted: Planted, reads: Callable[[], object]) -> None:
    """Do the reads, then everything that is in the shadow's queue."""
    reads()
    worker = threading.Thread(target=planted.router.shadow._work)
    worker.start()
    planted.router.shadow._queue.put(None)
    worker.join(60)
    assert not worker.is_alive()
