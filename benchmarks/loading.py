"""Moving the legacy rows: opening the directory, backfill, its memory, verify.

Ours runs as the command does, in a process of its own that begins with nothing open.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, Row, say, times
from benchmarks.raw import raw_copy
from benchmarks.site import ROOT
from benchmarks.timing import in_turn
from src.database import Role

MOST_MEMORY_MB = 200
PEER_ROWS = 10_000


def run(bench: Bench) -> list[Row]:
    say("backfill: raw COPY, ours, PGVector")
    made: list[dict[str, float]] = []

    def ours() -> list[float]:
        database, directory = bench.installation(), bench.directory()
        made.append(child(bench, "moving", database, directory))
        bench.loaded, bench.moved = database, directory
        return [made[-1]["backfill"]]

    found = in_turn(bench.rounds, {"raw": lambda: raw_copy(bench), "ours": ours})
    limit, backfill = (statistics.median(found[name]) for name in ("raw", "ours"))
    chunks = bench.data.chunks
    their_rate = peer_rate(bench)
    ratio, over_peer = limit / backfill, (chunks / backfill) / their_rate
    memory = max(each["memory_mb"] for each in made)
    verify = statistics.median(each["verify"] for each in made)
    return [
        Row(
            "backfill, everything included", ">= 0.8 of one raw COPY; >= 25 x PGVector",
            f"{backfill:.1f} s, {chunks / backfill:,.0f} rows/s ({ratio:.2f} of raw)",
            f"{limit:.1f} s, {chunks / limit:,.0f} rows/s", f"{their_rate:,.0f} rows/s ({times(over_peer)} slower)",
            ratio >= 0.8 and over_peer >= 25,
            {"ours_s": backfill, "raw_s": limit, "ratio": ratio, "peer_rows_s": their_rate, "over_peer": over_peer},
        ),
        Row(
            "memory of the backfill beyond the index", f"<= {MOST_MEMORY_MB} MB", f"{memory:.0f} MB", "-", "-",
            memory <= MOST_MEMORY_MB, {"memory_mb": memory, "index_mb": made[-1]["index_mb"]},
        ),
        Row(
            "verify both stores", "<= 0.7 of the backfill's time", f"{verify:.1f} s ({verify / backfill:.2f})",
            "-", "-", verify <= 0.7 * backfill, {"ours_s": verify, "ratio": verify / backfill},
        ),
        _opening(bench),
    ]  # fmt: skip


def fill(bench: Bench) -> list[Row]:
    """What the other families read, where `run` did not make it."""
    if not bench.loaded:
        bench.loaded, bench.moved = bench.installation(), bench.directory()
        found = child(bench, "moving", bench.loaded, bench.moved)
        bench.moving_seconds = found["backfill"] + found["verify"]
    return []


def child(bench: Bench, what: str, database: str, directory: Path) -> dict[str, float]:
    """What `python -m benchmarks.children WHAT` measures in a process of its own."""
    environment = {
        **os.environ,
        "DATABASE_URL": _url(bench, database, Role.APP),
        "DATABASE_ROLLOUT_URL": _url(bench, database, Role.ROLLOUT),
        "FAISS_INDEX_PATH": str(directory),
    }
    command = [sys.executable, "-m", "benchmarks.children", what]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _url(bench: Bench, database: str, role: Role) -> str:
    from src.database import url_of

    return url_of(bench.site.conninfo(database, role)).replace("+psycopg", "")


def peer_rate(bench: Bench) -> float:
    """Rows a second of PGVector.add_embeddings, on the first rows; the others are put beside them by SQL."""
    url = bench.peer_database()
    count = min(PEER_ROWS if not bench.quick else 2_000, bench.data.chunks)
    seconds = bench.peers.ask("add", url=url, vectors=str(bench.vectors_file), texts=str(bench.texts_file), count=count)
    bench.peer_rows = count
    return count / float(seconds)


def _opening(bench: Bench) -> Row:
    say("opening the FAISS directory")
    found = in_turn(
        bench.rounds,
        {
            "ours": lambda: [child(bench, "open", bench.loaded, bench.moved)["seconds"]],
            "peer": lambda: [child(bench, "load_local", bench.loaded, bench.moved)["seconds"]],
        },
    )
    ours, peer = (statistics.median(found[name]) for name in ("ours", "peer"))
    return Row(
        "opening the FAISS directory, owners included", "<= 1.2 x load_local", f"{ours:.2f} s ({times(ours / peer)})",
        "-", f"{peer:.2f} s (load_local)", ours <= 1.2 * peer, {"ours_s": ours, "peer_s": peer, "ratio": ours / peer},
    )  # fmt: skip


def texts(bench: Bench) -> Iterator[str]:
    """The peers' rows: a line of JSON each."""
    for document in bench.data.documents:
        for at in document.positions:
            metadata: dict[str, Any] = {**bench.data.metadata(document, at), "user_id": document.user_id}
            yield json.dumps({"id": str(bench.data.ids[at]), "content": bench.data.content(at), "metadata": metadata})
