"""What would be left of FAISS after its removal, or point at what has gone: nothing may."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator, Mapping

WORDS = re.compile(r"faiss|shadow|dualwrite|ledger", re.I)
HISTORY = ("CHANGELOG.md", "alembic/versions/", "docs/decisions/")
"""They tell what was, and keep doing so."""
OURS = ("src", "tests", "rollout")

_MARKER = re.compile(r"^\s*(?:#|<!--) (?:end of )?migration(?: -->)?\s*$")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.M)
_CODE = re.compile(r"^```.*?^```", re.M | re.S)


def leftovers(files: Mapping[str, bytes]) -> list[str]:
    """A line for each word, marker without its partner, dead link and dead import in these files; by path."""
    found = []
    for path, text in sorted(files.items()):
        if b"\0" in text:
            continue
        found += list(_words(path, text.decode()))
        if path.endswith(".md"):
            found += list(_dead_links(path, text.decode(), files))
        if path.endswith(".py"):
            found += [f"{path}: {name} is imported and gone" for name in sorted(_dead_imports(text, files))]
    return found


def _words(path: str, text: str) -> Iterator[str]:
    told = not path.startswith(HISTORY)
    if told and WORDS.search(path):
        yield f"{path}: its name"
    for number, line in enumerate(text.splitlines(), 1):
        if _MARKER.match(line) or (told and WORDS.search(line)):
            yield f"{path}:{number}: {line.strip()}"


def _dead_links(path: str, text: str, files: Mapping[str, bytes]) -> Iterator[str]:
    for target in _LINK.findall(_CODE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(posixpath.dirname(path), name)) if name else path
        there = place in files or any(each.startswith(f"{place}/") for each in files)
        if not there or (anchor and anchor not in _anchors(files[place].decode())):
            yield f"{path}: the link {target} leads nowhere"


def _anchors(text: str) -> set[str]:
    """The headings, as GitHub names them."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in _HEADING.findall(_CODE.sub("", text))}


def _dead_imports(text: bytes, files: Mapping[str, bytes]) -> Iterator[str]:
    """Our own modules only; what a module holds is for the type checker and the tests."""
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            plain_folder = not _is_module(node.module, files) and _is_folder(node.module, files)
            names = [f"{node.module}.{alias.name}" for alias in node.names] if plain_folder else [node.module]
        yield from (name for name in names if name.split(".")[0] in OURS and not _is_module(name, files))


def _is_module(name: str, files: Mapping[str, bytes]) -> bool:
    path = name.replace(".", "/")
    return any(f"{root}{path}{end}" in files for root in ("", "backend/") for end in (".py", "/__init__.py"))


def _is_folder(name: str, files: Mapping[str, bytes]) -> bool:
    path = name.replace(".", "/")
    return any(each.startswith((f"{path}/", f"backend/{path}/")) for each in files)
