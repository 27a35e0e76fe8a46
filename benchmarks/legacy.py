"""The old release: every read and every write loads LangChain's whole directory."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

from benchmarks.site import Given


def _loaded(directory: Path) -> Any:
    from langchain_community.vectorstores import FAISS

    return FAISS.load_local(str(directory), Given([]), allow_dangerous_deserialization=True)


def read(directory: Path, vector: Any, k: int) -> float:
    """Milliseconds of load_local and a search."""
    begun = time.perf_counter()
    _loaded(directory).similarity_search_by_vector(vector.tolist(), k=k)
    seconds = time.perf_counter() - begun
    # The next one shall not come on top of what is left of this one.
    gc.collect()
    return seconds * 1000


def write(directory: Path, rows: Any) -> float:
    """Milliseconds of load_local, adding and save_local; what it saves goes to a folder beside and is removed."""
    texts = [f"text {at}" for at in range(len(rows))]
    given = [row.tolist() for row in rows]
    target = directory.with_name("legacy_saved")
    begun = time.perf_counter()
    store = _loaded(directory)
    store.add_embeddings(list(zip(texts, given, strict=True)), metadatas=[{} for _ in texts])
    store.save_local(str(target))
    return (time.perf_counter() - begun) * 1000
