"""A real browser and a real dashboard for it, in this process."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from rollout.control import Control
from rollout.report.server import application, bind

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@dataclass
class Seen:
    """A page, with what it said and asked for."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@dataclass
class Clock:
    """Seconds that pass when the test says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield launched
        finally:
            launched.close()


@contextmanager
def opened(launched: Browser, url: str, *, width: int = 1280, scheme: Any = "light", **options: Any) -> Iterator[Seen]:
    """The page at `url`; the page's own clock stands still until the test moves it."""
    context = launched.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
    try:
        seen = Seen(context.new_page())
        seen.page.on("console", lambda message: seen.errors.append(message.text) if message.type != "log" else None)
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.clock.install()
        seen.page.goto(url)
        yield seen
    finally:
        context.close()


@contextmanager
def dashboard(control: Control, *, clock: Clock, token: str | None = None) -> Iterator[str]:
    """The address of a dashboard that runs in a thread; leaving ends it."""
    listening = bind("127.0.0.1", 0)
    app = application(control, token, clock=clock)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def keep_screenshot(seen: Seen, path: Path, height: int) -> None:
    """A small PNG of the top of the page: flat colours need no more than a palette."""
    from PIL import Image

    width = seen.page.viewport_size["width"] if seen.page.viewport_size else 1280
    seen.page.set_viewport_size({"width": width, "height": height})
    seen.page.screenshot(path=path)
    with suppress(OSError), Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)
