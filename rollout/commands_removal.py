"""Commands about the end: the archive of the FAISS directory, and taking FAISS out of the code."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rollout.commands_steps import Override, gate_text
from rollout.errors import UsageError
from rollout.options import Execute, Json, overrides
from rollout.output import Answer, failures, say, stderr

if TYPE_CHECKING:
    from rollout.archive import Archived
    from rollout.control import Control

Restore = Annotated[
    Path | None,
    typer.Option("--restore", help="Unpack FILE into this new folder, open it, and compare it with what is in use."),
]
Tree = Annotated[Path, typer.Option("--tree", help="The working tree, a git checkout of the project.")]
Check = Annotated[
    bool, typer.Option("--check", help="On a copy: lint and test what is left, without FAISS' packages. Needs no gate.")
]


def archive(
    file: Annotated[Path, typer.Argument(help="The tar file.")],
    restore: Restore = None,
    execute: Execute = False,
    as_json: Json = False,
) -> None:
    """Keep the FAISS directory as a tar with the hash of each file; with --restore, see that it opens again.

    Before it is written, FAISS is given what it is owed, deletions too, and saved. The gate `removal` asks for an
    archive of the last stage that was restored once; both are recorded. Exit code 3: the archive differs.
    """
    with failures("archive", as_json):
        from rollout import archive as archives
        from rollout.control import control

        with control() as made:
            if not execute:
                say(_would_archive(made, file, restore), as_json)
                return
            done = archives.write(made, file) if restore is None else archives.restore(made, file, restore)
        text = _archived_text(done, file, restore)
        say(Answer("archive", {"executed": True, **asdict(done)}, text, 3 if done.differences else 0), as_json)


def remove_faiss(
    tree: Tree = Path(),
    check: Check = False,
    execute: Execute = False,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Take FAISS, the migration and this command out of a working tree; refuses until the gate `removal` passes.

    Without --execute: the difference, and nothing is changed. Look at the result with `git diff`, and run `make setup
    lint test` before it is committed. The tables go a release later; alembic/versions has the revision.
    """
    with failures("remove-faiss", as_json):
        from rollout import removal_tree

        if check:
            if execute or override:
                raise UsageError("--check works on a copy; leave out --execute and --override")
            removal_tree.check(tree, lambda text: stderr.print(text, markup=False))
            text = ["without FAISS the rest passes `make lint test`, and again after the contracting revision"]
            say(Answer("remove-faiss", {"executed": False, "checked": True}, text), as_json)
            return
        before, after = removal_tree.plan(tree)
        if execute:
            _require_gate(overrides(override or []))
            removal_tree.refuse_unsaved(tree)
        lines = list(removal_tree.difference(before, after))
        text = [*lines, f"{len(before) - len(after)} files deleted, {_changed(before, after)} changed"]
        if execute:
            removal_tree.write(tree, before, after)
        else:
            text[-1] = f"would be: {text[-1]} (add --execute)"
        say(Answer("remove-faiss", {"executed": execute, "difference": lines}, text), as_json)


def _require_gate(given: dict[str, str]) -> None:
    from rollout.control import control
    from rollout.gates import require
    from rollout.removal_checks import removal_gate

    with control() as made:
        gate = removal_gate(made, made.view(), given)
    for part in gate_text(gate):
        stderr.print(part)
    require(gate)


def _changed(before: dict[str, bytes], after: dict[str, bytes]) -> int:
    return sum(before[name] != text for name, text in after.items())


def _would_archive(made: Control, file: Path, restore: Path | None) -> Answer:
    counts = made.faiss.counts()
    chunks = counts.owned + counts.unowned
    does = f"write {chunks} chunks to {file}" if restore is None else f"restore {file} into {restore}"
    return Answer("archive", {"executed": False, "chunks": chunks}, [f"would {does}; add --execute"])


def _archived_text(done: Archived, file: Path, restore: Path | None) -> list[str]:
    if restore is None:
        return [
            f"wrote {done.chunks} chunks to {file}, sha256 {done.sha256}",
            f"next: `rollout archive {file} --restore FOLDER --execute`, then keep it on another machine",
        ]
    if done.differences:
        return [f"restored {done.chunks} chunks into {restore}: {done.differences} differ from what is in use"]
    known = "recorded" if done.recorded else "not recorded: this database knows of no archive with this hash"
    return [f"restored {done.chunks} chunks into {restore}: they are what is in use; {known}"]
