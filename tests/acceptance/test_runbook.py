"""RUNBOOK.md is executed: the way from `off` to the end on one installation, and each question in its situation.

Every block of commands is run, in the order of the page, and what it prints is compared with what the page says.
"""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rollout.installation import make_installation
from src.tools.rag_tools.embeddings import LocalEmbeddings
from tests.support import questions, small
from tests.support.commands import ROOT, Commands, base_environment, commands_ready
from tests.support.database import Database
from tests.support.http_process import HttpProcess, http_process
from tests.support.runbook import Block, Section, is_as_printed, sections
from tests.support.small import Small

pytestmark = [pytest.mark.migration, pytest.mark.xdist_group("runbook")]

PAGE = sections(ROOT / "RUNBOOK.md")
THE_WAY = [each for each in PAGE if each.title.startswith(("Before", "Stage", "From complete"))]
QUESTIONS = [each for each in PAGE if each.blocks and each not in THE_WAY]
ENOUGH = 45
"""Comparisons in a window: what the profile `rehearsal` asks for, and a few."""

# What a command needs from what was printed before it, by the word that stands for it on the page.
BLANKS = {
    "NUMBER": r"--acknowledge-quarantine (\d+)",
    "GROUP": r"^([0-9a-f-]{36}) .*document \d+ of",
    "DOCUMENT": r"document (\d+) of",
    "DIFF": r"^(\d+) +\d{4}-\d\d-\d\d ",
    "INSTANCE": r"^([0-9a-f-]{36}) .* late",
    "STEP": r"^(\d+) +live +50 ",
}
# Whether the present step has what its gate asks for; of rampdown, whether reads were counted.
EVIDENCE = """
SELECT clock_timestamp() - created_at > interval '2.5 seconds'
       AND CASE WHEN stage IN ('shadow', 'live')
           THEN (SELECT count(*) FROM shadow_diffs WHERE transition_id = t.id) >= %s
           ELSE (SELECT count(*) FROM rollout_counts WHERE transition_id = t.id) > 0 END
FROM rollout_transitions t ORDER BY id DESC LIMIT 1
"""


