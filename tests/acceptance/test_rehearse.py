"""`rollout rehearse --legacy DIR` on a small installation, whole: what on-call runs before anything is installed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rollout.installation import Fate, Installation
from tests.support import small
from tests.support.commands import Ended, commands_ready
from tests.support.unchanged import files

pytestmark = pytest.mark.migration

STAGES = [
    "off", "dualwrite", "shadow", "live 1", "live 10", "live 0", "shadow (2)", "live 1 (2)", "live 10 (2)", "live 50",
    "live 100", "rampdown", "complete", "rampdown (2)", "complete (2)",
]  # fmt: skip
QUERIES = 100


@dataclass(frozen=True)
class Rehearsed:
    installation: Installation
    work: Path
    ended: Ended
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def result(self) -> dict[str, Any]:
        return self.ended.json


@pytest.fixture(scope="module")
def rehearsed(postgres: Any, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    """One rehearsal for all tests: it is the longest thing there is."""
    folder = tmp_path_factory.mktemp("rehearsal")
    installation = small.made_installation(postgres, folder / "old")
    before = everything(folder / "old")
    with commands_ready(folder) as rollout:
        ended = rollout(
            folder, {}, "rehearse", "--legacy", "old", "--work", "work", "--queries", str(QUERIES), "--json"
        )  # fmt: skip
    return Rehearsed(installation, folder / "work", ended, before, everything(folder / "old"))


def everything(folder: Path) -> dict[str, Any]:
    """Each path below the folder with its content and when it was changed."""
    times = {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}
    return {"times": times, "files": files(folder)}


def test_it_passes(rehearsed: Rehearsed) -> None:
    assert rehearsed.ended.code == 0, rehearsed.ended
    assert (rehearsed.result["verdict"], rehearsed.result["failures"]) == ("pass", [])


def test_the_given_folder_is_as_it_was_to_the_byte_and_the_nanosecond(rehearsed: Rehearsed) -> None:
    assert rehearsed.after == rehearsed.before


def test_it_goes_through_every_stage_is_taken_back_and_goes_twice_back(rehearsed: Rehearsed) -> None:
    stages = rehearsed.result["stages"]
    assert [stage["name"] for stage in stages] == STAGES
    assert [stage["transition"] for stage in stages] == list(range(1, len(STAGES) + 1))
    for stage in stages:
        by_gate = stage["name"] not in ("off", "live 0")
        assert (stage["gate"]["verdict"] == "pass") if by_gate else (stage["gate"] is None), stage["name"]


def test_the_guard_alone_takes_a_spoiled_pgvector_back_and_says_why(rehearsed: Rehearsed) -> None:
    guard = rehearsed.result["fault"]["guard"]
    assert (guard["actor"], guard["to"], guard["late"]) == ("guard", "live at 0 percent", [])
    assert guard["transition"] == 1 + STAGES.index("live 0")
    assert "for 3 windows: agreement" in guard["reason"]
    told = [
        line
        for log in rehearsed.work.glob("backend-*.log")
        for line in map(json.loads, log.read_text().splitlines())
        if line["event"] == "guard.step.done"
    ]
    assert [(line["transition"], line["reason"]) for line in told] == [(guard["transition"], guard["reason"])]


def test_the_gate_refuses_a_spoiled_pgvector_with_numbers(rehearsed: Rehearsed) -> None:
    refused = rehearsed.result["fault"]["refused"]
    assert (refused["to"], refused["verdict"]) == ("live at 1 percent", "fail")
    failing = {each["name"]: each["value"] for each in refused["criteria"] if each["verdict"] == "fail"}
    assert {"agreement", "unexplained"} <= set(failing)
    assert re.search(r"\d+ missing_in_pgvector", failing["unexplained"])


def test_every_fault_is_planted_met_and_explained_by_its_cause(rehearsed: Rehearsed) -> None:
    fault = rehearsed.result["fault"]
    kinds = {"missing_in_pgvector", "content_drift", "vector_drift", "owner_mismatch", "stale"}
    assert set(fault["planted"]) == kinds
    assert all(fault["planted"].values())
    assert kinds <= set(fault["comparisons"])
    assert fault["right_share"] >= 0.99, fault["wrong"]
    for cause in kinds - {"stale"}:
        assert fault["explained"][cause]["proof"], cause
        assert "rollout" in fault["explained"][cause]["mend"]


def test_repair_leaves_nothing_of_it(rehearsed: Rehearsed) -> None:
    repaired = rehearsed.result["fault"]["repaired"]
    assert repaired["differences"] > 0 < repaired["documents"]
    assert (repaired["left"], repaired["differences_afterwards"]) == (0, 0)


def test_every_user_asks_in_every_stage_and_no_answer_is_wrong(rehearsed: Rehearsed) -> None:
    answers = rehearsed.result["answers"]
    assert answers["total"] >= QUERIES
    assert (answers["failed"], answers["foreign"], answers["deleted"]) == (0, 0, 0)
    assert answers["known_share"] >= 0.95
    assert answers["around_changes"] > 0
    users = len(rehearsed.installation.users)
    assert [stage["users"] for stage in rehearsed.result["stages"]] == [users] * len(STAGES)


def test_every_legacy_chunk_is_migrated_quarantined_or_deleted_and_the_quarantine_is_as_planned(
    rehearsed: Rehearsed,
) -> None:
    chunks = rehearsed.result["chunks"]
    held = rehearsed.installation.quarantined[Fate.SEVERAL_USERS]
    assert chunks["legacy"] == len(rehearsed.installation.uploaded_by)
    assert (chunks["quarantined"], chunks["quarantined_by_reason"]) == (len(held), {"several_users": len(held)})
    assert chunks["migrated"] + chunks["deleted"] == len(rehearsed.installation.expected)
    assert chunks["migrated"] > 0 < chunks["deleted"]


def test_uploads_are_found_and_the_saved_directory_lacks_nothing_before_complete(rehearsed: Rehearsed) -> None:
    assert rehearsed.result["uploads"] == {"made": 20, "missing": []}
    assert rehearsed.result["deletes"] == 5
    for stage in rehearsed.result["stages"]:
        if stage["name"].startswith("complete"):
            assert stage["saved"] is None
        else:
            assert stage["saved"]["missing"] == 0 < stage["saved"]["wanted"]


def test_what_the_rehearsal_profile_lets_pass_says_so(rehearsed: Rehearsed) -> None:
    assert rehearsed.result["profile"] == "rehearsal"
    (model,) = [each for each in rehearsed.result["stages"][1]["gate"]["criteria"] if each["name"] == "model"]
    assert model["verdict"] == "overridden"


def test_progress_is_told_beside_the_result_and_nothing_is_left_running(rehearsed: Rehearsed) -> None:
    for stage in STAGES:
        assert f"stage {stage}\n" in rehearsed.ended.err
    assert not (rehearsed.work / "postgres" / "pgdata" / "postmaster.pid").exists()
