"""A database of one test: what `tests/conftest.py` hands out as the fixture `database`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg

from src.database import Role, url_of
from src.embedded import EmbeddedServer


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
