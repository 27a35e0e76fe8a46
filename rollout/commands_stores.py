"""Commands about what the stores hold: bringing it over, settling, comparing, and saving FAISS."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rollout.commands_steps import owed_table
from rollout.errors import UsageError
from rollout.options import Execute, Json, OnlyCause
from rollout.output import Answer, failures, progress, say, stderr, table

if TYPE_CHECKING:
    from rollout.repair import RepairReport
    from rollout.verify_report import VerifyReport
    from src.tools.rag_tools.migration.stages import Store

SHOWN = 20
NOTHING = "nothing to list"


def backfill(execute: Execute = False, as_json: Json = False) -> None:
    """Copy the legacy documents that pgvector is owed, in bulk, in a stage that writes both stores.

    Interrupt it at will, or kill it: each document is wholly copied or still owed, and the same command goes
    on from there. Then `rollout verify`.
    """
    show = progress("backfill")
    with failures("backfill", as_json):
        from rollout import backfill as bulk
        from rollout.control import control
        from rollout.hold import is_held

        with control() as made:
            report = bulk.backfill(
                made.pool,
                made.faiss,
                execute=execute,
                progress=lambda at: show(at.documents, at.of_documents),
                should_stop=lambda: is_held(made.pool),
            )
        did = "copied" if report.executed else "would copy (add --execute)"
        text = [
            f"{did} {report.documents} documents, {report.chunks} chunks of {len(report.owners)} users",
            f"pgvector is owed {report.remaining} documents" + ("" if report.executed else " now"),
            *(["stopped: the rollout is held; `rollout resume` ends that"] if report.stopped else []),
            *[f"document {document}: {why}" for document, why in sorted(report.failed.items())],
        ]
        data = {**asdict(report), "owners": len(report.owners), "estimated_seconds": round(report.estimated_seconds, 1)}
        say(Answer("backfill", data, text, 1 if report.failed else 0), as_json)


def settle(
    execute: Execute = False,
    store: Annotated[
        str | None, typer.Option("--store", help="faiss or pgvector; those that the stage writes where left out.")
    ] = None,
    retry_aside: Annotated[bool, typer.Option("--retry-aside", help="Try again what was set aside.")] = False,
    as_json: Json = False,
) -> None:
    """Bring the stores to what the ledger wants, now, without waiting for leases or backoff.

    The backend does the same by itself, a little later. Without --execute: what is owed, and why.
    """
    with failures("settle", as_json):
        from rollout.control import control
        from rollout.status import failing, owed
        from src.tools.rag_tools.migration import ledger

        stores = _stores(store)
        with control() as made:
            if not execute:
                rows, why = owed(made), failing(made)
                text = [owed_table(rows), *([_rows_table("failing", why)] if why else [])]
                say(Answer("settle", {"executed": False, "owed": rows, "failing": why}, text), as_json)
                return
            if retry_aside:
                with made.connection() as connection:
                    ledger.retry_aside(connection)
            report = made.router.settler.run(stores=stores, at_once=True)
        failed = [{"document": document, "store": name, "why": why} for (document, name), why in report.failed.items()]
        text = [f"settled {report.done} entries, {report.ready} documents made ready, {len(failed)} failed"]
        text += [f"document {each['document']} in {each['store']}: {each['why']}" for each in failed]
        data = {
            "executed": True,
            "done": report.done,
            "ready": report.ready,
            "failed": failed,
            "aside": len(report.aside),
        }
        say(Answer("settle", data, text, 1 if failed else 0), as_json)


def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Owe again what differs; see --execute.")] = False,
    execute: Execute = False,
    as_json: Json = False,
) -> None:
    """Do both stores hold the same? Every chunk by id, owner, document, content hash and vector hash.

    The result is recorded: it is evidence for the gates. Exit code 0: they do; 3: they differ. With --repair
    --execute what differs is owed again: then `rollout settle --execute`, and verify once more.
    """
    show = progress("verify")
    with failures("verify", as_json):
        from rollout import repair as mending
        from rollout import verify as comparing
        from rollout.control import control

        if execute and not repair:
            raise UsageError("--execute belongs to --repair; verify itself changes nothing but its own record")
        with control() as made:
            report = comparing.verify(made.pool, made.faiss, progress=lambda at: show(at.users, at.of_users))
            mended = mending.repair(made.pool, report, execute=execute) if repair else None
        data = report.to_json() | {"run": report.run_id, "repair": None if mended is None else asdict(mended)}
        text = _verify_text(report) + ([] if mended is None else _repair_text(mended))
        say(Answer("verify", data, text, 3 if report.differences else 0), as_json)


def diffs(
    cause: OnlyCause = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="The newest so many.")] = SHOWN,
    transition: Annotated[
        int | None, typer.Option("--transition", min=1, help="Of this transition; the present one where left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How often the stores answered differently in the shadow, and why: counts by cause, and the newest.

    Texts and queries are not kept: an event has ids and similarities. `rollout check` says which causes count
    against the gate; `owner_mismatch` is a leak: page somebody.
    """
    with failures("diffs", as_json):
        from rollout import diffs as found
        from rollout.control import control

        with control() as made:
            report = found.newest(made, cause=cause, limit=limit, transition=transition)
        text = [
            f"{report.comparisons} comparisons under transition {report.transition}",
            *([table("causes", ["cause", "comparisons"], list(report.causes.items()))] if report.causes else []),
            *([_rows_table("newest", [_without_lists(row) for row in report.rows])] if report.rows else [NOTHING]),
        ]
        say(Answer("diffs", asdict(report), text), as_json)


