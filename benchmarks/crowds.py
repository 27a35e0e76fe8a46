"""Eight clients at once: how far the slow answers lie from the middle, without and with an upload running."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from benchmarks.bench import Bench, Row, ms, say
from benchmarks.site import Given
from benchmarks.timing import Spread, each, spread
from benchmarks.uploads import data_user, note

CLIENTS = 8
K = 3
NOTES = 20
WARM = 50


def run(bench: Bench) -> list[Row]:
    say(f"{CLIENTS} clients, without and with an upload running")
    bench.site.step(bench.loaded, "live", 100, 0.0)
    quiet: list[float] = []
    busy: list[float] = []
    with bench.router(bench.loaded, bench.moved, embeddings=Given(bench.data.vectors)) as router:
        # Until the pool has as many connections as are asked for at once, and each has planned the statement.
        _asked(bench, router, WARM)
        for _ in range(bench.rounds):
            quiet += _asked(bench, router, bench.questions(150))
            with _uploading(bench, router):
                busy += _asked(bench, router, bench.questions(150))
    return [_row("without an upload", 6, spread(quiet)), _row("with an upload running", 10, spread(busy))]


def _row(how: str, most: float, found: Spread) -> Row:
    ratio = found.p99 / found.p50
    return Row(
        f"p99 / p50, 500 chunks, {CLIENTS} clients, {how}", f"<= {most}",
        f"{ratio:.1f} ({ms(found.p99)} / {ms(found.p50)})", "-", "-", ratio <= most,
        {"p50_ms": found.p50, "p99_ms": found.p99, "ratio": ratio},
    )  # fmt: skip


def _asked(bench: Bench, router: Any, questions: int) -> list[float]:
    user = bench.data.medium
    given = [bench.data.near(user, questions, seed) for seed in range(CLIENTS)]
    found: list[list[float]] = [[] for _ in range(CLIENTS)]

    def client(number: int) -> None:
        found[number] = each(lambda row: router.search(user, row, K), given[number])

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one for some in found for one in some]


@contextmanager
def _uploading(bench: Bench, router: Any) -> Iterator[None]:
    """One document after another, as long as the clients ask."""
    files = [note(bench.site.folder, 10_000 + number) for number in range(NOTES)]
    over = threading.Event()

    def upload() -> None:
        for number in count():
            if over.is_set():
                return
            path = files[number % NOTES]
            router.index(router.receive(data_user(path), path, path.name))

    thread = threading.Thread(target=upload)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
