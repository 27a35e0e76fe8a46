"""What must hold after every step, and what must hold once everything that is owed is settled.

RYW      a document that is ready and wanted is in its owner's answers, from any store that may be asked: at once in
         the process that acknowledged it, in the others once they have polled
FLEET    before anything has failed, an acknowledged upload is in the answers of every live process at once
DEL      a deletion that was acknowledged is in no answer of a process that has polled since
DELOWN   ... and at once in none of the process that acknowledged it
SCOPE    nobody is answered with another user's document
LEDGER   `done` is true: the store holds the whole document, or nothing of it
TOMB     what is not wanted is deleted or failed, and stays so; what was acknowledged never fails
PAYLOAD  a store that is done can give the document to the other
HALF     a store holds all chunks of a document or none
SAFE     no live process writes one store alone while another may read the other
ERRORS   a request ends well or with an error that its caller knows
FALSEERR an upload that nothing disturbs is acknowledged; by a process that the fleet left behind it may be refused
At rest:
I2       an acknowledged upload is ready and in every store that the stage writes, owed or done in the other
I3       every other upload is wholly there or wholly absent
I7       an acknowledged deletion is done in every store that the stage writes, owed or done in the other
STATUS   no upload is left half way; nothing stays owed to a store that the stage writes
SAME     both stores hold the same bytes
SAVE     the saved files hold every ready document
LEFT     no file of a document that is gone is left beside the uploads
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from src.tools.rag_tools.chunking import DocumentUnreadableError
from src.tools.rag_tools.documents import DocumentNotFoundError
from src.tools.rag_tools.embeddings import EmbeddingError
from src.tools.rag_tools.migration.router import StaleProcessError
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from src.tools.rag_tools.store import StoreError

if TYPE_CHECKING:
    from tests.integration.state_machine.actors import Actor
    from tests.integration.state_machine.truth import Truth
    from tests.integration.state_machine.world import Document, Process, World

KNOWN_ERRORS = (StoreError, EmbeddingError, DocumentUnreadableError, DocumentNotFoundError)
CHUNKS = 2
"""So many has every document."""

Violation = tuple[str, str]


class PropertyViolatedError(AssertionError):
    """`violated: NAME` and what shows it."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"violated: {name}: {what}")


@dataclass(frozen=True)
class Answers:
    """Documents of a process' answers: wholly in the regular one, in every possible one, at all in any; strangers'."""

    regular: frozenset[int]
    every: frozenset[int]
    some: frozenset[int]
    foreign: frozenset[int]


def in_every_state(world: World, now: Truth, answers: dict[str, Answers]) -> Iterator[Violation]:
    yield from world.noticed
    for process in world.processes:
        if process.name in answers:
            yield from _answers(world, now, process, answers[process.name])
    for document in world.documents:
        if document.id in now.documents:
            yield from _document(now, document, document.id)
        else:
            yield from _never_intended(document)
    yield from _safe(world, now)
    for process in world.processes:
        if process.router is not None and process.up.flags.halted:
            yield "ERRORS", f"{process.name} stopped writing: {process.up.flags.halted}"


def at_rest(world: World, now: Truth) -> Iterator[Violation]:
    for document in world.documents:
        if document.id in now.documents:
            yield from _settled(now, document, document.id)
    held = world.bytes_held()
    for number in held[Store.FAISS].keys() & held[Store.PGVECTOR].keys():
        if held[Store.FAISS][number] != held[Store.PGVECTOR][number]:
            yield "SAME", f"the stores hold document {number} with other vectors"
    yield from _left(world, now)


def saved(now: Truth, chunks: dict[int, int]) -> Iterator[Violation]:
    """`chunks`: how many of each document the saved files hold."""
    for number in now.ready():
        if chunks.get(number, 0) != CHUNKS:
            yield "SAVE", f"the saved files hold {chunks.get(number, 0)} chunks of document {number}"


def of_error(world: World, actor: Actor, document: Document | None) -> Iterator[Violation]:
    """`document`: where the request was its upload."""
    error = actor.error
    if error is None:
        return
    if not isinstance(error, KNOWN_ERRORS):
        yield "ERRORS", f"{actor}: {error!r}"
    undisturbed = not world.hurt and not (isinstance(error, StaleProcessError) and actor.process.given_up)
    if document is not None and undisturbed and not document.deleting:
        yield "FALSEERR", f"{actor}: {error!r}"


