"""The options that several commands share, and what their text means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rollout.errors import UsageError

if TYPE_CHECKING:
    from rollout.transitions import Target
    from src.tools.rag_tools.migration.stages import Stage


def _stages() -> list[str]:
    from src.tools.rag_tools.migration.stages import Stage

    return [str(stage) for stage in Stage]


def _causes() -> list[str]:
    from src.tools.rag_tools.migration.causes import Cause

    return [str(cause) for cause in Cause]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Execute = Annotated[bool, typer.Option("--execute", help="Do it; without this, only say what would be done.")]
Reason = Annotated[str, typer.Option("--reason", help="Why, for the record.")]
To = Annotated[
    str | None, typer.Option("--to", help="Stage to go to; one step where left out.", autocompletion=_stages)
]
OnlyCause = Annotated[
    str | None,
    typer.Option("--cause", help="Only this cause; all but `match` where left out.", autocompletion=_causes),
]
Percent = Annotated[int | None, typer.Option("--percent", min=0, max=100, help="Percent of users, within `live`.")]
Acknowledge = Annotated[
    int | None,
    typer.Option("--acknowledge-quarantine", help="The number of quarantined chunks, as seen and accepted."),
]


def named_target(to: str | None, percent: int | None, current: Stage, one_step: Target | None) -> Target | None:
    """The step that --to and --percent name; None where neither was given.

    Where the percent is left out, it is that of `one_step` if that leads to the stage named.
    """
    from rollout.transitions import Target, default_percent
    from src.tools.rag_tools.migration.stages import UnknownStageError, parse_stage

    if to is None and percent is None:
        return None
    try:
        stage = current if to is None else parse_stage(to)
    except UnknownStageError as error:
        raise UsageError(str(error)) from error
    if percent is not None:
        return Target(stage, percent)
    if one_step is not None and one_step.stage is stage:
        return one_step
    return Target(stage, default_percent(stage))


def overrides(given: list[str]) -> dict[str, str]:
    """CRITERION=REASON pairs as a mapping. Raises UsageError for one without a reason, or named twice."""
    pairs: dict[str, str] = {}
    for each in given:
        name, _, why = each.partition("=")
        if not name.strip() or not why.strip():
            raise UsageError(f"--override {each}: write --override CRITERION='why it may be passed over'")
        if name in pairs:
            raise UsageError(f"--override {name} is given twice; give one reason")
        pairs[name] = why
    return pairs
