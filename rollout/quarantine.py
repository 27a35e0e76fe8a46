"""`rollout quarantine`: what nobody is served, and on-call's decisions about it.

A group is one run of chunks, named by the docstore id of its first. All decisions of one command are
checked together and stored in one transaction with a new version of the assignment; a process that
dies leaves all of them or none. Nothing is decided without a person, and nothing is erased: a
discarded group is only hidden, and may still be assigned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from rollout.errors import RefusedError, UsageError
from rollout.owner_report import Known
from rollout.owner_rules import DocumentRow, RowState, Status
from rollout.owner_sources import known_to_postgres
from rollout.owners import exclusively, owe_pgvector, record_version
from rollout.quarantine_csv import Action, Choice, CsvError, from_csv, to_csv
from rollout.quarantine_groups import Candidate, Group, Held, held_groups, listing
from src.tools.rag_tools.pgvector_store import Connection

__all__ = [
    "Action",
    "Candidate",
    "Choice",
    "CsvError",
    "DecisionsRefusedError",
    "Group",
    "Outcome",
    "apply",
    "assign",
    "discard",
    "from_csv",
    "listing",
    "to_csv",
]

log = structlog.get_logger(__name__)

STATUS_OF_CHUNKS = "SELECT docstore_id, status FROM legacy_chunks WHERE docstore_id = ANY (%s)"
STATUS_OF_DOCUMENTS = "SELECT id, status FROM documents WHERE id = ANY (%s)"
ASSIGN = """
UPDATE legacy_chunks
SET status = 'assigned', reason = 'by_hand', document_id = %(document_id)s, user_id = %(user_id)s,
    ordinal = ordinal + (
        SELECT coalesce(max(ordinal) + 1, 0) FROM legacy_chunks
        WHERE document_id = %(document_id)s AND status = 'assigned'),
    decided_at = now()
WHERE docstore_id = ANY (%(chunks)s)
"""
# `decided_at` stays, for it is what keeps the chunks of a group together.
DISCARD = """
UPDATE legacy_chunks SET status = 'discarded', reason = %(reason)s
WHERE docstore_id = ANY (%(chunks)s)
"""


class DecisionsRefusedError(RefusedError):
    """Some of the decisions cannot be carried out; none was."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Chunks by what becomes of them, and the documents that pgvector then owes: `rollout backfill`
    brings them. `version` is None in a dry run, and where nothing was to do."""

    version: int | None
    assigned: int
    discarded: int
    documents: tuple[int, ...]


def assign(connection: Connection, group: str, document_id: int, *, actor: str) -> Outcome:
    """Give one group to one document, and with it to the document's owner."""
    choices = [Choice(group, Action.ASSIGN, document_id)]
    return apply(connection, choices, actor=actor, execute=True)


def discard(connection: Connection, group: str, *, actor: str, reason: str) -> Outcome:
    """Hide one group from the listing for good, or until it is assigned after all."""
    choices = [Choice(group, Action.DISCARD)]
    return apply(connection, choices, actor=actor, reason=reason, execute=True)


def apply(
    connection: Connection,
    choices: Sequence[Choice],
    *,
    actor: str,
    execute: bool,
    reason: str = "",
) -> Outcome:
    """Carry out all of the decisions, or none; without `execute` only check them.

    `reason`: why groups are discarded. Raises DecisionsRefusedError naming each that cannot be
    carried out, UsageError for a discard without a reason, PreconditionError as `exclusively`.
    """
    if not reason.strip() and any(choice.action is Action.DISCARD for choice in choices):
        raise UsageError("a group is discarded without a reason; add --reason")
    with exclusively(connection):
        known = known_to_postgres(connection, hold=True)
        held = {one.name: one for one in held_groups(connection)}
        _refuse(_problems(connection, choices, known, held))
        version = None
        if execute and choices:
            version = _store(connection, choices, known, held, actor, reason)
    outcome = _outcome(choices, held, version)
    if version is not None:
        log.info(
            "quarantine.apply.done", version=version, actor=actor,
            assigned=outcome.assigned, discarded=outcome.discarded,
        )  # fmt: skip
    return outcome


