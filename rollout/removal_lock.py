"""The locked packages without those that only the migration needs. No version moves, and no network is asked.

Each package of the lock says in `# via` who needs it; what neither the project nor a package that stays needs, goes.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

PROJECT = "(pyproject.toml)"
_ENTRY = re.compile(r"^(?=[A-Za-z0-9])", re.M)
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_VIA = re.compile(r"^    # via(?: (?P<only>.+))?\n(?P<more>(?:    #   .+\n)*)", re.M)


def pruned(lock: str, project: str) -> str:
    """`lock` as pip compiles it for what `project`, the text of pyproject.toml, names now."""
    named = set(_requirements(project))
    entries = {_name(entry): entry for entry in _ENTRY.split(lock) if entry}
    parents = {name: _parents(entry) for name, entry in entries.items()}
    kept = {name for name in entries if name in named and any(PROJECT in each for each in parents[name])}
    while more := {name for name in entries if name not in kept and kept.intersection(parents[name])}:
        kept |= more
    return "".join(_rewritten(entry, parents[name], named, kept) for name, entry in entries.items() if name in kept)


def _requirements(project: str) -> Iterator[str]:
    table = tomllib.loads(project)["project"]
    for group in (table["dependencies"], *table.get("optional-dependencies", {}).values()):
        yield from map(_name, group)


def _rewritten(entry: str, parents: list[str], named: set[str], kept: set[str]) -> str:
    """The entry with those who still need it."""
    left = [each for each in parents if (_name(entry) in named if PROJECT in each else each in kept)]
    via = f" {left[0]}\n" if len(left) == 1 else "\n" + "".join(f"    #   {each}\n" for each in left)
    return _VIA.sub(lambda _: f"    # via{via}", entry)


def _parents(entry: str) -> list[str]:
    found = _VIA.search(entry)
    if found is None:
        return []
    more = [line.removeprefix("    #   ") for line in found["more"].splitlines()]
    return [found["only"], *more] if found["only"] else more


def _name(requirement: str) -> str:
    """As PyPI normalises it, without extras and versions."""
    found = _NAME.match(requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""
