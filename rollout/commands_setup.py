"""Commands before the rollout: moving the relational tables, and rehearsing the whole way on a copy."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rollout.options import Execute, Json
from rollout.output import Answer, failures, say, stderr, table
from rollout.profiles import REHEARSAL

if TYPE_CHECKING:
    from rollout.import_sql import ImportReport

MISSING = 5


def import_sql(
    source: Annotated[str, typer.Argument(help="sqlite:///victus.db, or sqlite:////an/absolute/path/victus.db")],
    execute: Execute = False,
    as_json: Json = False,
) -> None:
    """Move the relational tables from SQLite to PostgreSQL, in one maintenance window; stop all writers first.

    Counted and compared by content; then the file is marked as moved. Without --execute: what would be moved,
    and what is in the way (exit code 5).
    """
    with failures("import-sql", as_json):
        from rollout.import_sql import import_sql as move
        from src.database import Role, conninfo

        report = move(source, conninfo(Role.ROLLOUT), execute=execute, progress=stderr.print)
        say(Answer("import-sql", asdict(report), _import_text(report), MISSING if report.problems else 0), as_json)


def rehearse(
    legacy: Annotated[Path | None, typer.Option(help="A legacy installation; it is copied, never changed.")] = None,
    queries: Annotated[int, typer.Option(min=1, help="At least so many queries in all.")] = 1_000,
    embed: Annotated[
        bool, typer.Option("--embed", help="Use the configured embedding provider: texts leave the machine.")
    ] = False,
    work: Annotated[
        Path | None, typer.Option(help="A new or empty folder to work in; a temporary one where left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the made installation and of the traffic.")] = 0,
    as_json: Json = False,
) -> None:
    """The whole cut-over on a copy of an installation, under traffic; exit code 0 only if everything held.

    Without --legacy an installation is made first. Nothing leaves the machine unless --embed.
    """
    with failures("rehearse", as_json):
        from rollout.rehearsal import Plan
        from rollout.rehearsal import rehearse as run
        from rollout.rehearsal_report import text

        folder = work or Path(tempfile.mkdtemp(prefix="victus-rehearsal-"))
        plan = Plan(folder.absolute(), legacy.absolute() if legacy else None, queries, embed, seed)
        result = run(plan, lambda line: stderr.print(line, markup=False))
        code = 0 if result["verdict"] == "pass" else 1
        say(Answer("rehearse", result, text(result), code, REHEARSAL.name), as_json)


def _import_text(report: ImportReport) -> list[Any]:
    rows = [[each.table, each.rows, len(each.set_aside)] for each in report.tables]
    did = "moved" if report.executed else "would move"
    return [
        table(
            f"{did} {report.rows} rows from {report.source} to {report.target}", ["table", "rows", "set aside"], rows
        ),
        *[f"set aside: {each.table} {each.id}: {each.reason}" for each in report.set_aside],
        *[f"in the way: {problem}" for problem in report.problems],
    ]
