"""A rehearsal in which something went wrong does not pass: each fault is planted, and the verdict must name it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout.control import Control
from rollout.rehearsal import DELETES, UPLOADS
from rollout.rehearsal_result import SPOILED
from rollout.rehearsal_run import Rehearsal
from src.config import settings
from src.database import Role
from tests.support import small
from tests.support.control import control_on
from tests.support.small import Small

pytestmark = pytest.mark.migration


class Talker:
    """Stands for a process of the traffic that has ended well."""

    def __init__(self) -> None:
        self.missing: list[int] = []

    def ask(self, **command: Any) -> dict[str, Any]:
        assert command == {"do": "find"}
        return {"uploads": 3, "missing": self.missing}


@pytest.fixture
def filled(postgres: Any, template_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Small]:
    with small.filled(postgres, template_database, tmp_path) as made:
        monkeypatch.chdir(made.folder)
        for name, value in made.environment().items():
            if name.startswith("DATABASE"):
                monkeypatch.setattr(settings, name, value)
        yield made


@pytest.fixture
def control(filled: Small, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    with control_on(filled.folder, monkeypatch) as made:
        yield made


def answered(stage: str = "off", **other: Any) -> dict[str, Any]:
    return {
        "stage": stage, "user": 1, "begun": 1.0, "ms": 2.0, "foreign": [], "deleted": [], "known": True, **other
    }  # fmt: skip


def fault(**other: Any) -> dict[str, Any]:
    """What a rehearsal notes of a fault that was met, taken back and mended."""
    return {
        "comparisons": {"match": 50, "missing_in_pgvector": 50},
        "wrong": {},
        "right_share": 1.0,
        "guard": {"actor": "guard", "late": []},
        "repaired": {"left": 0, "differences_afterwards": 0},
        **other,
    }


@pytest.fixture
def rehearsal(filled: Small, control: Control) -> Rehearsal:
    """At its end, with everything in order."""
    talker: Any = Talker()
    made = Rehearsal(control, [talker], 40, "STORED", {1}, len(filled.installation.uploaded_by))
    made.observed.lines = [answered() for _ in range(40)]
    made.changes = [(0.5, 1.5)]
    made.uploads = [(talker, 1_000 + number, 1) for number in range(UPLOADS)]
    made.deleted = {1_000 + number for number in range(DELETES)}
    made.fault = fault()
    made.stages = [{"name": "off", "transition": 1, "seconds": 1.0, "gate": None, "saved": made._saved()}]
    return made


def test_in_order_it_passes(rehearsal: Rehearsal, filled: Small) -> None:
    result = rehearsal.result()
    assert (result["verdict"], result["failures"]) == ("pass", [])
    assert result["chunks"]["migrated"] == len(filled.installation.expected)
    assert result["chunks"]["quarantined"] == filled.quarantined


def test_what_a_spoiled_pgvector_does_not_give_is_the_fault_s(rehearsal: Rehearsal) -> None:
    rehearsal.observed.lines += [answered(SPOILED, known=False)] * 40
    result = rehearsal.result()
    assert (result["verdict"], result["answers"]["known_share"]) == ("pass", 1.0)


Plant = Callable[[Rehearsal, Small], None]


def sql(statement: str) -> Plant:
    def run(_: Rehearsal, filled: Small) -> None:
        with filled.database.connect(Role.ROLLOUT, autocommit=True) as connection:
            assert connection.execute(statement).rowcount > 0

    return run


def line(**values: Any) -> Plant:
    def add(rehearsal: Rehearsal, _: Small) -> None:
        rehearsal.observed.lines.append(answered(**values))

    return add


def three_in_forty_unknown(rehearsal: Rehearsal, _: Small) -> None:
    for asked in rehearsal.observed.lines[:3]:
        asked["known"] = False


def no_known_chunk_was_ever_asked_for(rehearsal: Rehearsal, _: Small) -> None:
    for asked in rehearsal.observed.lines:
        asked["known"] = None


def too_few(rehearsal: Rehearsal, _: Small) -> None:
    rehearsal.observed.lines.pop()


def lost_upload(rehearsal: Rehearsal, _: Small) -> None:
    rehearsal.talkers[0].missing.append(17)  # type: ignore[attr-defined]


def silent_process(rehearsal: Rehearsal, _: Small) -> None:
    rehearsal.talkers[0].ask = lambda **_: {"failed": "OSError: the disk is full"}  # type: ignore[method-assign]


def saved_without_the_last(rehearsal: Rehearsal, filled: Small) -> None:
    """As if saving had written the directory of before the last document."""
    rehearsal.stages[0]["saved"] = {"chunks": 5, "wanted": 6, "missing": 1}


def unasked_at_a_change(rehearsal: Rehearsal, _filled: Small) -> None:
    rehearsal.changes.append((9.0, 9.5))


def one_upload_less(rehearsal: Rehearsal, _filled: Small) -> None:
    rehearsal.uploads.pop()


def one_delete_less(rehearsal: Rehearsal, _filled: Small) -> None:
    rehearsal.deleted.pop()


def fault_with(**other: Any) -> Plant:
    def plant(rehearsal: Rehearsal, _: Small) -> None:
        rehearsal.fault = fault(**other)

    return plant


def without_a_fault(rehearsal: Rehearsal, _: Small) -> None:
    rehearsal.fault = {}


def missed_while_spoiled(rehearsal: Rehearsal, _: Small) -> None:
    rehearsal.observed.lines += [answered(SPOILED, known=False)] * 40 + [answered(SPOILED, foreign=[3])]


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (without_a_fault, "no fault was rehearsed"),
        (fault_with(guard={"actor": "ada", "late": []}), "not the guard but ada went back"),
        (fault_with(guard={"actor": "guard", "late": ["app-1:7"]}), "late behind the guard: app-1:7"),
        (fault_with(comparisons={"match": 100}), "no comparison missed one"),
        (fault_with(right_share=0.98, wrong={"match": 2}), "right cause: 98.00%; wrong {'match': 2}"),
        (fault_with(repaired={"left": 1, "differences_afterwards": 0}), "1 documents could not be repaired"),
        (fault_with(repaired={"left": 0, "differences_afterwards": 4}), "4 differences after the repair"),
        (missed_while_spoiled, "1 answers held a foreign chunk"),
        (line(failed="StoreError: away"), "1 answers failed"),
        (line(foreign=[3]), "1 answers held a foreign chunk"),
        (line(deleted=[3]), "1 answers held a deleted document"),
        (three_in_forty_unknown, "known chunks found: 92.5%"),
        (no_known_chunk_was_ever_asked_for, "known chunks found: 0.0%"),
        (too_few, "only 39 queries"),
        (unasked_at_a_change, "no query was in flight"),
        (one_upload_less, "only 19 of 20 uploads"),
        (one_delete_less, "only 4 of 5 deletes"),
        (lost_upload, "uploads not found afterwards: [17]"),
        (silent_process, "uploads not found afterwards: ['unknown']"),
        (saved_without_the_last, "off: saved directory lacks 1 chunks"),
        (sql("DELETE FROM document_chunks WHERE document_id = 1 AND ordinal = 0"), "legacy chunks do not add up"),
        (sql("UPDATE document_chunks SET user_id = 2 WHERE document_id = 1 AND ordinal = 0"), "do not add up"),
        (sql("UPDATE document_chunks SET document_id = 2 WHERE document_id = 1 AND ordinal = 0"), "do not add up"),
        (sql("UPDATE documents SET status = 'deleted' WHERE id = 1"), "legacy chunks do not add up"),
        (
            sql(
                "INSERT INTO document_chunks SELECT 3, docstore_id::uuid, 3, 0, 'x', '', '{}', embedding"
                " FROM legacy_chunks, (SELECT embedding FROM document_chunks LIMIT 1) e"
                " WHERE status = 'quarantined' ORDER BY position LIMIT 1"
            ),
            "legacy chunks do not add up",
        ),
        (sql("DELETE FROM legacy_chunks WHERE position = 0"), "legacy chunks do not add up"),
    ],
)
def test_a_fault_is_found_and_named(rehearsal: Rehearsal, filled: Small, plant: Plant, said: str) -> None:
    plant(rehearsal, filled)
    result = rehearsal.result()
    assert result["verdict"] == "fail"
    assert any(said in failure for failure in result["failures"]), result["failures"]


def test_a_saved_directory_is_opened_by_langchain_and_what_it_lacks_is_counted(
    rehearsal: Rehearsal, filled: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = filled.folder / "before"
    shutil.copytree(filled.index, before, symlinks=True)
    with rehearsal.control.connection() as connection:
        connection.execute("UPDATE documents SET path = ''")
    saved = rehearsal._saved()
    assert (saved["missing"], saved["wanted"]) == (0, len(filled.installation.expected))
    # A save that forgets: the files still hold everything else.
    store = rehearsal.control.faiss
    forgotten = store._memory.live()[1:]
    store.save()
    monkeypatch.setattr(type(store._memory), "live", lambda _: forgotten)
    monkeypatch.setattr(type(store), "_already_saved", lambda *_: None)
    assert rehearsal._saved()["missing"] == 1


def test_a_deletion_erases_no_file_outside_of_the_copy(filled: Small) -> None:
    from rollout.rehearsal_run import INSIDE

    given = ["/srv/victus/uploads/a.pdf", "../uploads/b.pdf", "uploads/../../c.pdf", "uploads/d.pdf", "C:\\e.pdf"]
    with filled.database.connect(Role.ROLLOUT, autocommit=True) as connection:
        for path in given:
            connection.execute(
                "INSERT INTO documents (user_id, filename, path) VALUES (1, %s, %s)", (path.split("/")[-1], path)
            )
        connection.execute(INSIDE)
        found = {row[0] for row in connection.execute("SELECT path FROM documents WHERE id > 5")}
    assert found == {"uploads/a.pdf", "uploads/b.pdf", "uploads/c.pdf", "uploads/d.pdf", "uploads/e.pdf"}
