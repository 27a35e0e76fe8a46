"""Reads LangChain's index.pkl without running anything that it names (an allow-list unpickler).

Documents and the docstore become inert classes of our own that only keep their state, so no code of
LangChain or pydantic runs, whatever version wrote the file. Only reads: a process that dies changes
nothing.
"""

from __future__ import annotations

import builtins
import datetime
import gc
import pickle
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.tools.rag_tools.migration.faiss_disk import FaissDirectoryError


class HostilePickleError(FaissDirectoryError):
    """The file names something that an index saved by LangChain does not hold. Nothing of it was run."""


class DamagedPickleError(FaissDirectoryError):
    """The file is cut short, or is not what LangChain saves."""


class MismatchedPairError(FaissDirectoryError):
    """index.pkl does not describe the vectors of index.faiss."""


@dataclass(frozen=True, slots=True)
class PickledChunks:
    """What index.pkl says, by position: three lists of one length. Content and metadata are as saved."""

    docstore_ids: list[str]
    contents: list[str]
    metadatas: list[dict[str, Any]]


class _Docstore:
    """An InMemoryDocstore, reduced to what it holds."""

    __slots__ = ("documents",)

    def __setstate__(self, state: Any) -> None:
        self.documents = state["_dict"]


class _Document:
    """A Document, reduced to the two fields that every version of it has."""

    __slots__ = ("content", "metadata")

    def __setstate__(self, state: Any) -> None:
        # pydantic, 1 and 2, wraps the fields in a state of its own.
        fields = state["__dict__"]
        self.content, self.metadata = fields["page_content"], fields["metadata"]


_DOCSTORES = (
    "langchain_community.docstore.in_memory",
    "langchain_classic.docstore.in_memory",
    "langchain.docstore.in_memory",
)
_DOCUMENTS = (
    "langchain_core.documents.base",
    "langchain_core.documents",
    "langchain.schema.document",
    "langchain.schema",
    "langchain.docstore.document",
    "langchain_community.docstore.document",
    "langchain_classic.schema.document",
    "langchain_classic.schema",
    "langchain_classic.docstore.document",
)
_PLAIN = [
    "bool",
    "bytearray",
    "bytes",
    "complex",
    "dict",
    "float",
    "frozenset",
    "int",
    "list",
    "set",
    "str",
    "tuple",
]
_TIMES = ["date", "datetime", "time", "timedelta", "timezone"]
ALLOWED: dict[tuple[str, str], Any] = {
    **{(module, "InMemoryDocstore"): _Docstore for module in _DOCSTORES},
    **{(module, "Document"): _Document for module in _DOCUMENTS},
    **{("builtins", name): getattr(builtins, name) for name in _PLAIN},
    **{("datetime", name): getattr(datetime, name) for name in _TIMES},
    ("uuid", "UUID"): uuid.UUID,
}


class _Unpickler(pickle.Unpickler):
    """Knows the names in ALLOWED, whole: a dotted name is one key here and is never walked."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise HostilePickleError(
                f"{self._path} names {module}.{name}, which no index saved by LangChain holds; nothing of the file was"
                " run. Find out who wrote it, and restore index.faiss and index.pkl from a backup"
            ) from None


@dataclass(frozen=True, slots=True)
class Pickled:
    """What index.pkl holds, before it is held against index.faiss."""

    path: Path
    documents: dict[str, Any]
    positions: dict[int, str]

    def chunks(self, total: int) -> PickledChunks:
        """Of an index of `total` vectors, in the order of their positions.

        Raises DamagedPickleError, or MismatchedPairError naming both counts.
        """
        documents, path = self.documents, self.path
        docstore_ids = _in_order(self.positions, total, path)
        missing = [key for key in docstore_ids if key not in documents]
        if missing:
            raise MismatchedPairError(
                f"{path}: {len(missing)} of {total} chunks have no document in the docstore of {len(documents)}, the"
                f" first is {missing[0]!r}; {_RESTORE}"
            )
        # Documents that no position names have no vector, so no search ever found them: left out.
        found = [_checked(documents[key], key, path) for key in docstore_ids]
        contents = [document.content for document in found]
        return PickledChunks(docstore_ids, contents, [document.metadata for document in found])


def read_pickle(path: Path) -> Pickled:
    """The file, without running anything that it names. Raises HostilePickleError, DamagedPickleError."""
    return Pickled(path, *_parts(_load(path), path))


_RESTORE = "restore index.faiss and index.pkl together from one backup"


def _load(path: Path) -> Any:
    with path.open("rb") as file, collector_paused():
        try:
            return _Unpickler(file, path).load()
        except (HostilePickleError, OSError):
            raise
        except Exception as error:
            # A damaged pickle raises whatever the byte that broke leads to.
            raise DamagedPickleError(f"{path} cannot be read ({type(error).__name__}: {error}); {_RESTORE}") from error


def _parts(saved: Any, path: Path) -> tuple[dict[str, Any], dict[int, str]]:
    match saved:
        case (_Docstore(documents=dict(documents)), dict(positions)):
            return documents, positions
        case _:
            raise DamagedPickleError(f"{path} holds no pair of a docstore and a mapping of positions; {_RESTORE}")


def _in_order(positions: dict[int, str], total: int, path: Path) -> list[str]:
    if len(positions) != total:
        raise MismatchedPairError(
            f"{path} maps {len(positions)} positions, index.faiss beside it holds {total} vectors; {_RESTORE}"
        )
    try:
        docstore_ids = [positions[position] for position in range(total)]
    except KeyError as error:
        raise MismatchedPairError(f"{path} maps {total} positions, but not position {error}; {_RESTORE}") from error
    if any(type(name) is not str for name in docstore_ids):
        raise DamagedPickleError(f"{path} maps positions to what is no text; {_RESTORE}")
    distinct = len(set(docstore_ids))
    if distinct != total:
        raise MismatchedPairError(f"{path} maps {total} positions to {distinct} docstore ids; {_RESTORE}")
    return docstore_ids


def _checked(document: Any, key: str, path: Path) -> _Document:
    if (
        type(document) is _Document
        # Without a state it has neither.
        and type(getattr(document, "content", None)) is str
        and type(getattr(document, "metadata", None)) is dict
    ):
        return document
    raise DamagedPickleError(f"{path}: the entry {key!r} is no document with content and metadata; {_RESTORE}")


@contextmanager
def collector_paused() -> Iterator[None]:
    """Else it goes through all that was read so far again and again, for half of the time."""
    was_running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_running:
            gc.enable()
