"""One process of a rehearsal's traffic: a backend of its own that asks, uploads and deletes until told to stop.

Commands arrive as JSON lines on stdin; answers leave as JSON lines on stdout. Each query is a line of its log
file, so what was seen survives the process. `python -m rollout.traffic NUMBER SEED STORED|MODEL`.
"""

from __future__ import annotations

import json
import queue
import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rollout.logs import log_to
from rollout.stored_embeddings import StoredEmbeddings
from src.tools import rag_tools
from src.tools.rag_tools.embeddings import embedder
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.store import Chunk
from src.utils.context import acting_as

K = 3
PAUSE_SECONDS = 0.005
KNOWN_PER_USER = 200
AFTER_DELETE_SECONDS = 2.5
"""A deletion is in every process' answers gone past one poll, which is a second apart."""


@dataclass
class Truth:
    """Who owns which document, what each user must be able to find, and what was deleted when."""

    owners: dict[int, int]
    known: dict[int, list[Chunk]]
    uploads: dict[int, str] = field(default_factory=dict)
    deleted: dict[int, float] = field(default_factory=dict)

    def findable(self, user_id: int) -> list[Chunk]:
        return [chunk for chunk in self.known[user_id] if chunk.document_id not in self.deleted]


class Traffic:
    """The loop of one process."""

    def __init__(self, service: Router, truth: Truth, log: TextIO, seed: int, number: int) -> None:
        self.service = service
        self.truth = truth
        self.log = log
        self.random = random.Random(seed)  # noqa: S311 - repeatable traffic, not a secret
        self.number = number
        self.stage = ""
        self.turn = 0
        self.users = sorted(truth.known)

    def run(self, commands: queue.Queue[dict[str, Any]]) -> None:
        while True:
            try:
                command = commands.get(timeout=PAUSE_SECONDS)
            except queue.Empty:
                self.ask()
                continue
            if command["do"] == "stop":
                return
            say({"answer": command["do"], **self.obey(command)})

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        try:
            return getattr(self, f"do_{command['do']}")(command) or {}
        except Exception as error:  # noqa: BLE001 - the boundary: the rehearsal counts every failure
            return {"failed": f"{type(error).__name__}: {error}"}

    # -- queries

    def ask(self) -> None:
        """Ask for one of the user's own chunks, in other words than its own, and log what came."""
        user_id = self.users[self.turn % len(self.users)]
        self.turn += 1
        findable = self.truth.findable(user_id)
        wanted = self.random.choice(findable) if findable else None
        begun = time.monotonic()
        line: dict[str, Any] = {"stage": self.stage, "user": user_id, "begun": begun}
        try:
            with acting_as(user_id):
                hits = self.service.query(user_id, question(wanted), K)
            line |= self._judge(user_id, wanted, begun, hits)
        except Exception as error:  # noqa: BLE001 - the boundary: the rehearsal counts every failure
            line["failed"] = f"{type(error).__name__}: {error}"
        line["ms"] = (time.monotonic() - begun) * 1000
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()

    def _judge(self, user_id: int, wanted: Chunk | None, begun: float, hits: list[Any]) -> dict[str, Any]:
        gone = self.truth.deleted
        return {
            "foreign": [hit.document_id for hit in hits if self._owner(hit.document_id) != user_id],
            "deleted": [
                hit.document_id for hit in hits if gone.get(hit.document_id, begun) + AFTER_DELETE_SECONDS < begun
            ],
            "known": None if wanted is None else any(
                hit.chunk_id == wanted.id or hit.content == wanted.content for hit in hits
            ),
        }  # fmt: skip

    def _owner(self, document_id: int) -> int:
        """From the `documents` table, not from a store: the stores are what is being judged."""
        if document_id not in self.truth.owners:
            self.truth.owners[document_id] = self.service.load(document_id).user_id
        return self.truth.owners[document_id]

    # -- commands

    def do_stage(self, command: dict[str, Any]) -> None:
        self.stage = command["stage"]

    def do_guard(self, command: dict[str, Any]) -> None:
        """Its windows are so long from now on."""
        self.service.guard.window_seconds = command["window_seconds"]

    def do_upload(self, command: dict[str, Any]) -> dict[str, Any]:
        user_id = self.users[command["number"] % len(self.users)]
        path = Path("uploads") / f"rehearsal-{self.number}-{command['number']}.md"
        path.write_text(upload_text(command["number"], self.number), encoding="utf-8")
        with acting_as(user_id):
            document_id = rag_tools.update_vector_store(str(path))
        self.truth.owners[document_id] = user_id
        self.truth.uploads[document_id] = path.read_text(encoding="utf-8")
        return {"document": document_id, "user": user_id}

    def do_delete(self, command: dict[str, Any]) -> dict[str, Any]:
        document_id, user_id = command["document"], command["user"]
        with acting_as(user_id):
            rag_tools.delete_document(document_id)
        self.truth.deleted[document_id] = time.monotonic()
        return {"document": document_id}

    def do_deleted(self, command: dict[str, Any]) -> None:
        """Another process deleted it."""
        self.truth.deleted.setdefault(command["document"], time.monotonic())

    def do_find(self, command: dict[str, Any]) -> dict[str, Any]:
        """Which of the documents uploaded here, and not deleted, their owners find."""
        missing = []
        for document_id, text in self.truth.uploads.items():
            if document_id in self.truth.deleted:
                continue
            user_id = self.truth.owners[document_id]
            with acting_as(user_id):
                hits = self.service.query(user_id, text, K)
            if document_id not in {hit.document_id for hit in hits}:
                missing.append(document_id)
        return {"uploads": len(self.truth.uploads), "missing": missing}


