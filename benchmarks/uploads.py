"""An upload of 20 chunks in `dualwrite`, durable in both stores, at two sizes; and the old release's write."""

from __future__ import annotations

import random
import shutil
import statistics
from pathlib import Path

from benchmarks import data
from benchmarks.bench import Bench, Row, ms, say, times
from benchmarks.legacy import write
from benchmarks.site import Given, adopt, save_legacy
from benchmarks.timing import each
from src.database import Role
from src.tools.rag_tools.chunking import split

CHUNKS = 20
SMALL_SITE = 1_000


def run(bench: Bench) -> list[Row]:
    say(f"uploads of {CHUNKS} chunks at {bench.data.chunks:,} and {SMALL_SITE:,}")
    small = _small(bench)
    here, there = [], []
    count = bench.questions(60)
    files = [note(bench.site.folder, number) for number in range(2 * count + 5)]
    bench.site.step(bench.loaded, "dualwrite")
    with (
        bench.router(bench.loaded, bench.moved, embeddings=Given(bench.data.vectors)) as large,
        bench.router(*small, embeddings=Given(bench.data.vectors)) as little,
    ):
        for router in (large, little):
            each(lambda path, to=router: _upload(to, path), files[:5])
        for number in range(count):
            here += each(lambda path: _upload(large, path), [files[5 + 2 * number]])
            there += each(lambda path: _upload(little, path), [files[6 + 2 * number]])
    rows = bench.data.vectors[:CHUNKS]
    legacy = statistics.median(write(bench.legacy, rows) for _ in range(bench.rounds))
    ours, at_small = statistics.median(here), statistics.median(there)
    return [
        Row(
            "an upload of 20 chunks, durable in both",
            "<= 40 ms; within 20 percent of that at 1,000 chunks; >= 100 x legacy",
            f"{ms(ours)} ({times(ours / at_small)} that at {SMALL_SITE:,})", "-",
            f"legacy {ms(legacy)} ({times(legacy / ours)})",
            ours <= 40 and ours <= 1.2 * at_small and legacy >= 100 * ours,
            {"ours_ms": ours, "at_1000_ms": at_small, "legacy_ms": legacy},
        )
    ]  # fmt: skip


def _upload(router: object, path: Path) -> None:
    router.index(router.receive(data_user(path), path, path.name))  # type: ignore[attr-defined]


def data_user(path: Path) -> int:
    """Users with few chunks, in turn."""
    return 3 + int(path.stem.rpartition("-")[2]) % 20


def note(folder: Path, number: int) -> Path:
    """A text that is cut into exactly CHUNKS chunks."""
    uploads = folder / "uploads"
    uploads.mkdir(exist_ok=True)
    path = uploads / f"note-{number}.txt"
    chance = random.Random(number)
    words = " ".join(chance.choices(data.WORDS, k=3_000))
    length = 16_000
    while True:
        path.write_text(words[:length])
        pieces = len(split(path, str(path)))
        if pieces == CHUNKS:
            return path
        length += 400 * (CHUNKS - pieces)


def _small(bench: Bench) -> tuple[str, Path]:
    """An installation of 1,000 chunks on the same server."""
    made = data.make(SMALL_SITE)
    directory = bench.site.folder / "small_index"
    shutil.rmtree(directory, ignore_errors=True)
    save_legacy(directory, made)
    database = bench.site.database()
    with bench.site.connect(database, Role.OWNER) as connection:
        adopt(connection, made)
    bench.site.step(database, "dualwrite")
    return database, directory
