"""What becomes of the project's files when FAISS is removed: a list of paths, marked lines, and one import.

In a file that stays, lines between `migration` and `end of migration`, each alone in a comment, go; so does a single
line that ends with such a comment. Of the tests, files marked with `pytest.mark.migration` go, and then what no test
imports any more. Everything here is a function from texts to texts; who calls it reads and writes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from rollout.errors import RefusedError
from rollout.removal_lock import pruned

Files = Mapping[str, bytes]

PATHS = (
    "rollout/",
    "backend/src/tools/rag_tools/migration/",
    "benchmarks/",
    "deploy/grafana/dashboard.json",
    "deploy/prometheus/alerts.yml",
    "deploy/prometheus/alerts_test.yml",
    "docs/adopt.md",
    "docs/architecture.md",
    "docs/images/",
    "docs/observability.md",
    "docs/performance.md",
    "docs/runbook-trial.md",
    "docs/scaling.md",
    "RUNBOOK.md",
    "tests/acceptance/faults/",
    "tests/browser/",
    "tests/integration/state_machine/",
)
SEAM = "backend/src/tools/rag_tools/__init__.py"
ROUTED = b"from src.tools.rag_tools.migration.router import Router as Service\n"
ALONE = b"from src.tools.rag_tools.documents import Documents as Service\n"
LOCK, PROJECT = "requirements.lock", "pyproject.toml"

_OPEN, _SHUT = r"[ \t]*(?:#|<!--) migration(?: -->)?\n", r"[ \t]*(?:#|<!--) end of migration(?: -->)?\n"
_BLOCK = rf"^{_OPEN}(?:.*\n)*?{_SHUT}"
# Where an empty line stands before a block, those after it go with it.
_MARKED = re.compile(rf"(?:(?<=\n\n){_BLOCK}\n*|{_BLOCK}|^.*\S.*(?:  # migration|<!-- migration -->(?: \|)?)\n)", re.M)
_TEST = re.compile(r"^pytestmark = (?:\[[^\]]*)?pytest\.mark\.migration\b", re.M)


def removed(files: Files) -> dict[str, bytes]:
    """The files that stay, as they are then. RefusedError where the line of the seam is not as expected."""
    if ROUTED not in files.get(SEAM, b""):
        raise RefusedError(f"{SEAM} does not import the router in the one line that is to be replaced")
    kept = {path: text for path, text in files.items() if not (path.startswith(PATHS) or _is_marked_test(path, text))}
    kept = {path: _unmarked(path, text) for path, text in kept.items()}
    kept[SEAM] = _alone(kept[SEAM])
    _drop_idle_helpers(kept)
    kept[LOCK] = pruned(kept[LOCK].decode(), kept[PROJECT].decode()).encode()
    return kept


def _alone(text: bytes) -> bytes:
    """With the other import, which has its place among the others by the alphabet."""
    lines = text.replace(ROUTED, ALONE).splitlines(keepends=True)
    ours = [at for at, line in enumerate(lines) if line.startswith(b"from src.")]
    for at, line in zip(ours, sorted(lines[at] for at in ours), strict=True):
        lines[at] = line
    return b"".join(lines)


def _is_marked_test(path: str, text: bytes) -> bool:
    return path.startswith("tests/") and path.endswith(".py") and bool(_TEST.search(text.decode()))


def _unmarked(path: str, text: bytes) -> bytes:
    if b"migration" not in text:
        return text
    left = _MARKED.sub("", text.decode())
    return (left.rstrip("\n") + "\n").encode() if left != text.decode() else text


def _drop_idle_helpers(files: dict[str, bytes]) -> None:
    """Modules below tests/ that are no tests themselves and that nothing there imports, until none is left."""
    while True:
        tests = {path: text for path, text in files.items() if path.startswith("tests/") and path.endswith(".py")}
        imported = {name for path, text in tests.items() for name in _imports(text)}
        idle = [
            path
            for path in tests
            if not PurePosixPath(path).name.startswith(("test_", "conftest", "__init__"))
            and path.removesuffix(".py").replace("/", ".") not in imported
        ]
        if not idle:
            return
        for path in idle:
            del files[path]


def _imports(text: bytes) -> set[str]:
    """The modules that the text imports, and for `from a import b` also a.b."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
