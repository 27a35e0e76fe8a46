"""What a victim does: one operation of the write path, with an accident at one fault point.

It runs in a process forked for it, which opens its own pool and router and tells what it does line by line on a
pipe, so that a test knows afterwards how far it came: `begin`, `> point`, `< point`, `ack ID`, `error ...`, `end`.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.backfill import backfill
from src.tools import rag_tools
from src.tools.rag_tools import faults
from src.tools.rag_tools.chunking import DocumentUnreadableError
from src.tools.rag_tools.documents import DocumentNotFoundError
from src.tools.rag_tools.embeddings import EmbeddingError
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.settings import MigrationSettings
from src.tools.rag_tools.pgvector_store import open_pool
from src.tools.rag_tools.store import StoreError
from src.utils.context import acting_as
from tests.support.routers import HashEmbeddings

KNOWN_ERRORS = (StoreError, EmbeddingError, DocumentUnreadableError, DocumentNotFoundError)
BATCH_CHUNKS = 6


@dataclass(frozen=True, slots=True)
class Accident:
    """What happens the `time`-th time that the victim comes to the point: `before` the operation or after it.

    `what`: kill, stop (until somebody lets it go on), or kill the process `pid`.
    """

    point: str
    time: int = 1
    before: bool = True
    what: str = "kill"
    pid: int = 0


@dataclass
class Victim:
    """`tell` writes a line to the test."""

    tell: Callable[[str], None]
    accident: Accident | None
    begun: bool = False
    _came: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def hook(self, point: str) -> Iterator[None]:
        """For `faults.hook`."""
        if not self.begun:
            yield
            return
        self._came[point] += 1
        time = self._came[point]
        self.tell(f"> {point}")
        self._perhaps(point, time, before=True)
        yield
        self._perhaps(point, time, before=False)
        self.tell(f"< {point}")

    def _perhaps(self, point: str, time: int, *, before: bool) -> None:
        accident = self.accident
        if accident is None or (accident.point, accident.time, accident.before) != (point, time, before):
            return
        match accident.what:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                self.tell("stopping")
                os.kill(os.getpid(), signal.SIGSTOP)
            case "kill other":
                os.kill(accident.pid, signal.SIGKILL)
                self.tell("killed it")
            case unknown:
                raise ValueError(unknown)

    def run(self, request: dict[str, Any]) -> None:
        """The operation that `request` names. What it raises is told; an error nobody expects is told as such."""
        faults.hook = self.hook
        operation = getattr(self, f"_{request['operation']}")
        try:
            with open_pool(request["conninfo"], 4, name="victim") as pool:
                settings = MigrationSettings(FAISS_INDEX_PATH=Path(request["faiss"]), **request.get("settings", {}))
                router = Router(pool, HashEmbeddings(), settings=settings)
                router.start(loops=False)
                operation(router, **request.get("arguments", {}))
                self.tell("end")
                self.begun = False
                router.close()
        except KNOWN_ERRORS as error:
            self.tell(f"error {type(error).__name__}: {error}".replace("\n", " "))
        except Exception as error:  # noqa: BLE001  the test judges it
            self.tell(f"unexpected {error!r}".replace("\n", " "))

    def _begin(self) -> None:
        self.begun = True
        self.tell("begin")

    def _upload(self, router: Router, path: str, user: int) -> None:
        """As a job does it, which is told at the end."""
        rag_tools._service = router
        self._begin()
        self.tell(f"ack {rag_tools.update_vector_store(path, user)}")

    def _post(self, router: Router, path: str, user: int) -> None:
        """As the API does it, which answers once the upload is received."""
        self._begin()
        document_id = router.receive(user, Path(path), Path(path).name)
        self.tell(f"ack {document_id}")
        router.index(document_id, answered=True)

    def _delete(self, router: Router, document: int, user: int) -> None:
        rag_tools._service = router
        self._begin()
        with acting_as(user):
            rag_tools.delete_document(document)
        self.tell(f"ack {document}")

    def _settle(self, router: Router) -> None:
        """One step of the backend's loop."""
        self._begin()
        router.resume()

    def _save(self, router: Router) -> None:
        self._begin()
        router.stores.faiss.save()

    def _backfill(self, router: Router, bulk: str) -> None:
        with open_pool(bulk, 2, name="backfill") as pool:
            self._begin()
            report = backfill(
                pool, router.stores.faiss, execute=True, progress=lambda _: None, batch_chunks=BATCH_CHUNKS
            )
        self.tell(f"copied {report.documents}")
