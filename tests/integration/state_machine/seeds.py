"""`python -m tests.integration.state_machine.seeds [NAME ...]`: does the machine find the bugs it is there for?

Each patch in `seeds/` puts one bug into a copy of the tree; its first paragraph says which, and which promise falls.
Prints for each what the machine needed to see it; exit code 1 where one was not seen in MOST_EXAMPLES. A patch that
does not apply any more is an error: the code it was written for has changed, so write it anew. That the tree as it is
passes is the test's to show. A run that is killed leaves a folder `victus-seeds-*` in the temporary folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path(__file__).parent / "seeds"
COPIED = ("backend/src", "rollout", "tests")
HUNT = "tests.integration.state_machine.hunt"
TEMPLATE = "seeds_template"
MOST_EXAMPLES = 3000
"""The best hidden of them need some hundreds. A count and no time: a busy machine changes nothing."""
AT_ONCE = 2


class PatchOutdatedError(Exception):
    """The patch no longer fits the tree."""


@dataclass(frozen=True)
class Found:
    """`what`: the property that fell, None where none did. `output`: all that the hunt said."""

    name: str
    seconds: float
    output: str

    @property
    def what(self) -> str | None:
        return next((line for line in self.output.splitlines() if line.startswith("violated: ")), None)

    @property
    def examples(self) -> str:
        return next((line for line in self.output.splitlines() if line.endswith(" examples")), "")

    def __str__(self) -> str:
        return f"{self.name:34} {self.seconds:6.1f} s {self.examples:>14}  {self.what or 'NOT FOUND'}"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.patch"))


def prose(name: str) -> str:
    """The patch's first paragraph."""
    return (FOLDER / f"{name}.patch").read_text().partition("\n\n")[0]


def apply(name: str, tree: Path, *, check: bool = False) -> None:
    """Raises PatchOutdatedError."""
    command = ["git", "apply", *(["--check"] if check else []), str(FOLDER / f"{name}.patch")]
    # Within a repository git would look for the files from its root, and silently skip those outside of `tree`.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise PatchOutdatedError(f"{name}.patch does not apply any more: {done.stderr.strip()}")


def copy_tree(target: Path) -> None:
    """What a hunt needs, as it is in the working tree."""
    for part in COPIED:
        shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))


@contextmanager
def patched(name: str, folder: Path) -> Iterator[Path]:
    tree = folder / name
    copy_tree(tree)
    try:
        apply(name, tree)
        yield tree
    finally:
        shutil.rmtree(tree)


def hunted(name: str, folder: Path) -> Found:
    """Hunts the bug `name` on the server in `folder`."""
    with patched(name, folder) as tree:
        command = [sys.executable, "-m", HUNT, str(folder / "server"), TEMPLATE, str(MOST_EXAMPLES)]
        paths = os.pathsep.join([str(tree), str(tree / "backend")])
        begun = time.monotonic()
        done = subprocess.run(
            command, cwd=tree, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
        )
    return Found(name, time.monotonic() - begun, done.stdout + done.stderr)


@contextmanager
def server_with_template() -> Iterator[Path]:
    """A folder whose `server` runs as long as this lasts."""
    from src import embedded
    from tests.support.database import make_template, never_wait_for_the_disk

    folder = Path(tempfile.mkdtemp(prefix="victus-seeds-"))
    try:
        server = embedded.start(folder / "server")
        never_wait_for_the_disk(server)
        make_template(server, TEMPLATE)
        yield folder
    finally:
        embedded.leave(folder / "server")
        shutil.rmtree(folder)


def main(chosen: Sequence[str]) -> int:
    missed = []
    for name in chosen or names():
        apply(name, ROOT, check=True)
    with server_with_template() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        for found in pool.map(lambda name: hunted(name, folder), chosen or names()):
            print(found, flush=True)
            if found.what is None:
                missed.append(found)
    for each in missed:
        print(f"\n{each.name} was not seen in {MOST_EXAMPLES} examples:\n{prose(each.name)}\n{each.output}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
