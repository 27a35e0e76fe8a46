"""Questions: through the router, beside the raw statement, PGVector and the old release's read."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from benchmarks.bench import Bench, Row, ms, say, times
from benchmarks.loading import peer_rate
from benchmarks.raw import raw_search
from benchmarks.timing import each, in_turn
from src.database import Role, url_of

K = 3
PEER_QUESTIONS = 20
"""Of each round: PGVector goes through all rows for each."""
# The peers' table from ours, on the server; metadata as PGVector writes it.
FILL_PEER = """
INSERT INTO langchain_pg_embedding (id, collection_id, embedding, document, cmetadata)
SELECT c.id::text, (SELECT uuid FROM langchain_pg_collection), c.embedding, c.content,
       c.metadata || jsonb_build_object('user_id', c.user_id)
FROM imported c ON CONFLICT (id) DO NOTHING
"""


def run(bench: Bench) -> list[Row]:
    say("questions: ours, raw, PGVector, the legacy read")
    _fill_peer(bench)
    bench.site.step(bench.loaded, "live", 100, 0.0)
    with bench.router(bench.loaded, bench.moved) as router, raw_search(bench, bench.loaded) as raw:
        router.pgvector.giants.suspect(bench.data.giant)
        router.look_for_giants()
        legacy = statistics.median(_legacy_read(bench))
        rows = [_few(bench, router, raw, user, legacy) for user in (bench.data.small, bench.data.medium)]
        return [*rows, _giant(bench, router, raw)]


def _few(bench: Bench, router: Any, raw: Any, user: int, legacy: float) -> Row:
    count = bench.questions(100)
    near, far = bench.data.near(user, count), bench.data.far(user, count)
    found = _measured(bench, router, raw, user, np.concatenate([near, far]))
    recall = min(_recall(bench, router, user, questions) for questions in (near, far))
    own = len(bench.data.positions_of[user])
    ours, limit, peer = found["ours"], found["raw"], found["peer"]
    needed = 10 if user == bench.data.small else 1
    met = ours <= 1.5 * limit and recall == 1.0 and peer >= needed * ours and legacy >= 500 * ours
    return Row(
        f"a query, {own} own chunks",
        f"<= 1.5 x raw; recall 1.0;{' >= 10 x PGVector;' if needed == 10 else ''} >= 500 x the legacy read",
        f"{ms(ours)} ({times(ours / limit)} raw), recall {recall:.3f}", ms(limit),
        f"PGVector {ms(peer)} ({times(peer / ours)}), legacy {ms(legacy)} ({times(legacy / ours)})", met,
        {"ours_ms": ours, "raw_ms": limit, "peer_ms": peer, "legacy_ms": legacy, "recall": recall},
    )  # fmt: skip


def _giant(bench: Bench, router: Any, raw: Any) -> Row:
    user, count = bench.data.giant, bench.questions(30)
    near, far = bench.data.near(user, count), bench.data.far(user, count)
    found = _measured(bench, router, raw, user, np.concatenate([near[: count // 2], far[: count // 2]]))
    recalls = [_recall(bench, router, user, questions) for questions in (near, far)]
    ours, limit, peer = found["ours"], found["raw"], found["peer"]
    met = ours <= 0.6 * limit and min(recalls) >= 0.99 and peer >= 3 * ours
    return Row(
        f"the same, {len(bench.data.positions_of[user]):,} own chunks",
        "<= 0.6 of the exact scan; recall@3 >= 0.99 near and far; >= 3 x PGVector",
        f"{ms(ours)} ({ours / limit:.2f}), recall {recalls[0]:.3f} / {recalls[1]:.3f}", f"{ms(limit)} (exact scan)",
        f"PGVector {ms(peer)} ({times(peer / ours)})", met,
        {"ours_ms": ours, "raw_ms": limit, "peer_ms": peer, "near": recalls[0], "far": recalls[1]},
    )  # fmt: skip


def _measured(bench: Bench, router: Any, raw: Any, user: int, questions: Any) -> dict[str, float]:
    """Median milliseconds of each way."""
    asked = bench.site.folder / "questions.npy"
    np.save(asked, questions[:: max(1, len(questions) // PEER_QUESTIONS)])
    url = url_of(bench.site.conninfo("bench_peer", Role.OWNER))
    for warm in range(10):
        router.search(user, questions[warm], K)
        raw(user, questions[warm], K)
    acts = {
        "ours": lambda: each(lambda row: router.search(user, row, K), questions),
        "raw": lambda: each(lambda row: raw(user, row, K), questions),
        "peer": lambda: bench.peers.ask("query", url=url, user_id=user, questions=str(asked), k=K),
    }
    return {name: statistics.median(found) for name, found in in_turn(bench.rounds, acts).items()}


def _recall(bench: Bench, router: Any, user: int, questions: Any) -> float:
    found = [{hit.chunk_id for hit in router.search(user, row, K)} for row in questions]
    best = [bench.data.best(user, row, K) for row in questions]
    return float(np.mean([len(mine & theirs) / len(theirs) for mine, theirs in zip(found, best, strict=True)]))


def _legacy_read(bench: Bench) -> list[float]:
    """Milliseconds of what the old release did for each question: load the directory, search it."""
    from benchmarks.legacy import read

    (row,) = bench.data.near(bench.data.small, 1)
    return [read(bench.legacy, row, K) for _ in range(bench.rounds)]


def _fill_peer(bench: Bench) -> None:
    """The rows that PGVector has not got by its own hand."""
    if not bench.peer_rows:
        peer_rate(bench)
    with bench.site.superuser(bench.loaded) as ours, bench.site.superuser("bench_peer") as peer:
        peer.execute(
            "CREATE UNLOGGED TABLE imported (id uuid, user_id int, content text, metadata jsonb, embedding vector)"
        )
        columns = "id, user_id, content, metadata, embedding"
        with (
            ours.cursor().copy(f"COPY document_chunks ({columns}) TO STDOUT (FORMAT BINARY)") as source,
            peer.cursor().copy(f"COPY imported ({columns}) FROM STDIN (FORMAT BINARY)") as target,
        ):
            for block in source:
                target.write(block)
        peer.execute(FILL_PEER)
        peer.execute("DROP TABLE imported")
        peer.execute("ANALYZE langchain_pg_embedding")
