"""The backend as a process of its own, answering over HTTP."""

from __future__ import annotations

import http.client
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlencode

from src.auth.tokens import issue_token
from tests.support.commands import base_environment

KEY = "k" * 40
LISTENS = re.compile(r"running on http://127\.0\.0\.1:(\d+)")
START_SECONDS = 120


@dataclass(frozen=True, slots=True)
class HttpProcess:
    port: int

    def search(self, user_id: int, question: str) -> str:
        """What the user gets for the question."""
        token = issue_token(user_id, KEY, timedelta(hours=1))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(
                "GET", f"/api/search?{urlencode({'q': question})}", headers={"Authorization": f"Bearer {token}"}
            )
            answer = connection.getresponse()
            body = answer.read().decode()
        finally:
            connection.close()
        assert answer.status == 200, body
        return body


@contextmanager
def http_process(folder: Path, environment: Mapping[str, str]) -> Iterator[HttpProcess]:
    """Started in `folder` on a port of its own, and stopped as a supervisor stops it."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "uvicorn", "src.main:app", "--port", "0"],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**base_environment(), **environment, "SECRET_KEY": KEY},
    )  # fmt: skip
    ports: queue.Queue[int] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, ports), daemon=True)
    reader.start()
    try:
        yield HttpProcess(ports.get(timeout=START_SECONDS))
    finally:
        process.terminate()
        process.wait(timeout=START_SECONDS)
        reader.join()
        if process.stdout is not None:
            process.stdout.close()


def _read(process: subprocess.Popen[str], ports: queue.Queue[int]) -> None:
    """All of it, or the process would wait for a reader; the port as soon as it is told."""
    for line in process.stdout or ():
        if match := LISTENS.search(line):
            ports.put(int(match[1]))
