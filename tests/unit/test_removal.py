"""What FAISS' removal makes of files, shown on small ones, and that of this project nothing would be left behind."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from rollout.errors import PreconditionError, RefusedError
from rollout.removal import ALONE, ROUTED, SEAM, removed
from rollout.removal_leftovers import leftovers
from rollout.removal_lock import pruned
from rollout.removal_tree import difference, plan, read, refuse_unsaved, write

pytestmark = pytest.mark.migration

ROOT = Path(__file__).resolve().parents[2]
PROJECT = '[project]\ndependencies = ["kept"]\n'
LOCK = "kept==1 \\\n    --hash=sha256:00\n    # via victus-backend (pyproject.toml)\n"
ALONE_IS = "backend/src/tools/rag_tools/documents.py"
LEAST = {SEAM: ROUTED, ALONE_IS: b"", "pyproject.toml": PROJECT.encode(), "requirements.lock": LOCK.encode()}


def left(path: str, text: str) -> str | None:
    """What becomes of a file of that text; None where it goes."""
    found = removed({**LEAST, path: text.encode()}).get(path)
    return None if found is None else found.decode()


# -- this project


def test_of_this_project_nothing_of_faiss_would_be_left() -> None:
    assert leftovers(removed(read(ROOT))) == []


def test_in_this_project_what_is_left_still_has_its_parts() -> None:
    after = removed(read(ROOT))
    for path in ("README.md", "Makefile", ".ci/run", "docker-compose.yml", "tests/conftest.py"):
        assert len(after[path].splitlines()) > 15, path
    assert "backend/src/tools/rag_tools/pgvector_store.py" in after
    assert after[SEAM].count(ALONE) == 1
    assert not any(path.startswith(("rollout/", "backend/src/tools/rag_tools/migration/")) for path in after)


# -- lines


@pytest.mark.parametrize(
    ("text", "then"),
    [
        ("a\n# migration\nb\n\nc\n# end of migration\nd\n", "a\nd\n"),
        ("a\n\n# migration\nb\n# end of migration\n\nd\n", "a\n\nd\n"),
        ("a\n\n\n# migration\nb\n\n\n# end of migration\n\n\nd\n", "a\n\n\nd\n"),
        ("  a:\n    # migration\n    b\n    # end of migration\n    c\n", "  a:\n    c\n"),
        ("a\n<!-- migration -->\nb\n<!-- end of migration -->\n", "a\n"),
        ("# migration\na\n# end of migration\nb\n# migration\nc\n# end of migration\nd\n", "b\nd\n"),
        ("a = 1,  # migration\nb = 2,\n", "b = 2,\n"),
        ("| a | b |\n| c | d <!-- migration --> |\n", "| a | b |\n"),
        ("the migration is told of here\n", "the migration is told of here\n"),
        ("no marker, and two lines at its end\n\n", "no marker, and two lines at its end\n\n"),
    ],
)
def test_marked_lines_go_and_the_rest_stays_as_it_is(text: str, then: str) -> None:
    assert left("some/file", text) == then


@pytest.mark.parametrize("text", ["# migration\na\n", "a\n# end of migration\n", "<!-- migration -->\n"])
def test_a_marker_without_its_partner_is_left_over(text: str) -> None:
    assert leftovers(removed({**LEAST, "some/file": text.encode()})) != []


def test_the_seam_must_be_as_expected() -> None:
    with pytest.raises(RefusedError, match="does not import the router"):
        removed({**LEAST, SEAM: ROUTED.replace(b" as Service", b"")})


# -- tests and their helpers


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("import pytest\npytestmark = pytest.mark.migration\n", False),
        ("pytestmark = [pytest.mark.migration, pytest.mark.slow]\n", False),
        ("pytestmark = [\n    # why\n    pytest.mark.slow,\n    pytest.mark.migration,\n]\n", False),
        ("pytestmark = [pytest.mark.slow]\n@pytest.mark.migration\ndef test_a(): ...\n", True),
        ("# pytestmark = pytest.mark.migration\n", True),
    ],
)
def test_a_file_of_tests_goes_by_its_mark(text: str, stays: bool) -> None:
    assert (left("tests/unit/test_a.py", text) is not None) is stays


def test_a_helper_goes_once_no_test_that_stays_needs_it() -> None:
    after = removed(
        LEAST
        | {
            "tests/unit/test_a.py": b"from tests.support import first\n",
            "tests/unit/test_b.py": b"pytestmark = pytest.mark.migration\nfrom tests.support.fourth import x\n",
            "tests/support/first.py": b"def make():\n    import tests.support.second\n",
            "tests/support/second.py": b"",
            "tests/support/third.py": b"from tests.support.first import x\n",
            "tests/support/fourth.py": b"from tests.support.third import x\n",
            "tests/conftest.py": b"",
        }
    )
    names = {path.rpartition("/")[2] for path in after if path.startswith("tests/")}
    assert names == {"test_a.py", "first.py", "second.py", "conftest.py"}


# -- locked packages


def test_a_package_goes_when_nobody_who_stays_needs_it() -> None:
    def entry(name: str, *via: str) -> str:
        told = f" {via[0]}" if len(via) == 1 else "".join(f"\n    #   {each}" for each in via)
        return f"{name}==1 \\\n    --hash=sha256:00\n    # via{told}\n"

    project = "victus-backend (pyproject.toml)"
    lock = (
        entry("both", "gone", "kept")
        + entry("circular-a", "circular-b", "gone")
        + entry("circular-b", "circular-a")
        + entry("gone", project)
        + entry("kept[extra]", project)
        + entry("named-no-more", "kept", project)
        + entry("of-a-kept-one", "both", "circular-a", "kept")
        + entry("only-of-the-gone", "gone")
    )
    assert pruned(lock, '[project]\ndependencies = ["Kept[extra]>=1"]\n[project.optional-dependencies]\na = []\n') == (
        entry("both", "kept")
        + entry("kept[extra]", project)
        + entry("named-no-more", "kept")
        + entry("of-a-kept-one", "both", "kept")
    )


# -- what is left over


def test_words_dead_links_and_names_are_left_over_and_history_may_tell() -> None:
    found = leftovers(
        {
            "CHANGELOG.md": b"FAISS, [gone](RUNBOOK.md)",
            "docs/decisions/a.md": b"The shadow.",
            "src/a.py": b"x = 1\nopen('Faiss')\n",
            "src/shadow_play.py": b"",
            "src/a.bin": b"\0faiss",
            "README.md": b"[a](docs/b.md#the-first-one) [b](docs/b.md#second) [c](docs) [d](mailto:a@b.example)"
            b" [e](#here)\nOf Faiss.\n# Here\n```\n[f](nowhere.md)\n```\n",
            "docs/b.md": b"# The first one!\n[up](../README.md)\n",
        }
    )
    assert found == [
        "CHANGELOG.md: the link RUNBOOK.md leads nowhere",
        "README.md:2: Of Faiss.",
        "README.md: the link docs/b.md#second leads nowhere",
        "src/a.py:2: open('Faiss')",
        "src/shadow_play.py: its name",
    ]


def test_what_a_file_imports_of_ours_must_be_there() -> None:
    files = {
        "backend/src/a.py": b"import os.path\nimport src.gone\nfrom src.b import c\nfrom src.b.d import e\n",
        "backend/src/b/__init__.py": b"",
        "tests/test_a.py": b"def f():\n    from tests.support import kept, gone\n    import rollout.cli\n",
        "tests/support/kept.py": b"from . import x\nfrom unknown.package import y\n",
    }
    assert leftovers(files) == [
        "backend/src/a.py: src.b.d is imported and gone",
        "backend/src/a.py: src.gone is imported and gone",
        "tests/test_a.py: rollout.cli is imported and gone",
        "tests/test_a.py: tests.support.gone is imported and gone",
    ]


# -- on a work tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        **LEAST,
        "rollout/cli.py": b"faiss\n",
        "README.md": b"One.\n\n<!-- migration -->\nTwo.\n<!-- end of migration -->\n",
        "run": b"# migration\nfaiss\n# end of migration\nrun\n",
        ".gitignore": b"ignored\n",
        "ignored": b"faiss\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    (tmp_path / "run").chmod(0o755)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(tree: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    return subprocess.run(["git", "-C", tree, *identity, *arguments], check=True, capture_output=True, text=True).stdout


def commit(tree: Path) -> None:
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "all")


def test_a_tree_is_written_as_the_difference_says_and_once_more_changes_nothing(tree: Path) -> None:
    before, after = plan(tree)
    told = list(difference(before, after))
    assert "deleted: rollout/cli.py" in told
    assert {"-Two.", "-faiss", f"+{ALONE.decode().rstrip()}"} <= set(told)
    write(tree, before, after)
    assert not (tree / "rollout").exists()
    assert (tree / "README.md").read_text() == "One.\n"
    assert (tree / "run").stat().st_mode & 0o111, "what could be run still can"
    assert (tree / "ignored").read_text() == "faiss\n", "nothing that git does not know is touched"
    write(tree, before, after)
    assert read(tree) == after


def test_a_tree_with_something_unmarked_is_refused_by_line(tree: Path) -> None:
    (tree / "new.py").write_text("a\nimport faiss\n")
    with pytest.raises(RefusedError, match="new\\.py:2: import faiss"):
        plan(tree)


def test_a_tree_with_changes_that_are_not_committed_is_refused(tree: Path) -> None:
    refuse_unsaved(tree)
    (tree / "run").write_text("run\n")
    with pytest.raises(PreconditionError, match=r"not committed.*\n.*run"):
        refuse_unsaved(tree)
    commit(tree)
    refuse_unsaved(tree)


def test_a_tree_is_read_without_a_repository_and_written_only_with_one(tree: Path) -> None:
    whole = read(tree)
    shutil.rmtree(tree / ".git")
    assert read(tree) == whole
    with pytest.raises(PreconditionError, match="git cannot read"):
        refuse_unsaved(tree)


def test_what_is_not_the_project_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match=r"has no pyproject\.toml"):
        read(tmp_path)
