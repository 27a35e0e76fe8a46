"""Who reads from where, asked through OpenFeature's SDK: our provider, the SDK's own, and ones that misbehave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from openfeature import api
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import GeneralError
from openfeature.flag_evaluation import FlagResolutionDetails, Reason
from openfeature.provider import AbstractProvider
from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider

from src.tools.rag_tools.migration.breaker import FAILURES
from src.tools.rag_tools.migration.flags import Begun, Flags, View
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.settings import MigrationSettings
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.migration.targeting import (
    BACKEND_FLAG,
    DOMAIN,
    SAMPLE_FLAG,
    TransitionProvider,
    bucket,
    sample_rate,
    serving_store,
)
from src.tools.rag_tools.pgvector_store import Pool
from src.tools.rag_tools.store import DIMENSION, StoreError
from tests.support.routers import HashEmbeddings

pytestmark = pytest.mark.migration

USERS = range(1, 100)
RAMP = (0.0, 1.0, 10.0, 50.0, 100.0)
QUESTION = np.eye(1, DIMENSION, dtype=np.float32)[0]


@pytest.fixture(autouse=True)
def our_provider() -> Iterator[None]:
    """Whatever a test sets, the next one finds ours."""
    api.set_provider_and_wait(TransitionProvider(), DOMAIN)
    yield
    api.set_provider_and_wait(TransitionProvider(), DOMAIN)
    api.clear_hooks()


def view(stage: Stage = Stage.LIVE, threshold: float = 50.0, rate: float = 1.0) -> View:
    return View(3, stage, round(threshold), threshold, rate)


def moved(threshold: float) -> set[int]:
    return {user for user in USERS if view(threshold=threshold).serving(user) is Store.PGVECTOR}


# -- our provider


def test_the_sdk_answers_from_our_provider_by_bucket_and_threshold() -> None:
    details = api.get_client(DOMAIN).get_string_details(
        BACKEND_FLAG, "faiss", EvaluationContext("7", {"read_threshold": bucket(7) + 1e-9})
    )
    assert (details.value, details.variant, details.reason) == ("pgvector", "pgvector", Reason.TARGETING_MATCH)
    assert api.get_provider_metadata(DOMAIN).name == "victus-transitions"


def test_a_user_stays_on_the_side_they_were_moved_to_while_the_ramp_widens() -> None:
    sides = [moved(threshold) for threshold in RAMP]
    assert sides[0] == set()
    assert sides[-1] == set(USERS)
    assert all(before <= after for before, after in pairwise(sides))
    assert moved(50.0) == moved(50.0)


def test_a_flag_that_is_not_ours_or_names_no_user_gets_the_caller_s_default() -> None:
    client = api.get_client(DOMAIN)
    context = EvaluationContext("7", {"read_threshold": 100.0, "sample_rate": 0.25})
    assert client.get_string_value("another-flag", "default", context) == "default"
    assert client.get_string_value(BACKEND_FLAG, "default", EvaluationContext(None, context.attributes)) == "default"
    assert client.get_float_value("another-flag", 0.75, context) == 0.75
    assert client.get_float_value(SAMPLE_FLAG, 0.75, context) == 0.25
    assert client.get_boolean_value(BACKEND_FLAG, True, context) is True
    assert client.get_integer_value(BACKEND_FLAG, 3, context) == 3
    assert client.get_object_value(BACKEND_FLAG, {"a": 1}, context) == {"a": 1}


# -- somebody else's provider


def in_memory(flags: dict[str, InMemoryFlag[Any]]) -> None:
    api.set_provider_and_wait(InMemoryProvider(flags), DOMAIN)


def answering(answer: Callable[[str], Any]) -> dict[str, InMemoryFlag[Any]]:
    """The backend flag of the SDK's own provider, which answers by the user's id."""

    def evaluate(_: InMemoryFlag[Any], context: EvaluationContext) -> FlagResolutionDetails[Any]:
        return FlagResolutionDetails(answer(context.targeting_key or ""), reason=Reason.TARGETING_MATCH)

    return {BACKEND_FLAG: InMemoryFlag("faiss", {"faiss": "faiss"}, context_evaluator=evaluate)}


def test_the_sdk_s_in_memory_provider_can_target_single_users() -> None:
    chosen = {"3", "50", "77"}
    in_memory(answering(lambda user: "pgvector" if user in chosen else "faiss"))
    assert moved(1.0) == moved(50.0) == {int(user) for user in chosen}


def test_a_provider_is_told_the_user_and_the_transition_in_force() -> None:
    told: list[tuple[str | None, dict[str, Any]]] = []

    class Recording(TransitionProvider):
        def resolve_string_details(
            self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
        ) -> FlagResolutionDetails[str]:
            assert evaluation_context is not None
            told.append((evaluation_context.targeting_key, dict(evaluation_context.attributes)))
            return super().resolve_string_details(flag_key, default_value, evaluation_context)

    api.set_provider_and_wait(Recording(), DOMAIN)
    view(threshold=50.0, rate=0.5).serving(7)
    assert told == [
        ("7", {"stage": "live", "transition": 3, "read_percent": 50, "read_threshold": 50.0, "sample_rate": 0.5})
    ]


def test_after_the_guard_or_a_person_went_back_to_0_percent_no_provider_moves_anybody() -> None:
    in_memory(answering(lambda _: "pgvector"))
    assert moved(0.0) == set()


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.LIVE])
def test_a_provider_that_wants_the_other_store_is_not_heard_outside_live(stage: Stage) -> None:
    ours = {user: view(stage).serving(user) for user in USERS}
    other = next(iter(ours.values())).other
    in_memory(answering(lambda _: other.value))
    assert {user: view(stage).serving(user) for user in USERS} == ours


def test_without_the_flag_the_answer_is_ours() -> None:
    ours = moved(50.0)
    in_memory({})
    assert moved(50.0) == ours


@pytest.mark.parametrize("nonsense", ["", "PGVECTOR", "postgres", "both", "complete", 1, None, True, ["pgvector"], {}])
def test_an_answer_that_is_no_store_means_ours(nonsense: Any) -> None:
    ours = moved(50.0)
    in_memory(answering(lambda _: nonsense))
    assert moved(50.0) == ours


@pytest.mark.parametrize("error", [GeneralError, RuntimeError, KeyError, OSError])
def test_a_provider_that_fails_means_ours(error: type[Exception]) -> None:
    def fail(_: str) -> str:
        raise error("flagd is away")

    ours = moved(50.0)
    in_memory(answering(fail))
    assert moved(50.0) == ours


def test_a_provider_that_is_not_ready_means_ours() -> None:
    ours, begun, release = moved(50.0), threading.Event(), threading.Event()

    class Slow(InMemoryProvider):
        def initialize(self, evaluation_context: EvaluationContext) -> None:
            begun.set()
            release.wait(30)

    api.set_provider(Slow(answering(lambda _: "pgvector")), DOMAIN)
    assert begun.wait(30)
    try:
        assert moved(50.0) == ours
    finally:
        release.set()


# -- the sample rate


def rate_of(answer: Any) -> float:
    in_memory({SAMPLE_FLAG: InMemoryFlag("on", {"on": answer})})
    return sample_rate(view(rate=0.5))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(0.0, 0.0), (0.01, 0.01), (1.0, 1.0), (7.0, 1.0), (-3.0, 0.0), (float("inf"), 1.0), (float("-inf"), 0.0)],
)
def test_the_sample_rate_is_kept_between_0_and_1(answer: float, expected: float) -> None:
    assert rate_of(answer) == expected


@pytest.mark.parametrize("answer", [float("nan"), "half", None, {}])
def test_a_sample_rate_that_is_no_number_means_ours(answer: Any) -> None:
    assert rate_of(answer) == 0.5


def test_a_provider_that_hangs_over_the_sample_rate_holds_up_no_request() -> None:
    asked, release = threading.Event(), threading.Event()

    class Hanging(TransitionProvider):
        def resolve_float_details(
            self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
        ) -> FlagResolutionDetails[float]:
            asked.set()
            assert release.wait(30)
            return super().resolve_float_details(flag_key, default_value, evaluation_context)

    flags = acting_on("shadow")
    api.set_provider_and_wait(Hanging(), DOMAIN)
    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(flags.adopt, Begun(0, 0.0), row(4, "live"))
        assert asked.wait(30)
        with flags.request() as during:
            flags.note_deleted(9)
        release.set()
        after = polling.result(30)
    assert (during.transition_id, after.transition_id, set(after.hidden)) == (3, 4, {9})


# -- one evaluation a request


class Counting(AbstractProvider):
    """Answers pgvector and faiss by turns, so that a request that asked twice would contradict itself."""

    def __init__(self) -> None:
        self.asked = 0

    def get_metadata(self) -> Any:
        return TransitionProvider().get_metadata()

    def resolve_string_details(
        self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[str]:
        self.asked += 1
        return FlagResolutionDetails("pgvector" if self.asked % 2 else "faiss")

    def resolve_float_details(
        self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[float]:
        return FlagResolutionDetails(default_value)

    resolve_boolean_details = resolve_float_details  # type: ignore[assignment]
    resolve_integer_details = resolve_float_details  # type: ignore[assignment]
    resolve_object_details = resolve_float_details  # type: ignore[assignment]


class OneStore:
    """Both stores of a router: FAISS answers nothing, pgvector what it is told to."""

    def __init__(self, pgvector: Callable[[], None]) -> None:
        self.pgvector = pgvector
        self.asked: list[tuple[Store, ...]] = []

    def search(self, names: tuple[Store, ...], *_: Any) -> list[Any]:
        self.asked.append(names)
        if Store.PGVECTOR in names:
            self.pgvector()
        return []


@pytest.fixture
def counting() -> Counting:
    provider = Counting()
    api.set_provider_and_wait(provider, DOMAIN)
    return provider


@pytest.mark.parametrize("stage", list(Stage))
def test_a_request_asks_once_in_live_and_never_elsewhere(stage: Stage, tmp_path: Path, counting: Counting) -> None:
    with routed(tmp_path, stage) as (router, _):
        router.search(7, QUESTION, 3)
    assert counting.asked == (1 if stage is Stage.LIVE else 0)


def test_a_request_that_falls_back_asks_once_and_knows_whom_it_asked(tmp_path: Path, counting: Counting) -> None:
    with routed(tmp_path, Stage.LIVE, pgvector=_fail) as (router, stores):
        router.search(7, QUESTION, 3)
    assert counting.asked == 1
    assert stores.asked == [(Store.PGVECTOR,), (Store.FAISS,)]


def test_a_request_while_pgvector_rests_asks_once(tmp_path: Path, counting: Counting) -> None:
    with routed(tmp_path, Stage.LIVE, pgvector=_fail) as (router, stores):
        for _ in range(FAILURES):
            router.breaker.failed()
        router.search(7, QUESTION, 3)
    assert counting.asked == 1
    assert stores.asked == [(Store.FAISS,)]


def test_the_plan_of_a_request_is_one_answer(counting: Counting) -> None:
    plan = view().plan(7)
    assert (plan.serving, plan.reads, plan.writes, plan.fallback) == (
        Store.PGVECTOR, (Store.PGVECTOR,), (Store.PGVECTOR, Store.FAISS), Store.FAISS,
    )  # fmt: skip
    assert counting.asked == 1
    assert serving_store(view(), 7) is Store.FAISS


# -- parts


@contextmanager
def routed(
    directory: Path, stage: Stage, *, pgvector: Callable[[], None] = lambda: None
) -> Iterator[tuple[Router, OneStore]]:
    """A router without a database, on flags that say `stage` at 50 percent."""
    settings = MigrationSettings(FAISS_INDEX_PATH=directory / "faiss_index")
    router = Router(cast("Pool", None), HashEmbeddings(), settings=settings)
    real, stores = router.stores, OneStore(pgvector)
    router.flags.adopt(Begun(0, router.clock()), row(3, stage.value))
    router.stores = cast("Any", stores)
    try:
        yield router, stores
    finally:
        real.faiss.close()


def acting_on(stage: str) -> Flags:
    flags = Flags(cast("Pool", None))
    flags.adopt(Begun(0, 0.0), row(3, stage))
    return flags


def row(number: int, stage: str) -> tuple[Any, ...]:
    return (number, stage, 50, 50.0, 1.0, [], [], 0)


def _fail() -> None:
    raise StoreError("PostgreSQL is away")
