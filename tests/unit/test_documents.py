"""The documents point at what exists: links, anchors, and every command of `rollout` that they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.exceptions import TyperException

from rollout.cli import app
from tests.support.runbook import is_as_printed, sections

pytestmark = pytest.mark.migration

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)")
INLINE = re.compile(r"`(rollout [a-z][^`]*)`")
# Words of a page that stand for something of the reader's own.
NUMBERS = {"NUMBER", "DIFF", "STEP", "DOCUMENT"}
LATER = {"archive", "remove-faiss"}
"""On the page before they are there."""
ROLLOUT: Any = typer.main.get_command(app)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#{1,6} +(.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_dead(page: Path) -> None:
    for file, anchor in LINK.findall(prose_of(page)):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


def named_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        inline = INLINE.findall(re.sub(r"\s+", " ", prose_of(page)))
        blocks = re.findall(r"^ *(rollout [a-z].*)$", text_of(page), re.MULTILINE)
        found += [(page.name, command) for command in [*inline, *blocks]]
    there = set(ROLLOUT.commands)
    return sorted({(page, command) for page, command in found if command.split()[1] not in LATER - there})


@pytest.mark.parametrize(("page", "command"), named_commands())
def test_every_command_on_a_page_is_one_that_exists(page: str, command: str) -> None:
    words = shlex.split(command.partition(" #")[0].replace("'...'", "'a reason'"))[1:]
    words = ["1" if word in NUMBERS else word for word in words]
    found = ROLLOUT
    while hasattr(found, "commands"):
        if not words:
            return  # a group, named as such
        assert words[0] in found.commands, f"{page}: {command}"
        found = found.commands[words.pop(0)]
    if not words:
        return  # the command, named without its arguments
    try:
        found.make_context("rollout", words)
    except TyperException as error:
        pytest.fail(f"{page}: {command}: {error.format_message()}")


def test_every_section_that_a_message_names_is_there() -> None:
    code = [*ROOT.glob("rollout/**/*.py"), *ROOT.glob("backend/src/**/*.py")]
    named = {title for file in code for title in re.findall(r"RUNBOOK\.md, '(.+?)'(?=[\",;\s])", text_of(file))}
    titles = {section.title.lower() for section in sections(ROOT / "RUNBOOK.md")}
    assert named
    assert {title.lower() for title in named} <= titles


SAID = ("gate: pass", "...", "every process is here", "[exit code 3]")


@pytest.mark.parametrize(
    ("printed", "missing"),
    [
        (["gate: pass", "owed  0", "every  process is here ", "[exit code 3]"], ""),
        (["gate: fail", "every process is here", "[exit code 3]"], "gate: pass"),
        (["gate: pass", "every process is here"], "every process is here\n[exit code #]"),
        (["gate: pass", "every process is here", "[exit code 3]", "more"], "the page says nothing of: more"),
        (["transition 2", "gate: pass", "every process is here", "[exit code 3]"], "gate: pass"),
    ],
)
def test_a_page_that_says_otherwise_is_noticed(printed: list[str], missing: str) -> None:
    assert is_as_printed(SAID, printed) == missing


def test_numbers_ids_and_times_are_aside_and_words_are_not() -> None:
    said = ("3f2a91c0-5b1d-4e6e-9a55-0c8f6f1d2b47  4711  2026-11-25 09:48:23+00:00  2 days, 0:21:07  late",)
    assert not is_as_printed(said, ["d41a1a16-6b0a-4ca6-b77a-d6263c3a27ae 9 2027-01-02 10:11:12+00:00 0:00:01 late"])
    assert is_as_printed(said, ["d41a1a16-6b0a-4ca6-b77a-d6263c3a27ae 9 2027-01-02 10:11:12+00:00 0:00:01 arrived"])


@pytest.mark.parametrize("page", ["## One\n```sh\nrollout status\n```\n## Two\n", "## One\n```text\nfine\n```\n"])
def test_commands_and_what_they_print_belong_together(page: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(ValueError, match="belong together"):
        sections(tmp_path / "page.md")