@dataclass
class Reader:
    """Somebody with the page in hand and a terminal in the installation's folder."""

    folder: Path
    database: Database
    environment: Mapping[str, str]
    commands: Commands
    heard: list[str] = field(default_factory=list)

    def follow(self, block: Block) -> None:
        printed = [line for command in block.commands for line in self._type(command)]
        self.heard += printed
        missing = is_as_printed(block.printed, printed)
        shown = "\n".join(printed)
        assert not missing, f"RUNBOOK.md:{block.line}: not printed:\n{missing}\n\nprinted was:\n{shown}"

    def _type(self, command: str) -> list[str]:
        program, *arguments = shlex.split(self._filled(command))
        if program == "rollout":
            ended = self.commands(self.folder, self.environment, *arguments)
            # Progress and the log are beside the answer.
            told = [line for line in ended.err.splitlines() if line.startswith(("rollout: ", "  because: "))]
            lines, code = [*ended.out.splitlines(), *told], ended.code
        else:
            lines, code = self._run(program, *arguments)
        lines = [self._here(line) for line in lines if not line.startswith("profile: ")]
        return [*lines, f"[exit code {code}]"] if code else lines

    def _run(self, program: str, *arguments: str) -> tuple[list[str], int]:
        done = subprocess.run(
            [str(Path(sys.executable).parent / program), *arguments], cwd=self.folder, check=False, text=True,
            env={**base_environment(), **self.environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.stdout.splitlines(), done.returncode

    def _filled(self, command: str) -> str:
        for blank, pattern in BLANKS.items():
            if re.search(rf"\b{blank}\b", command):
                found = [match[1] for line in self.heard if (match := re.search(pattern, line))]
                assert found, f"nothing printed so far tells {blank} for: {command}"
                command = re.sub(rf"\b{blank}\b", found[-1], command)
        return command.replace("CHECKOUT", str(ROOT))

    def _here(self, line: str) -> str:
        """As on the page's machine."""
        server = self.database.conninfo().split()[0].removeprefix("host=")
        for ours, the_pages in (
            (str(self.folder), "/srv/victus"), (socket.gethostname(), "app-1"), (server, "db-1"),
            (self.database.name, "victus"),
        ):  # fmt: skip
            line = re.sub(rf"(?<![\w-]){re.escape(ours)}(?![\w-])", the_pages, line)
        return line


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with commands_ready(tmp_path_factory.mktemp("commands")) as ready:
        yield ready


# -- the way


@pytest.fixture
def empty_database(postgres: Any) -> Iterator[Database]:
    """As a server gives it: with the roles, without a table."""
    made = Database(postgres, "runbook")
    postgres.drop_database(made.name)
    postgres.create_database(made.name)
    yield made
    postgres.drop_database(made.name)


@pytest.fixture
def reader(empty_database: Database, commands: Commands, tmp_path: Path) -> Reader:
    """In front of an installation of the old release as the old release left it."""
    folder = tmp_path / "victus"
    installation = make_installation(folder, LocalEmbeddings(), plans=small.PLANS)
    environment = Small(folder, empty_database, installation).environment() | {
        "ALEMBIC_CONFIG": str(ROOT / "alembic.ini"),
        "ENVIRONMENT": "development",
        "ROLLOUT_ACTOR": "ada",
        "ROLLOUT_PROFILE": "rehearsal",
    }
    return Reader(folder, empty_database, environment, commands)


def test_the_way_from_the_old_release_to_the_last_stage(reader: Reader) -> None:
    before, *stages = THE_WAY
    for block in before.blocks:
        reader.follow(block)
    with http_process(reader.folder, reader.environment) as backend:
        for section in stages:
            for block in section.blocks:
                gather(reader, backend, section)
                reader.follow(block)
    with reader.database.connect() as connection:
        steps = connection.execute("SELECT stage, read_percent FROM rollout_transitions ORDER BY id").fetchall()
    assert steps == [
        ("off", 0), ("dualwrite", 0), ("shadow", 0), ("live", 1), ("live", 10), ("live", 50), ("live", 100),
        ("rampdown", 100), ("complete", 100),
    ]  # fmt: skip


def gather(reader: Reader, backend: HttpProcess, section: Section) -> None:
    """Users ask until the present step has the evidence that its gate wants."""
    if not section.title.startswith(("Stage shadow", "Stage live", "Stage rampdown", "From complete")):
        return
    with reader.database.connect(autocommit=True) as connection:
        for number in range(2_000):
            if connection.execute(EVIDENCE, (ENOUGH,)).fetchone() == (True,):
                return
            backend.search(1 + number % 2, f"how does a heap merge {number} inputs?")
    raise AssertionError(f"{section.title}: no evidence came of 2,000 questions")


# -- the questions


@pytest.fixture
def filled(postgres: Any, template_database: str, tmp_path: Path) -> Iterator[Small]:
    with small.filled(postgres, template_database, tmp_path) as made:
        yield made


@pytest.mark.parametrize("section", QUESTIONS, ids=lambda section: section.title)
def test_each_question_is_answered_as_the_page_says(section: Section, filled: Small, commands: Commands) -> None:
    # The situations' comparisons are made in this process: a gate wants them made with its own settings.
    settings = {"EMBEDDING_PROVIDER": "openai", "ROLLOUT_ACTOR": "ada", "ROLLOUT_PROFILE": "rehearsal"}
    environment = filled.environment() | settings
    situation: AbstractContextManager[None] = questions.SITUATIONS[section.title](filled)
    with situation:
        reader = Reader(filled.folder, filled.database, environment, commands)
        for block in section.blocks:
            reader.follow(block)


def test_no_question_asks_for_more_than_three_commands() -> None:
    assert {section.title for section in QUESTIONS if sum(len(block.commands) for block in section.blocks) > 3} == set()


def test_every_situation_is_that_of_a_section() -> None:
    assert set(questions.SITUATIONS) == {section.title for section in QUESTIONS}