def question(wanted: Chunk | None) -> str:
    """The chunk's content less its last tenth; for a user who owns nothing, anything."""
    if wanted is None:
        return "What have I uploaded?"
    return wanted.content[: max(1, len(wanted.content) * 9 // 10)]


def upload_text(number: int, process: int) -> str:
    return (
        f"# Note {number} of process {process}\n\nWritten while the stores were being exchanged, to be found by its"
        f" owner and by nobody else. Its number is {number * 7919 + process}."
    )


def learn(service: Router) -> Truth:
    """What the tables say; contents of known chunks come from the FAISS directory as adopted."""
    with service.pool.connection() as connection:
        owners = {int(row[0]): int(row[1]) for row in connection.execute("SELECT id, user_id FROM documents")}
        users = [int(row[0]) for row in connection.execute("SELECT id FROM users ORDER BY id")]
    known: dict[int, list[Chunk]] = {user_id: [] for user_id in users}
    for document_id, user_id in owners.items():
        if len(known[user_id]) < KNOWN_PER_USER:
            known[user_id] += service.stores.faiss.document(document_id)
    return Truth(owners, known)


def stored(truth: Truth) -> StoredEmbeddings:
    """Stored vectors by content, and by the question that asks for it."""
    chunks = [chunk for chunks in truth.known.values() for chunk in chunks]
    known = {text: row for row, chunk in enumerate(chunks) for text in (chunk.content, question(chunk))}
    return StoredEmbeddings(known, np.stack([chunk.vector for chunk in chunks]))


def commands(stream: TextIO) -> queue.Queue[dict[str, Any]]:
    """The commands of `stream`; its end means stop."""
    waiting: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in _lines(stream):
            waiting.put(json.loads(line))
        waiting.put({"do": "stop"})

    threading.Thread(target=read, name="commands", daemon=True).start()
    return waiting


def _lines(stream: TextIO) -> Iterator[str]:
    while line := stream.readline():
        yield line


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main(number: int, seed: int, provider: str) -> None:
    log_to(Path(f"backend-{number}.log").open("w", encoding="utf-8"))  # noqa: SIM115 - open as long as the process
    with rag_tools.lifespan(StoredEmbeddings({}, np.zeros((1, 1536), np.float32))) as service:
        truth = learn(service)
        service.embeddings = stored(truth) if provider == "STORED" else embedder()
        with Path(f"traffic-{number}.jsonl").open("w", encoding="utf-8") as log:
            traffic = Traffic(service, truth, log, seed + number, number)
            say({"answer": "ready", "users": traffic.users})
            traffic.run(commands(sys.stdin))
    say({"answer": "stopped"})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
