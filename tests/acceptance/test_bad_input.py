"""What cannot be migrated as it is: each is told with what, where and what to do next, and nothing is changed."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psycopg
import pytest

from src.database import Role, url_of
from src.tools.rag_tools.migration.faiss_store import FaissStore
from tests.support import small
from tests.support.commands import Commands, Ended, commands_ready
from tests.support.small import Small
from tests.support.unchanged import contents, files

pytestmark = pytest.mark.migration

MISSING = 5


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with commands_ready(tmp_path_factory.mktemp("commands")) as ready:
        yield ready


@pytest.fixture(scope="module")
def adopted(postgres: Any, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """In stage `off`. Shared: nothing here changes its database."""
    with small.installed(postgres, template_database, tmp_path_factory.mktemp("adopted")) as made:
        yield made


@pytest.fixture
def copied(adopted: Small, tmp_path: Path) -> Small:
    """With files of the test's own."""
    shutil.copytree(adopted.folder, tmp_path / "copy")
    return Small(tmp_path / "copy", adopted.database, adopted.installation)


@pytest.fixture
def served(copied: Small) -> Small:
    """A backend has run here: beside the index is its journal."""
    FaissStore.open(copied.index).close()
    return copied


@pytest.fixture
def rollout(commands: Commands, copied: Small) -> Callable[..., Ended]:
    """A command on the copy that must be refused for something missing, and change nothing."""

    def refused(*arguments: str, **settings: str) -> Ended:
        before, on_disk = contents(copied.database), files(copied.folder)
        ended = commands(copied.folder, copied.environment() | settings, *arguments, "--json")
        assert ended.code == MISSING, ended
        assert "Traceback" not in ended.err
        assert contents(copied.database) == before
        assert files(copied.folder) == on_disk
        return ended

    return refused


# -- the directory


def no_index(index: Path) -> None:
    (index / "index.faiss").unlink()


def no_pickle(index: Path) -> None:
    (index / "index.pkl").unlink()


def nothing_at_all(index: Path) -> None:
    shutil.rmtree(index)


def truncated(index: Path) -> None:
    os.truncate(index / "index.faiss", (index / "index.faiss").stat().st_size // 2)


def truncated_pickle(index: Path) -> None:
    os.truncate(index / "index.pkl", (index / "index.pkl").stat().st_size - 20)


def mapping_lacks_one(index: Path) -> None:
    _change_pickle(index, lambda docstore, mapping: (docstore, dict(list(mapping.items())[:-1])))


def mapping_names_another(index: Path) -> None:
    _change_pickle(index, lambda docstore, mapping: (docstore, mapping | {0: "nobody knows this chunk"}))


def another_dimension(index: Path) -> None:
    _change_vectors(index, lambda vectors: vectors[:, :768] / np.linalg.norm(vectors[:, :768], axis=1, keepdims=True))


def longer_than_one(index: Path) -> None:
    def stretched(vectors: Any) -> Any:
        vectors[7] *= 1.5
        return vectors

    _change_vectors(index, stretched)


def not_a_number(index: Path) -> None:
    def broken(vectors: Any) -> Any:
        vectors[3, 5] = np.nan
        return vectors

    _change_vectors(index, broken)


def inner_product(index: Path) -> None:
    _change_vectors(index, lambda vectors: vectors, faiss.IndexFlatIP)


def _change_pickle(index: Path, change: Callable[[Any, dict[int, str]], Any]) -> None:
    path = index / "index.pkl"
    path.write_bytes(pickle.dumps(change(*pickle.loads(path.read_bytes()))))


def _change_vectors(index: Path, change: Callable[[Any], Any], kind: Any = faiss.IndexFlatL2) -> None:
    path = str(index / "index.faiss")
    old = faiss.read_index(path)
    vectors = np.ascontiguousarray(change(old.reconstruct_n(0, old.ntotal)), dtype=np.float32)
    new = kind(vectors.shape[1])
    new.add(vectors)
    faiss.write_index(new, path)


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str, by: Callable[[str], object]) -> None:
        self.command, self.by = command, by

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return self.by, (self.command,)


def planted(by: Callable[[str], object], command: str) -> Callable[[Path], None]:
    def plant(index: Path) -> None:
        _change_pickle(index, lambda docstore, mapping: (docstore, mapping, Planted(command, by)))

    return plant


