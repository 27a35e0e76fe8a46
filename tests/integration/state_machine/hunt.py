"""`python -m tests.integration.state_machine.hunt SERVER TEMPLATE EXAMPLES`: run the machine until something breaks.

SERVER is the folder of a running embedded server, TEMPLATE a database at Alembic's head there. Prints the property
that fell first, and after how many examples; exit code 0 where none did in as many as given, 1 where one did.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.integration.state_machine.machine import Machine
from tests.integration.state_machine.properties import PropertyViolatedError
from tests.integration.state_machine.world import World

MEMORY = Path("/dev/shm")
EXAMPLES_AT_ONCE = 20


@contextmanager
def world_on(database: Any) -> Iterator[World]:
    """In memory where there is some: what a power cut takes is worked out, not suffered."""
    root = Path(tempfile.mkdtemp(prefix="victus-machine-", dir=MEMORY if MEMORY.is_dir() else None))
    world = World(database, root)
    try:
        yield world
    finally:
        world.close()
        shutil.rmtree(root)


@contextmanager
def no_logs() -> Iterator[None]:
    """What the routers say of each failure would drown what the machine says."""

    def drop(*_: Any) -> Any:
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[drop])
    try:
        yield
    finally:
        structlog.configure(**before)


def run(world: World, *, seed: int, examples: int, steps: int, shrink: bool = False) -> None:
    """Raises PropertyViolatedError."""
    machine = hypothesis.seed(seed)(type("Machine", (Machine,), {"world": world}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )


def hunt(database: Any, examples: int) -> tuple[int, str | None]:
    """The first violation that is found in that many examples, and after how many."""
    with no_logs(), world_on(database) as world:
        while world.examples < examples:
            try:
                run(world, seed=random.randrange(2**32), examples=EXAMPLES_AT_ONCE, steps=30)
            except PropertyViolatedError as error:
                return world.examples, str(error)
        return world.examples, None


def main() -> int:
    from src import embedded
    from tests.support.database import Database

    folder, template, examples = sys.argv[1:]
    server = embedded.start(Path(folder))
    database = Database(server, f"hunt_{uuid.uuid4().hex}")
    server.create_database(database.name, template)
    try:
        tried, found = hunt(database, int(examples))
    finally:
        server.drop_database(database.name)
        embedded.leave(Path(folder))
    print(f"{tried} examples")
    print(found or "nothing was violated")
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main())
