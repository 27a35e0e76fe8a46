"""A line to PostgreSQL that can be bad: it stalls, is reset, or is cut after some bytes, when the test says so.

It listens on a Unix socket in a folder of its own, named as libpq looks for it, and passes on what it gets. Each
connection has two threads, one for each direction.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: closing throws away what was not sent."""


class BadLine:
    """`cut_after` bytes from now on, in either direction together, every connection is closed and none is let in."""

    def __init__(self, folder: Path, conninfo: str) -> None:
        parameters = conninfo_to_dict(conninfo)
        self.conninfo = make_conninfo(conninfo, host=str(folder))
        name = f".s.PGSQL.{parameters.get('port', '5432')}"
        self._target = f"{parameters['host']}/{name}"
        self._lock = threading.Lock()
        self._flows = threading.Event()
        self._flows.set()
        self.held_back = threading.Event()
        self._left: int | None = None
        self._stall_after: int | None = None
        self._open: set[socket.socket] = set()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(folder / name))
        (folder / name).chmod(0o777)
        self._server.listen(32)
        self._threads = [self._start(self._accept)]

    # -- what the test says

    def cut_after(self, count: int) -> None:
        """So many bytes still pass, then the line is cut."""
        with self._lock:
            self._left = count

    def stall_after(self, count: int) -> None:
        """So many bytes still pass, then nothing does, and nobody is told; `held_back` is set then."""
        with self._lock:
            self._stall_after = count
            self.held_back.clear()

    def reset(self) -> None:
        """Every connection is broken off now; what is held back is lost."""
        with self._lock:
            self._left, self._stall_after = 0, None
        self._break_all()
        self._flows.set()

    def mend(self) -> None:
        """New connections are let in again."""
        with self._lock:
            self._left, self._stall_after = None, None
        self._flows.set()

    def close(self) -> None:
        self.reset()
        # Closing alone would not wake the thread that waits for a connection.
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join()

    # -- parts

    def _start(self, target: object, *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with self._lock:
                refused = self._left == 0
            if refused:
                client.close()
                continue
            upstream = socket.socket(socket.AF_UNIX)
            try:
                upstream.connect(self._target)
            except OSError:
                client.close()
                upstream.close()
                continue
            with self._lock:
                self._open |= {client, upstream}
            self._threads += [self._start(self._pass, client, upstream), self._start(self._pass, upstream, client)]

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                allowed = self._allowed(len(data))
                self._flows.wait()
                with self._lock:
                    if self._left == 0 and allowed == len(data):
                        allowed = 0
                target.sendall(data[:allowed])
                if allowed < len(data):
                    self._break_all()
                    return
        for end in (source, target):
            self._break(end)

    def _allowed(self, count: int) -> int:
        """How many of so many bytes may pass before the line is cut; holds it where it is to stall."""
        with self._lock:
            if self._stall_after is not None:
                self._stall_after -= count
                if self._stall_after < 0:
                    self._flows.clear()
                    self.held_back.set()
            if self._left is None:
                return count
            allowed = min(self._left, count)
            self._left -= allowed
            return allowed

    def _break_all(self) -> None:
        with self._lock:
            ends = list(self._open)
        for end in ends:
            self._break(end)

    def _break(self, end: socket.socket) -> None:
        with self._lock:
            self._open.discard(end)
        with suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextmanager
def bad_line(folder: Path, conninfo: str) -> Iterator[BadLine]:
    """A line to where `conninfo` leads; good until the test says otherwise. `folder` is short and new."""
    line = BadLine(folder, conninfo)
    try:
        yield line
    finally:
        line.close()
