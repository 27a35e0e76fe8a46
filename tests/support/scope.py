"""Attempts to reach what is somebody else's: who attempts, what there is to reach, and how it is judged.

An attempt is one function that says whether it reached the owner's things. It runs twice: as a stranger,
who must not reach them, and as their owner, who must, for otherwise the attempt proves nothing.
"""

from __future__ import annotations

import itertools
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import SecretStr
from sqlalchemy import select

from src.database import SessionLocal
from src.embedded import EmbeddedServer
from src.models import UserFact
from src.tools import memory_tools, rag_tools
from src.utils.context import acting_as
from tests.support.backend import CHEAP, Backend, User, running_backend
from tests.support.database import Database
from tests.support.obedient_model import ObedientServer

SECRET = "heron4711quartz"
"""In everything that the owner has, and in nothing that the stranger sends or has."""
TEXT = f"The code word of the vault is {SECRET}."
QUESTION = "What is the code word of the vault?"
LOOT = "The boat is painted green and its engine is old."
FACT = "vault"
NEARER = 1_500


@dataclass
class World:
    """A running backend, an owner with one of everything, and a stranger with things of their own."""

    backend: Backend
    database: Database
    model: ObedientServer
    owner: User
    stranger: User
    document: int = 0
    conversation: str = ""
    message: str = ""
    fact: int = 0
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def name(self, user: User) -> str:
        """A new name for something of the user's; only the owner's tell the secret."""
        return f"{SECRET if user is self.owner else 'loot'} {next(self._numbers)}"

    def send(self, user: User, method: str, path: str, **parts: Any) -> str:
        """Everything that the answer to the user's request says."""
        return told(user.request(method, path, **parts))

    def upload(self, user: User, name: str, text: str) -> int:
        """The id of a new document, which is searchable."""
        answer = user.upload(name, text.encode())
        assert answer.status_code == 200, answer.text
        self.backend.indexed()
        return int(answer.json()["document_id"])

    def received(self, user: User) -> int:
        """The id of a new document of which there is only the file."""
        self.backend.uploads.mkdir(exist_ok=True)
        path = self.backend.uploads / f"{uuid.uuid4().hex}.txt"
        path.write_text(TEXT)
        return rag_tools.service().receive(user.id, path, f"{self.name(user)}.txt")

    def remember(self, user: User, key: str, value: str = SECRET) -> int:
        """The id of a new fact."""
        with acting_as(user.id):
            memory_tools.remember_fact(key, value)
        with SessionLocal() as db:
            own = (UserFact.user_id == str(user.id), UserFact.key == key)
            return int(db.scalars(select(UserFact.id).where(*own)).one())

    def chat(self, user: User, message: str, **body: Any) -> str:
        """Everything that the model and the user are told while the message is answered."""
        before = len(self.model.chats)
        answer = user.post("/api/chat", json={"message": message, **body})
        heard = [str(request.body) for request in self.model.chats[before:]]
        return "\n".join([told(answer), *heard])


Reach = Callable[[World, User], bool]


@dataclass(frozen=True)
class Attempt:
    """`reach` acts as the user that it is given, and says whether it got at the owner's things."""

    kind: str
    name: str
    reach: Reach


def told(answer: Any) -> str:
    return f"{answer.status_code} {dict(answer.headers)} {answer.text}"


def failures(world: World, attempts: Iterable[Attempt]) -> list[str]:
    """What is wrong, by attempt: none where strangers are kept out and the owner is not."""
    wrong = []
    for attempt in attempts:
        for user, may in ((world.stranger, False), (world.owner, True)):
            who = "the owner" if may else "a stranger"
            try:
                reached = attempt.reach(world, user)
            except Exception as error:  # noqa: BLE001 - told with the attempt's name, beside the others
                wrong.append(f"{attempt.kind}: {attempt.name}: broke as {who}: {error!r:.300}")
                continue
            if reached is not may:
                wrong.append(f"{attempt.kind}: {attempt.name}: {'reached by' if reached else 'denied to'} {who}")
    return wrong


def by_kind(attempts: Sequence[Attempt]) -> dict[str, int]:
    return dict(sorted(Counter(attempt.kind for attempt in attempts).items()))


@contextmanager
def world_on(postgres: EmbeddedServer, template: str, folder: Path, **settings: Any) -> Iterator[World]:
    """A world for many attempts, on a database of its own; `settings` change the backend's."""
    name = f"test_{uuid.uuid4().hex}"
    postgres.create_database(name, template)
    with ExitStack() as stack:
        stack.callback(postgres.drop_database, name)
        database = Database(postgres, name)
        changes = stack.enter_context(pytest.MonkeyPatch.context())
        _configure(database, changes, stack)
        model = stack.enter_context(ObedientServer())
        chat = {"OPENAI_API_KEY": SecretStr(model.api_key), "OPENAI_BASE_URL": model.base_url}
        backend = stack.enter_context(running_backend(folder, changes, **chat, **settings))
        # Thousands of lines that are about requests refused as they should be.
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        world = World(backend, database, model, backend.user("ada"), backend.user("bob"))
        _plant(world)
        yield world


def _configure(database: Database, changes: pytest.MonkeyPatch, stack: ExitStack) -> None:
    """What the fixture `configured_database` does for one test."""
    import src.database as module
    from src.auth import passwords
    from src.config import settings

    for setting, role in (("", module.Role.APP), ("ADMIN_", module.Role.OWNER), ("ROLLOUT_", module.Role.ROLLOUT)):
        changes.setattr(settings, f"DATABASE_{setting}URL", database.url(role))
    changes.setattr(passwords, "_NOBODYS", CHEAP.hash("nobody's"))
    previous, engine = module.engine, module.make_engine(settings.DATABASE_URL)
    changes.setattr(module, "engine", engine)
    module.SessionLocal.configure(bind=engine)
    stack.callback(engine.dispose)
    stack.callback(module.SessionLocal.configure, bind=previous)


def _plant(world: World) -> None:
    owner, stranger = world.owner, world.stranger
    world.document = world.upload(owner, f"{SECRET}.txt", TEXT)
    world.upload(stranger, "boat.txt", LOOT)
    # Nearer to the question than the owner's answer: who filters what was found among all loses it.
    world.upload(stranger, "questions.txt", f"{QUESTION}\n\n" * NEARER)
    world.fact = world.remember(owner, FACT)
    world.remember(stranger, "boat", "green")
    world.chat(stranger, "Hello.")
    said = world.chat(owner, f'My code word is {SECRET}. CALL recall_fact {{"key": "{FACT}"}}')
    assert SECRET in said
    titled = owner.post("/api/conversations", json={"title": SECRET}).json()["id"]
    with world.database.connect(autocommit=True) as connection:
        # However many are made later, it stays among those that are listed.
        connection.execute("UPDATE conversations SET pinned = true WHERE id = %s", (titled,))
    (world.conversation,) = {one["id"] for one in owner.get("/api/conversations").json()} - {titled}
    history = owner.get(f"/api/conversations/{world.conversation}").json()
    world.message = history["messages"][-1]["id"]
