"""What the migration costs a caller: the router over its store, and the shadow read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.bench import Bench, Row, ms, say
from benchmarks.timing import each, in_turn, spread
from src.database import Role
from src.tools.rag_tools.pgvector_store import SEARCH

K = 3
OLD_MS = 2.0
FAST_MS, HANGING_MS = 2.0, 200.0


def run(bench: Bench) -> list[Row]:
    return [_router(bench), *_shadow(bench)]


def _router(bench: Bench) -> Row:
    say("router over the store: ours, LaunchDarkly's")
    user, count = bench.data.small, bench.questions(400)
    questions = bench.data.near(user, count)
    asked = bench.site.folder / "questions.npy"
    np.save(asked, questions)
    bench.site.step(bench.loaded, "live", 100, 0.0)
    with bench.router(bench.loaded, bench.moved) as router:
        each(lambda row: router.search(user, row, K), questions[:20])
        acts = {
            "router": lambda: each(lambda row: router.search(user, row, K), questions),
            "store": lambda: each(lambda row: router.pgvector.search(user, row, K), questions),
        }
        found = {name: statistics.median(times) for name, times in in_turn(2 * bench.rounds, acts).items()}
    theirs = bench.peers.ask(
        "migrator_overhead", conninfo=bench.site.conninfo(bench.loaded, Role.APP), statement=SEARCH, user_id=user,
        questions=str(asked), rounds=2 * bench.rounds,
    )  # fmt: skip
    ours = found["router"] - found["store"]
    peer = statistics.median(theirs["through"]) - statistics.median(theirs["direct"])
    return Row(
        "router over the store, no shadow", "+ <= 0.15 ms", f"+ {ms(ours)}", f"{ms(found['store'])} (the store alone)",
        f"LaunchDarkly + {ms(peer)}", ours <= 0.15, {"ours_ms": ours, "peer_ms": peer, "store_ms": found["store"]},
    )  # fmt: skip


class Slow:
    """A store that takes so much longer than the real one behind it, without using the processor."""

    def __init__(self, store: Any, milliseconds: float) -> None:
        self.store, self.seconds = store, milliseconds / 1000

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def search(self, user_id: int, vector: Any, k: int) -> Any:
        time.sleep(self.seconds)  # the store, as slow as the figure says
        return self.store.search(user_id, vector, k)


def _shadow(bench: Bench) -> list[Row]:
    return [_shadowed(bench, name, slow) for name, slow in (("fast", FAST_MS), ("hanging 200 ms", HANGING_MS))]


def _shadowed(bench: Bench, name: str, slow: float) -> Row:
    """The caller's read takes 2 ms; every one is sampled. Alone: the same with nothing sampled."""
    say(f"shadow read, other store {name}")
    count = bench.questions(200)
    found: dict[str, list[float]] = {"alone": [], "shadow": []}
    for number in range(2 * bench.rounds):
        for way in ("alone", "shadow") if number % 2 else ("shadow", "alone"):
            found[way] += _reads(bench, slow, 1.0 if way == "shadow" else 0.0, count)
    alone, shadow = spread(found["alone"]), spread(found["shadow"])
    peers = bench.peers.ask("shadow_overhead", old_ms=OLD_MS, new_ms=slow, count=min(count, 60))
    theirs = {peer: statistics.median(peers[peer]) - statistics.median(peers["alone"]) for peer in peers}
    p50, p99 = shadow.p50 - alone.p50, shadow.p99 - alone.p99
    return Row(
        f"shadow read, other store {name}", "+ <= 0.1 ms p50, <= 0.5 ms p99", f"+ {ms(p50)} p50, + {ms(p99)} p99",
        f"{ms(alone.p50)} / {ms(alone.p99)} (without)",
        f"LaunchDarkly + {ms(theirs['launchdarkly'])}, laboratory + {ms(theirs['laboratory'])}",
        p50 <= 0.1 and p99 <= 0.5, {"p50_ms": p50, "p99_ms": p99, **{k: v for k, v in theirs.items() if k != "alone"}},
    )  # fmt: skip


def _reads(bench: Bench, slow: float, rate: float, count: int) -> Sequence[float]:
    user = bench.data.medium
    bench.site.step(bench.loaded, "shadow", 0, rate)
    with bench.router(bench.loaded, bench.moved) as router:
        stores = router.stores
        object.__setattr__(stores, "faiss", Slow(stores.faiss, OLD_MS))
        object.__setattr__(router.shadow.stores, "pgvector", Slow(router.shadow.stores.pgvector, slow))
        router.shadow.start()
        questions = bench.data.near(user, count + 10)
        each(lambda row: router.search(user, row, K), questions[:10])
        return each(lambda row: router.search(user, row, K), questions[10:])
