"""The HTTP backend: `uvicorn src.main:app`.

Of the document search it knows only how to open it and whether it is ready. Closing goes the other way
round: runs of the agent are cancelled, begun indexing is finished, then the document service drains,
saves and leaves the fleet. Nothing here is lost in a crash: each part keeps its own promises.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from importlib.metadata import PackageNotFoundError, version

import structlog
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from src import log as logs
from src.agent.runs import Runner, prepare
from src.api import (
    accounts,
    chat,
    conversations,
    documents,
    errors,
    facts,
    health,
    metrics,
    traces,
    upload_files,
)
from src.api.body_limit import BodyLimitMiddleware
from src.api.indexing import Indexing
from src.api.middleware import RequestMiddleware
from src.auth.accounts import OpenAccounts
from src.auth.middleware import IdentityMiddleware
from src.auth.throttle import Throttle
from src.auth.tokens import check_secret_key
from src.config import Settings
from src.config import settings as configured
from src.database import EMBEDDED, DocumentsNeedPostgresError, SessionLocal
from src.tools import rag_tools

MOST_BODY_BYTES = 1 << 20
"""Of every request but an upload."""
FORM_BYTES = 64 * 1024
"""What the form around an uploaded file may add to its size."""

log = structlog.get_logger(__name__)


def create_app(settings: Settings = configured) -> FastAPI:
    """The application. It starts only with a SECRET_KEY that is fit: see `_open`."""
    app = FastAPI(title="Victus", version=_version(), lifespan=lifespan)
    app.state.settings = settings
    app.state.sessions = SessionLocal
    app.state.throttle = Throttle()
    app.state.documents_off = None
    errors.install(app)
    for router in (accounts, chat, conversations, documents, facts, health, metrics, traces):
        app.include_router(router.router)
    # The last one added is the outermost: nothing is read before it is known who sends it.
    app.add_middleware(
        BodyLimitMiddleware,
        limits={"/api/upload": settings.MAX_UPLOAD_BYTES + FORM_BYTES},
        default=MOST_BODY_BYTES,
    )
    app.add_middleware(IdentityMiddleware, key=settings.SECRET_KEY.get_secret_value())
    app.add_middleware(RequestMiddleware)
    return app


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Opening and closing take a while and block, so they run in a thread."""
    stack = ExitStack()
    try:
        await run_in_threadpool(_open, app, stack)
    except Exception as error:
        log.error("service.start.failed", kind=type(error).__name__, reason=str(error))
        raise
    log.info("service.start.done", documents=app.state.documents_off is None)
    try:
        yield
    finally:
        await run_in_threadpool(stack.close)
        log.info("service.stop.done")


def _open(app: FastAPI, stack: ExitStack) -> None:
    """Raises SecretKeyError; uvicorn then ends, and its supervisor does not try again for ever."""
    settings: Settings = app.state.settings
    check_secret_key(settings)
    app.state.accounts = OpenAccounts(SessionLocal)
    with _undone(stack):
        stack.callback(_leave_database, settings.DATABASE_URL)
        prepare(settings)
        try:
            stack.enter_context(rag_tools.lifespan())
        except DocumentsNeedPostgresError as error:
            app.state.documents_off = str(error)
            log.warning("service.documents.off", reason=str(error))
        upload_files.sweep(settings.UPLOAD_DIR)
        app.state.indexing = stack.enter_context(closing(Indexing(settings.INDEX_WORKERS)))
        runner = Runner(SessionLocal, settings, lambda outcome: metrics.CHATS.labels(outcome).inc())
        app.state.runner = stack.enter_context(closing(runner))


def _leave_database(url: str) -> None:
    """Asked for here because uvicorn ends by the signal that stopped it, without what atexit holds."""
    SessionLocal.kw["bind"].dispose()
    if url.startswith(EMBEDDED):
        from src import embedded

        embedded.leave(url.removeprefix(EMBEDDED))


@contextmanager
def _undone(stack: ExitStack) -> Iterator[None]:
    """A start that fails leaves nothing open."""
    try:
        yield
    except BaseException:
        stack.close()
        raise


def _version() -> str:
    try:
        return version("victus-backend")
    except PackageNotFoundError:
        return "0"


def __getattr__(name: str) -> FastAPI:
    """`app` is made when it is first asked for, so that importing this module decides nothing."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    logs.configure(configured.LOG_LEVEL)
    globals()["app"] = app = create_app(configured)
    return app
