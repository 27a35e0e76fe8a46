"""The result: kept as JSON, printed as a table, put between the marks in README.md and docs/performance.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, Row
from benchmarks.site import ROOT, SERVER_SETTINGS

RESULTS = ROOT / "benchmarks/results"
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs/performance.md"
VERDICTS = {True: "met", False: "missed", None: "-"}


def result(rows: Sequence[Row], bench: Bench) -> dict[str, Any]:
    """What was measured, where and on what."""
    with bench.site.superuser("postgres") as connection:
        (version,) = connection.execute("SHOW server_version").fetchone() or ("",)
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "chunks": bench.data.chunks,
        "users": len(bench.data.sizes),
        "quick": bench.quick,
        "machine": {
            "cpus": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "system": platform.system(),
            "python": platform.python_version(),
            "postgres": version,
            "settings": SERVER_SETTINGS,
        },
        "rows": [asdict(row) for row in rows],
    }


def keep(found: dict[str, Any]) -> Path:
    """One file a day and kind of run; the last one stays."""
    kind = "-quick" if found["quick"] else "" if found["chunks"] == 100_000 else f"-{found['chunks']}"
    path = RESULTS / f"{found['at'][:10]}{kind}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def plain(found: dict[str, Any]) -> str:
    lines = [f"{found['chunks']:,} chunks of {found['users']} users, {found['machine']['cpus']} cores, durable"]
    for row in found["rows"]:
        verdict = "" if found["quick"] else f"  [{VERDICTS[row['met']]}]"
        lines += [f"\n{row['what']}{verdict}", f"    goal  {row['goal']}", f"    ours  {row['ours']}"]
        lines += [f"    {name:<5} {row[name]}" for name in ("raw", "peer") if row[name] != "-"]
    return "\n".join(lines)


def markdown(found: dict[str, Any]) -> str:
    header = ["what", "goal", "ours", "raw limit", "peer", "verdict"]
    rows = (
        [row["what"], row["goal"], row["ours"], row["raw"], row["peer"], _verdict(found, row)] for row in found["rows"]
    )
    return f"{_where(found)}\n\n{_table(header, rows)}"


def short(found: dict[str, Any]) -> str:
    rows = ([row["what"], row["ours"], _verdict(found, row)] for row in found["rows"])
    return f"{_where(found)}\n\n{_table(['what', 'measured', 'goal'], rows)}"


def write_docs(found: dict[str, Any]) -> None:
    put(README, "bench", short(found))
    put(PERFORMANCE, "bench", markdown(found))


def put(path: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- MARK -->` and `<!-- /MARK -->`."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before = path.read_text()
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(before):
        raise ValueError(f"{path} has no marks {begin} and {end}")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", before))


def _verdict(found: dict[str, Any], row: dict[str, Any]) -> str:
    return "-" if found["quick"] else VERDICTS[row["met"]]


def _where(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return (
        f"Measured on {found['at'][:10]}: {found['chunks']:,} chunks of {found['users']} users,"
        f" {machine['cpus']} cores that client and server share, {machine['memory_gb']} GB,"
        f" PostgreSQL {machine['postgres']}, durable."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
