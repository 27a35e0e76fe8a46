"""Whether a comparison's cause is a fault that was planted in its chunks."""

from __future__ import annotations

from uuid import UUID

import pytest

from rollout.rehearsal_faults import Faults, is_right
from src.tools.rag_tools.migration.causes import Cause

pytestmark = pytest.mark.migration

GONE, REWRITTEN, SOUND, OTHER = (UUID(int=number) for number in range(1, 5))
PLANTED = {GONE: Cause.MISSING_IN_PGVECTOR, REWRITTEN: Cause.CONTENT_DRIFT}


@pytest.mark.parametrize(
    ("cause", "chunks", "right"),
    [
        (Cause.MISSING_IN_PGVECTOR, [SOUND, GONE], True),
        (Cause.MISSING_IN_PGVECTOR, [GONE, REWRITTEN], True),
        (Cause.MISSING_IN_PGVECTOR, [REWRITTEN], False),
        (Cause.MISSING_IN_PGVECTOR, [SOUND], False),
        (Cause.CONTENT_DRIFT, [REWRITTEN, SOUND], True),
        (Cause.VECTOR_DRIFT, [REWRITTEN], False),
        (Cause.MATCH, [SOUND, OTHER], True),
        (Cause.TIE, [SOUND], True),
        (Cause.MATCH, [], True),
        (Cause.MATCH, [SOUND, GONE], False),
        (Cause.TIE, [REWRITTEN], False),
        (Cause.REORDER, [SOUND], False),
        (Cause.STALE, [GONE], True),
        (Cause.STALE, [SOUND], True),
    ],
)
def test_a_cause_is_right_by_what_was_planted(cause: Cause, chunks: list[UUID], right: bool) -> None:
    assert is_right(cause, chunks, PLANTED) is right


def test_what_no_comparison_has_met_is_unseen_and_nothing_seen_is_not_all_right() -> None:
    faults = Faults(PLANTED)
    assert (faults.unseen, faults.right_share) == (set(PLANTED.values()), 0.0)
    faults.causes.update([Cause.MISSING_IN_PGVECTOR, Cause.MATCH, Cause.MATCH, Cause.MATCH])
    faults.wrong.update([Cause.MATCH])
    assert (faults.unseen, faults.right_share) == ({Cause.CONTENT_DRIFT}, 0.75)
