"""How what a caller waits for grows with all chunks: points for a log-log plot, with fitted exponents."""

from __future__ import annotations

import json
import statistics
from typing import Any

import numpy as np

from benchmarks import data, loading, tables
from benchmarks.bench import Bench, ms, say
from benchmarks.peers import Peers
from benchmarks.site import ROOT, Given, Site
from benchmarks.timing import each
from benchmarks.uploads import _upload, note

SIZES = (1_000, 10_000, 100_000, 1_000_000)
PLOT = ROOT / "docs/images/growth.png"
KEPT = ROOT / "benchmarks/results/growth.json"
K = 3
LABELS = {
    "small": "a query, 10 own chunks",
    "giant": "a query, a fifth of all chunks one's own",
    "upload": "an upload of 20 chunks in dualwrite",
    "legacy": "the old release's query",
    "backfill": "backfill and verify, per 1,000 chunks",
}

Points = dict[str, list[list[float]]]


def run(site: Site, peers: Peers, most: int) -> Points:
    """Points (chunks, milliseconds) by name, for every size up to `most`."""
    points: Points = {name: [] for name in LABELS}
    for size in (size for size in SIZES if size <= most):
        say(f"growth: {size:,} chunks")
        for name, value in _at(Bench(site, data.make(size), peers, quick=True)).items():
            points[name].append([size, value])
    return points


def _at(bench: Bench) -> dict[str, float]:
    loading.fill(bench)
    found = {"backfill": bench.moving_seconds * 1e6 / bench.data.chunks, "legacy": _legacy(bench)}
    files = [note(bench.site.folder, 50_000 + number) for number in range(25)]
    with bench.router(bench.loaded, bench.moved, embeddings=Given(bench.data.vectors)) as router:
        each(lambda path: _upload(router, path), files[:5])
        found["upload"] = statistics.median(each(lambda path: _upload(router, path), files[5:]))
    bench.site.step(bench.loaded, "live", 100, 0.0)
    with bench.router(bench.loaded, bench.moved) as router:
        router.pgvector.giants.suspect(bench.data.giant)
        router.look_for_giants()
        for name, user in (("small", bench.data.small), ("giant", bench.data.giant)):
            questions = bench.data.near(user, 40)
            found[name] = statistics.median(each(lambda row, of=user: router.search(of, row, K), questions)[10:])
    bench.clear()
    return found


def _legacy(bench: Bench) -> float:
    from benchmarks.legacy import read

    (row,) = bench.data.near(bench.data.small, 1)
    return statistics.median(read(bench.legacy, row, K) for _ in range(2))


def exponents(points: Points) -> dict[str, float]:
    """The slope of each line in the log-log plot."""
    return {
        name: float(np.polyfit(np.log([x for x, _ in line]), np.log([y for _, y in line]), 1)[0])
        for name, line in points.items()
    }


def tell(points: Points, *, write: bool, peers: Peers, as_json: bool) -> int:
    slopes = exponents(points)
    print(json.dumps({"points": points, "exponents": slopes}) if as_json else markdown(points, slopes))
    if write:
        KEPT.write_text(json.dumps({"points": points, "exponents": slopes}, indent=1) + "\n")
        labels = {name: f"{LABELS[name]} (exponent {slopes[name]:.2f})" for name in points}
        peers.ask("plot", path=str(PLOT), series=points, labels=labels)
        tables.put(tables.PERFORMANCE, "growth", markdown(points, slopes))
    return 0


def markdown(points: Points, slopes: dict[str, float]) -> str:
    sizes = [int(x) for x, _ in points["small"]]
    header = ["what", *[f"{size:,}" for size in sizes], "exponent"]
    lines: list[list[Any]] = [header, ["---"] * len(header)]
    lines += [[LABELS[name], *[ms(y) for _, y in line], f"{slopes[name]:.2f}"] for name, line in points.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
