"""FAISS directories as LangChain's own code writes and reads them, and chunks to put there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from langchain_core.embeddings import Embeddings

from src.tools.rag_tools.migration.faiss_format import Content
from src.tools.rag_tools.store import DIMENSION, Chunk, chunk_id

ODD = " \0\ud800"
"""Ends the text of the chunk `odd`: neither JSON nor PostgreSQL can hold it."""


class _Unused(Embeddings):
    """Vectors are given with the texts."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    def embed_query(self, text: str) -> list[float]:
        raise NotImplementedError


def unit_vectors(count: int, seed: int = 0, dimension: int = DIMENSION) -> np.ndarray[Any, Any]:
    rows = np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def made_chunks(document_id: int, count: int = 2, text: str = "made") -> list[Chunk]:
    """Chunks of a new document; the same arguments give the same chunks."""
    rows = unit_vectors(count, 10_000 + document_id)
    return [
        Chunk(
            chunk_id(document_id, ordinal, f"{text} {document_id}.{ordinal}"),
            document_id,
            ordinal,
            f"{text} {document_id}.{ordinal}",
            {"source": f"uploads/{document_id}.pdf", "page": ordinal},
            rows[ordinal],
        )
        for ordinal in range(count)
    ]


def save_legacy(directory: Path, ids: Sequence[str], *, seed: int = 0, **options: Any) -> np.ndarray[Any, Any]:
    """An index with a chunk for each id, saved as the old release did; its vectors."""
    rows = unit_vectors(len(ids), seed)
    _langchain().from_embeddings(
        _pairs(ids, rows), _Unused(), metadatas=_metadatas(ids), ids=list(ids), **options
    ).save_local(str(directory))
    return rows


def old_release_adds(directory: Path, ids: Sequence[str], *, seed: int = 1) -> None:
    """The old release reads everything, adds to it, and writes both files in place."""
    store = _load(directory)
    rows = unit_vectors(len(ids), seed)
    store.add_embeddings(_pairs(ids, rows), metadatas=_metadatas(ids), ids=list(ids))
    store.save_local(str(directory))


def opened_by_langchain(directory: Path) -> dict[str, tuple[str, dict[str, Any], bytes]]:
    """What FAISS.load_local finds: docstore id -> content, metadata, vector."""
    store = _load(directory)
    assert store.index.ntotal == len(store.index_to_docstore_id)
    found = {}
    for position, name in store.index_to_docstore_id.items():
        document = store.docstore.search(name)
        vector = store.index.reconstruct(position).tobytes()
        found[name] = (document.page_content, document.metadata, vector)
    return found


def _langchain() -> Any:
    """Imported where it is needed: it takes seconds."""
    with warnings.catch_warnings():
        # It announces at import that it is no longer maintained.
        warnings.simplefilter("ignore", DeprecationWarning)
        from langchain_community.vectorstores import FAISS
    return FAISS


def _load(directory: Path) -> Any:
    return _langchain().load_local(str(directory), _Unused(), allow_dangerous_deserialization=True)


def _pairs(ids: Sequence[str], rows: Any) -> list[tuple[str, list[float]]]:
    return [
        (f"text of {name}{ODD if name == 'odd' else ''}", row.tolist()) for name, row in zip(ids, rows, strict=True)
    ]


def _metadatas(ids: Sequence[str]) -> list[dict[str, Any]]:
    return [{"source": f"uploads/{name[:1]}.pdf", "page": at} for at, name in enumerate(ids)]


def content_of(found: dict[str, tuple[str, dict[str, Any], bytes]]) -> Content:
    """What LangChain found, as `save_generation` takes it."""
    content = Content.empty()
    for name, (text, metadata, vector) in found.items():
        content.index.add(np.frombuffer(vector, np.float32)[None])
        content.chunks.docstore_ids.append(name)
        content.chunks.contents.append(text)
        content.chunks.metadatas.append(metadata)
    return content


def made_content(*names: str) -> Content:
    """A chunk for each name."""
    rows = unit_vectors(len(names), 5)
    found = {name: (f"saved {name}", {"n": name}, row.tobytes()) for name, row in zip(names, rows, strict=True)}
    return content_of(found)


def found_in(content: Content) -> dict[str, tuple[str, dict[str, Any], bytes]]:
    """The inverse of `content_of`."""
    chunks = content.chunks
    return {
        name: (chunks.contents[at], chunks.metadatas[at], content.index.reconstruct(at).tobytes())
        for at, name in enumerate(chunks.docstore_ids)
    }
