"""Each criterion of each gate made to fail and then to hold, on a small installation with both stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langchain_core.embeddings import Embeddings

from rollout import install_checks, owners, sentinel, steps, verify
from rollout.backfill import backfill
from rollout.control import Control
from rollout.errors import InconclusiveError, PreconditionError, RefusedError
from rollout.gates import Criterion, Gate
from rollout.transitions import next_target
from src.config import settings
from src.database import Role
from src.tools.rag_tools import pgvector_store
from src.tools.rag_tools.embeddings import EmbeddingUnavailableError
from src.tools.rag_tools.migration import shadow
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import Stage
from src.tools.rag_tools.store import StoreError
from tests.support import small
from tests.support.control import EASY, control_on
from tests.support.routers import HashEmbeddings, router_on, set_stage
from tests.support.small import Small

pytestmark = pytest.mark.migration


@pytest.fixture
def installed(
    postgres: Any, template_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Small]:
    with small.installed(postgres, template_database, tmp_path) as made:
        configure(made, monkeypatch)
        yield made


@pytest.fixture
def filled(postgres: Any, template_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Small]:
    with small.filled(postgres, template_database, tmp_path) as made:
        configure(made, monkeypatch)
        yield made


@pytest.fixture
def control(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    """Of the installation that the test asks for."""
    request.getfixturevalue("installed" if "installed" in request.fixturenames else "filled")
    with control_on(tmp_path, monkeypatch) as made:
        yield made


def configure(made: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.folder)
    for name, value in made.environment().items():
        if name.startswith("DATABASE"):
            monkeypatch.setattr(settings, name, value)


def gate(control: Control, **options: Any) -> Gate:
    view = control.view()
    target = next_target(view, control.profile)
    assert target is not None
    return steps.check(control, view, target, **options)


def ask(control: Control, name: str, **options: Any) -> Criterion:
    """The one criterion of the next gate."""
    view = control.view()
    target = next_target(view, control.profile)
    assert target is not None
    checks = steps.GATES[target.stage](control, view, options.get("acknowledged"))
    return steps.evaluate(target, {name: checks[name]}, {}).criteria[0]


def run(made: Small, statement: str, *parameters: Any, as_superuser: bool = False) -> int:
    info = made.database.superuser_conninfo() if as_superuser else made.database.conninfo(Role.ROLLOUT)
    with psycopg.connect(info, autocommit=True) as connection:
        return connection.execute(statement, parameters).rowcount


def assign(control: Control) -> None:
    positions = owners.positions_of(control.faiss.base_positions())
    with control.connection() as connection:
        owners.assign_owners(connection, positions, actor="test", execute=True)
    control.reload_owners()


# -- to dualwrite


def test_a_whole_installation_may_go_to_dualwrite(installed: Small, control: Control) -> None:
    assign(control)
    found = gate(control, acknowledged=installed.quarantined)
    assert {each.name: each.verdict.value for each in found.criteria} == dict.fromkeys(
        ("postgresql", "schema", "role", "directory", "model", "owners", "quarantine"), "pass"
    )


@pytest.mark.parametrize("where", ["pgvector", "server"])
def test_an_old_server_or_extension_is_a_missing_precondition(
    installed: Small, control: Control, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with monkeypatch.context() as older:
        if where == "pgvector":
            older.setattr(pgvector_store, "MINIMUM_PGVECTOR", (99, 0, 0))
        else:
            older.setattr(install_checks, "MINIMUM_SERVER", 990_000)
        found = ask(control, "postgresql")
        assert (found.verdict, found.precondition) == ("fail", True)
        with pytest.raises(PreconditionError):
            steps.advance(control, target=None, execute=True, actor="me", reason="")
    assert ask(control, "postgresql").verdict == "pass"


def test_a_schema_behind_its_head_is_a_missing_precondition(installed: Small, control: Control) -> None:
    head = ask(control, "schema").threshold
    run(installed, "UPDATE alembic_version SET version_num = 'a1f0c2d3e4b5'", as_superuser=True)
    found = ask(control, "schema")
    assert (found.verdict, found.precondition, found.value) == ("fail", True, "a1f0c2d3e4b5")
    assert "alembic upgrade head" in found.todo
    run(installed, "UPDATE alembic_version SET version_num = %s", head, as_superuser=True)
    assert ask(control, "schema").verdict == "pass"


@pytest.mark.parametrize(
    ("role", "why"), [(Role.OWNER, "owns the table"), (Role.ROLLOUT, "bypasses it"), (None, "is a superuser")]
)
def test_a_backend_that_could_read_past_row_level_security_is_a_missing_precondition(
    installed: Small, control: Control, monkeypatch: pytest.MonkeyPatch, role: Role | None, why: str
) -> None:
    from src.database import url_of

    with monkeypatch.context() as wrong:
        wrong.setattr(
            settings,
            "DATABASE_URL",
            url_of(installed.database.superuser_conninfo()) if role is None else installed.database.url(role),
        )
        found = ask(control, "role")
        assert (found.verdict, found.precondition) == ("fail", True)
        assert why in found.value
        assert "victus_app" in found.todo
    assert ask(control, "role").verdict == "pass"


def test_a_bulk_role_that_sees_nothing_is_a_missing_precondition(
    installed: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "DATABASE_ROLLOUT_URL", installed.database.url(Role.APP))
    with control_on(tmp_path, monkeypatch) as control:
        found = ask(control, "role")
    assert (found.verdict, found.precondition) == ("fail", True)
    assert "victus_app, as which this command connects, is held by it too" in found.value


def test_a_backend_that_cannot_connect_fails_the_gate(
    installed: Small, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "DATABASE_URL", "postgresql://victus_app@/victus?host=/nonexistent")
    assert ask(control, "role").verdict == "fail"


def test_a_truncated_directory_is_a_missing_precondition_and_stays_as_it_was(
    installed: Small, control: Control
) -> None:
    whole = (installed.index / "index.faiss").read_bytes()
    (installed.index / "index.faiss").write_bytes(whole[: len(whole) // 2])
    found = ask(control, "directory")
    assert (found.verdict, found.precondition) == ("fail", True)
    assert "index.faiss" in found.value
    assert ask(control, "owners").verdict == "inconclusive"
    assert ask(control, "model").verdict == "inconclusive"
    assert {path.name for path in installed.index.iterdir()} == {"index.faiss", "index.pkl"}
    (installed.index / "index.faiss").write_bytes(whole)
    assert ask(control, "directory").verdict == "pass"


def test_a_directory_without_an_index_cannot_be_where_the_documents_are(installed: Small, control: Control) -> None:
    moved = installed.index.rename(installed.folder / "elsewhere")
    found = ask(control, "directory")
    assert (found.verdict, found.precondition) == ("fail", True)
    assert "holds no index, but 5 documents" in found.value
    assert not installed.index.exists()
    moved.rename(installed.index)
    assert ask(control, "directory").verdict == "pass"


class Elsewhere(HashEmbeddings):
    """Another model: other vectors for the same texts."""

    def embed_query(self, text: str) -> list[float]:
        return super().embed_query(f"in another space: {text}")


class Shorter(HashEmbeddings):
    """A model of another dimension."""

    def embed_query(self, text: str) -> list[float]:
        return super().embed_query(text)[:768]


class Unavailable(Embeddings):
    """A provider without a key."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise EmbeddingUnavailableError("no key for OpenAI's embeddings: set OPENAI_API_KEY")

    def embed_query(self, text: str) -> list[float]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("other", "verdict", "said"),
    [
        (Elsewhere(), "fail", "smallest cosine"),
        (Shorter(), "fail", "dimension 768"),
        (Unavailable(), "inconclusive", "OPENAI_API_KEY"),
    ],
)
def test_an_index_made_by_another_model_is_refused_and_one_not_tried_is_inconclusive(
    installed: Small, control: Control, other: Embeddings, verdict: str, said: str
) -> None:
    fitting, control.embeddings = control.embeddings, other
    found = ask(control, "model")
    assert found.verdict == verdict
    assert said in found.value
    control.embeddings = fitting
    assert ask(control, "model").verdict == "pass"


