"""How far two ranked answers to one query agree: pure functions on (chunk id, similarity) lists.

Two stores add the same products in another order, so equal chunks differ in the last bits, and
which of two tied chunks makes the cut at k is chance. What is decided here forgives exactly that.
"""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest

TIE_TOLERANCE = 1e-5
"""What rounding may make of one cosine: float32 sums of 1,536 products differ by up to 2e-6."""
PERSISTENCE = 0.9

Ranking = Sequence[tuple[uuid.UUID, float]]
"""An answer: best first, ids distinct, similarity the cosine."""

_NOTHING = object()


@dataclass(frozen=True, slots=True)
class Comparison:
    """The agreement of two answers at depth k; swapping them swaps `missing_*` and `only_*` alone.

    `overlap_at_k` is 1.0 exactly where both `missing` are empty. `rbo` forgives no ties.
    `only_in_*` are all ids that one answer shows alone, excused or not: whether they may be shown
    to this user at all is a question that no tie answers.
    """

    overlap_at_k: float
    rbo: float
    top1_match: bool
    largest_similarity_difference: float
    missing_in_first: tuple[uuid.UUID, ...]
    missing_in_second: tuple[uuid.UUID, ...]
    same_order: bool
    order_differs_only_by_ties: bool
    only_in_first: tuple[uuid.UUID, ...] = ()
    only_in_second: tuple[uuid.UUID, ...] = ()


def compare(
    first: Ranking,
    second: Ranking,
    k: int,
    *,
    tolerance: float = TIE_TOLERANCE,
    p: float = PERSISTENCE,
) -> Comparison:
    """Compare two answers of which only the first k entries count; `rbo` takes them whole.

    Raises ValueError for k below 1 or p outside (0, 1).
    """
    _check_depth(k)
    left, right = first[:k], second[:k]
    overlap = overlap_at_k(left, right, k, tolerance)
    same_order = _ids(left) == _ids(right)
    return Comparison(
        overlap_at_k=overlap,
        rbo=rank_biased_overlap(_ids(first), _ids(second), p),
        top1_match=overlap_at_k(left, right, 1, tolerance) == 1.0,
        largest_similarity_difference=_largest_difference(left, right),
        missing_in_first=missing(right, left, k, tolerance),
        missing_in_second=missing(left, right, k, tolerance),
        same_order=same_order,
        order_differs_only_by_ties=(not same_order and overlap == 1.0 and _only_ties_swapped(left, right, tolerance)),
        only_in_first=tuple(_ids(_only(left, right))),
        only_in_second=tuple(_ids(_only(right, left))),
    )


def overlap_at_k(first: Ranking, second: Ranking, k: int, tolerance: float = TIE_TOLERANCE) -> float:
    """The share, 0 to 1, of the first k places on which both answers agree.

    Chunks found by one answer only count as agreed, pair by pair, where each is tied with the
    k-th of the answer that lacks it. Answers shorter than k are all that a user has: the longer
    one is then the measure, and two empty ones agree.
    """
    _check_depth(k)
    left, right = first[:k], second[:k]
    places = max(len(left), len(right))
    if not places:
        return 1.0
    common = len(set(_ids(left)) & set(_ids(right)))
    interchangeable = min(len(_cut_in_a_tie(left, right, k, tolerance)), len(_cut_in_a_tie(right, left, k, tolerance)))
    return (common + interchangeable) / places


def missing(shown: Ranking, other: Ranking, k: int, tolerance: float = TIE_TOLERANCE) -> tuple[uuid.UUID, ...]:
    """Ids among the first k of `shown` that `other` ought to show and does not, in rank order.

    It ought to where it has a place left, or where its k-th is worse by more than `tolerance`.
    What only fell below its cut because of other chunks above it is therefore not named.
    """
    cut = _cut(other, k)
    return tuple(
        chunk_id for chunk_id, similarity in _only(shown[:k], other[:k]) if cut is None or similarity - cut > tolerance
    )


def rank_biased_overlap(first: Sequence[Hashable], second: Sequence[Hashable], p: float = PERSISTENCE) -> float:
    """Extrapolated rank-biased overlap of two rankings of distinct items, uneven ones included.

    Webber, Moffat & Zobel, "A similarity measure for indefinite rankings", ACM TOIS 28(4), 2010,
    equation 32. With s and l the lengths of the shorter and the longer ranking and X(d) the size
    of what their first d entries have in common:

        RBO_ext = (1-p)/p * ( sum[d=1..l] X(d)/d * p^d
                              + sum[d=s+1..l] X(s)*(d-s)/(s*d) * p^d )
                  + ( (X(l)-X(s))/l + X(s)/s ) * p^l

    Two empty rankings agree (1.0), an empty one and another do not (0.0).
    Raises ValueError for p outside (0, 1).
    """
    if not 0.0 < p < 1.0:
        raise ValueError(f"p is {p}; rank-biased overlap needs 0 < p < 1")
    short, long = sorted((len(first), len(second)))
    if not short:
        return 1.0 if not long else 0.0
    common = _common_by_depth(first, second)
    at_short, at_long = common[short - 1], common[-1]
    seen = sum(count / d * p**d for d, count in enumerate(common, 1))
    assumed = sum(at_short * (d - short) / (short * d) * p**d for d in range(short + 1, long + 1))
    tail = ((at_long - at_short) / long + at_short / short) * p**long
    return min(1.0, (1 - p) / p * (seen + assumed) + tail)  # rounding exceeds 1 by an ulp


def _common_by_depth(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[int]:
    seen_first: set[Hashable] = set()
    seen_second: set[Hashable] = set()
    common = []
    for left, right in zip_longest(first, second, fillvalue=_NOTHING):
        seen_first.add(left)
        seen_second.add(right)
        common.append(len((seen_first & seen_second) - {_NOTHING}))
    return common


def _only_ties_swapped(first: Ranking, second: Ranking, tolerance: float) -> bool:
    """Whether every two common chunks that change places are tied in both answers."""
    one, other = dict(first), dict(second)
    rank = {chunk_id: place for place, (chunk_id, _) in enumerate(second)}
    return all(
        abs(one[upper] - one[lower]) <= tolerance and abs(other[upper] - other[lower]) <= tolerance
        for upper, lower in combinations([item for item in one if item in other], 2)
        if rank[upper] > rank[lower]
    )


def _largest_difference(first: Ranking, second: Ranking) -> float:
    """Over the chunks that both show; 0.0 where they share none."""
    other = dict(second)
    return max((abs(value - other[item]) for item, value in first if item in other), default=0.0)


def _cut_in_a_tie(shown: Ranking, other: Ranking, k: int, tolerance: float) -> list[tuple[uuid.UUID, float]]:
    cut = _cut(other, k)
    if cut is None:
        return []
    return [entry for entry in _only(shown, other) if abs(entry[1] - cut) <= tolerance]


def _cut(ranking: Ranking, k: int) -> float | None:
    """The k-th similarity; None where nothing was cut off because there was no k-th."""
    return ranking[k - 1][1] if len(ranking) >= k else None


def _only(shown: Ranking, other: Ranking) -> list[tuple[uuid.UUID, float]]:
    known = set(_ids(other))
    return [entry for entry in shown if entry[0] not in known]


def _ids(ranking: Ranking) -> list[uuid.UUID]:
    return [chunk_id for chunk_id, _ in ranking]


def _check_depth(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; a comparison needs a depth of 1 or more")
