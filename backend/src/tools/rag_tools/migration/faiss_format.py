"""The pair of files that LangChain's FAISS saves, read with every check and written so that it opens them.

Knows nothing of folders and generations. Writing goes to new files only: a process that dies leaves
files that nothing points at. faiss is loaded by the functions that need it.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from src.tools.rag_tools.migration.faiss_pickle import PickledChunks, read_pickle

INDEX_FILE = "index.faiss"
PICKLE_FILE = "index.pkl"
PAIR = (INDEX_FILE, PICKLE_FILE)
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Content:
    """What the pair of files holds. `index`: faiss.IndexFlatL2; the lists of `chunks` go by position."""

    index: Any
    chunks: PickledChunks

    @classmethod
    def empty(cls) -> Content:
        from src.tools.rag_tools.migration.faiss_index import new_index

        return cls(new_index(), PickledChunks([], [], []))


@dataclass(frozen=True, slots=True)
class Written:
    """What was written to a file."""

    sha256: str
    size: int


def read_pair(folder: Path) -> Content:
    """The content of `folder`, checked. Raises a FaissDirectoryError naming the file and what is wrong."""
    from src.tools.rag_tools.migration.faiss_index import read_index, refuse_wrong_length

    # They take about as long as each other, and only one of them the interpreter.
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(read_index, folder / INDEX_FILE)
        pickled = read_pickle(folder / PICKLE_FILE)
        index, wrong = reading.result()
    chunks = pickled.chunks(index.ntotal)
    refuse_wrong_length(folder / INDEX_FILE, wrong, chunks.docstore_ids)
    return Content(index, chunks)


def write_index(path: Path, index: Any) -> Written:
    """Through Python's file: faiss' own writer does not report a disk that fills at the close."""
    from src.tools.rag_tools.migration.faiss_index import write_blocks

    with path.open("xb", buffering=BLOCK) as file:
        output = _HashingFile(file)
        write_blocks(index, output.write)
    return output.written()


def write_pickle(path: Path, chunks: PickledChunks) -> Written:
    """LangChain's own objects, as its FAISS.save_local writes them."""
    with path.open("xb", buffering=BLOCK) as file:
        output = _HashingFile(file)
        pickle.dump(_langchain_objects(chunks), output)
    return output.written()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _HashingFile:
    """Passes on what is written, and knows its hash and size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def write(self, block: bytes) -> int:
        self._hash.update(block)
        self._size += len(block)
        return self._file.write(block)

    def written(self) -> Written:
        return Written(self._hash.hexdigest(), self._size)


def _langchain_objects(chunks: PickledChunks) -> tuple[Any, dict[int, str]]:
    docstore, document = _langchain_classes()
    documents = {
        key: document(id=key, page_content=content, metadata=metadata)
        for key, content, metadata in zip(chunks.docstore_ids, chunks.contents, chunks.metadatas, strict=True)
    }
    return docstore(documents), dict(enumerate(chunks.docstore_ids))


def _langchain_classes() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Imported when something is saved: it takes a second, and reading does without."""
    with warnings.catch_warnings():
        # It announces at import that it is no longer maintained; it goes with FAISS.
        warnings.simplefilter("ignore", DeprecationWarning)
        from langchain_community.docstore.in_memory import InMemoryDocstore
        from langchain_core.documents import Document
    return InMemoryDocstore, Document
