"""The revision of a later release, which drops what the migration left: what stays goes on as if nothing had been."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.command import check, downgrade, upgrade
from alembic.config import Config
from alembic.script import ScriptDirectory

from src.database import Role
from src.tools.rag_tools.documents import Documents
from src.tools.rag_tools.migration.stages import Stage
from src.tools.rag_tools.pgvector_store import open_pool
from tests.support.embeddings import HashEmbeddings
from tests.support.routers import add_users, router_on, set_stage, write_note

pytestmark = pytest.mark.migration

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ROOT / "alembic" / "versions"
LATER = next(VERSIONS.glob("*.py.later"))
EVERYTHING = """
SELECT 'table ' || relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'S', 'i')
UNION ALL SELECT 'trigger ' || tgname FROM pg_trigger WHERE NOT tgisinternal
UNION ALL SELECT 'policy ' || polname FROM pg_policy
UNION ALL SELECT 'function ' || p.oid::regprocedure FROM pg_proc p
WHERE pronamespace = 'public'::regnamespace
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
"""


@pytest.fixture
def later(database: Any, tmp_path: Path) -> Config:
    """Alembic's configuration of the release that has the revision."""
    scripts = tmp_path / "alembic"
    shutil.copytree(ROOT / "alembic", scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / LATER.name).rename(scripts / "versions" / LATER.name.removesuffix(".later"))
    config = Config(ROOT / "alembic.ini")
    config.set_main_option("script_location", str(scripts))
    config.attributes["url"] = database.url(Role.OWNER)
    return config


@pytest.fixture
def documents(database: Any) -> Iterator[Documents]:
    """A process of the release without FAISS."""
    with open_pool(database.conninfo(Role.APP), 2, name="documents") as pool:
        made = Documents(pool, HashEmbeddings())
        made.start(loops=False)
        yield made


def everything(database: Any) -> set[str]:
    with database.connect() as connection:
        return {row[0] for row in connection.execute(EVERYTHING)}


def test_it_follows_the_head_that_there_is(later: Config) -> None:
    now = ScriptDirectory.from_config(Config(ROOT / "alembic.ini")).get_current_head()
    script = ScriptDirectory.from_config(later)
    assert script.get_revision("head").down_revision == now


def test_what_was_made_for_the_migration_goes_and_nothing_else(database: Any, later: Config) -> None:
    script = ScriptDirectory.from_config(later)
    whole, made = everything(database), set[str]()
    for name in reversed(script.get_revision("head").module.MADE_BY):
        revision = script.get_revision(name)
        downgrade(later, revision.revision)
        after = everything(database)
        downgrade(later, revision.down_revision)
        made |= after - everything(database)
    upgrade(later, "head")
    assert everything(database) == whole - made
    check(later)
    downgrade(later, "-1")
    assert everything(database) == whole


def test_an_installation_in_use_goes_on_without_the_tables(
    database: Any, documents: Documents, later: Config, tmp_path: Path
) -> None:
    """Uploaded with the ledger, in use by a release that does not know it, on the schema before and after."""
    (user,) = add_users(database, 1)
    with database.connect(autocommit=True) as connection:
        set_stage(connection, Stage.COMPLETE, 100)
    with router_on(database, tmp_path) as router:
        made = [upload(router, user, tmp_path, number) for number in range(3)]
    use(documents, user, tmp_path, found=made, gone=made.pop())
    upgrade(later, "head")
    use(documents, user, tmp_path, found=made, gone=made.pop())
    with database.connect(autocommit=True) as connection:
        connection.execute("DELETE FROM users")
    assert documents.has_documents(user) is False


def upload(documents: Documents, user: int, folder: Path, number: int) -> int:
    path = write_note(folder, f"{number}.md", f"Note {number} says something of its own.")
    document_id = documents.receive(user, path, path.name)
    documents.index(document_id)
    return document_id


def use(documents: Documents, user: int, folder: Path, *, found: list[int], gone: int) -> None:
    """Upload, search, delete, and what a crash would leave to be done."""
    assert {hit.document_id for hit in documents.query(user, "note", 9)} >= {*found, gone}
    documents.delete(user, gone)
    new = upload(documents, user, folder, 100 + gone)
    documents.resume()
    left = {hit.document_id for hit in documents.query(user, "note", 9)}
    assert {*found, new} <= left
    assert gone not in left
