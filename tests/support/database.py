"""A database of one test, which `tests/conftest.py` hands out as the fixture `database`, and the template for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from alembic.config import Config

from alembic import command
from src.database import Role, url_of
from src.embedded import EmbeddedServer

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class Database:
    """A clone of the template at Alembic's head, dropped after the test."""

    server: EmbeddedServer
    name: str

    def conninfo(self, role: Role = Role.OWNER) -> str:
        """libpq's connection string for `role`."""
        return self.server.conninfo(role, self.name)

    def superuser_conninfo(self) -> str:
        """libpq's connection string for the superuser, whom row-level security does not bind."""
        return self.server.superuser_conninfo(self.name)

    def url(self, role: Role = Role.OWNER) -> str:
        """SQLAlchemy's URL for `role`."""
        return url_of(self.conninfo(role))

    def connect(self, role: Role = Role.OWNER, **options: Any) -> psycopg.Connection[Any]:
        """A connection as `role`; `with` commits and closes it."""
        return psycopg.connect(self.conninfo(role), **options)


def make_template(server: EmbeddedServer, name: str) -> None:
    """A database at Alembic's head, under another name until whole: who dies here leaves no half template."""
    unfinished = f"{name}_unfinished"
    server.drop_database(unfinished)
    server.create_database(unfinished)
    config = Config(ROOT / "alembic.ini")
    config.attributes["url"] = url_of(server.conninfo(Role.OWNER, unfinished))
    command.upgrade(config, "head")
    with psycopg.connect(server.superuser_conninfo(), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {unfinished} RENAME TO {name}")


def never_wait_for_the_disk(server: EmbeddedServer) -> None:
    """For a server of which nothing outlives the machine; a killed process loses nothing that the kernel has."""
    with psycopg.connect(server.superuser_conninfo(), autocommit=True) as connection:
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            connection.execute(f"ALTER SYSTEM SET {setting} = off")
        connection.execute("SELECT pg_reload_conf()")
