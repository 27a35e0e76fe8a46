"""What must be true before anything is written twice: server, schema, roles, directory, model, owners."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import psycopg
from alembic.script import ScriptDirectory

from rollout.control import Control
from rollout.errors import PreconditionError
from rollout.gates import Check, Criterion, Verdict
from rollout.schema import alembic_config
from src.database import Role, conninfo
from src.tools.rag_tools.embeddings import EmbeddingError, embed_texts
from src.tools.rag_tools.pgvector_store import check_extension, check_role
from src.tools.rag_tools.store import InvalidVectorError, StoreError

MINIMUM_SERVER = 160_000
SAMPLE = 20
SAME_MODEL = 0.999

BULK_ROLE = "SELECT current_user, rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user"


def install_checks(control: Control, acknowledged: int | None) -> Mapping[str, Check]:
    """The gate to the first stage that writes both stores. `acknowledged`: quarantined chunks seen and accepted."""
    return {
        "postgresql": partial(_postgresql, control),
        "schema": partial(_schema, control),
        "role": partial(_role, control),
        "directory": partial(_directory, control),
        "model": partial(_model, control),
        "owners": partial(_owners, control),
        "quarantine": partial(_quarantine, control, acknowledged),
    }


def _postgresql(control: Control) -> Criterion:
    with control.connection() as connection:
        number = connection.info.server_version
        try:
            extension, fits = f"pgvector {check_extension(connection)}", number >= MINIMUM_SERVER
        except StoreError as error:
            extension, fits = str(error), False
    return Criterion(
        "postgresql", "are PostgreSQL and pgvector new enough?",
        f"PostgreSQL {number // 10_000}, {extension}", "PostgreSQL >= 16, pgvector >= 0.8.4",
        _verdict(fits), "update the server or the extension", precondition=True,
    )  # fmt: skip


def _schema(control: Control) -> Criterion:
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    with control.connection() as connection:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    found = "none" if row is None else str(row[0])
    return Criterion(
        "schema",
        "is the schema at head?",
        found,
        str(head),
        _verdict(found == head),
        "run `alembic upgrade head`",
        precondition=True,
    )


def _role(control: Control) -> Criterion:
    """The backend's must be held by row-level security, and the one of this command must not."""
    with control.connection() as connection:
        bulk, bypasses = connection.execute(BULK_ROLE).fetchone() or ("nobody", False)
    try:
        with psycopg.connect(conninfo(Role.APP), autocommit=True, connect_timeout=10) as connection:
            check_role(connection)
            value, fits = f"{connection.info.user} is held by row-level security", True
    except (StoreError, psycopg.OperationalError) as error:
        value, fits = str(error).strip(), False
    if not bypasses:
        value = f"{value}; {bulk}, as which this command connects, is held by it too and would see nothing"
    return Criterion(
        "role", "is the backend's role held by row-level security, and this command's not?", value,
        "the backend's: neither owner, superuser nor BYPASSRLS; this command's: BYPASSRLS", _verdict(fits and bypasses),
        f"point DATABASE_URL at {Role.APP} and DATABASE_ROLLOUT_URL at {Role.ROLLOUT}", precondition=True,
    )  # fmt: skip


def _directory(control: Control) -> Criterion:
    question = "is the FAISS directory whole, local, of the right dimension and unit length?"
    try:
        chunks = control.faiss.counts().legacy
    except PreconditionError as error:
        return Criterion(
            "directory", question, str(error), "opens", Verdict.FAIL, "nothing was changed", precondition=True
        )  # fmt: skip
    return Criterion("directory", question, f"opened, {chunks} chunks", "opens", Verdict.PASS, n=chunks)


def _model(control: Control) -> Criterion:
    question, limit = "did the configured model make the index?", f"cosine >= {SAME_MODEL}"
    todo = "set EMBEDDING_PROVIDER and EMBEDDING_MODEL as they were when the index was made"
    samples = control.faiss.sample(SAMPLE, seed=0)
    if not samples:
        return Criterion("model", question, "no chunks", limit, Verdict.PASS, n=0)
    try:
        vectors = embed_texts(control.embeddings, [sample.text for sample in samples])
    except EmbeddingError as error:
        return Criterion(
            "model", question, f"could not embed: {error}", limit, Verdict.INCONCLUSIVE,
            "give the provider that made the index, or override `model` with the reason", 0,
        )  # fmt: skip
    except InvalidVectorError as error:
        return Criterion("model", question, str(error), limit, Verdict.FAIL, todo, len(samples), precondition=True)
    stored = np.stack([sample.vector for sample in samples])
    smallest = float(np.einsum("ij,ij->i", vectors, stored).min())
    return Criterion(
        "model", question, f"smallest cosine {smallest:.4f} of {len(samples)} chunks embedded again", limit,
        _verdict(smallest >= SAME_MODEL), todo, len(samples), precondition=True,
    )  # fmt: skip


def _owners(control: Control) -> Criterion:
    with control.connection() as connection:
        decided = {row[0] for row in connection.execute("SELECT docstore_id FROM legacy_chunks")}
    undecided = [docstore_id for docstore_id in control.faiss.unowned() if docstore_id not in decided]
    return Criterion(
        "owners", "has every legacy chunk been decided?", f"{len(undecided)} undecided", "0 undecided",
        _verdict(not undecided), "run `rollout assign-owners`, read it, then with --execute", len(decided),
    )  # fmt: skip


def _quarantine(control: Control, acknowledged: int | None) -> Criterion:
    with control.connection() as connection:
        row = connection.execute("SELECT count(*) FROM legacy_chunks WHERE status = 'quarantined'").fetchone()
    count = 0 if row is None else int(row[0])
    said = "nothing acknowledged" if acknowledged is None else f"{acknowledged} acknowledged"
    return Criterion(
        "quarantine", "has somebody seen what nobody will find any more?", f"{count} quarantined, {said}",
        "acknowledged with its number", _verdict(count == (acknowledged or 0)),
        f"read `rollout quarantine list`, then add --acknowledge-quarantine {count}", count,
    )  # fmt: skip


def _verdict(holds: bool) -> Verdict:
    return Verdict.PASS if holds else Verdict.FAIL