def _answers(world: World, now: Truth, process: Process, got: Answers) -> Iterator[Violation]:
    ready = now.ready()
    for number in (process.found & ready) - got.every:
        yield "RYW", f"{process.name} misses document {number} in an answer"
    if not world.hurt and process.counts:
        returned = {each.id for each in world.documents if each.returned}
        for number in (returned & ready) - got.regular:
            yield "FLEET", f"{process.name} misses document {number}, which was acknowledged"
    for number in process.lost & got.some:
        yield "DEL", f"{process.name} answers with document {number}, deleted before its last poll"
    for number in process.lost_here & got.some:
        yield "DELOWN", f"{process.name} answers with document {number}, which it has deleted"
    for number in got.foreign:
        yield "SCOPE", f"{process.name} answers a user with document {number} of another"


def _document(now: Truth, document: Document, number: int) -> Iterator[Violation]:
    wanted, status = now.wanted(number), now.status(number)
    for store in Store:
        chunks = now.chunks(number, store)
        if chunks not in (0, CHUNKS):
            yield "HALF", f"{store} holds {chunks} chunks of document {number}"
        if wanted is not None and now.state(number, store) == "done" and bool(chunks) != (wanted == "present"):
            yield "LEDGER", f"{store} is done with document {number}, wanted {wanted}, and holds {chunks} chunks"
    if wanted == "absent" and status not in ("failed", "deleted"):
        yield "TOMB", f"document {number} is not wanted and {status}"
    if status == "failed" and (document.durable or document.returned):
        yield "TOMB", f"document {number} was acknowledged and failed"
    if document.gone and wanted != "absent":
        yield "TOMB", f"document {number} was not wanted and is wanted again"
    if document.deleted and status != "deleted":
        yield "TOMB", f"document {number} was deleted and is {status}"


def _safe(world: World, now: Truth) -> Iterator[Violation]:
    live = [process for process in world.processes if process.router is not None and process.counts]
    reads = {store: process.name for process in live for store in ROUTING[process.up.flags.view().stage].reads}
    for process in live:
        for stage in _acts_on(process, now):
            writes = ROUTING[stage].writes
            if len(writes) == 1 and writes[0].other in reads:
                other = writes[0].other
                yield "SAFE", f"{process.name} writes {writes[0]} alone while {reads[other]} may read {other}"


def _acts_on(process: Process, now: Truth) -> set[Stage]:
    """Those of its requests that are two transitions behind can acknowledge nothing any more."""
    flags = process.up.flags
    begun = {number for number in flags._in_flight if now.transition - number <= 1}
    return {now.stages[number] for number in {*begun, flags.view().transition_id}}


def _left(world: World, now: Truth) -> Iterator[Violation]:
    """The file of an upload that failed is its caller's, who may send it again."""
    files = world.files()
    for document in world.documents:
        if document.id not in now.documents:
            continue
        status = now.status(document.id)
        kept = {name for name in files if name.startswith(document.name) and name != document.name}
        if status in ("deleted", "failed") and kept:
            yield "LEFT", f"{kept} of document {document.id}, which is {status}"
        if status == "deleted" and document.name in files:
            yield "LEFT", f"the upload of document {document.id}, which is deleted"


def _never_intended(document: Document) -> Iterator[Violation]:
    if document.durable or document.returned:
        yield "I2", f"{document.name} was acknowledged, and no row knows it"


def _settled(now: Truth, document: Document, number: int) -> Iterator[Violation]:
    wanted, status = now.wanted(number), now.status(number)
    writes = ROUTING[now.stage].writes
    owed = [store for store in writes if wanted is None or now.state(number, store) != "done"]
    there = wanted == "present" and all(now.chunks(number, store) == CHUNKS for store in writes)
    gone = wanted in ("absent", None) and not any(now.chunks(number, store) for store in writes)
    acknowledged = document.durable or document.returned
    if acknowledged and status != "deleted" and (not there or owed or status != "ready"):
        yield "I2", f"document {number} was acknowledged; it is {status}, wanted {wanted}, owed to {owed}"
    if not there and not gone:
        yield "I3", f"document {number} is neither whole nor absent"
    if document.deleted and not gone:
        yield "I7", f"document {number} was deleted and is not gone"
    if status in ("received", "indexing"):
        yield "STATUS", f"document {number} is left {status}"
    if owed:
        yield "STATUS", f"document {number} is still owed to {owed}"
