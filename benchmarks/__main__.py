"""`python -m benchmarks [NAME] [--chunks N] [--quick] [--json] [--write-docs]`

Measures, prints the table and keeps the result. NAME is one of the families below or `growth`; all families
where it is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from benchmarks import crowds, data, growth, loading, processes, reads, routing, site, tables, uploads
from benchmarks.bench import QUICK_CHUNKS, Bench, Figure, Row, say
from benchmarks.peers import Peers
from src import log as logs

# In this order: backfill fills what the others read, and the stages only go forward.
FAMILIES: dict[str, Sequence[Figure]] = {
    "loading": (loading.run,),
    "reads": (loading.fill, reads.run),
    "crowds": (loading.fill, crowds.run),
    "routing": (loading.fill, routing.run),
    "uploads": (loading.fill, uploads.run),
    "processes": (loading.fill, processes.run),
}


def main() -> int:
    asked = _arguments()
    _log_as_in_use()
    chunks = asked.chunks or (QUICK_CHUNKS if asked.quick else 100_000)
    with Peers() as peers, site.site() as place:
        if asked.name == "growth":
            points = growth.run(place, peers, chunks)
            return growth.tell(points, write=asked.write_docs, peers=peers, as_json=asked.json)
        say(f"making {chunks:,} chunks")
        bench = Bench(place, data.make(chunks), peers, asked.quick)
        rows = _measure(bench, asked.name)
        result = tables.result(rows, bench)
    path = tables.keep(result)
    say(f"kept in {path}")
    print(json.dumps(result, indent=1) if asked.json else tables.plain(result))
    if asked.write_docs:
        tables.write_docs(result)
    # A quick run says how things stand, not whether the promises hold.
    return 0 if asked.quick or all(row.met is not False for row in rows) else 1


def _measure(bench: Bench, name: str | None) -> list[Row]:
    figures = FAMILIES[name] if name else chain.from_iterable(FAMILIES.values())
    return [row for figure in dict.fromkeys(figures) for row in figure(bench)]


def _log_as_in_use() -> None:
    """Rendered as in the backend, which is part of what is measured, and written to nowhere."""
    logs.configure("INFO")
    for handler in logging.root.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(Path(os.devnull).open("w"))  # noqa: SIM115 - until the process ends


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=[*FAMILIES, "growth"])
    parser.add_argument("--chunks", type=int, help="how many chunks in all (100,000; with --quick 10,000)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and questions; no verdict")
    parser.add_argument("--json", action="store_true", help="the result as JSON instead of the table")
    parser.add_argument(
        "--write-docs", action="store_true", help="put the table into README.md and docs/performance.md"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