TOUCH = "touch ../planted planted"
DAMAGE: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (no_index, ("no index.faiss", "restore")),
    (no_pickle, ("no index.pkl", "restore")),
    (nothing_at_all, ("FAISS_INDEX_PATH",)),
    (truncated, ("index.faiss cannot be read", "restore")),
    (truncated_pickle, ("index.pkl cannot be read", "restore")),
    (planted(os.system, TOUCH), ("index.pkl names posix.system", "nothing of the file was run")),
    (planted(eval, f"__import__('os').system({TOUCH!r})"), ("index.pkl names builtins.eval", "restore")),
    (mapping_lacks_one, ("index.pkl maps", "restore")),
    (mapping_names_another, ("'nobody knows this chunk'", "restore")),
    (another_dimension, ("dimension 768, 1536 needed", "text-embedding-3-small")),
    (longer_than_one, ("position 7", "length 1.5, 1 needed")),
    (not_a_number, ("position 3", "length nan")),
    (inner_product, ("IndexFlatIP", "IndexFlatL2 is needed")),
]


@pytest.mark.parametrize(
    "command",
    [
        ("assign-owners", "--execute"),
        ("assign-owners", "--from-sqlite", "sqlite:///victus.db"),
        ("check",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_a_directory_that_is_not_whole(
    rollout: Callable[..., Ended],
    copied: Small,
    damage: Callable[[Path], None],
    said: tuple[str, ...],
    command: tuple[str, ...],
) -> None:
    damage(copied.index)
    ended = rollout(*command)
    told = ended.out.replace("\\\\", "\\")
    for words in (*said, "faiss_index"):
        assert words in told, ended
    assert not list(copied.folder.parent.rglob("planted"))


def test_the_planted_command_would_have_run(copied: Small) -> None:
    """Else the test of it shows nothing."""
    planted(os.system, f"cd '{copied.folder}' && {TOUCH}")(copied.index)
    pickle.loads((copied.index / "index.pkl").read_bytes())
    assert len(list(copied.folder.parent.rglob("planted"))) == 2


@pytest.mark.parametrize("damage", [truncated, planted(os.system, TOUCH), longer_than_one])
def test_such_a_directory_is_not_rehearsed_either(
    commands: Commands, postgres: Any, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    installation = small.made_installation(postgres, tmp_path / "old")
    damage(installation.index)
    before = files(tmp_path / "old")
    given = ("rehearse", "--legacy", "old", "--work", "work", "--json")
    ended = commands(tmp_path, {}, *given)
    assert ended.json["exit_code"] == MISSING, ended
    assert "the installation is as it was" in ended.json["error"]
    assert files(tmp_path / "old") == before
    assert not list(tmp_path.rglob("planted"))


@pytest.mark.usefixtures("served")
def test_an_index_of_another_model(rollout: Callable[..., Ended]) -> None:
    """The installation's vectors are not those of the configured, local model."""
    ended = rollout("check")
    (model,) = [each for each in ended.json["criteria"] if each["name"] == "model"]
    assert (model["verdict"], model["n"]) == ("fail", 20)
    assert "EMBEDDING_PROVIDER and EMBEDDING_MODEL" in model["todo"]
    assert "model is smallest cosine" in rollout("advance", "--execute").json["error"]


def test_a_document_whose_file_is_gone(rollout: Callable[..., Ended], served: Small) -> None:
    (served.folder / "uploads" / "heaps.docx").unlink()
    told = rollout("assign-owners", "--execute").json["error"]
    assert f"1 documents have no file in {served.folder / 'uploads'}, first document 1 of user 1" in told
    assert "--accept-missing-files 1" in told


# -- the database


@pytest.mark.parametrize(
    "command",
    ["status", "check", "advance --execute", "rollback --execute", "assign-owners --execute", "backfill --execute",
     "settle --execute", "verify", "diffs", "save-faiss --execute", "quarantine list", "instances list",
     "import-sql sqlite:///victus.db --execute"],
)  # fmt: skip
def test_sqlite_where_postgresql_is_needed(rollout: Callable[..., Ended], command: str) -> None:
    ended = rollout(*command.split(), DATABASE_URL="sqlite:///victus.db", DATABASE_ROLLOUT_URL="")
    assert "documents need PostgreSQL with pgvector, but the database is sqlite:///victus.db" in ended.json["error"]
    assert "rollout import-sql sqlite:///victus.db" in ended.json["error"]


def test_no_url_for_the_bulk_role(rollout: Callable[..., Ended]) -> None:
    assert "set DATABASE_ROLLOUT_URL" in rollout("status", DATABASE_ROLLOUT_URL="").json["error"]


@pytest.mark.parametrize("secret", ["hunter2"])
def test_a_server_that_is_away_is_told_at_once_and_without_the_password(
    rollout: Callable[..., Ended], tmp_path: Path, secret: str
) -> None:
    url = f"postgresql://victus_rollout:{secret}@/victus?host={tmp_path}"
    ended = rollout("status", DATABASE_ROLLOUT_URL=url)
    assert "cannot be reached as victus_rollout" in ended.json["error"]
    assert "because: connection" in ended.err
    assert secret not in ended.err + ended.out


@pytest.fixture
def own(postgres: Any, template_database: str, commands: Commands, tmp_path: Path) -> Iterator[Small]:
    """With a database of the test's own, to be spoilt."""
    with small.installed(postgres, template_database, tmp_path / "own") as made:
        yield made


def spoil(made: Small, statement: str) -> None:
    with psycopg.connect(made.database.superuser_conninfo(), autocommit=True) as connection:
        connection.execute(statement)


def refused(commands: Commands, made: Small, *arguments: str, **settings: str) -> Ended:
    before = contents(made.database)
    ended = commands(made.folder, made.environment() | settings, *arguments, "--json")
    assert ended.json["exit_code"] == MISSING, ended
    assert contents(made.database) == before
    return ended


def test_pgvector_is_missing(commands: Commands, own: Small) -> None:
    spoil(own, "DROP EXTENSION vector CASCADE")
    for command in ("status", "check", "verify"):
        told = refused(commands, own, command).json["error"]
        assert "pgvector is missing in this database; run CREATE EXTENSION vector" in told


def test_pgvector_is_too_old(commands: Commands, own: Small) -> None:
    spoil(own, "UPDATE pg_extension SET extversion = '0.7.4' WHERE extname = 'vector'")
    for command in (("check",), ("advance", "--execute")):
        ended = refused(commands, own, *command)
        assert "pgvector 0.7.4 is too old, 0.8.4 or later is needed" in ended.out
        assert "ALTER EXTENSION vector UPDATE" in ended.out


def test_a_schema_without_the_migration(commands: Commands, own: Small) -> None:
    spoil(own, "DROP TABLE rollout_transitions")
    for command in ("status", "check", "backfill"):
        assert "alembic upgrade head" in refused(commands, own, command).json["error"]


@pytest.mark.parametrize(
    ("role", "why"),
    [(Role.OWNER, "owns the table"), (Role.ROLLOUT, "bypasses it"), (None, "is a superuser")],
)
def test_a_backend_that_could_read_past_row_level_security(
    rollout: Callable[..., Ended], served: Small, role: Role | None, why: str
) -> None:
    url = url_of(served.database.superuser_conninfo()) if role is None else served.database.url(role)
    for command in (("check",), ("advance", "--execute")):
        ended = rollout(*command, DATABASE_URL=url)
        assert f"is not held by row-level security ({why})" in ended.out
        assert "DATABASE_URL must name victus_app" in ended.out


# -- rehearse


@pytest.mark.parametrize("part", ["victus.db", "faiss_index/index.faiss", "faiss_index/index.pkl"])
def test_a_folder_that_is_no_installation(rollout: Callable[..., Ended], copied: Small, part: str) -> None:
    (copied.folder / part).unlink()
    told = rollout("rehearse", "--legacy", ".", "--work", str(copied.folder.parent / "work")).json["error"]
    assert f"{part} is missing" in told
    assert "name the folder that holds victus.db, uploads/ and faiss_index/" in told


def test_a_working_folder_in_use_or_inside_the_installation(rollout: Callable[..., Ended], copied: Small) -> None:
    used = copied.folder.parent / "used"
    used.mkdir()
    (used / "result.json").write_text('{"verdict": "pass"}')
    assert "is not an empty folder" in rollout("rehearse", "--legacy", ".", "--work", str(used)).json["error"]
    assert "which is never changed" in rollout("rehearse", "--legacy", ".", "--work", "inside").json["error"]
    assert not (copied.folder / "inside").exists()