def test_every_legacy_chunk_must_have_been_decided(installed: Small, control: Control) -> None:
    found = ask(control, "owners")
    assert (found.verdict, found.value) == ("fail", f"{len(installed.installation.uploaded_by)} undecided")
    assign(control)
    assert ask(control, "owners").verdict == "pass"


def test_the_quarantine_must_be_acknowledged_with_its_number(installed: Small, control: Control) -> None:
    assign(control)
    number = installed.quarantined
    for wrong in (None, 0, number - 1, number + 1):
        found = ask(control, "quarantine", acknowledged=wrong)
        assert (found.verdict, found.n) == ("fail", number)
        assert f"--acknowledge-quarantine {number}" in found.todo
    assert ask(control, "quarantine", acknowledged=number).verdict == "pass"


def test_a_refused_gate_that_lacks_no_precondition_exits_three(installed: Small, control: Control) -> None:
    assign(control)
    assert gate(control).exit_code == 3
    with pytest.raises(RefusedError, match="quarantine is"):
        steps.advance(control, target=None, execute=True, actor="me", reason="")
    assert control.view().stage is Stage.OFF


# -- to shadow


def test_the_backfill_is_not_forgotten_however_young_the_assignment_is(installed: Small, control: Control) -> None:
    assign(control)
    run(installed, "SELECT 1")
    with control.connection() as connection:
        set_stage(connection, Stage.DUALWRITE)
    found = ask(control, "owed")
    assert found.verdict == "fail"
    assert "3 wait for the backfill" in found.value
    backfill(control.pool, control.faiss, execute=True, progress=lambda _: None)
    assert ask(control, "owed").verdict == "pass"


