"""Comparing two answers: properties, a second way to compute each measure, published values."""

from __future__ import annotations

import math
import string
import uuid
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, permutations, zip_longest

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from src.tools.rag_tools.migration.comparison import (
    TIE_TOLERANCE,
    Comparison,
    compare,
    missing,
    overlap_at_k,
    rank_biased_overlap,
)

pytestmark = pytest.mark.migration

# A deadline is a wall-clock assertion: a busy machine would fail what is right.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

Answer = list[tuple[uuid.UUID, float]]

# Computed by William Webber's own program for "a".."z" against each ranking; published with
# github.com/mpetri/rbo (test_data/uneven_abc.json), six decimals.
PUBLISHED = [
    ("akdwcjomxrubqitenhspyl", 0.1, 0.948509),
    ("afcmleivjhs", 0.1, 0.951493),
    ("aptkn", 0.2, 0.892587),
    ("ma", 0.4, 0.200001),
    ("degczfbxkwnjutsirylmhpv", 0.4, 0.035780),
    ("f", 0.9, 0.053090),
    ("zclx", 0.9, 0.233312),
    ("bafnecwvlog", 0.9, 0.620766),
    ("zhatsimjpnkvcfxwqgoeryubd", 0.9, 0.364444),
    ("kxcnarvmwyp", 0.99, 0.529392),
]


def chunk(letter: str) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_OID, letter)


def answer(**similarities: float) -> Answer:
    return [(chunk(letter), value) for letter, value in similarities.items()]


def ids(letters: str) -> tuple[uuid.UUID, ...]:
    return tuple(chunk(letter) for letter in letters)


# Eighths are exact, so that ties are frequent and no rounding blurs what is tied.
similarities = st.integers(-8, 8).map(lambda eighths: eighths / 8)
depths = st.integers(1, 6)
orders = st.lists(st.sampled_from(string.ascii_letters), unique=True, max_size=30)
persistences = st.floats(0.05, 0.99)


@st.composite
def answers(draw: st.DrawFn, letters: str = "abcdefghij") -> Answer:
    drawn = draw(st.dictionaries(st.sampled_from(letters), similarities, max_size=8))
    ranked = sorted(drawn.items(), key=lambda item: -item[1])
    return [(chunk(letter), value) for letter, value in ranked]


@st.composite
def answers_of_one_truth(draw: st.DrawFn) -> tuple[Answer, Answer, int]:
    """The first k of the same chunks by two stores that break ties, and round, differently."""
    truth = draw(st.dictionaries(st.sampled_from("abcdefghij"), similarities, max_size=10))
    k = draw(depths)
    noise = st.floats(-TIE_TOLERANCE / 4, TIE_TOLERANCE / 4)

    def served() -> Answer:
        seen = {letter: value + draw(noise) for letter, value in truth.items()}
        ranked = sorted(seen.items(), key=lambda item: -item[1])
        return [(chunk(letter), value) for letter, value in ranked][:k]

    return served(), served(), k


def swapped(comparison: Comparison) -> tuple[object, ...]:
    return (
        comparison.overlap_at_k,
        comparison.top1_match,
        comparison.largest_similarity_difference,
        comparison.missing_in_second,
        comparison.missing_in_first,
        comparison.only_in_second,
        comparison.only_in_first,
        comparison.same_order,
        comparison.order_differs_only_by_ties,
    )


def unswapped(comparison: Comparison) -> tuple[object, ...]:
    return (
        comparison.overlap_at_k,
        comparison.top1_match,
        comparison.largest_similarity_difference,
        comparison.missing_in_first,
        comparison.missing_in_second,
        comparison.only_in_first,
        comparison.only_in_second,
        comparison.same_order,
        comparison.order_differs_only_by_ties,
    )


