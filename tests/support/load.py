"""Sixteen people at once who search, upload, delete and look around, and judge every answer they get.

Each has an account, a connection of their own and nothing to try twice with. What they upload are passages of real
text; what they ask is a passage less its last tenth.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.parse import urlencode

from rollout.installation_files import reference_text
from tests.support.served import Answer, Line, form

K = 3
PASSAGE = 600
LEAST_KEPT, MOST_KEPT = 3, 30
THINKING_SECONDS = 0.12
ONE_POLL_SECONDS = 2.5
"""A poll is a second apart; busy processes begin theirs later."""
MODULES = ("argparse", "textwrap", "queue", "heapq", "statistics", "random", "shutil", "tarfile", "zipfile", "typing")
WISHES = {"search": 70, "upload": 8, "delete": 5, "list": 6, "facts": 6, "health": 5}


@dataclass
class Seen:
    """What all of them saw, counted; the lists say what was wrong."""

    requests: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    searches: int = 0
    known: int = 0
    failed: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> int:
        return self.requests.total()

    def table(self) -> list[str]:
        """A line for each kind of request: how many, median and 99th percentile in milliseconds."""
        lines = []
        for kind, count in sorted(self.requests.items()):
            times = sorted(self.seconds[kind])
            p50, p99 = (times[int(len(times) * share)] * 1000 for share in (0.5, 0.99))
            lines.append(f"{kind:8} {count:6}   p50 {p50:6.1f} ms   p99 {p99:7.1f} ms   max {times[-1] * 1000:7.1f} ms")
        return lines


class Person:
    """One of them; `act` is one turn."""

    def __init__(self, name: str, user_id: int, line: Line, chance: random.Random, passages: list[str]) -> None:
        self.name = name
        self.user_id = user_id
        self.line = line
        self.chance = chance
        self.passages = passages
        self.sent: dict[int, str] = {}
        self.waiting: set[int] = set()
        self.kept: set[int] = set()
        self.gone: dict[int, float] = {}

    def act(self, seen: Seen) -> None:
        if self.waiting:
            self.look(seen)
        wish = self.chance.choices(list(WISHES), list(WISHES.values()))[0]
        if len(self.kept) < LEAST_KEPT and wish in ("search", "delete"):
            wish = "upload"
        if len(self.kept) + len(self.waiting) >= MOST_KEPT and wish == "upload":
            wish = "search"
        getattr(self, wish)(seen)

    def search(self, seen: Seen) -> None:
        wanted = self.chance.choice(sorted(self.kept))
        query = urlencode({"q": self.sent[wanted][: PASSAGE * 9 // 10], "k": K})
        begun = time.monotonic()
        answer = self.ask(seen, "search", "GET", f"/api/search?{query}")
        if answer is None:
            return
        found = {hit["document_id"]: hit["content"] for hit in answer.data}
        foreign = [f"{self.name} got {each}" for each, text in found.items() if not self.owns(each, text)]
        late = [each for each in found if self.gone.get(each, begun) + ONE_POLL_SECONDS < begun]
        with seen.lock:
            seen.searches += 1
            seen.known += wanted in found
            seen.foreign += foreign
            seen.deleted += [f"{self.name} got {each}, deleted {begun - self.gone[each]:.1f} s before" for each in late]

    def owns(self, document: int, text: str) -> bool:
        return document in self.sent and text.strip() == self.sent[document].strip()

    def upload(self, seen: Seen) -> None:
        text = f"{self.passages.pop()} (note of {self.name})"
        answer = self.ask(seen, "upload", "POST", "/api/upload", form("note.txt", text))
        if answer is not None:
            document = answer.data["document_id"]
            self.sent[document] = text
            self.waiting.add(document)

    def look(self, seen: Seen) -> None:
        """Whether an upload is ready."""
        document = min(self.waiting)
        answer = self.ask(seen, "show", "GET", f"/api/documents/{document}")
        if answer is None or answer.data["status"] not in ("ready", "failed"):
            return
        self.waiting.remove(document)
        if answer.data["status"] == "ready":
            self.kept.add(document)
        else:
            with seen.lock:
                seen.failed.append(f"{self.name}: upload {document} failed: {answer.data['reason']}")

    def delete(self, seen: Seen) -> None:
        document = self.chance.choice(sorted(self.kept))
        self.kept.remove(document)
        if self.ask(seen, "delete", "DELETE", f"/api/documents/{document}", expected=204) is not None:
            self.gone[document] = time.monotonic()

    def list(self, seen: Seen) -> None:
        answer = self.ask(seen, "list", "GET", "/api/documents?limit=200")
        if answer is not None:
            listed = {each["id"] for each in answer.data}
            with seen.lock:
                seen.foreign += [f"{self.name} is shown {each}" for each in listed - set(self.sent)]
                seen.failed += [f"{self.name} is not shown {each}" for each in self.kept - listed]

    def facts(self, seen: Seen) -> None:
        self.ask(seen, "facts", "GET", "/api/facts")

    def health(self, seen: Seen) -> None:
        self.ask(seen, "health", "GET", self.chance.choice(("/healthz", "/readyz", "/metrics")))

    def ask(
        self, seen: Seen, kind: str, method: str, path: str, body: Any = None, expected: int = 200
    ) -> Answer | None:
        """The answer, or None if it failed, which is counted."""
        begun = time.monotonic()
        answer, why = None, ""
        try:
            answer = self.line.ask(method, path, body)
        except (OSError, HTTPException) as error:
            why = repr(error)
            self.line.close()  # the next request opens it anew
        if answer is not None and answer.status != expected:
            why, answer = f"{answer.status} {answer.text[:200]}", None
        with seen.lock:
            seen.requests[kind] += 1
            seen.seconds[kind].append(time.monotonic() - begun)
            if answer is None:
                seen.failed.append(f"{self.name}: {method} {path[:40]}: {why}")
        return answer


class Crowd:
    """All of them, each in a thread, from `start` to `stop`."""

    def __init__(self, people: Sequence[Person]) -> None:
        self.people = people
        self.seen = Seen()
        self.notes: list[str] = []
        self.begun = time.monotonic()
        self.over = threading.Event()
        self.broken: list[BaseException] = []
        self.threads = [threading.Thread(target=self._live, args=(person,), daemon=True) for person in people]

    def start(self) -> None:
        self.begun = time.monotonic()
        for thread in self.threads:
            thread.start()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.begun

    def note(self, what: str) -> None:
        """What happened meanwhile, and when."""
        self.notes.append(f"{what} at {self.seconds:.0f} s, {self.seen.total} requests, {len(self.seen.failed)} failed")

    def wait(self, seconds: float) -> None:
        """Go on so much longer."""
        self.over.wait(seconds)

    def stop(self) -> Seen:
        self.over.set()
        for thread in self.threads:
            thread.join()
        for person in self.people:
            person.line.close()
        if self.broken:
            raise self.broken[0]
        return self.seen

    def _live(self, person: Person) -> None:
        try:
            while not self.over.wait(person.chance.expovariate(1 / THINKING_SECONDS)):
                person.act(self.seen)
        except BaseException as error:  # noqa: BLE001  told by `stop`
            self.broken.append(error)
            self.over.set()


def passages(chance: random.Random) -> list[str]:
    """Passages of the standard library's documentation, each once, in an order of chance."""
    text = " ".join(reference_text(MODULES).split())
    found = [text[start : start + PASSAGE] for start in range(0, len(text) - PASSAGE, PASSAGE)]
    chance.shuffle(found)
    return found