def test_what_is_owed_for_more_than_a_minute_or_set_aside_holds_up_the_gate(filled: Small, control: Control) -> None:
    owe = (
        "UPDATE vector_ledger SET state = %s, changed_at = clock_timestamp() - make_interval(secs => %s),"
        " next_attempt_at = now() WHERE store = 'pgvector' AND document_id = %s"
    )
    (document, *_) = filled.documents("ben")
    for state, age, verdict in (
        ("owed", 5, "pass"),
        ("owed", 61, "fail"),
        ("aside", 0, "fail"),
        ("done", 0, "pass"),
    ):
        run(filled, owe, state, age, document)
        assert ask(control, "owed").verdict == verdict, (state, age)


def test_verify_must_be_clean_and_begun_after_the_last_step(filled: Small, control: Control) -> None:
    assert ask(control, "verify").value == "never run"
    assert ask(control, "verify").verdict == "inconclusive"
    run(filled, "UPDATE document_chunks SET content = content || '!' WHERE ordinal = 0")
    compare(control)
    found = ask(control, "verify")
    assert found.verdict == "fail"
    assert found.value.startswith("3 differences")
    run(filled, "UPDATE document_chunks SET content = left(content, -1) WHERE ordinal = 0")
    compare(control)
    assert ask(control, "verify").verdict == "pass"
    with control.connection() as connection:
        set_stage(connection, Stage.OFF)
        set_stage(connection, Stage.DUALWRITE)
    found = ask(control, "verify")
    assert found.verdict == "inconclusive"
    assert "too old" in found.value


def test_a_process_that_has_not_arrived_fails_the_gate(filled: Small, control: Control) -> None:
    with router_on(filled.database, filled.folder) as router:
        assert ask(control, "fleet").verdict == "pass"
        with control.connection() as connection:
            set_stage(connection, Stage.OFF)
            set_stage(connection, Stage.DUALWRITE)
        found = ask(control, "fleet")
        assert (found.verdict, found.n) == ("fail", 1)
        assert "acts on transition 2" in found.todo
        router.refresh()
        router.refresh()
        assert ask(control, "fleet").verdict == "pass"


def compare(control: Control) -> None:
    verify.verify(control.pool, control.faiss, progress=lambda _: None)


# -- to live


QUERIES = 12


