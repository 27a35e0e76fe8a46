"""What on-call reads before a step back: whether FAISS holds everything, what is lost, how long it takes, what reopens.

Reads the ledger and the directory; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from rollout.control import Control
from rollout.transitions import Instance, Target, fleet, laggards, owed_entries, set_aside
from src.tools.rag_tools.migration.faiss_files import old_release_wrote
from src.tools.rag_tools.migration.faiss_generations import current_generation
from src.tools.rag_tools.migration.flags import View
from src.tools.rag_tools.migration.settings import migration_settings
from src.tools.rag_tools.migration.stages import ROUTING, Store

SILENT_SECONDS = 10.0
"""A busy process misses a poll or two."""
UNFINISHED = "SELECT count(*) FROM documents WHERE status IN ('received', 'indexing')"
NOBODYS = "SELECT count(*) FROM legacy_chunks WHERE status <> 'assigned'"


def way_back(control: Control, view: View, target: Target) -> Iterator[str]:
    """Sentences about the step from `view` back to `target`, and about the old release."""
    before, after = ROUTING[view.stage], ROUTING[target.stage]
    yield f"reads then come from {' or '.join(after.reads)}, writes go to {' and '.join(after.writes)}"
    with control.connection() as connection:
        owed, aside = owed_entries(connection, Store.FAISS), set_aside(connection, Store.FAISS)
        unfinished = _number(connection.execute(UNFINISHED).fetchone())
        nobodys = _number(connection.execute(NOBODYS).fetchone())
        running = [each for each in fleet(connection) if each.silent < control.profile.dead_seconds]
    yield from _owed(owed, aside, joining=Store.FAISS not in before.writes)
    yield _lost(aside, unfinished)
    yield _arrival(running, laggards(running, view.transition_id, control.profile), control.profile.dead_seconds)
    yield _saved(control, nobodys)


def _owed(owed: int, aside: list[int], *, joining: bool) -> Iterator[str]:
    if not owed:
        yield "FAISS is owed nothing: it holds everything that was written and not deleted"
        return
    settled = "`rollout rollback --execute` settles them first" if joining else "the backend settles them meanwhile"
    yield f"FAISS is owed {owed} entries; {settled}, and `rollout settle --execute --store faiss` does so now"
    if aside:
        named = ", ".join(map(str, aside[:5])) + (", ..." if len(aside) > 5 else "")
        yield (
            f"{len(aside)} of them were set aside (document {named}): mend what `rollout status` shows, then"
            " `rollout settle --execute --retry-aside --store faiss`"
        )


def _lost(aside: list[int], unfinished: int) -> str:
    waiting = f"; {unfinished} uploads are being indexed, and go on" if unfinished else ""
    if aside:
        return f"lost until they are mended: {len(aside)} entries that FAISS does not have{waiting}"
    return f"nothing is lost by the step{waiting}; the evidence of the present step does not count again"


def _arrival(running: list[Instance], late: list[Instance], dead_seconds: float) -> str:
    """A process takes a step over at its second poll at the latest, unless a request holds it up."""
    if late:
        return f"no step is taken before these act on the present one: {', '.join(map(str, late))}"
    if not running:
        return "no backend process runs: the step is in force at once"
    seconds = 2 * migration_settings.POLL_SECONDS
    told = (
        f"every backend process ({len(running)}) acts on it within about {seconds:.0f} seconds,"
        " or once the requests that it is answering are over"
    )
    silent = max(running, key=lambda each: each.silent)
    if silent.silent < SILENT_SECONDS:
        return told
    return f"{told}; {silent} is waited for until it is heard, {dead_seconds - silent.silent:.0f} seconds at most"


def _saved(control: Control, nobodys: int) -> str:
    directory = control.faiss.directory
    generation = current_generation(directory)
    position = control.faiss.tail()
    behind = position - (generation.journal_position if generation is not None else 0)
    if old_release_wrote(directory):
        state = "the old release has written to the directory"
    elif behind:
        state = f"the files in {directory} lack the last {behind} journal entries"
    else:
        state = f"the files in {directory} hold everything"
    return (
        f"the old release: {state}; run `rollout save-faiss --execute` before it is started. It would reopen"
        f" the leak: it searches every user's chunks for everybody, also the {nobodys} that are served to nobody"
    )


def _number(row: tuple[int] | tuple[object, ...] | None) -> int:
    return 0 if row is None else int(str(row[0]))