def best_agreement(first: Answer, second: Answer, k: int, tolerance: float) -> float:
    """Overlap by trying every way to exchange chunks of `second` for those it cut in a tie."""
    first, second = first[:k], second[:k]
    shown, other = dict(first), dict(second)
    places = max(len(first), len(second))

    def exchangeable(own: uuid.UUID, theirs: uuid.UUID) -> bool:
        return (
            len(first) == len(second) == k
            and abs(shown[own] - second[-1][1]) <= tolerance
            and abs(other[theirs] - first[-1][1]) <= tolerance
        )

    def agreed(replaced: Sequence[uuid.UUID]) -> int:
        return len(set(shown) & (set(other) - set(theirs) | set(replaced)))

    best = len(set(shown) & set(other))
    for size in range(1, places + 1):
        for theirs in combinations(set(other) - set(shown), size):
            for own in permutations(set(shown) - set(other), size):
                if all(exchangeable(a, b) for a, b in zip(own, theirs, strict=True)):
                    best = max(best, agreed(own))
    return best / places if places else 1.0


def expected_agreement(first: Sequence[str], second: Sequence[str], p: float) -> float:
    """Rank-biased overlap by its definition, (1-p) * sum p^(d-1) * A(d), until p^d is nothing.

    Beyond the end of the shorter ranking its unseen entries are assumed to agree as its seen ones
    did; beyond both ends the last agreement is assumed to go on.
    """
    short, long = sorted((first, second), key=len)
    rate = Fraction(len(set(short) & set(long[: len(short)])), len(short))

    def agreement(depth: int) -> Fraction:
        seen = len(set(short[:depth]) & set(long[:depth]))
        return (seen + rate * max(0, depth - len(short))) / depth

    known = [float(agreement(depth)) for depth in range(1, len(long) + 1)]
    unseen = math.ceil(math.log(1e-12) / math.log(p))
    weights = [p ** (depth - 1) for depth in range(1, len(long) + unseen)]
    return (1 - p) * math.fsum(weight * agreed for weight, agreed in zip_longest(weights, known, fillvalue=known[-1]))


# --- rank-biased overlap


@pytest.mark.parametrize(("ranking", "p", "published"), PUBLISHED)
def test_rbo_gives_the_published_values(ranking: str, p: float, published: float) -> None:
    assert rank_biased_overlap(string.ascii_lowercase, ranking, p) == pytest.approx(published, abs=1e-6)


@given(orders, orders, persistences)
def test_rbo_is_the_expected_agreement_of_a_reader_who_goes_on_with_probability_p(
    first: list[str], second: list[str], p: float
) -> None:
    assume(first and second)
    assert rank_biased_overlap(first, second, p) == pytest.approx(expected_agreement(first, second, p), abs=1e-9)


@given(orders, orders, persistences)
def test_rbo_lies_between_0_and_1_and_is_symmetric(first: list[str], second: list[str], p: float) -> None:
    value = rank_biased_overlap(first, second, p)
    assert 0.0 <= value <= 1.0
    assert value == rank_biased_overlap(second, first, p)


@given(orders, persistences)
def test_rbo_of_a_ranking_and_itself_is_1(ranking: list[str], p: float) -> None:
    assert rank_biased_overlap(ranking, ranking, p) == pytest.approx(1.0)


@given(orders, persistences)
def test_rbo_of_rankings_without_a_common_item_is_0(ranking: list[str], p: float) -> None:
    assume(ranking)
    others = [f"other {item}" for item in ranking]
    assert rank_biased_overlap(ranking, others, p) == 0.0
    assert rank_biased_overlap(ranking, [], p) == 0.0


@given(orders, persistences, st.data())
def test_rbo_falls_the_more_the_higher_the_foreign_item_stands(
    ranking: list[str], p: float, data: st.DataObject
) -> None:
    assume(len(ranking) > 1)
    lower = data.draw(st.integers(1, len(ranking) - 1))
    upper = data.draw(st.integers(0, lower - 1))

    def with_foreign_item_at(place: int) -> float:
        other: list[str] = [*ranking[:place], "foreign", *ranking[place + 1 :]]
        return rank_biased_overlap(ranking, other, p)

    slack = 1e-12
    assert with_foreign_item_at(upper) <= with_foreign_item_at(lower) + slack
    assert with_foreign_item_at(lower) <= 1.0


