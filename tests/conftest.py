"""What every test may ask for: one PostgreSQL server a run, and a database of the test's own.

The server's folder belongs to the run: pytest's main process makes it and removes it, its workers
share it. A run that was killed leaves folder and server behind; the next run removes both.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from src.utils.file_lock import Mode, acquire, holding
from tests.support import statements
from tests.support.fault_table import pytest_terminal_summary  # noqa: F401  a hook, by its name  # migration

if TYPE_CHECKING:
    from src.embedded import EmbeddedServer
    from tests.support.database import Database

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "victus_template"
# Not under pytest's own folder, which every other run of pytest closes to the server's user.
TEMPORARY = Path(tempfile.gettempdir())
RUN_FOLDERS = "victus-tests-"
ALONE = TEMPORARY / f"victus-tests.{os.getuid()}.lock"

# migration
# `make load` takes minutes, and sets LOAD_SECONDS.
collect_ignore = [] if os.environ.get("LOAD_SECONDS") else ["acceptance/test_load.py"]
# end of migration

UNSCOPED = "victus/unscoped"
run_folder = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    statements.record()
    if not hasattr(config, "workerinput") and not _only_failed_ones(config):
        _keep_unscoped(config, {})
    inherited = getattr(config, "workerinput", {}).get("run_folder")
    config.stash[run_folder] = Path(inherited) if inherited else _new_run_folder()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tells a worker of pytest-xdist where the run's server is."""
    node.workerinput["run_folder"] = str(node.config.stash[run_folder])


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash[run_folder]
    if hasattr(config, "workerinput"):
        _leave(folder)
        return
    # Another run that looks for abandoned folders would put its lock into this one meanwhile.
    with holding(ALONE):
        _remove(folder)


@pytest.fixture(scope="session", autouse=True)
def _statements_name_the_user(pytestconfig: pytest.Config) -> Iterator[None]:
    """At the end of the run: a statement on the chunks that any test made the project run, and that names no user.

    It is laid at the door of whichever test was last, so asking that one again does not make up for it.
    """
    yield
    unscoped = {text: where for text, where in statements.ran.items() if statements.names_no_user(text)}
    if unscoped:
        _keep_unscoped(pytestconfig, unscoped)
    elif _only_failed_ones(pytestconfig):
        cache = getattr(pytestconfig, "cache", None)
        unscoped = cache.get(UNSCOPED, {}) if cache else {}
    assert not unscoped, f"statements on document_chunks without user_id: {unscoped}"


def _only_failed_ones(config: pytest.Config) -> bool:
    return bool(config.getoption("lf", default=False))


def _keep_unscoped(config: pytest.Config, unscoped: dict[str, str]) -> None:
    if cache := getattr(config, "cache", None):
        cache.set(UNSCOPED, unscoped)


@pytest.fixture
def server_folder() -> Iterator[Path]:
    """A new folder for an embedded server that a test starts itself; its server is stopped.

    Use it instead of `tmp_path` for that: see TEMPORARY.
    """
    folder = Path(tempfile.mkdtemp(prefix="victus-server-", dir=TEMPORARY))
    yield folder
    _remove(folder)


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> EmbeddedServer:
    """The run's PostgreSQL server, shared by all workers.

    It does not wait for the disk: nothing in a test outlives the machine, and a killed process loses nothing that the
    kernel has. Tests of the server itself start one of their own.
    """
    from src import embedded
    from tests.support.database import never_wait_for_the_disk

    server = embedded.start(pytestconfig.stash[run_folder])
    never_wait_for_the_disk(server)
    return server


@pytest.fixture(scope="session")
def template_database(postgres: EmbeddedServer) -> str:
    """The name of a database at Alembic's head, made once a run. Nobody may connect to it."""
    from tests.support.database import make_template

    with holding(postgres.home / "template.lock"):
        if not _exists(postgres, TEMPLATE):
            make_template(postgres, TEMPLATE)
    return TEMPLATE


@pytest.fixture
def database(postgres: EmbeddedServer, template_database: str) -> Iterator[Database]:
    """A database of this test's own, at Alembic's head."""
    from tests.support.database import Database

    made = Database(postgres, f"test_{uuid.uuid4().hex}")
    postgres.create_database(made.name, template_database)
    yield made
    postgres.drop_database(made.name)


@pytest.fixture
def configured_database(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """`database`, which the settings, `src.database.engine` and SessionLocal use for this test."""
    import src.database as module
    from src.config import settings

    monkeypatch.setattr(settings, "DATABASE_URL", database.url(module.Role.APP))
    monkeypatch.setattr(settings, "DATABASE_ADMIN_URL", database.url(module.Role.OWNER))
    monkeypatch.setattr(settings, "DATABASE_ROLLOUT_URL", database.url(module.Role.ROLLOUT))
    previous = module.engine
    engine = module.make_engine(settings.DATABASE_URL)
    monkeypatch.setattr(module, "engine", engine)
    module.SessionLocal.configure(bind=engine)
    yield database
    module.SessionLocal.configure(bind=previous)
    engine.dispose()


def _exists(postgres: EmbeddedServer, name: str) -> bool:
    return bool(_superuser(postgres, "SELECT FROM pg_database WHERE datname = %s", [name]))


def _superuser(postgres: EmbeddedServer, statement: str, values: list[Any] | None = None) -> int:
    import psycopg

    with psycopg.connect(postgres.superuser_conninfo(), autocommit=True) as connection:
        return connection.execute(statement, values).rowcount


def _new_run_folder() -> Path:
    with holding(ALONE):
        for folder in TEMPORARY.glob(f"{RUN_FOLDERS}*"):
            _remove_if_abandoned(folder)
        made = Path(tempfile.mkdtemp(prefix=RUN_FOLDERS, dir=TEMPORARY))
        acquire(made / "run.lock", Mode.SHARED)  # held until this process ends
        return made


def _remove_if_abandoned(folder: Path) -> None:
    try:
        lock = acquire(folder / "run.lock", Mode.EXCLUSIVE_NOW)
    except OSError:
        return  # its run is alive, or it belongs to another user of the machine
    _remove(folder)
    os.close(lock)


def _remove(folder: Path) -> None:
    _leave(folder)
    shutil.rmtree(folder)


def _leave(folder: Path) -> None:
    if (folder / "pgdata").exists():
        from src import embedded

        embedded.leave(folder)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where NO_SKIPS is set, as in CI, a test that was skipped is a failure of the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("NO_SKIPS") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
