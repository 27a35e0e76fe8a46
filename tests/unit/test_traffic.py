"""What a rehearsal's traffic holds against an answer: it judges by the tables, never by the stores."""

from __future__ import annotations

import io
import json
import uuid
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rollout.stored_embeddings import StoredEmbeddings
from rollout.traffic import AFTER_DELETE_SECONDS, Traffic, Truth, question, stored
from src.tools.rag_tools.store import Chunk, Hit, StoreError
from tests.support.routers import HashEmbeddings

pytestmark = pytest.mark.migration


def chunk(document_id: int, text: str) -> Chunk:
    vector = np.array(HashEmbeddings().embed_query(text), dtype=np.float32)
    return Chunk(uuid.uuid5(uuid.NAMESPACE_OID, text), document_id, 0, text, {}, vector)


def hit(of: Chunk) -> Hit:
    return Hit(of.id, of.document_id, of.content, {}, 1.0)


MINE, OTHER, THEIRS = chunk(1, "The tide turns at four."), chunk(2, "Mine as well."), chunk(3, "Not mine at all.")


class Service:
    """Answers what it is told to, and knows whose a document is that the traffic has not heard of."""

    def __init__(self, *hits: Hit | Exception, owners: dict[int, int] | None = None) -> None:
        self.hits, self.owners = hits, owners or {}

    def query(self, _user: int, _text: str, _k: int) -> list[Any]:
        for each in self.hits:
            if isinstance(each, Exception):
                raise each
        return list(self.hits)

    def load(self, document_id: int) -> Any:
        return SimpleNamespace(user_id=self.owners[document_id])


def asked(service: Service, deleted: dict[int, float] | None = None, known: list[Chunk] | None = None) -> Any:
    """The line that one query of user 7 leaves."""
    truth = Truth({1: 7, 2: 7, 3: 8}, {7: [MINE] if known is None else known}, deleted=deleted or {})
    log = io.StringIO()
    Traffic(service, truth, log, 0, 0).ask()  # type: ignore[arg-type]
    return json.loads(log.getvalue())


def test_an_own_known_chunk_is_what_is_wanted() -> None:
    line = asked(Service(hit(MINE), hit(OTHER)))
    assert (line["known"], line["foreign"], line["deleted"]) == (True, [], [])


def test_an_empty_answer_lacks_the_known_chunk() -> None:
    assert asked(Service())["known"] is False


def test_a_user_without_chunks_is_asked_for_nothing_known() -> None:
    assert asked(Service(), known=[])["known"] is None


def test_the_same_text_in_another_of_the_users_documents_is_as_good() -> None:
    again = Hit(uuid.uuid4(), 2, MINE.content, {}, 1.0)
    assert asked(Service(again))["known"] is True


def test_a_chunk_of_another_user_is_foreign() -> None:
    assert asked(Service(hit(MINE), hit(THEIRS)))["foreign"] == [3]


def test_whose_a_new_document_is_comes_from_the_tables() -> None:
    new = chunk(9, "Uploaded by another process.")
    assert asked(Service(hit(new), owners={9: 7}))["foreign"] == []
    assert asked(Service(hit(new), owners={9: 8}))["foreign"] == [9]


def test_a_deleted_document_is_wrong_once_a_poll_has_passed() -> None:
    assert asked(Service(hit(OTHER)), deleted={2: float("-inf")})["deleted"] == [2]
    line = asked(Service(hit(OTHER)), deleted={2: float("inf")})
    assert line["deleted"] == []
    assert 1.0 < AFTER_DELETE_SECONDS < 5.0


def test_an_error_is_a_failed_answer() -> None:
    assert asked(Service(StoreError("away")))["failed"] == "StoreError: away"


def test_a_deleted_chunk_is_asked_for_no_more() -> None:
    assert asked(Service(), deleted={1: 0.0})["known"] is None


def test_a_question_is_not_the_chunk_itself() -> None:
    assert question(MINE) != MINE.content
    assert MINE.content.startswith(question(MINE))
    assert question(None)


# -- vectors without a model


def test_a_question_gets_nearly_the_vector_of_its_chunk_and_always_the_same() -> None:
    truth = Truth({1: 7, 2: 7}, {7: [MINE, OTHER]})
    vectors = stored(truth)
    first, second = (np.array(vectors.embed_query(question(MINE))) for _ in range(2))
    assert (first == second).all()
    assert 0.99 < float(first @ MINE.vector) < 1.0
    assert abs(float(first @ OTHER.vector)) < 0.3
    assert np.linalg.norm(first) == pytest.approx(1.0)


def test_a_text_never_seen_gets_a_stored_vector_slightly_turned() -> None:
    vectors = StoredEmbeddings({}, np.stack([MINE.vector, OTHER.vector]))
    for text in ("anything", "anything else", "a third"):
        made = np.array(vectors.embed_query(text))
        nearest = max(float(made @ MINE.vector), float(made @ OTHER.vector))
        assert 0.99 < nearest < 1.0
    one, two = vectors.embed_documents(["anything", "anything else"])
    assert one != two