def test_two_empty_rankings_agree() -> None:
    assert rank_biased_overlap([], []) == 1.0


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_rbo_refuses_a_persistence_outside_0_and_1(p: float) -> None:
    with pytest.raises(ValueError, match="0 < p < 1"):
        rank_biased_overlap("ab", "ab", p)


# --- overlap


@given(answers(), answers(), depths, st.sampled_from([0.0, 0.125, 0.25]))
def test_overlap_is_what_trying_every_exchange_of_tied_chunks_gives(
    first: Answer, second: Answer, k: int, tolerance: float
) -> None:
    assert overlap_at_k(first, second, k, tolerance) == best_agreement(first, second, k, tolerance)


@given(answers(), answers(), depths)
def test_overlap_lies_between_0_and_1(first: Answer, second: Answer, k: int) -> None:
    assert 0.0 <= overlap_at_k(first, second, k) <= 1.0


@given(answers(), answers(), depths)
def test_swapping_the_answers_swaps_only_who_misses_what(first: Answer, second: Answer, k: int) -> None:
    one, other = compare(first, second, k), compare(second, first, k)
    assert unswapped(one) == swapped(other)
    assert one.rbo == other.rbo


@given(answers(), depths)
def test_an_answer_compared_with_itself_agrees_in_everything(given_answer: Answer, k: int) -> None:
    comparison = compare(given_answer, given_answer, k)
    assert comparison.rbo == pytest.approx(1.0)
    assert unswapped(comparison) == (1.0, True, 0.0, (), (), (), (), True, False)


@given(answers("abcde"), answers("fghij"), depths)
def test_answers_without_a_common_or_tied_chunk_do_not_overlap(first: Answer, second: Answer, k: int) -> None:
    assume(first or second)
    lower = [(chunk_id, value - 3.0) for chunk_id, value in second]
    comparison = compare(first, lower, k)
    assert comparison.overlap_at_k == 0.0
    assert comparison.rbo == 0.0
    assert not comparison.top1_match


@given(answers_of_one_truth())
def test_two_stores_that_hold_the_same_agree_however_they_break_ties(
    case: tuple[Answer, Answer, int],
) -> None:
    first, second, k = case
    comparison = compare(first, second, k)
    assert comparison.overlap_at_k == 1.0
    assert comparison.top1_match
    assert comparison.same_order or comparison.order_differs_only_by_ties
    assert comparison.largest_similarity_difference <= TIE_TOLERANCE


@given(answers(), answers(), depths, st.sampled_from([0.0, 0.125, 0.25]))
def test_overlap_is_full_exactly_where_no_chunk_is_missing(
    first: Answer, second: Answer, k: int, tolerance: float
) -> None:
    comparison = compare(first, second, k, tolerance=tolerance)
    nothing_missing = not comparison.missing_in_first and not comparison.missing_in_second
    assert (comparison.overlap_at_k == 1.0) == nothing_missing


@given(answers(), answers(), depths, similarities.map(abs), similarities.map(abs))
def test_more_tolerance_never_lowers_the_overlap(
    first: Answer, second: Answer, k: int, one: float, other: float
) -> None:
    assert overlap_at_k(first, second, k, min(one, other)) <= overlap_at_k(first, second, k, max(one, other))


@given(answers(), answers(), depths, st.data())
def test_losing_one_more_common_chunk_never_raises_the_overlap(
    first: Answer, second: Answer, k: int, data: st.DataObject
) -> None:
    common = [entry for entry in second[:k] if entry[0] in dict(first[:k])]
    assume(common)
    lost = data.draw(st.sampled_from(common))
    second = second[:k]
    poorer = [entry for entry in second if entry != lost]
    assert overlap_at_k(first, poorer, k, 0.0) <= overlap_at_k(first, second, k, 0.0)


def test_chunks_tied_at_the_last_place_are_interchangeable() -> None:
    first = answer(a=0.9, b=0.8, c=0.7)
    second = answer(a=0.9, b=0.8, d=0.7 + TIE_TOLERANCE / 2)
    comparison = compare(first, second, 3)
    assert comparison.overlap_at_k == 1.0
    assert comparison.missing_in_first == comparison.missing_in_second == ()
    assert comparison.order_differs_only_by_ties


