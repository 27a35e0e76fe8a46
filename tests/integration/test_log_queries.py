"""The log queries of docs/observability.md, on lines that a router has really written."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import structlog

from src import log as logs
from src.database import Role
from src.tools.rag_tools.migration.evidence import Read
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.store import StoreError
from tests.support.routers import add_users, router_on, set_stage, write_note

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
SOURCES = [*(ROOT / "backend" / "src").rglob("*.py"), *(ROOT / "rollout").rglob("*.py")]
JQ = re.findall(r"^([^\n]+):\n\n```sh\n(jq .*?)\n```", GUIDE, re.MULTILINE | re.DOTALL)
LOGQL = re.findall(r"```logql\n(.*?)\n```", GUIDE, re.DOTALL)

pytestmark = pytest.mark.migration


@pytest.fixture
def _as_in_production(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    root, access = logging.getLogger(), logging.getLogger("uvicorn.access")
    before = (root.handlers[:], root.level, access.propagate)
    logs.configure()
    yield
    structlog.reset_defaults()
    root.handlers[:], access.propagate = before[0], before[2]
    root.setLevel(before[1])


@pytest.fixture
def folder(_as_in_production: None, database: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with backend.log: two good comparisons, one that a missing row spoils, one whose store failed."""
    owner, other = add_users(database, 2)
    with router_on(database, tmp_path) as router:
        with database.connect(autocommit=True) as connection:
            set_stage(connection, Stage.SHADOW)
        router.refresh()
        for number in range(7):
            name = f"{number}.md"
            router.index(router.receive(owner, write_note(tmp_path, name, f"Note {number}."), name))
        read = _read(router, owner)
        router.shadow.compare(read)
        router.shadow.compare(_read(router, other))
        _spoil(database)
        router.shadow.compare(read)
        _fail(router)
        router.shadow.compare(read)
    (tmp_path / "backend.log").write_text(f"not JSON\n{capsys.readouterr().out}")
    return tmp_path


def _read(router: Any, user: int) -> Read:
    question = np.array(router.embeddings.embed_query("Note 3."), np.float32)
    hits = router.search(user, question, 3)
    return Read(router.flags.view(), user, question, 3, Store.FAISS, hits, router.clock(), router.clock())


def _spoil(database: Any) -> None:
    with database.connect(Role.ROLLOUT, autocommit=True) as connection:
        connection.execute("DELETE FROM document_chunks WHERE document_id = 4")
        # What was owed a moment ago would excuse the difference.
        connection.execute("UPDATE vector_ledger SET changed_at = changed_at - interval '1 hour'")


def _fail(router: Any) -> None:
    def away(*_: Any) -> None:
        raise StoreError("PostgreSQL is away")

    stores = router.shadow.stores
    router.shadow.stores = SimpleNamespace(search=away, faiss=stores.faiss, pgvector=stores.pgvector)


def queried(folder: Path, command: str) -> list[str]:
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_every_jq_query_finds_what_it_says(folder: Path) -> None:
    found = {title: queried(folder, command) for title, command in JQ}
    assert list(found) == [
        "Comparisons by cause", "Every comparison that nothing excuses, the newest last", "Agreement by cohort",
        "The slowest shadow reads, in milliseconds, beside the answer that was served",
        "What failed: stores, debts, saving, the guard", "What happened to document 7",
    ]  # fmt: skip
    by_cause, unexcused, by_cohort, slowest, failed, one = found.values()
    assert [line.split() for line in by_cause] == [["1", '"error"'], ["2", '"match"'], ["1", '"missing_in_pgvector"']]
    assert [json.loads(line)["cause"] for line in unexcused] == ["missing_in_pgvector", "error"]
    assert all(None not in json.loads(line).values() for line in unexcused[:1])
    assert json.loads("".join(by_cohort)) == {"cohort": "small", "judged": 4, "agreed": 2}
    assert len(slowest) == 4
    assert [json.loads(line)["event"] for line in failed] == ["shadow.read.failed"]
    assert [json.loads(line)["event"] for line in one] == ["document.receive.done", "document.index.done"]


def test_the_queries_for_loki_name_events_and_fields_that_are_written() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert len(LOGQL) == len(JQ)
    for query in LOGQL:
        for _, events in re.findall(r'\bevent(=~|=)"([^"]+)"', query):
            for event in events.split("|"):
                assert f'"{event}"' in source, event
        fields = set(re.findall(r'\| (\w+)[=!]~?"', query)) | set(re.findall(r"unwrap (\w+)", query))
        fields |= set(re.findall(r"by \((\w+)\)", query))
        for field in fields - {"event", "json"}:
            assert f'"{field}"' in source or f"{field}=" in source, field


def test_both_query_languages_ask_for_the_same_events() -> None:
    for (title, jq), logql in zip(JQ, LOGQL, strict=True):
        events = set(re.findall(r'"([a-z_]+(?:\.[a-z_]+)+)"', jq))
        asked = {name for _, names in re.findall(r'\bevent(=~|=)"([^"]+)"', logql) for name in names.split("|")}
        assert events == asked, title
