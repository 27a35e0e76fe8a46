"""Ids, hashes and what is made fit for storage: the same in both stores, now and later."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import uuid
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.tools.rag_tools import store
from src.tools.rag_tools.store import Chunk, InvalidVectorError, check_vectors

any_text = st.text(st.characters(), max_size=60)  # surrogates and NUL included
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)


def unit(*head: float) -> store.Vector:
    vector = np.zeros(store.DIMENSION, dtype=np.float32)
    vector[: len(head)] = head
    return vector


def test_the_id_of_a_chunk_never_changes() -> None:
    assert store.chunk_id(7, 3, "Grüße") == uuid.UUID("6c55c259-757f-5966-85fa-987293a7bed9")


@given(
    st.tuples(st.integers(1), st.integers(0), st.text()),
    st.tuples(st.integers(1), st.integers(0), st.text()),
)
def test_chunks_have_one_id_only_if_they_are_the_same(one: tuple[int, int, str], other: tuple[int, int, str]) -> None:
    assert (store.chunk_id(*one) == store.chunk_id(*other)) == (one == other)


def test_neighbouring_numbers_are_not_confused() -> None:
    assert store.chunk_id(1, 23, "a") != store.chunk_id(12, 3, "a")


# migration
def test_a_legacy_id_that_is_a_uuid_is_kept() -> None:
    known = uuid.UUID("0b0e0ad4-54bd-4a3b-b3c8-6e0a54b1f5a5")
    assert store.legacy_chunk_id(str(known)) == known
    assert store.legacy_chunk_id(str(known).upper()) == known


@pytest.mark.parametrize("docstore_id", ["", "doc-1", "0", "0b0e0ad4-54bd-4a3b-b3c8", "é"])
def test_any_other_legacy_id_gets_a_uuid_of_its_own(docstore_id: str) -> None:
    made = store.legacy_chunk_id(docstore_id)
    assert made.version == 5
    assert made == store.legacy_chunk_id(docstore_id)
    assert made != store.legacy_chunk_id(docstore_id + " ")


# end of migration


def test_the_content_hash_is_sha256_of_utf8() -> None:
    chunk = Chunk(uuid.uuid4(), 1, 0, "Grüße, 東京", {}, unit(1))
    assert chunk.content_sha256 == hashlib.sha256("Grüße, 東京".encode()).digest()


def test_the_vector_hash_is_of_pgvectors_binary_form() -> None:
    values = [1 / (place + 1) for place in range(store.DIMENSION)]
    vector = np.array(values, dtype=np.float32)
    sent = struct.pack(f">HH{store.DIMENSION}f", store.DIMENSION, 0, *vector)
    assert store.vector_hash(vector) == hashlib.sha256(sent).digest()


def test_the_vector_hash_does_not_depend_on_how_the_array_lies_in_memory() -> None:
    matrix = np.arange(2 * store.DIMENSION, dtype=np.float32).reshape(store.DIMENSION, 2)
    strided, swapped = matrix[:, 1], matrix[:, 1].astype(">f4")
    assert not strided.flags.contiguous
    expected = store.vector_hash(strided.copy())
    assert store.vector_hash(strided) == store.vector_hash(swapped) == expected


def test_one_changed_bit_changes_the_vector_hash() -> None:
    vector, changed = unit(1), unit(1)
    changed[store.DIMENSION - 1] = np.float32(1e-45)
    assert store.vector_hash(vector) != store.vector_hash(changed)


@given(any_text)
def test_normalised_text_can_be_stored_and_stays_as_it_is(text: str) -> None:
    normalised = store.normalise_text(text)
    assert "\0" not in normalised
    assert normalised.encode().decode() == normalised
    assert store.normalise_text(normalised) == normalised


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60))
def test_text_that_can_be_stored_is_left_alone(text: str) -> None:
    assert store.normalise_text(text) == text


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("a\0b", "a b"),
        ("a\ud800b", "a\ufffdb"),
        ("a\udfff", "a\ufffd"),
        ("\ud83d", "\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\0\ud800", " \ufffd"),
    ],
)
def test_only_what_cannot_be_stored_is_replaced(text: str, normalised: str) -> None:
    assert store.normalise_text(text) == normalised


@given(st.dictionaries(any_text | st.integers() | st.none(), values, max_size=5))
def test_normalised_metadata_survives_json_and_stays_as_it_is(metadata: dict[str, Any]) -> None:
    normalised = store.normalise_metadata(metadata)
    written = json.dumps(normalised, allow_nan=False, ensure_ascii=False)
    assert json.loads(written.encode()) == normalised
    assert store.normalise_metadata(normalised) == normalised


class Colour(StrEnum):
    RED = "red"


def test_values_that_json_cannot_hold_become_null_or_text() -> None:
    when = datetime(2024, 2, 29, tzinfo=UTC)
    metadata: dict[Any, Any] = {
        "nan": math.nan,
        "infinity": -math.inf,
        "numpy": np.float64("nan"),
        "date": when,
        "path": Path("uploads/a.pdf"),
        "tuple": (1, "a\0"),
        "enum": Colour.RED,
        7: {None: b"\xff"},
    }
    assert store.normalise_metadata(metadata) == {
        "nan": None,
        "infinity": None,
        "numpy": None,
        "date": "2024-02-29 00:00:00+00:00",
        "path": "uploads/a.pdf",
        "tuple": [1, "a "],
        "enum": "red",
        "7": {"None": r"b'\xff'"},
    }


@given(values, values)
def test_canonical_json_does_not_depend_on_the_order_of_keys(one: Any, other: Any) -> None:
    forth = store.normalise_metadata({"one": one, "other": other})
    back = store.normalise_metadata({"other": other, "one": one})
    assert store.canonical_json(forth) == store.canonical_json(back)


def test_unit_vectors_pass_as_float32() -> None:
    for given_vectors in ([unit(1).tolist()], np.array([unit(0.6, 0.8)], dtype=np.float64)):
        checked = check_vectors(given_vectors, "test")
        assert checked.dtype == np.float32
        assert checked.shape == (1, store.DIMENSION)
        assert checked.flags.c_contiguous


def test_a_length_within_rounding_passes_and_beyond_does_not() -> None:
    assert len(check_vectors([unit(1.0009)], "test")) == 1
    with pytest.raises(InvalidVectorError, match=r"has length 1\.002"):
        check_vectors([unit(1.002)], "test")


def test_no_vectors_at_all_pass_if_their_dimension_is_right() -> None:
    assert check_vectors(np.empty((0, store.DIMENSION)), "test").shape == (0, store.DIMENSION)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 2.0, 1e300])
def test_a_bad_vector_is_refused_with_its_row(value: float) -> None:
    vectors = [unit(1).tolist(), [value, *[0.0] * (store.DIMENSION - 1)], unit(1).tolist()]
    with pytest.raises(InvalidVectorError, match=r"^import: vector 1 \(1 of 3\) has length"):
        check_vectors(vectors, "import")


@pytest.mark.parametrize("vectors", [[], [1.0], [[1.0]], [[1.0] * 1537], [[[1.0] * 1536]], None, 1.0])
def test_another_dimension_is_refused_with_the_model_to_use(vectors: Any) -> None:
    with pytest.raises(InvalidVectorError, match="1536 needed; use the model that made the index"):
        check_vectors(vectors, "import")


@pytest.mark.parametrize("vectors", [[[1.0], [1.0, 2.0]], [["x"] * 1536], "text"])
def test_what_are_no_vectors_is_refused_as_such(vectors: Any) -> None:
    with pytest.raises(InvalidVectorError, match=r"^import: no vectors of one dimension"):
        check_vectors(vectors, "import")
