"""`python -m src.serve`: the backend in several processes, restarted one by one without failing a request.

uvicorn's own command serves as well; only its stop differs. It cuts every connection on which no request has arrived
yet, also one that a client opened a moment ago or is about to use again. Here such a connection gets its next answer,
which says that it is the last. SIGHUP replaces the workers one after the other, each when its successor is ready;
SIGTERM stops them all. A worker that is killed is replaced; its connections are lost, what it promised is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import uvicorn
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

APP = "src.main:app"
GRACE_SECONDS = 60
"""For requests in flight when a worker stops; then they are cut off."""
READY_SECONDS = 120
"""For a new worker to load model and index; the old one serves meanwhile, and stays if it takes longer."""
STOPPING = "stopping"


class PatientProtocol(H11Protocol):
    """A connection that outlives the order to stop by one answer, or by the keep-alive time without a request."""

    def shutdown(self) -> None:
        """Called for each connection once no new one is accepted."""
        # All connections of a server share this; one that was accepted meanwhile learns of it here.
        self.app_state[STOPPING] = True
        self._last_answer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if STOPPING in self.app_state:
            self._last_answer()

    def _last_answer(self) -> None:
        """The answer in the making says that it is the last; without one the keep-alive time runs."""
        if self.cycle is None or self.cycle.response_complete:
            self._close_if_nothing_comes()
        elif not self.cycle.response_started and CLOSE_HEADER not in self.headers:
            self.headers.append(CLOSE_HEADER)  # uvicorn answers with it what was asked with it

    def _close_if_nothing_comes(self) -> None:
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m src.serve", description="The backend, in several processes.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args(arguments)
    uvicorn.run(
        APP,
        host=given.host,
        port=given.port,
        workers=given.workers,
        http="src.serve:PatientProtocol",
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_worker_healthcheck=READY_SECONDS,
    )


if __name__ == "__main__":
    main()
