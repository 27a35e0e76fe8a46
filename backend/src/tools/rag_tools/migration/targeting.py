"""Who reads from where inside the ramp, and how many reads are shadowed: asked through OpenFeature.

Our provider answers from the transition in force. A team with flagd, Unleash or LaunchDarkly sets its own provider for
the domain `victus`; whatever it answers, the router clamps it to what the stage allows, and an error means our answer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from openfeature import api
from openfeature.evaluation_context import EvaluationContext
from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType, Reason
from openfeature.provider import AbstractProvider, Metadata

from src.tools.rag_tools.migration.stages import Store

if TYPE_CHECKING:
    from src.tools.rag_tools.migration.flags import View

DOMAIN = "victus"
BACKEND_FLAG = "rag-read-backend"
SAMPLE_FLAG = "rag-shadow-sample-rate"


def bucket(user_id: int | str) -> float:
    """Where a user stands on the ramp, 0 <= b < 100, for good: BLAKE2 of the id, 64 bits."""
    digest = hashlib.blake2b(str(user_id).encode(), digest_size=8, person=b"victus-ramp").digest()
    return int.from_bytes(digest, "big") * 100.0 / 2**64


class TransitionProvider(AbstractProvider):
    """Answers from the context, into which the request's own view of the last transition was put."""

    def get_metadata(self) -> Metadata:
        return Metadata(name="victus-transitions")

    def resolve_string_details(
        self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[str]:
        if flag_key != BACKEND_FLAG or evaluation_context is None or evaluation_context.targeting_key is None:
            return FlagResolutionDetails(default_value, reason=Reason.DEFAULT)
        threshold = _number(evaluation_context, "read_threshold", 0.0)
        moved = bucket(evaluation_context.targeting_key) < threshold
        store = Store.PGVECTOR if moved else Store.FAISS
        return FlagResolutionDetails(store.value, variant=store.value, reason=Reason.TARGETING_MATCH)

    def resolve_float_details(
        self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[float]:
        if flag_key != SAMPLE_FLAG or evaluation_context is None:
            return FlagResolutionDetails(default_value, reason=Reason.DEFAULT)
        return FlagResolutionDetails(_number(evaluation_context, "sample_rate", default_value), reason=Reason.STATIC)

    def resolve_boolean_details(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        return FlagResolutionDetails(default_value, reason=Reason.DEFAULT)

    def resolve_integer_details(
        self, flag_key: str, default_value: int, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[int]:
        return FlagResolutionDetails(default_value, reason=Reason.DEFAULT)

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        return FlagResolutionDetails(default_value, reason=Reason.DEFAULT)


api.set_provider(TransitionProvider(), DOMAIN)
_client = api.get_client(DOMAIN)


def serving_store(view: View, user_id: int) -> Store:
    """The store that the flag names for this user; where it names none, ours by threshold.

    At 0 percent nobody is asked: whoever has taken the rollout back, the guard as well, is not overruled.
    """
    if view.read_threshold <= 0.0:
        return Store.FAISS
    ours = Store.PGVECTOR if bucket(user_id) < view.read_threshold else Store.FAISS
    answer = _client.get_string_value(BACKEND_FLAG, ours.value, _context(view, str(user_id)))
    return Store(answer) if answer in tuple(Store) else ours


def sample_rate(view: View) -> float:
    """The share of reads to shadow, between 0 and 1; asked once a poll, not once a request."""
    answer = _client.get_float_value(SAMPLE_FLAG, view.sample_rate, _context(view, None))
    return view.sample_rate if math.isnan(answer) else min(max(answer, 0.0), 1.0)


def _context(view: View, targeting_key: str | None) -> EvaluationContext:
    attributes: dict[str, Any] = {
        "stage": view.stage.value,
        "transition": view.transition_id,
        "read_percent": view.read_percent,
        "read_threshold": view.read_threshold,
        "sample_rate": view.sample_rate,
    }
    return EvaluationContext(targeting_key, attributes)


def _number(context: EvaluationContext, name: str, default: float) -> float:
    value = context.attributes.get(name)
    return float(value) if isinstance(value, int | float) else default
