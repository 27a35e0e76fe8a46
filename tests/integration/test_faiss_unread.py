"""FAISS is read by a process whose stage needs it, and by no other; a step is reported as soon as it is taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from src.tools.rag_tools.migration.stages import Stage
from src.tools.rag_tools.store import StoreError
from tests.support.legacy_index import LegacyIndex, adopt, make_legacy_index
from tests.support.routers import router_on, set_stage

pytestmark = [
    pytest.mark.migration,
    pytest.mark.filterwarnings("ignore:.langchain-community. is being sunset:DeprecationWarning"),
]

ADA = 1
REPORTED = "SELECT transition_id FROM rollout_instances WHERE instance = %s"
# What it takes to parse files, to embed, and to read FAISS is loaded when it is first needed.
LATER = (
    "faiss",
    "langchain_community",
    "langchain_openai",
    "langchain_text_splitters",
    "pypdf",
    "docx2txt",
    "wordllama",
)


@pytest.fixture
def legacy(database: Any, tmp_path: Path) -> LegacyIndex:
    made = make_legacy_index(tmp_path / "faiss_index", [(ADA, 3)])
    adopt(database, made, Stage.COMPLETE)
    return made


def test_a_process_in_complete_leaves_faiss_unread(database: Any, tmp_path: Path, legacy: LegacyIndex) -> None:
    with router_on(database, tmp_path) as router:
        router.refresh()
        assert not router.stores.faiss.is_loaded


def test_going_back_reads_faiss_with_its_owners_before_the_process_acts_on_the_step(
    database: Any, tmp_path: Path, legacy: LegacyIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    with router_on(database, tmp_path) as router, database.connect(autocommit=True) as owner:
        before = router.flags.view().transition_id
        set_stage(owner, Stage.RAMPDOWN)
        with monkeypatch.context() as broken:
            broken.setattr(type(router.stores.faiss), "_read", _away)
            with pytest.raises(StoreError, match="no disk"):
                router.refresh()
        assert router.flags.acts_on == before
        router.refresh()
        assert router.stores.faiss.is_loaded
        assert router.flags.acts_on == before + 1
        assert router.stores.faiss.count(ADA) == 3


def _away(*_: Any) -> None:
    raise StoreError("no disk")


def test_one_poll_takes_a_step_and_reports_it(database: Any, tmp_path: Path, legacy: LegacyIndex) -> None:
    with router_on(database, tmp_path) as router, database.connect(autocommit=True) as owner:
        step = set_stage(owner, Stage.RAMPDOWN)
        router.poll()
        assert owner.execute(REPORTED, (router.flags.instance,)).fetchone() == (step,)


def test_a_poll_ends_though_a_request_under_the_stage_before_goes_on(
    database: Any, tmp_path: Path, legacy: LegacyIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    with router_on(database, tmp_path) as router, database.connect(autocommit=True) as owner:
        with router.flags.request():
            step = set_stage(owner, Stage.RAMPDOWN)
            monkeypatch.setattr(router._closing, "wait", lambda _: True)
            router.poll()
            assert owner.execute(REPORTED, (router.flags.instance,)).fetchone() == (step - 1,)
        router.poll()
        assert owner.execute(REPORTED, (router.flags.instance,)).fetchone() == (step,)


def test_the_backend_is_imported_without_what_only_some_requests_need() -> None:
    code = f"import sys, src.main; print([name for name in {LATER} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
