"""What is spoiled in pgvector on purpose in a rehearsal, behind the router's back, and what must be said of it.

Of every user's chunks two in five stay sound. Later, while FAISS serves everybody, chunks of one user lie under
another, and a document is owed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from src.tools.rag_tools.migration.causes import Cause
from src.tools.rag_tools.pgvector_store import Connection

# Of every five chunks of a user: one gone, one with another text, one with the halves of its vector exchanged.
FIFTHS = """
SELECT user_id, id, row_number() OVER (PARTITION BY user_id ORDER BY id) % 5 AS fifth FROM document_chunks
"""
SPOIL = {
    Cause.MISSING_IN_PGVECTOR: "DELETE FROM document_chunks WHERE user_id = ANY (%s) AND id = ANY (%s)",
    Cause.CONTENT_DRIFT: """
UPDATE document_chunks SET content = content || ' Spoiled.' WHERE user_id = ANY (%s) AND id = ANY (%s)
""",
    Cause.VECTOR_DRIFT: """
UPDATE document_chunks SET embedding = subvector(embedding, 769, 768) || subvector(embedding, 1, 768)
WHERE user_id = ANY (%s) AND id = ANY (%s)
""",
}
# The two users with the most chunks, but for giants: their second copy forbids it.
LARGEST = """
SELECT user_id, min(document_id) FROM document_chunks c
WHERE NOT EXISTS (SELECT FROM giant_users g WHERE g.user_id = c.user_id)
GROUP BY user_id ORDER BY count(*) DESC, user_id LIMIT 2
"""
GIVE_AWAY = "UPDATE document_chunks SET user_id = %s WHERE user_id = %s AND id = ANY (%s)"
DROP = "DELETE FROM document_chunks WHERE user_id = %s AND document_id = %s RETURNING id"
OWE = """
UPDATE vector_ledger SET state = 'owed', next_attempt_at = 'infinity', changed_at = clock_timestamp()
WHERE document_id = %s AND store = 'pgvector'
"""
NOW = "SELECT clock_timestamp()"
# A comparison that was under way at the planting may have seen either side of it.
COMPARED = """
SELECT id, cause, event -> 'served', event -> 'shadow' FROM shadow_diffs
WHERE at > %s + interval '1 second' AND id > %s ORDER BY id
"""


@dataclass
class Faults:
    """The spoiled chunks by id, and what comparisons made of them."""

    planted: dict[UUID, Cause] = field(default_factory=dict)
    since: datetime | None = None
    """The last planting, by the database's clock."""
    looked: int = 0
    """The last comparison that was judged."""
    causes: Counter[Cause] = field(default_factory=Counter)
    wrong: Counter[Cause] = field(default_factory=Counter)
    examples: dict[Cause, int] = field(default_factory=dict)

    def spoil(self, connection: Connection) -> None:
        """What everybody's answers show. In one transaction: no query sees half of it."""
        with connection.transaction():
            rows = connection.execute(FIFTHS).fetchall()
            for fifth, (cause, statement) in enumerate(SPOIL.items(), 1):
                chosen = [(user_id, chunk) for user_id, chunk, each in rows if each == fifth]
                connection.execute(statement, ([user_id for user_id, _ in chosen], [chunk for _, chunk in chosen]))
                self.planted |= {chunk: cause for _, chunk in chosen}
        self._begin(connection)

    def mix_up(self, connection: Connection) -> None:
        """A leak and a debt, where there are two users; only for when nobody is served by pgvector."""
        self.judge(connection)
        with connection.transaction():
            found = connection.execute(LARGEST).fetchall()
            if len(found) == 2:
                (robbed, _), (other, document_id) = found
                theirs = [chunk for user_id, chunk, _ in connection.execute(FIFTHS) if user_id == robbed]
                taken = [chunk for chunk in theirs if chunk not in self.planted][::2]
                owed = [row[0] for row in connection.execute(DROP, (other, document_id))]
                connection.execute(OWE, (document_id,))
                connection.execute(GIVE_AWAY, (other, robbed, taken))
                self.planted |= dict.fromkeys(taken, Cause.OWNER_MISMATCH) | dict.fromkeys(owed, Cause.STALE)
        self._begin(connection)

    def judge(self, connection: Connection) -> None:
        """Take in the comparisons since the last planting that were not judged yet."""
        rows = connection.execute(COMPARED, (self.since, self.looked)).fetchall()
        for self.looked, name, served, shadow in rows:
            cause = Cause(name)
            self.causes[cause] += 1
            self.examples[cause] = self.looked
            if not is_right(cause, [UUID(chunk) for chunk, _ in served + shadow], self.planted):
                self.wrong[cause] += 1

    @property
    def unseen(self) -> set[Cause]:
        """What was planted, and is no comparison's cause."""
        return set(self.planted.values()) - set(self.causes)

    @property
    def right_share(self) -> float:
        return 1 - self.wrong.total() / self.causes.total() if self.causes else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "planted": dict(Counter(cause.value for cause in self.planted.values())),
            "comparisons": {cause.value: count for cause, count in self.causes.items()},
            "wrong": {cause.value: count for cause, count in self.wrong.items()},
            "right_share": round(self.right_share, 4),
        }

    def _begin(self, connection: Connection) -> None:
        (self.since,) = connection.execute(NOW).fetchone() or (None,)


def is_right(cause: Cause, chunks: Iterable[UUID], planted: Mapping[UUID, Cause]) -> bool:
    """Whether the cause is a fault of one of the two answers' chunks, or there is none and they agree.

    `stale` is right of whoever is owed something, which is seen in the ledger and not in the chunks.
    """
    faults = {planted[chunk] for chunk in chunks if chunk in planted}
    return cause is Cause.STALE or cause in (faults or (Cause.MATCH, Cause.TIE))