@contextmanager
def in_stage(made: Small, stage: Stage, percent: int = 0, **options: Any) -> Iterator[Router]:
    """A backend in the stage. What it was asked in the shadow is compared when it is left."""
    with made.database.connect(autocommit=True) as connection:
        set_stage(connection, stage, percent)
    with router_on(made.database, made.folder, **options) as router:
        if "SHADOW_QUEUE" not in options:
            router.shadow.start()
        yield router
        router.shadow.close()
        router.refresh()


def query(made: Small, router: Router, times: int = QUERIES) -> None:
    """Users with documents in turn, each for a chunk of their own."""
    for number in range(times):
        user = made.installation.users[("ada", "ben")[number % 2]]
        wanted = router.stores.faiss.document(made.documents(("ada", "ben")[number % 2])[0])
        router.search(user, wanted[number % len(wanted)].vector, 3)


def test_a_user_may_be_moved_once_everything_holds(filled: Small, control: Control) -> None:
    with in_stage(filled, Stage.SHADOW) as router:
        query(filled, router)
    compare(control)
    found = gate(control)
    assert [(each.name, each.value) for each in found.criteria if not each.holds] == []
    assert steps.advance(control, target=None, execute=True, actor="me", reason="").transition_id == 4


def test_no_evidence_is_no_pass(filled: Small, control: Control) -> None:
    with in_stage(filled, Stage.SHADOW):
        pass
    verdicts = {each.name: each.verdict.value for each in gate(control).criteria}
    for name in ("comparisons", "cohorts", "unexplained", "stale", "dropped", "latency", "verify", "agreement"):
        assert verdicts[name] == "inconclusive", name
    with pytest.raises(InconclusiveError):
        steps.advance(control, target=None, execute=True, actor="me", reason="")


def test_evidence_of_an_earlier_transition_does_not_count(filled: Small, control: Control) -> None:
    with in_stage(filled, Stage.SHADOW) as router:
        query(filled, router)
    assert ask(control, "comparisons").verdict == "pass"
    with in_stage(filled, Stage.DUALWRITE), in_stage(filled, Stage.SHADOW):
        pass
    assert ask(control, "comparisons").value == "0 comparisons"
    assert ask(control, "comparisons").verdict == "inconclusive"


def test_too_few_comparisons_are_inconclusive(filled: Small, control: Control) -> None:
    with in_stage(filled, Stage.SHADOW) as router:
        query(filled, router, EASY.comparisons - 1)
    assert ask(control, "comparisons").verdict == "inconclusive"
    with router_on(filled.database, filled.folder) as router:
        router.shadow.start()
        query(filled, router, 1)
    assert ask(control, "comparisons").verdict == "pass"


