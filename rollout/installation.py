"""Makes an installation of the old release in a folder, file by file as that release left one.

For rehearsals without real data and for tests: it knows who really uploaded each chunk, which the
old release never wrote down. A process that dies midway leaves an unfinished folder; delete it and
make it again, for a folder that holds anything is refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from rollout.errors import PreconditionError
from rollout.installation_files import InstallationError, reference_text, write_file
from rollout.installation_rows import made_uuid, write_database

DATABASE = "victus.db"
UPLOADS = "uploads"
INDEX = "faiss_index"

Progress = Callable[[str], None]


class Fate(StrEnum):
    """What the rules of owner assignment must make of an upload; all but `owned` is quarantined."""

    OWNED = "owned"
    NO_ROW = "no row"
    MISSING_USER = "missing user"
    SEVERAL_USERS = "several users"
    MORE_RUNS_THAN_ROWS = "more runs than rows"


class FolderInUseError(InstallationError, PreconditionError):
    """The folder holds something already."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One upload to make. `row`: whether `documents` has a row for it."""

    user: str
    filename: str
    modules: tuple[str, ...]
    fate: Fate = Fate.OWNED
    row: bool = True


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload that was made, and its chunks' docstore ids in order of position.

    `document_id` is the row of this very upload, None where it has none.
    """

    user_id: int
    document_id: int | None
    source: str
    fate: Fate
    docstore_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Installation:
    """A made installation and the truth about it. `users`: id by name, of those that exist.

    Uploads are in the order of their chunks' positions in the index.
    """

    directory: Path
    users: dict[str, int]
    uploads: tuple[Upload, ...]

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.directory / DATABASE}"

    @property
    def index(self) -> Path:
        return self.directory / INDEX

    @property
    def uploaded_by(self) -> dict[str, int]:
        """Who really uploaded each chunk, by docstore id; quarantined chunks are in it too."""
        return {item: upload.user_id for upload in self.uploads for item in upload.docstore_ids}

    @property
    def expected(self) -> dict[str, int]:
        """The owner that assignment must find, by docstore id; quarantined chunks are not in it."""
        return {
            item: upload.user_id for upload in self.uploads for item in upload.docstore_ids if upload.fate is Fate.OWNED
        }

    @property
    def quarantined(self) -> dict[Fate, frozenset[str]]:
        """The docstore ids that assignment must quarantine, by reason."""
        return {
            fate: frozenset(item for upload in self.uploads for item in upload.docstore_ids if upload.fate is fate)
            for fate in Fate
            if fate is not Fate.OWNED
        }


USERS = ("ada", "ben", "cleo", "dan", "eve")
GONE = "finn"
"""Uploaded once; the row in `users` is gone, for SQLite enforced no foreign key."""

# In order of upload. Both plans for report.pdf wrote one file; both chunk sets stayed. Between the
# notes.docx of dan are other uploads, between the plan.docx of eve none: those are one run.
PLANS = (
    Plan("ada", "syntax-trees.docx", ("ast",)),
    Plan("cleo", "testing.pdf", ("unittest",)),
    Plan("dan", "report.pdf", ("pathlib",), Fate.SEVERAL_USERS),
    Plan("ben", "heaps.docx", ("heapq",)),
    Plan("ada", "concurrency.pdf", ("asyncio",)),
    Plan("eve", "plan.docx", ("textwrap",)),
    Plan("eve", "plan.docx", ("fractions",)),
    Plan("cleo", "report.pdf", ("statistics",), Fate.SEVERAL_USERS),
    Plan("dan", "notes.docx", ("difflib",)),
    Plan("ada", "mail.docx", ("mailbox",)),
    Plan("dan", "notes.docx", ("random",)),
    Plan("cleo", "settings.docx", ("configparser",)),
    Plan("cleo", "handbook.pdf", ("calendar",), Fate.NO_ROW, row=False),
    Plan("ada", "encryption.pdf", ("ssl",)),
    Plan(GONE, "minutes.docx", ("gzip",), Fate.MISSING_USER),
    Plan("eve", "contexts.pdf", ("contextlib",)),
    Plan("ada", "constants-and-streams.docx", ("enum", "io")),
    Plan("dan", "draft.docx", ("shelve",), Fate.MORE_RUNS_THAN_ROWS),
    Plan("ada", "types.pdf", ("typing",)),
    Plan("dan", "draft.docx", ("queue",), Fate.MORE_RUNS_THAN_ROWS, row=False),
    Plan("cleo", "numbers.pdf", ("decimal",)),
    Plan("ada", "system.docx", ("os", "socket", "inspect")),
)


def make_installation(
    directory: Path,
    embeddings: Embeddings,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    plans: Sequence[Plan] = PLANS,
) -> Installation:
    """Make `victus.db`, `uploads/` and `faiss_index/` in `directory`, which is new or empty.

    The same seed and Python version give the same chunks, ids and rows. Raises InstallationError.
    """
    _refuse_used(directory)
    (directory / UPLOADS).mkdir(parents=True)
    chance = random.Random(seed)  # noqa: S311  reproducible, and nothing secret
    users = {name: number for number, name in enumerate((*USERS, GONE), 1)}
    uploads = []
    for plan, row_id in zip(plans, _row_ids(plans), strict=True):
        made = _upload(directory, embeddings, plan, users[plan.user], row_id, chance)
        uploads.append(made)
        if progress is not None:
            progress(f"{made.source}: {len(made.docstore_ids)} chunks ({len(uploads)}/{len(plans)})")
    del users[GONE]
    write_database(directory / DATABASE, users, _document_rows(uploads), chance)
    return Installation(directory, users, tuple(uploads))


def legacy_add(
    directory: Path,
    file_path: str,
    embeddings: Embeddings,
    *,
    ids: Callable[[int], list[str]] | None = None,
) -> list[str]:
    """Index `directory / file_path` as the old update_vector_store did; gives the docstore ids.

    The whole index is read, added to and written again in place. `file_path` is as the old release
    got it (`uploads/<filename>`) and becomes the chunks' source. `ids` makes that many docstore
    ids; without it LangChain makes random ones.
    """
    from langchain_community.vectorstores import FAISS  # takes a second to load

    chunks = legacy_chunks(directory, file_path)
    index = directory / INDEX
    given = ids(len(chunks)) if ids else None
    if index.is_dir() and any(index.iterdir()):
        store = FAISS.load_local(str(index), embeddings, allow_dangerous_deserialization=True)
        known = len(store.index_to_docstore_id)
        store.add_documents(chunks, ids=given)
    else:
        known = 0
        store = FAISS.from_documents(chunks, embeddings, ids=given)
    store.save_local(str(index))
    return [store.index_to_docstore_id[at] for at in range(known, known + len(chunks))]


def legacy_chunks(directory: Path, file_path: str) -> list[Document]:
    """The chunks that the old release made of `directory / file_path`, with its metadata."""
    from langchain_community.document_loaders import Docx2txtLoader, PyPDFLoader
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    path = directory / file_path
    loader = PyPDFLoader(str(path)) if path.suffix == ".pdf" else Docx2txtLoader(str(path))
    splitter = RecursiveCharacterTextSplitter(chunk_size=1000, chunk_overlap=200)
    chunks = splitter.split_documents(loader.load())
    for chunk in chunks:
        # The loader was given a full path here; the old release ran in `directory`.
        chunk.metadata["source"] = file_path
        chunk.metadata["file_name"] = path.name
    return chunks


def _upload(
    directory: Path,
    embeddings: Embeddings,
    plan: Plan,
    user_id: int,
    document_id: int | None,
    chance: random.Random,
) -> Upload:
    source = f"{UPLOADS}/{plan.filename}"
    write_file(directory / source, reference_text(plan.modules))
    added = legacy_add(
        directory,
        source,
        embeddings,
        ids=lambda number: [str(made_uuid(chance)) for _ in range(number)],
    )
    return Upload(user_id, document_id, source, plan.fate, tuple(added))


def _refuse_used(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FolderInUseError(f"{directory} exists and is not an empty folder; name another one, or delete it")


def _row_ids(plans: Sequence[Plan]) -> list[int | None]:
    numbers = count(1)
    return [next(numbers) if plan.row else None for plan in plans]


def _document_rows(uploads: Sequence[Upload]) -> list[dict[str, int | str]]:
    return [
        {"user_id": made.user_id, "filename": Path(made.source).name, "path": made.source}
        for made in uploads
        if made.document_id is not None
    ]
