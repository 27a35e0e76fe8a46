"""What is in quarantine, as groups: runs of chunks that nobody is served, and whose they may be.

A group is named by the docstore id of its first chunk. Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from psycopg.rows import class_row

from rollout.owner_report import Known
from rollout.owner_rules import Rows, RowState, Status
from rollout.owner_sources import known_to_postgres
from rollout.quarantine_files import Matcher, hashes_of
from src.tools.rag_tools.pgvector_store import Connection

# Within one assignment a run is known by its source and the position at which it began; outside a
# document an ordinal counts from there.
GROUPS = """
SELECT array_agg(docstore_id ORDER BY ordinal) AS members, source, min(position) AS position,
       min(reason) AS reason, status
FROM legacy_chunks WHERE status <> 'assigned'
GROUP BY decided_at, source, position - ordinal, status
ORDER BY decided_at, position - ordinal
"""
LATEST_OF_PATH = """
SELECT path, max(id) FROM documents WHERE path = ANY (%s) AND status <> 'deleted' GROUP BY path
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document that a group could belong to. `owns_chunks`: it has others already.

    `matched`: which share of the group's chunks is in the file that is on the disk now; None where
    that file is of a later upload, is gone, or cannot be read.
    """

    document_id: int
    user_id: int
    username: str | None
    path: str
    owns_chunks: bool
    matched: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """A run that nobody is served. `name` is what the other commands call it by."""

    name: str
    source: str
    position: int
    chunks: int
    reason: str
    status: Status
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """A group as the table has it; `members` are docstore ids in order."""

    members: list[str]
    source: str
    position: int
    reason: str
    status: str

    @property
    def name(self) -> str:
        return self.members[0]


def listing(
    connection: Connection,
    *,
    uploads: Path | None = None,
    contents: Iterable[tuple[str, str]] = (),
    discarded: bool = False,
) -> list[Group]:
    """The groups in quarantine, oldest first, each with the documents that it may belong to.

    With `uploads` (the folder) and `contents` (docstore id and text of the chunks in the FAISS
    directory) candidates are compared with their files. `discarded`: with the hidden ones.
    """
    with connection.transaction():
        known = known_to_postgres(connection)
        held = [one for one in held_groups(connection) if discarded or one.status == Status.QUARANTINED]
        paths = [row.path for row in known.rows]
        latest: dict[str, int] = dict(connection.execute(LATEST_OF_PATH, (paths,)).fetchall())
    wanted = frozenset(name for one in held for name in one.members)
    matcher = Matcher(uploads, hashes_of(contents, wanted))
    rows = Rows(known.rows)
    return [_group(one, rows, known, latest, matcher) for one in held]


def held_groups(connection: Connection) -> list[Held]:
    with connection.cursor(row_factory=class_row(Held)) as cursor:
        return cursor.execute(GROUPS).fetchall()


def _group(held: Held, rows: Rows, known: Known, latest: Mapping[str, int], matcher: Matcher) -> Group:
    alike = [row for row in rows.like(held.source) if row.state is RowState.LIVE]
    candidates = (
        Candidate(
            row.id,
            row.user_id,
            known.users[row.user_id].username if row.user_id in known.users else None,
            row.path,
            row.id in known.earlier.used,
            matcher.share(row, held.members) if latest.get(row.path) == row.id else None,
        )
        for row in alike
    )
    return Group(
        held.name, held.source, held.position, len(held.members),
        held.reason, Status(held.status), tuple(candidates),
    )  # fmt: skip