def test_each_size_of_user_that_exists_must_have_been_compared(
    filled: Small, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ada has fewer chunks than the limit set here, ben has more."""
    counts = control.faiss.counts().by_user
    ada, ben = (counts[filled.installation.users[name]] for name in ("ada", "ben"))
    assert ada != ben
    monkeypatch.setattr(shadow, "COHORTS", ((max(ada, ben), "small"), (10_000, "medium")))
    smaller, larger = ("ada", "ben") if ada < ben else ("ben", "ada")
    with in_stage(filled, Stage.SHADOW) as router:
        one = router.stores.faiss.document(filled.documents(smaller)[0])[0]
        for _ in range(QUERIES):
            router.search(filled.installation.users[smaller], one.vector, 3)
    assert ask(control, "comparisons").verdict == "pass"
    found = ask(control, "cohorts")
    assert (found.verdict, found.value) == ("inconclusive", f"medium 0, small {QUERIES}")
    with router_on(filled.database, filled.folder) as router:
        router.shadow.start()
        one = router.stores.faiss.document(filled.documents(larger)[0])[0]
        for _ in range(EASY.cohort_comparisons - 1):
            router.search(filled.installation.users[larger], one.vector, 3)
    assert ask(control, "cohorts").verdict == "inconclusive"
    with router_on(filled.database, filled.folder) as router:
        router.shadow.start()
        router.search(filled.installation.users[larger], one.vector, 3)
    assert ask(control, "cohorts").verdict == "pass"


@pytest.mark.parametrize(
    ("harm", "cause"),
    [
        ("DELETE FROM document_chunks WHERE user_id = %(ben)s", "missing_in_pgvector"),
        ("UPDATE document_chunks SET user_id = %(dan)s WHERE user_id = %(ben)s", "owner_mismatch"),
        ("UPDATE document_chunks SET content = 'drifted' WHERE user_id = %(ben)s", "content_drift"),
    ],
)
def test_an_unexplained_difference_fails_the_gate(filled: Small, control: Control, harm: str, cause: str) -> None:
    with psycopg.connect(filled.database.conninfo(Role.ROLLOUT)) as connection:
        connection.execute(harm, filled.installation.users)
    # In a moment at which nothing of the user's has just been owed.
    run(filled, "UPDATE vector_ledger SET changed_at = now() - interval '1 hour'")
    with in_stage(filled, Stage.SHADOW) as router:
        query(filled, router)
    found = ask(control, "unexplained")
    assert found.verdict == "fail"
    assert found.value == f"{QUERIES // 2} {cause}"


def test_a_search_that_fails_in_the_shadow_fails_the_gate(
    filled: Small, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> list[Any]:
        raise StoreError("PostgreSQL is away")

    with in_stage(filled, Stage.SHADOW) as router:
        monkeypatch.setattr(router.shadow.stores.pgvector, "search", away)
        query(filled, router, 3)
    assert (ask(control, "unexplained").verdict, ask(control, "unexplained").value) == ("fail", "3 error")


@pytest.mark.parametrize(
    ("name", "change", "undo"),
    [
        (
            "stale",
            "UPDATE shadow_diffs SET cause = 'stale' WHERE mod(id, 2) = 0",
            "UPDATE shadow_diffs SET cause = 'match'",
        ),
        ("latency", "UPDATE shadow_diffs SET shadow_ms = 500", "UPDATE shadow_diffs SET shadow_ms = 99"),
        (
            "agreement",
            "UPDATE shadow_diffs SET cause = 'timeout'",
            "UPDATE shadow_diffs SET cause = 'match'",
        ),
    ],
)
def test_what_was_measured_must_be_within_its_limit(
    filled: Small, control: Control, name: str, change: str, undo: str
) -> None:
    with in_stage(filled, Stage.SHADOW) as router:
        query(filled, router)
    run(filled, change)
    assert ask(control, name).verdict == "fail"
    run(filled, undo)
    assert ask(control, name).verdict == "pass"


def test_slow_is_fast_enough_where_faiss_is_as_slow(filled: Small, control: Control) -> None:
    with in_stage(filled, Stage.SHADOW) as router:
        query(filled, router)
    run(filled, "UPDATE shadow_diffs SET shadow_ms = 500, served_ms = 400")
    assert ask(control, "latency").verdict == "pass"
    run(filled, "UPDATE shadow_diffs SET shadow_ms = 501, served_ms = 400")
    assert ask(control, "latency").verdict == "fail"


def test_shadow_reads_that_did_not_fit_are_counted_by_every_process_and_fail_the_gate(
    filled: Small, control: Control
) -> None:
    with in_stage(filled, Stage.SHADOW, SHADOW_QUEUE=1) as router:
        query(filled, router, 4)
        router.refresh()
        router.shadow._queue.get_nowait()
    found = ask(control, "dropped")
    assert (found.verdict, found.value) == ("fail", "3 of 3 (100.00%)")
    with in_stage(filled, Stage.DUALWRITE), in_stage(filled, Stage.SHADOW) as router:
        query(filled, router)
    assert ask(control, "dropped").verdict == "pass"


def test_a_step_must_have_lasted(filled: Small, control: Control) -> None:
    with in_stage(filled, Stage.SHADOW):
        pass
    control.profile = replace(EASY, ramp_soak=3_600.0)
    found = ask(control, "soak")
    assert found.verdict == "inconclusive"
    assert found.todo.startswith("wait 0:59") or found.todo == "wait 1:00:00"
    control.profile = EASY
    assert ask(control, "soak").verdict == "pass"


def test_for_the_ramp_verify_must_be_fresh(filled: Small, control: Control) -> None:
    compare(control)
    with in_stage(filled, Stage.SHADOW):
        pass
    assert ask(control, "verify").verdict == "pass"
    run(filled, "UPDATE verify_runs SET finished_at = now() - interval '25 hours'")
    assert ask(control, "verify").verdict == "inconclusive"


@pytest.mark.parametrize("lost", ["write", "deletion"])
def test_a_sentinel_that_is_not_written_or_not_deleted_fails_the_gate_and_none_is_left(
    filled: Small, control: Control, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    with in_stage(filled, Stage.SHADOW):
        pass
    with monkeypatch.context() as broken:
        if lost == "write":
            broken.setattr("src.tools.rag_tools.migration.stores.insert_chunks", lambda *_: None)
        else:
            broken.setattr("src.tools.rag_tools.migration.stores.DELETE", "SELECT %s, %s")
        found = ask(control, "sentinel")
    assert found.verdict == "fail"
    assert found.value == (
        "not found in pgvector after the write" if lost == "write" else "still in pgvector after the deletion"
    )
    run(filled, "DELETE FROM document_chunks WHERE metadata ->> 'file_name' = 'sentinel'")
    assert ask(control, "sentinel").verdict == "pass"
    assert left_of_the_sentinel(filled, control) == (0, 0, 0)


def test_a_sentinel_that_a_dead_probe_left_is_removed_by_the_next(
    filled: Small, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> bool:
        raise KeyboardInterrupt

    with in_stage(filled, Stage.SHADOW):
        pass
    with monkeypatch.context() as dying:
        dying.setattr(sentinel, "_finds", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(control, "sentinel")
    assert left_of_the_sentinel(filled, control) == (1, 1, 1)
    assert ask(control, "sentinel").verdict == "pass"
    assert left_of_the_sentinel(filled, control) == (0, 0, 0)


def left_of_the_sentinel(made: Small, control: Control) -> tuple[int, int, int]:
    """Documents not deleted, chunks in pgvector, chunks in FAISS."""
    with control.connection() as connection:
        (user,) = connection.execute("SELECT id FROM users WHERE username = %s", (sentinel.NAME,)).fetchone() or (0,)
    return (
        run(made, "SELECT 1 FROM documents WHERE user_id = %s AND status <> 'deleted'", user),
        run(made, "SELECT 1 FROM document_chunks WHERE user_id = %s", user),
        control.faiss.count(user),
    )


# -- to complete


def test_complete_needs_reads_and_next_to_no_fallback(
    filled: Small, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_stage(filled, Stage.RAMPDOWN, 100) as router:
        assert ask(control, "fallback").verdict == "inconclusive"
        query(filled, router)
        router.refresh()
        assert ask(control, "fallback").verdict == "pass"
        assert ask(control, "fallback-free").verdict == "pass"
        with monkeypatch.context() as broken:
            broken.setattr(router.stores.pgvector, "search", _away)
            query(filled, router, 1)
        router.refresh()
    assert (ask(control, "fallback").verdict, ask(control, "fallback").value) == ("fail", "1 of 13 (7.69%)")
    assert (ask(control, "fallback-free").verdict, ask(control, "fallback-free").value) == ("fail", "1")
    run(filled, "UPDATE rollout_counts SET since = now() - interval '25 hours' WHERE name = 'fallback'")
    run(filled, "UPDATE rollout_counts SET count = 1000000 WHERE name = 'reads.pgvector'")
    assert ask(control, "fallback").verdict == "pass"
    assert ask(control, "fallback-free").verdict == "pass"


def test_complete_needs_the_long_soak_and_nothing_set_aside(filled: Small, control: Control) -> None:
    with in_stage(filled, Stage.RAMPDOWN, 100) as router:
        query(filled, router)
    assert gate(control).exit_code == 0
    control.profile = replace(EASY, long_soak=86_400.0)
    assert gate(control).exit_code == 4
    control.profile = EASY
    run(filled, "UPDATE vector_ledger SET state = 'aside' WHERE store = 'pgvector' AND document_id = 1")
    assert gate(control).exit_code == 3


def _away(*_: object) -> list[Any]:
    raise StoreError("PostgreSQL is away")
