"""The help of `rollout` teaches: panels in the order of the way, an example for each command that it takes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from rollout.cli import app

pytestmark = pytest.mark.migration


def leaves(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name), command


ROOT: Any = typer.main.get_command(app)
COMMANDS = {" ".join(path): command for path, command in leaves(ROOT)}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_what_it_does_and_shows_an_example(name: str) -> None:
    assert COMMANDS[name].help
    assert COMMANDS[name].epilog.startswith(f"Example: rollout {name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_is_one_that_the_command_takes(name: str) -> None:
    words = shlex.split(COMMANDS[name].epilog.removeprefix("Example: rollout "))
    arguments = words[len(name.split()) :]
    # Numbers are numbers: the only words of an example that stand for something of the reader's own are in capitals.
    made = COMMANDS[name].make_context(name, arguments)
    assert not made.args


def test_every_command_is_in_a_panel() -> None:
    panels = {name: command.rich_help_panel for name, command in ROOT.commands.items()}
    assert all(isinstance(panel, str) for panel in panels.values()), panels
    assert len(set(panels.values())) >= 4
