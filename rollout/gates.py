"""Gates as data: may the rollout go on? Each criterion has a value, a threshold and a verdict.

Missing evidence is inconclusive, never a pass. Only a gate whose every criterion passes lets a step through;
an override names the criterion and the reason and goes into the record with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from rollout.errors import InconclusiveError, PreconditionError, RefusedError, RolloutError, UsageError
from rollout.transitions import Target


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105 - a verdict
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    OVERRIDDEN = "overridden"


@dataclass(frozen=True, slots=True)
class Criterion:
    """One question of a gate, answered: `n` counts what `value` rests on."""

    name: str
    question: str
    value: str
    threshold: str
    verdict: Verdict
    todo: str = ""
    n: int | None = None
    precondition: bool = False
    """Whether a failure means that something is missing, which no evidence makes up for."""

    @property
    def holds(self) -> bool:
        return self.verdict in (Verdict.PASS, Verdict.OVERRIDDEN)


Check = Callable[[], Criterion]


@dataclass(frozen=True, slots=True)
class Gate:
    """The answered criteria of a step, or of what comes after the last one."""

    target: Target | str
    criteria: Sequence[Criterion] = field(default_factory=tuple)

    @property
    def verdict(self) -> Verdict:
        """Fail before inconclusive before pass."""
        verdicts = {criterion.verdict for criterion in self.criteria}
        for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE):
            if verdict in verdicts:
                return verdict
        return Verdict.PASS

    @property
    def error(self) -> type[RolloutError] | None:
        """What `require` raises; None where the gate passes."""
        match self.verdict:
            case Verdict.FAIL if any(each.precondition and each.verdict is Verdict.FAIL for each in self.criteria):
                return PreconditionError
            case Verdict.FAIL:
                return RefusedError
            case Verdict.INCONCLUSIVE:
                return InconclusiveError
            case Verdict.PASS | Verdict.OVERRIDDEN:
                return None

    @property
    def exit_code(self) -> int:
        return 0 if self.error is None else self.error.exit_code

    def as_dict(self) -> dict[str, Any]:
        return {
            "to": str(self.target),
            "verdict": self.verdict.value,
            "criteria": [asdict(criterion) for criterion in self.criteria],
        }


def evaluate(target: Target | str, checks: Mapping[str, Check], overrides: Mapping[str, str]) -> Gate:
    """Answer every check; one that errs is inconclusive.

    Raises UsageError for an override of no criterion, or without a reason.
    """
    unknown = set(overrides) - set(checks)
    if unknown:
        raise UsageError(
            f"no criterion of the gate to {target} is called {', '.join(sorted(unknown))};"
            f" there are {', '.join(checks) or 'none'}"
        )
    if blank := [name for name, why in overrides.items() if not why.strip()]:
        raise UsageError(f"the override of {blank[0]} has no reason; say why it may be passed over")
    return Gate(target, tuple(_answer(name, check, overrides) for name, check in checks.items()))


def require(gate: Gate) -> None:
    """RefusedError, PreconditionError or InconclusiveError, with the numbers, unless the gate passes."""
    if gate.error is None:
        return
    reasons = "; ".join(
        f"{each.name} is {each.value}, needed {each.threshold}" + (f" ({each.todo})" if each.todo else "")
        for each in gate.criteria
        if not each.holds
    )
    error = gate.error(f"the gate to {gate.target} is {gate.verdict}: {reasons}")
    error.data = {"gate": gate.as_dict()}
    raise error


def _answer(name: str, check: Check, overrides: Mapping[str, str]) -> Criterion:
    try:
        criterion = check()
    except Exception as error:  # noqa: BLE001 - the boundary: whatever fails here must not open a gate
        criterion = Criterion(
            name, "could this be answered?", f"error: {error}", "an answer", Verdict.INCONCLUSIVE,
            "mend what the error says and check again",
        )  # fmt: skip
    if criterion.holds or name not in overrides:
        return criterion
    return replace(criterion, verdict=Verdict.OVERRIDDEN, todo=f"overridden: {overrides[name]}")
