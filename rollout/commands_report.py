"""Commands that show the rollout as a page: written to a file, or served to a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rollout.options import Json
from rollout.output import Answer, failures, say, stderr

LOOPBACK = "127.0.0.1"
PORT = 8787

Span = Annotated[
    str | None,
    typer.Option("--span", help="How far back the charts go: 10m, 1h, 6h, 24h, 7d or 30d; fitting where left out."),
]


def report(
    file: Annotated[Path, typer.Argument(help="The HTML file to write; one that is there is replaced.")],
    span: Span = None,
    as_json: Json = False,
) -> None:
    """Write the rollout as one page of HTML that needs no network: for a ticket, a mail, the record.

    Stage and timeline, the gate of the next step, agreement, causes, latency, what is owed, the fleet, and the
    newest differences with their explanations. It changes nothing; criteria that write or embed are left out.
    """
    with failures("report", as_json):
        from rollout.control import control
        from rollout.report import collect, render
        from rollout.report.files import write

        with control() as made:
            found = collect(made, span=span)
        size = write(file, render(found))
        data = {"file": str(file), "bytes": size, "span": found.span.name, "as_of": found.as_of}
        say(Answer("report", data, [f"wrote {file} ({size:,} bytes)"]), as_json)


def dashboard(
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = LOOPBACK,
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="0 takes a free one.")] = PORT,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="A file with a token; needed on any address but loopback."),
    ] = None,
) -> None:
    """Serve the same page to browsers, renewed by itself, until interrupted. It only reads.

    With a token, a browser asks for it as a password (any user name); scripts send it as `Authorization: Bearer`.
    The process holds the FAISS index in memory once, as each backend process does.
    """
    with failures("dashboard", False):
        from rollout.control import control
        from rollout.report.server import read_token, serve

        token = None if token_file is None else read_token(token_file)
        with control() as made:
            serve(made, host, port, token, lambda text: stderr.print(text, markup=False))