def _problems(connection: Connection, choices: Sequence[Choice], known: Known, held: Mapping[str, Held]) -> list[str]:
    """What stands against each decision, in their order."""
    live = {row.id: row for row in known.rows if row.state is RowState.LIVE}
    names = [choice.group for choice in choices]
    numbers = [choice.document_id for choice in choices if choice.document_id is not None]
    chunks: dict[str, str] = dict(connection.execute(STATUS_OF_CHUNKS, (names,)).fetchall())
    documents: dict[int, str] = dict(connection.execute(STATUS_OF_DOCUMENTS, (numbers,)).fetchall())
    found = []
    times = Counter(names)
    for choice in choices:
        problem = _group_problem(choice, held.get(choice.group), chunks.get(choice.group))
        if times[choice.group] > 1:
            problem = "is decided more than once"
        if problem is not None:
            found.append(f"{choice.where}group {choice.group!r} {problem}")
        elif (problem := _document_problem(choice, live, known, documents)) is not None:
            found.append(f"{choice.where}document {choice.document_id} {problem}")
    return found


def _group_problem(choice: Choice, held: Held | None, status: str | None) -> str | None:
    match status:
        case None:
            return "does not exist; `rollout quarantine list` names them"
        case Status.ASSIGNED:
            return "is assigned already; a decision is not changed"
        case _ if held is None:
            return "is a chunk inside a group; name the group by its first, as the list does"
        case Status.DISCARDED if choice.action is Action.DISCARD:
            return "is discarded already"
        case _:
            return None


def _document_problem(
    choice: Choice,
    live: Mapping[int, DocumentRow],
    known: Known,
    documents: Mapping[int, str],
) -> str | None:
    if choice.action is Action.DISCARD:
        return None
    row = live.get(choice.document_id or 0)
    if row is not None:
        gone = row.user_id not in known.users
        return f"belongs to user {row.user_id}, who does not exist" if gone else None
    match documents.get(choice.document_id or 0):
        case None:
            return "does not exist; the list names documents with that file name"
        case "ready":
            return "was uploaded to this release and is whole; name one that the old release took, or discard the group"
        case status:
            return f"is {status}; nothing is assigned to it"


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise DecisionsRefusedError("\n  ".join(["nothing was done, correct these first", *problems]))


def _store(
    connection: Connection,
    choices: Sequence[Choice],
    known: Known,
    held: Mapping[str, Held],
    actor: str,
    reason: str,
) -> int:
    owners = {row.id: row.user_id for row in known.rows}
    # In order of upload, by which the chunks of one document are numbered.
    order = {name: at for at, name in enumerate(held)}
    for choice in sorted(choices, key=lambda choice: order[choice.group]):
        values: dict[str, object] = {"chunks": held[choice.group].members}
        match choice.action:
            case Action.DISCARD:
                connection.execute(DISCARD, {**values, "reason": reason})
            case Action.ASSIGN:
                document_id = _named(choice)
                user_id = owners[document_id]
                connection.execute(ASSIGN, {**values, "document_id": document_id, "user_id": user_id})
    owe_pgvector(connection, {number: owners[number] for number in _documents(choices)})
    decided = [{"group": one.group, "action": one.action, "document_id": one.document_id} for one in choices]
    what = {"action": "quarantine", "reason": reason, "decided": decided}
    return record_version(connection, actor, what)


def _outcome(choices: Sequence[Choice], held: Mapping[str, Held], version: int | None) -> Outcome:
    chunks = {Action.ASSIGN: 0, Action.DISCARD: 0}
    for choice in choices:
        chunks[choice.action] += len(held[choice.group].members)
    return Outcome(version, chunks[Action.ASSIGN], chunks[Action.DISCARD], _documents(choices))


def _named(choice: Choice) -> int:
    if choice.document_id is None:
        raise AssertionError(f"group {choice.group!r} passed the checks without a document")
    return choice.document_id


def _documents(choices: Sequence[Choice]) -> tuple[int, ...]:
    return tuple(sorted({_named(choice) for choice in choices if choice.action is Action.ASSIGN}))
