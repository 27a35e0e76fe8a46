"""The seeded bugs still fit the code that they break; `make seeds` shows that the machine finds each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.state_machine import properties, seeds

pytestmark = pytest.mark.migration

NEVER_MISSING = {
    "intent-not-committed",
    "serving-store-after-answer",
    "settle-ignores-tombstone",
    "ready-without-compare-and-set",
    "journal-not-synced",
    "fallback-ignores-deletes",
    "advance-without-fleet",
}
PROMISES = {name for name in re.findall(r"^\w+", str(properties.__doc__), re.MULTILINE) if name.isupper()}


def test_the_bugs_that_every_change_must_be_held_against_are_there() -> None:
    assert set(seeds.names()) >= NEVER_MISSING


@pytest.mark.parametrize("name", seeds.names())
def test_a_seeded_bug_applies_and_says_which_promise_falls(name: str) -> None:
    seeds.apply(name, seeds.ROOT, check=True)
    assert PROMISES & set(re.findall(r"\w+", seeds.prose(name)))


def test_a_seeded_bug_whose_code_has_changed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone.patch").write_text("What it was.\n\n--- a/gone.py\n+++ b/gone.py\n@@ -1 +1 @@\n-a\n+b\n")
    monkeypatch.setattr(seeds, "FOLDER", tmp_path)
    with pytest.raises(seeds.PatchOutdatedError, match=r"gone\.patch does not apply"):
        seeds.apply("gone", seeds.ROOT, check=True)