def test_chunks_at_the_last_place_that_are_not_tied_are_not_interchangeable() -> None:
    comparison = compare(answer(a=0.9, b=0.8, c=0.7), answer(a=0.9, b=0.8, d=0.69), 3)
    assert comparison.overlap_at_k == pytest.approx(2 / 3)
    assert comparison.missing_in_second == ids("c")


def test_a_chunk_pushed_below_the_cut_by_another_is_not_called_missing() -> None:
    comparison = compare(answer(a=0.9, b=0.8, c=0.7), answer(a=0.9, c=0.7, d=0.6), 3)
    assert comparison.missing_in_second == ids("b")
    assert comparison.missing_in_first == ()


@given(answers(), answers(), depths)
def test_every_id_that_one_answer_shows_alone_is_named_be_it_tied_or_not(first: Answer, second: Answer, k: int) -> None:
    comparison = compare(first, second, k)
    shown, other = dict(first[:k]).keys(), dict(second[:k]).keys()
    assert set(comparison.only_in_first) == shown - other
    assert set(comparison.only_in_second) == other - shown
    assert set(comparison.missing_in_second) <= set(comparison.only_in_first)
    assert set(comparison.missing_in_first) <= set(comparison.only_in_second)


def test_a_lost_chunk_is_missing_also_where_the_store_has_no_other_to_show() -> None:
    comparison = compare(answer(a=0.9, b=0.8), answer(a=0.9), 3)
    assert comparison.overlap_at_k == 0.5
    assert comparison.missing_in_second == ids("b")
    assert missing(answer(a=0.9), answer(a=0.9, b=0.8), 3) == ()


def test_short_answers_that_hold_the_same_agree_wholly() -> None:
    assert overlap_at_k(answer(a=0.9), answer(a=0.9), 3) == 1.0
    assert overlap_at_k([], [], 3) == 1.0
    assert compare([], [], 3).top1_match


def test_an_empty_answer_and_another_do_not_agree() -> None:
    comparison = compare([], answer(a=0.9), 3)
    assert comparison.overlap_at_k == 0.0
    assert not comparison.top1_match
    assert comparison.missing_in_first == ids("a")


def test_only_the_first_k_count_for_the_overlap() -> None:
    assert overlap_at_k(answer(a=0.9, b=0.5), answer(a=0.9, c=0.4), 1) == 1.0


@pytest.mark.parametrize("k", [0, -1])
def test_a_depth_below_1_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="depth of 1"):
        compare([], [], k)


# --- first place, order, similarity


def test_the_first_place_matches_where_both_firsts_are_tied() -> None:
    first, second = answer(a=0.9, b=0.9, c=0.1), answer(b=0.9, a=0.9, c=0.1)
    comparison = compare(first, second, 3)
    assert comparison.top1_match
    assert not comparison.same_order
    assert comparison.order_differs_only_by_ties


def test_the_first_place_differs_where_another_chunk_is_nearer() -> None:
    comparison = compare(answer(a=0.9, b=0.8), answer(b=0.8, a=0.7), 2)
    assert comparison.overlap_at_k == 1.0
    assert not comparison.top1_match


def test_an_order_that_more_than_ties_explain_is_told_apart() -> None:
    comparison = compare(answer(a=0.9, b=0.8, c=0.7), answer(b=0.9, a=0.8, c=0.7), 3)
    assert comparison.overlap_at_k == 1.0
    assert not comparison.same_order
    assert not comparison.order_differs_only_by_ties


def test_the_largest_similarity_difference_is_taken_over_common_chunks_only() -> None:
    comparison = compare(answer(a=0.9, b=0.8, c=0.1), answer(a=0.88, b=0.5, d=0.4), 3)
    assert comparison.largest_similarity_difference == pytest.approx(0.3)
    assert compare(answer(a=0.9), answer(b=0.1), 1).largest_similarity_difference == 0.0
