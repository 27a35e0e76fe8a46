"""What a gate makes of its criteria: only an answered and passing question lets anybody through."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rollout.errors import InconclusiveError, PreconditionError, RefusedError, UsageError
from rollout.gates import Check, Criterion, Gate, Verdict, evaluate, require
from rollout.options import overrides
from rollout.transitions import Target
from src.tools.rag_tools.migration.stages import Stage

pytestmark = pytest.mark.migration

TO = Target(Stage.SHADOW, 0)


def answered(name: str, verdict: Verdict, *, precondition: bool = False) -> Check:
    return lambda: Criterion(name, "?", f"value of {name}", "limit", verdict, f"mend {name}", 3, precondition)


def erring(error: BaseException) -> Check:
    def check() -> Criterion:
        raise error

    return check


def gate(**verdicts: Verdict) -> Gate:
    return evaluate(TO, {name: answered(name, verdict) for name, verdict in verdicts.items()}, {})


@pytest.mark.parametrize(
    ("others", "verdict", "exit_code"),
    [
        ([], Verdict.PASS, 0),
        ([Verdict.PASS], Verdict.PASS, 0),
        ([Verdict.INCONCLUSIVE], Verdict.INCONCLUSIVE, 4),
        ([Verdict.INCONCLUSIVE, Verdict.FAIL], Verdict.FAIL, 3),
        ([Verdict.FAIL, Verdict.PASS], Verdict.FAIL, 3),
    ],
)
def test_a_gate_is_as_good_as_its_worst_criterion(others: list[Verdict], verdict: Verdict, exit_code: int) -> None:
    made = gate(first=Verdict.PASS, **{f"n{number}": each for number, each in enumerate(others)})
    assert made.verdict is verdict
    assert made.exit_code == exit_code


def test_a_gate_that_passes_lets_through() -> None:
    require(gate(one=Verdict.PASS, two=Verdict.PASS))


@pytest.mark.parametrize(("verdict", "kind"), [(Verdict.FAIL, RefusedError), (Verdict.INCONCLUSIVE, InconclusiveError)])
def test_a_refusal_names_each_lacking_criterion_with_its_value_and_what_to_do(
    verdict: Verdict, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as refused:
        require(gate(good=Verdict.PASS, bad=verdict, thin=Verdict.INCONCLUSIVE))
    message = str(refused.value)
    assert "bad is value of bad, needed limit (mend bad)" in message
    assert "thin is value of thin" in message
    assert "good" not in message
    assert refused.value.data["gate"]["verdict"] == verdict  # type: ignore[attr-defined]


def test_a_missing_precondition_is_told_apart_from_a_refusal() -> None:
    checks = {
        "server": answered("server", Verdict.FAIL, precondition=True),
        "quarantine": answered("quarantine", Verdict.FAIL),
    }
    made = evaluate(TO, checks, {})
    assert made.exit_code == 5
    with pytest.raises(PreconditionError):
        require(made)


def test_a_precondition_that_only_could_not_be_answered_is_inconclusive() -> None:
    made = evaluate(TO, {"server": answered("server", Verdict.INCONCLUSIVE, precondition=True)}, {})
    assert made.exit_code == 4


@pytest.mark.parametrize("error", [ValueError("broken"), PreconditionError("away"), KeyError("x"), AssertionError()])
def test_a_check_that_errs_is_inconclusive_and_the_others_are_still_asked(error: Exception) -> None:
    made = evaluate(TO, {"broken": erring(error), "fine": answered("fine", Verdict.PASS)}, {})
    assert [each.verdict for each in made.criteria] == [Verdict.INCONCLUSIVE, Verdict.PASS]
    assert str(error) in made.criteria[0].value
    assert made.exit_code == 4


def test_interrupting_a_check_is_no_answer() -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(TO, {"slow": erring(KeyboardInterrupt())}, {})


@pytest.mark.parametrize("check", [answered("bad", Verdict.FAIL), answered("bad", Verdict.INCONCLUSIVE)])
def test_an_override_names_criterion_and_reason_and_is_recorded(check: Check) -> None:
    made = evaluate(TO, {"bad": check}, {"bad": "known since Monday"})
    require(made)
    (criterion,) = made.as_dict()["criteria"]
    assert criterion["verdict"] == "overridden"
    assert "known since Monday" in criterion["todo"]
    assert criterion["value"] == "value of bad"


def test_an_override_also_passes_over_a_check_that_errs_and_the_record_keeps_the_error() -> None:
    made = evaluate(TO, {"bad": erring(OSError("no such disk"))}, {"bad": "the disk was sold"})
    require(made)
    assert "no such disk" in made.criteria[0].value


def test_an_override_of_what_passes_changes_nothing() -> None:
    made = evaluate(TO, {"good": answered("good", Verdict.PASS)}, {"good": "to be sure"})
    assert made.criteria[0].verdict is Verdict.PASS


def test_one_override_does_not_lift_another_criterion() -> None:
    made = evaluate(TO, {"a": answered("a", Verdict.FAIL), "b": answered("b", Verdict.FAIL)}, {"a": "reason"})
    with pytest.raises(RefusedError, match="b is value of b"):
        require(made)


@pytest.mark.parametrize(
    ("given", "said"), [({"unknown": "reason"}, "unknown"), ({"bad": ""}, "bad"), ({"bad": "  "}, "bad")]
)
def test_an_override_of_nothing_or_for_no_reason_is_a_mistake_and_nothing_is_asked(
    given: dict[str, str], said: str
) -> None:
    def asked() -> Criterion:
        raise SystemExit("was asked")

    with pytest.raises(UsageError, match=said):
        evaluate(TO, {"bad": asked}, given)


@pytest.mark.parametrize("given", [["model"], ["model="], ["model=  "], ["=reason"], ["a=1", "a=2"]])
def test_an_override_on_the_command_line_needs_a_name_and_one_reason(given: list[str]) -> None:
    with pytest.raises(UsageError):
        overrides(given)


def test_a_reason_may_hold_an_equals_sign() -> None:
    assert overrides(["model=cosine = 0.98, a rounding"]) == {"model": "cosine = 0.98, a rounding"}


def test_a_gate_is_plain_data_for_the_record() -> None:
    kept = gate(bad=Verdict.FAIL).as_dict()
    assert kept["to"] == "shadow"
    assert kept["criteria"][0] | {"question": ""} == {
        "name": "bad", "question": "", "value": "value of bad", "threshold": "limit", "verdict": "fail",
        "todo": "mend bad", "n": 3, "precondition": False,
    }  # fmt: skip


def test_checks_are_asked_once_each_and_in_order() -> None:
    seen: list[str] = []

    def noting(name: str) -> Callable[[], Criterion]:
        def check() -> Criterion:
            seen.append(name)
            return Criterion(name, "?", "", "", Verdict.PASS)

        return check

    evaluate(TO, {name: noting(name) for name in "cab"}, {})
    assert seen == ["c", "a", "b"]
