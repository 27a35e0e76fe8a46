"""`python -m src.demo`: the backend on this machine alone, with a demonstration user.

Everything it keeps lies in one folder (`data/demo`), which can be removed when it is not running.
Starting it again goes on with what is there. Whatever the environment or `.env` says about a database
and its files is not touched: the password of the demonstration user is known to everybody.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]
USER, EMAIL, PASSWORD = "demo", "demo@example.org", "demonstration"

USAGE = """
The backend listens on {base}; its description is on {base}/docs.

  TOKEN=$(curl -s {base}/auth/login -H 'Content-Type: application/json' \\
      -d '{{"username": "{user}", "password": "{password}"}}' | sed -E 's/.*"access_token":"([^"]+)".*/\\1/')
  curl -s {base}/api/upload -H "Authorization: Bearer $TOKEN" -F file=@your.pdf
  until curl -s {base}/api/documents -H "Authorization: Bearer $TOKEN" | grep '"ready"'; do sleep 1; done
  curl -s -G {base}/api/search -H "Authorization: Bearer $TOKEN" --data-urlencode 'q=your question'

{chat}Ctrl-C stops it.
"""
WITHOUT_CHAT = "Chat needs OPENAI_API_KEY and answers 503 until it is set; the rest works without.\n"


def main(
    folder: Annotated[Path, typer.Option(help="where everything is kept")] = Path("data/demo"),
    port: int = 8000,
) -> None:
    """Bring the schema up to date, make the demonstration user, and serve on this machine only."""
    prepare_settings(folder.resolve())
    upgrade_schema()
    seed_user()
    serve(port)


def prepare_settings(folder: Path) -> None:
    """Must run before `src.config` is imported, which reads the environment once."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "ENVIRONMENT": "development",
        "SECRET_KEY": secrets.token_hex(32),
        "DATABASE_URL": f"embedded:{folder / 'postgres'}",
        # Empty: derived from DATABASE_URL.
        "DATABASE_ADMIN_URL": "",
        "DATABASE_ROLLOUT_URL": "",
        "UPLOAD_DIR": str(folder / "uploads"),
        "FAISS_INDEX_PATH": str(folder / "faiss_index"),  # migration
    }
    os.environ.setdefault("EMBEDDING_PROVIDER", "local")


def upgrade_schema() -> None:
    """Alembic's head, as the owner of the database."""
    from alembic.config import Config

    from alembic import command

    command.upgrade(Config(ROOT / "alembic.ini"), "head")


def seed_user() -> None:
    """The demonstration user, unless there is one already."""
    from src.auth.accounts import register
    from src.auth.errors import AccountExistsError
    from src.database import SessionLocal

    with SessionLocal() as db:
        try:
            register(db, EMAIL, USER, PASSWORD, "Demonstration")
        except AccountExistsError:
            return


def serve(port: int) -> None:
    import uvicorn

    from src.config import settings

    chat = "" if settings.OPENAI_API_KEY else WITHOUT_CHAT
    usage = USAGE.format(base=f"http://127.0.0.1:{port}", user=USER, password=PASSWORD, chat=chat)
    typer.echo(usage, err=True)
    uvicorn.run("src.main:app", host="127.0.0.1", port=port)


if __name__ == "__main__":
    typer.run(main)
