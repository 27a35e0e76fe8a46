"""The six stages and what each routes where, as one table; no other module branches on a stage's name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Store(StrEnum):
    FAISS = "faiss"
    PGVECTOR = "pgvector"

    @property
    def other(self) -> Store:
        return Store.PGVECTOR if self is Store.FAISS else Store.FAISS


class Stage(StrEnum):
    OFF = "off"
    DUALWRITE = "dualwrite"
    SHADOW = "shadow"
    LIVE = "live"
    RAMPDOWN = "rampdown"
    COMPLETE = "complete"


@dataclass(frozen=True, slots=True)
class Routing:
    """`reads`: the stores that may serve; two only where a user's bucket decides. `shadow`: ask the other too."""

    reads: tuple[Store, ...]
    shadow: bool
    writes: tuple[Store, ...]


BOTH = (Store.FAISS, Store.PGVECTOR)
ROUTING: dict[Stage, Routing] = {
    Stage.OFF: Routing(reads=(Store.FAISS,), shadow=False, writes=(Store.FAISS,)),
    Stage.DUALWRITE: Routing(reads=(Store.FAISS,), shadow=False, writes=BOTH),
    Stage.SHADOW: Routing(reads=(Store.FAISS,), shadow=True, writes=BOTH),
    Stage.LIVE: Routing(reads=BOTH, shadow=True, writes=BOTH),
    Stage.RAMPDOWN: Routing(reads=(Store.PGVECTOR,), shadow=False, writes=BOTH),
    Stage.COMPLETE: Routing(reads=(Store.PGVECTOR,), shadow=False, writes=(Store.PGVECTOR,)),
}
ORDER = tuple(ROUTING)

# Where the guard goes back to, at 0 percent, when the evidence turns bad: users read FAISS there.
RETREAT: dict[Stage, Stage] = {
    Stage.SHADOW: Stage.DUALWRITE,
    Stage.LIVE: Stage.LIVE,
    Stage.RAMPDOWN: Stage.LIVE,
}


class UnknownStageError(Exception):
    """The database names a stage that this release does not know."""


def parse_stage(name: str) -> Stage:
    """The stage of that name; UnknownStageError for one from a later release."""
    try:
        return Stage(name)
    except ValueError as error:
        raise UnknownStageError(
            f"stage {name!r} is unknown to this release; it knows {', '.join(ORDER)}:"
            " start a release that knows it, or go back with the one that set it"
        ) from error
