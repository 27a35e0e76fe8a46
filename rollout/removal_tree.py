"""`rollout remove-faiss` on a working tree: reading it, showing the difference, writing it, and the check on a copy.

Only a git work tree is written, so what is written can be taken back until it is committed. The check needs no gate: it
works in a temporary folder, with the commands that a person would give there.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rollout.errors import PreconditionError, RefusedError
from rollout.removal import PROJECT, Files, removed
from rollout.removal_leftovers import leftovers
from src.config import Settings
from src.tools.rag_tools.migration.settings import MigrationSettings

SHOWN = 40
LATER = ".later"
# Those that touch what the contracting revision changes, or nearly does.
TOUCHED = "ARGS=tests/integration -k 'documents or rag or schema or security or scope'"
WITHOUT = ("faiss", "langchain_community")
# The settings of whoever runs the check are none of the copy's; nor are the packages and the make of this process.
OURS = {*Settings.model_fields, *MigrationSettings.model_fields, "PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MFLAGS"}

Tell = Callable[[str], None]


def plan(tree: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of the tree, and those that are left. RefusedError where something of FAISS would stay in them."""
    before = read(tree)
    after = removed(before)
    if found := leftovers(after):
        more = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise RefusedError(
            "of FAISS there would be left, so nothing was changed; mark these lines (see rollout/removal.py) or list"
            " their files there:\n" + "\n".join([*found[:SHOWN], *more])
        )
    return before, after


def read(tree: Path) -> dict[str, bytes]:
    """Every file that git would track. PreconditionError where `tree` is not the project's."""
    if not (tree / PROJECT).is_file():
        raise PreconditionError(f"{tree} has no {PROJECT}; run this in a checkout of the project")
    with tempfile.TemporaryDirectory() as empty:
        # As of a new repository, so that it does not matter whether the tree is one.
        _git(tree, "init", "--quiet", "--bare", empty)
        of_tree = (f"--git-dir={empty}", "--work-tree=.")
        names = _git(tree, *of_tree, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    return {name: (tree / name).read_bytes() for name in sorted({*names} - {""}) if (tree / name).is_file()}


def refuse_unsaved(tree: Path) -> None:
    """What is not committed could not be told from the removal, nor be brought back."""
    if changed := _git(tree, "status", "--porcelain"):
        raise PreconditionError(f"{tree} has changes that are not committed; commit them first:\n{changed.rstrip()}")


def write(tree: Path, before: Files, after: Files) -> None:
    """Begun twice is no harm: what is gone is gone, and each file is written whole."""
    for name in sorted(before.keys() - after.keys()):
        (tree / name).unlink(missing_ok=True)
        for folder in (tree / name).relative_to(tree).parents:
            if folder.parts and (tree / folder).is_dir() and not any((tree / folder).iterdir()):
                (tree / folder).rmdir()
    for name, text in after.items():
        if before.get(name) != text:
            (tree / name).write_bytes(text)


def difference(before: Files, after: Files) -> Iterator[str]:
    """As git shows it without the text of deleted files."""
    for name in sorted(before):
        if name not in after:
            yield f"deleted: {name}"
        elif before[name] != after[name]:
            old, new = (files[name].decode().splitlines() for files in (before, after))
            yield from difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", n=1, lineterm="")


def check(tree: Path, tell: Tell) -> None:
    """Take FAISS out of a copy; lint and test that, before and after the contracting revision. RefusedError if not."""
    _, after = plan(tree)
    with tempfile.TemporaryDirectory(prefix="without-faiss-") as folder:
        copy = Path(folder)
        modes = {name: (tree / name).stat().st_mode for name in after}
        for name, text in after.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(text)
            (copy / name).chmod(modes[name])
        _make(copy, tell, "lint")
        _require_without(copy)
        _make(copy, tell, "test")
        for later in (copy / "alembic" / "versions").glob(f"*{LATER}"):
            later.rename(later.with_name(later.name.removesuffix(LATER)))
            _make(copy, tell, "lint")
            _make(copy, tell, "test", TOUCHED)


def _make(copy: Path, tell: Tell, *arguments: str) -> None:
    tell(f"make {' '.join(arguments)}, without FAISS")
    made = subprocess.run(  # noqa: S603 - our own Makefile
        ["make", *arguments], cwd=copy, env=_environment(), check=False  # noqa: S607
    )  # fmt: skip
    if made.returncode:
        raise RefusedError(f"`make {' '.join(arguments)}` fails once FAISS is removed; its output says where")


def _require_without(copy: Path) -> None:
    """That the packages are really absent is what makes the tests say anything."""
    code = f"import importlib.util as u; print(*[n for n in {WITHOUT} if u.find_spec(n)])"
    found = subprocess.run(  # noqa: S603 - a constant of this module
        [copy / ".venv" / "bin" / "python", "-c", code], check=True, capture_output=True, text=True, env=_environment()
    ).stdout.split()
    if found:
        raise RefusedError(f"the packages that are left still bring {', '.join(found)}")


def _environment() -> Mapping[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OURS}


def _git(tree: Path, *arguments: str) -> str:
    try:
        return subprocess.run(  # noqa: S603 - constants of this module
            ["git", "-C", tree, *arguments], check=True, capture_output=True, text=True  # noqa: S607
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise PreconditionError(f"git cannot read {tree}: {getattr(error, 'stderr', '') or error}") from error
