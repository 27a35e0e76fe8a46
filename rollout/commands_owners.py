"""Commands about whose the legacy chunks are: deciding once, and what could not be decided."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rollout.errors import PreconditionError, UsageError
from rollout.options import Execute, Json
from rollout.output import Answer, failures, say, table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from rollout.control import Control
    from rollout.owner_report import AssignmentReport
    from rollout.owner_rules import DocumentRow
    from rollout.quarantine import Choice, Group, Outcome
    from src.tools.rag_tools.pgvector_store import Connection

NEVER_SQLITE = "none"
LEGACY_FILE = Path("victus.db")

FromSqlite = Annotated[
    str | None,
    typer.Option(
        "--from-sqlite",
        help="The report before anything is installed, from the old release's database (sqlite:///victus.db)"
        " and its FAISS directory; both are only read.",
    ),
]
FromPostgres = Annotated[
    str | None,
    typer.Option("--from-postgres", help="The same, where the old release runs on PostgreSQL: postgresql://..."),
]
ImportedFrom = Annotated[
    str | None,
    typer.Option(
        "--imported-from",
        help="The SQLite file that import-sql moved: rows that PostgreSQL could not hold still compete for chunks."
        f" Left out, ./{LEGACY_FILE} if it is there; `{NEVER_SQLITE}` where the old release ran on PostgreSQL.",
    ),
]
AcceptMissing = Annotated[
    int | None,
    typer.Option("--accept-missing-files", help="The number of documents whose file is gone, as seen and accepted."),
]
Csv = Annotated[Path | None, typer.Option("--csv", help="A file as `quarantine list --csv` writes it, filled in.")]


def assign_owners(
    execute: Execute = False,
    from_sqlite: FromSqlite = None,
    from_postgres: FromPostgres = None,
    imported_from: ImportedFrom = None,
    accept_missing: AcceptMissing = None,
    as_json: Json = False,
) -> None:
    """Decide once, for every legacy chunk, whose it is; what cannot be known is quarantined, served to nobody.

    Without --execute: the report, per user how many chunks they keep and lose. What was decided stays; running
    again decides only what is new. Then `rollout quarantine list`.
    """
    with failures("assign-owners", as_json):
        from rollout import owners

        if from_sqlite is not None or from_postgres is not None:
            if execute or (from_sqlite and from_postgres):
                raise UsageError("--from-sqlite and --from-postgres are previews: give one, and leave out --execute")
            report = _preview(from_sqlite, from_postgres)
        else:
            from rollout.control import control

            with control() as made:
                report = _assign(made, imported_from, accept_missing, execute)
        data = report.as_dict()
        data["assignment"] = data.pop("version")
        say(Answer("assign-owners", data, [owners.render(report)]), as_json)


def quarantine_list(
    csv: Annotated[Path | None, typer.Option("--csv", help="Write a file to fill in; `-` is stdout.")] = None,
    discarded: Annotated[bool, typer.Option("--discarded", help="Also what was discarded.")] = False,
    as_json: Json = False,
) -> None:
    """What nobody is served, in groups, and the documents that each may belong to.

    A group is one upload. `matched` is the share of its text that the document's file still on the disk
    contains: a hint for a person, never a decision.
    """
    with failures("quarantine list", as_json):
        from rollout import quarantine
        from rollout.control import control
        from src.config import settings

        with control() as made, made.connection() as connection:
            contents = ((chunk.docstore_id, chunk.content) for chunk in made.faiss.base_positions())
            groups = quarantine.listing(connection, uploads=settings.UPLOAD_DIR, contents=contents, discarded=discarded)
        if csv is not None:
            with _writing(csv) as file:
                quarantine.to_csv([_csv_row(group) for group in groups], file)
            if str(csv) == "-":
                return
        data = {"chunks": sum(group.chunks for group in groups), "groups": [asdict(group) for group in groups]}
        written = [] if csv is None else [f"written to {csv}; fill in action (assign, discard) and document_id"]
        say(Answer("quarantine list", data, [*_groups_text(groups), *written]), as_json)


def quarantine_assign(
    group: Annotated[str | None, typer.Argument(help="The group, as the list names it.")] = None,
    document: Annotated[int | None, typer.Argument(help="The document that its chunks belong to.")] = None,
    csv: Csv = None,
    reason: Annotated[str, typer.Option("--reason", help="Why the file discards groups, if it does.")] = "",
    execute: Execute = False,
    as_json: Json = False,
) -> None:
    """Give a group to a document, and with it to the document's owner; or carry out a CSV of decisions.

    All of a file's decisions are carried out, or none. Then `rollout backfill --execute` brings the chunks over.
    """
    with failures("quarantine assign", as_json):
        from rollout import quarantine

        if csv is not None and group is None:
            choices = quarantine.from_csv(csv)
        elif csv is None and group is not None and document is not None:
            choices = [quarantine.Choice(group, quarantine.Action.ASSIGN, document)]
        else:
            raise UsageError("name a group and a document, or a file with --csv")
        _decide("quarantine assign", choices, reason, execute, as_json)


def quarantine_discard(
    group: Annotated[str, typer.Argument(help="The group, as the list names it.")],
    reason: Annotated[str, typer.Option("--reason", help="Why nobody will miss it, for the record.")] = "",
    execute: Execute = False,
    as_json: Json = False,
) -> None:
    """Hide a group from the list; nothing is erased before the end, and it may still be assigned."""
    with failures("quarantine discard", as_json):
        from rollout import quarantine

        choices = [quarantine.Choice(group, quarantine.Action.DISCARD)]
        _decide("quarantine discard", choices, reason, execute, as_json)


def _preview(sqlite: str | None, postgres: str | None) -> AssignmentReport:
    """From the old database and the old directory, both only read."""
    from rollout import owners
    from src.config import settings
    from src.tools.rag_tools.migration.settings import migration_settings

    positions = owners.positions_in()
    if not positions:
        raise PreconditionError(
            f"{migration_settings.FAISS_INDEX_PATH.absolute()} holds no index; set FAISS_INDEX_PATH to the directory"
            " with index.faiss and index.pkl"
        )
    if sqlite is not None:
        return owners.preview(sqlite, positions, uploads=settings.UPLOAD_DIR)
    with _old_postgres(postgres or "") as connection:
        return owners.assign_owners(connection, positions, actor="preview", execute=False, uploads=settings.UPLOAD_DIR)


@contextmanager
def _old_postgres(url: str) -> Iterator[Connection]:
    import psycopg

    try:
        with psycopg.connect(url.replace("+psycopg://", "://"), autocommit=True, connect_timeout=10) as connection:
            yield connection
    except psycopg.OperationalError as error:
        raise PreconditionError("the PostgreSQL of --from-postgres cannot be reached") from error
    except psycopg.ProgrammingError as error:
        raise UsageError("--from-postgres names no database of the old release: postgresql://USER@HOST/NAME") from error


def _assign(made: Control, imported_from: str | None, accepted: int | None, execute: bool) -> AssignmentReport:
    from rollout import owners
    from rollout.control import actor
    from src.config import settings

    positions = owners.positions_of(made.faiss.base_positions())
    with made.connection() as connection:
        left_behind = _left_behind(connection, imported_from, execute)
        options: dict[str, Any] = {"actor": actor(), "left_behind": left_behind, "uploads": settings.UPLOAD_DIR}
        report = owners.assign_owners(connection, positions, execute=False, **options)
        if not execute:
            return report
        _refuse_missing_files(report, accepted, settings.UPLOAD_DIR)
        return owners.assign_owners(connection, positions, execute=True, **options)


def _left_behind(connection: Any, imported_from: str | None, execute: bool) -> list[DocumentRow]:
    """Without these rows an upload of a user who is gone could look like that of another."""
    from rollout import owners

    if imported_from == NEVER_SQLITE:
        return []
    if imported_from is None and LEGACY_FILE.is_file():
        imported_from = f"sqlite:///{LEGACY_FILE}"
    if imported_from is not None:
        return owners.rows_left_behind(connection, imported_from)
    if execute:
        raise UsageError(
            "name the SQLite file that import-sql moved with --imported-from sqlite:///victus.db, for its rows that"
            f" PostgreSQL could not hold still compete for chunks; `--imported-from {NEVER_SQLITE}` where there is none"
        )
    return []


def _refuse_missing_files(report: AssignmentReport, accepted: int | None, uploads: Path) -> None:
    """A document without its file lives in the index alone: it cannot be read or embedded again."""
    gone = report.documents_without_file
    if len(gone) == (accepted or 0):
        return
    said = "nothing was accepted" if accepted is None else f"{accepted} were accepted"
    first = gone[0] if gone else None
    named = "" if first is None else f", first document {first.document_id} of user {first.user_id}: {first.path}"
    raise PreconditionError(
        f"{len(gone)} documents have no file in {uploads.absolute()}{named}; {said}. Bring the files back, or set"
        f" UPLOAD_DIR; else their text is in the index alone: add --accept-missing-files {len(gone)}"
    )


def _decide(command: str, choices: list[Choice], reason: str, execute: bool, as_json: bool) -> None:
    from rollout import quarantine
    from rollout.control import actor, control

    with control() as made, made.connection() as connection:
        outcome = quarantine.apply(connection, choices, actor=actor(), execute=execute, reason=reason)
    data = asdict(outcome)
    data["assignment"] = data.pop("version")
    say(Answer(command, {"executed": execute, **data}, [_outcome_text(outcome, execute)]), as_json)


def _outcome_text(outcome: Outcome, execute: bool) -> str:
    did = "" if execute else "would be "
    then = "; now `rollout backfill --execute`" if execute and outcome.documents else ""
    return (
        f"{outcome.assigned} chunks {did}assigned, {outcome.discarded} {did}discarded{then}"
        + ("" if execute else "; add --execute to do it")
    )  # fmt: skip


def _groups_text(groups: list[Group]) -> list[Any]:
    if not groups:
        return ["nothing is in quarantine"]
    rows = [[group.name, group.source, group.chunks, group.reason, _candidates(group)] for group in groups]
    columns = ["group", "source", "chunks", "why", "may belong to"]
    return [table(f"{sum(group.chunks for group in groups)} chunks are served to nobody", columns, rows)]


def _csv_row(group: Group) -> dict[str, object]:
    return {
        "group": group.name,
        "source": group.source,
        "chunks": group.chunks,
        "why": group.reason,
        "candidates": _candidates(group),
    }


def _candidates(group: Group) -> str:
    return "; ".join(
        f"document {each.document_id} of {each.username or f'user {each.user_id}, who is gone'}"
        + ("" if each.matched is None else f" (matches {each.matched:.0%})")
        for each in group.candidates
    )


@contextmanager
def _writing(path: Path) -> Iterator[TextIO]:
    if str(path) == "-":
        yield sys.stdout
        return
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); name a new file") from error
