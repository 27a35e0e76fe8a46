"""A backend process to be measured from outside: `python -m benchmarks.backends http|asking`; ends with its stdin."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import psutil  # type: ignore[import-untyped]  # ships no types

WATCHED = ("faiss", "langchain_community")
ASK_SECONDS = 0.02


def http() -> None:
    """uvicorn in this process; says how long after the process began /readyz answered, and what was imported."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config("src.main:app", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not _is_ready(port) and thread.is_alive():
        time.sleep(0.005)  # uvicorn tells nobody that it listens
    seconds = time.time() - psutil.Process().create_time()
    imported = [name for name in WATCHED if name in sys.modules]
    print(json.dumps({"seconds": seconds, "imported": imported}), file=answers_to, flush=True)
    sys.stdin.read()
    server.should_exit = True
    thread.join()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def asking() -> None:
    """The document service with its loops, and a client that asks; a line for each answer at the end."""
    import numpy as np

    from benchmarks.site import Given
    from src.tools import rag_tools

    answers: list[tuple[float, float, bool]] = []
    over = threading.Event()
    question = np.random.default_rng(1).standard_normal(1536).astype(np.float32)
    question /= np.linalg.norm(question)
    with rag_tools.lifespan(Given(np.zeros((1, 1536)))) as service:

        def ask() -> None:
            user = 2
            while not over.is_set():
                user = 2 + (user + 1) % 50
                at, begun, good = time.time(), time.perf_counter(), True
                try:
                    service.search(user, question, 3)
                except Exception:  # noqa: BLE001 - what failed is counted
                    good = False
                answers.append((at, (time.perf_counter() - begun) * 1000, good))
                time.sleep(ASK_SECONDS)  # somebody who asks now and then, not as fast as can be

        thread = threading.Thread(target=ask)
        thread.start()
        sys.stdin.read()
        over.set()
        thread.join()
        for answer in answers:
            print(json.dumps(answer), file=answers_to)
        answers_to.flush()


if __name__ == "__main__":
    # Logs go where errors go; the answers have the first stdout for themselves.
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    {"http": http, "asking": asking}[sys.argv[1]]()
