"""The thresholds and soaks of the gates. `rehearsal` is for copies and is printed wherever it is in force."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rollout.errors import UsageError

HOUR = 3600.0
DAY = 24 * HOUR


@dataclass(frozen=True, slots=True)
class Profile:
    """Times in seconds, shares between 0 and 1."""

    name: str
    comparisons: int = 1_000
    cohort_comparisons: int = 400
    agreement: float = 0.99
    stale_share: float = 0.05
    dropped_share: float = 0.05
    p99_ratio: float = 1.25
    p99_ms: float = 100.0
    verify_age: float = DAY
    owed_age: float = 60.0
    ramp_soak: float = 2 * DAY
    long_soak: float = 7 * DAY
    fallback_share: float = 0.0001
    fallback_free: float = DAY
    ramp: tuple[int, ...] = (1, 10, 50, 100)
    dead_seconds: float = 60.0


PRODUCTION = Profile("production")
REHEARSAL = replace(
    PRODUCTION,
    name="rehearsal",
    comparisons=40,
    cohort_comparisons=30,
    agreement=0.9,
    stale_share=0.5,
    verify_age=HOUR,
    ramp_soak=1.0,
    long_soak=2.0,
    fallback_free=2.0,
)
PROFILES = {profile.name: profile for profile in (PRODUCTION, REHEARSAL)}


def profile_in_force() -> Profile:
    """The profile that ROLLOUT_PROFILE names; production where it is unset."""
    from rollout.settings import RolloutSettings  # `--help` should not load what reads settings

    name = RolloutSettings().ROLLOUT_PROFILE or PRODUCTION.name
    try:
        return PROFILES[name]
    except KeyError as error:
        raise UsageError(f"ROLLOUT_PROFILE={name!r} is unknown; set one of {', '.join(PROFILES)}") from error