def save_faiss(execute: Execute = False, as_json: Json = False) -> None:
    """Give FAISS what it is owed, then save the directory so that LangChain's load_local opens it.

    Before the old release is started again, run this last. It refuses while FAISS lacks anything.
    """
    with failures("save-faiss", as_json):
        from rollout import saved, steps
        from rollout.control import control
        from src.tools.rag_tools.migration.stages import Store

        with control() as made:
            directory = str(made.faiss.directory)
            if not execute:
                counts = made.faiss.counts()
                chunks = counts.owned + counts.unowned
                data = {"executed": False, "directory": directory, "chunks": chunks, **asdict(counts)}
                text = f"would save {chunks} chunks in {directory}; add --execute"
                say(Answer("save-faiss", data, [text]), as_json)
                return
            steps.settle_store(made, Store.FAISS)
            generation = saved.save(made)
        data = {"executed": True, "chunks": generation.chunks, "generation": generation.number, "directory": directory}
        text = f"saved {generation.chunks} chunks as generation {generation.number} in {directory}"
        say(Answer("save-faiss", data, [text]), as_json)


def _stores(name: str | None) -> list[Store] | None:
    from src.tools.rag_tools.migration.stages import Store

    if name is None:
        return None
    try:
        return [Store(name)]
    except ValueError as error:
        raise UsageError(f"--store {name}: there are {' and '.join(Store)}") from error


def _without_lists(row: dict[str, Any]) -> dict[str, Any]:
    """Both answers fill a screen; `rollout explain` has them, and --json."""
    return {name: value for name, value in row.items() if name not in ("served", "shadow")}


def _rows_table(title: str, rows: list[dict[str, Any]]) -> Any:
    return table(title, list(rows[0]), [list(row.values()) for row in rows])


def _verify_text(report: VerifyReport) -> list[Any]:
    text: list[Any] = [
        f"compared {report.chunks} chunks of {report.documents} documents and {report.users} users:"
        f" {report.differences} differences; {len(report.owed)} documents owed and so not judged"
    ]
    if report.found:
        columns = ["document", "what", "in", "user", "belongs to", "chunks"]
        rows = [
            [each.document_id, each.kind, each.store, each.user_id, each.belongs_to, each.chunks]
            for each in report.found[:SHOWN]
        ]
        text.append(table("differences", columns, rows))
        if len(report.found) > SHOWN:
            text.append(f"... and {len(report.found) - SHOWN} more; --json has all")
        text.append("next: `rollout verify --repair` says what would mend them")
    return text


def _repair_text(mended: RepairReport) -> list[Any]:
    documents = len({act.document_id for act in mended.acts})
    did = "owed again" if mended.executed else "would be owed again (add --execute)"
    text = [f"{documents} documents {did}; then `rollout settle --execute`, then `rollout verify`"] if documents else []
    text += [f"left as it is, document {document}: {why}" for document, why in sorted(mended.left.items())[:SHOWN]]
    if len(mended.left) > SHOWN:
        stderr.print(f"... and {len(mended.left) - SHOWN} more; --json has all")
    return list(text)
