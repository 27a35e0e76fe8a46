"""Saving the FAISS directory so that the old release, or any LangChain, can open it, and looking whether it can."""

from __future__ import annotations

from langchain_community.vectorstores import FAISS
from langchain_core.embeddings import Embeddings

from rollout.control import Control
from src.tools.rag_tools.migration.faiss_generations import Generation
from src.tools.rag_tools.store import legacy_chunk_id

# Read before the directory is saved: what is marked done by then must be in the files.
HELD = """
SELECT document_id FROM vector_ledger WHERE store = 'faiss' AND wanted = 'present' AND state = 'done'
"""
GONE = "SELECT document_id FROM vector_ledger WHERE store = 'faiss' AND wanted = 'absent'"


class _Unused(Embeddings):
    """Opening a saved index embeds nothing."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    def embed_query(self, text: str) -> list[float]:
        raise NotImplementedError


def save(control: Control) -> Generation:
    """Fold what the journal holds into files that LangChain opens."""
    return control.faiss.save()


def missing_from_saved(control: Control) -> dict[str, int]:
    """Save, open the directory with LangChain's own load_local, and count the chunks it lacks."""
    held = _documents(control, HELD)
    save(control)
    opened = FAISS.load_local(str(control.faiss.directory), _Unused(), allow_dangerous_deserialization=True)
    saved = {legacy_chunk_id(docstore_id) for docstore_id in opened.index_to_docstore_id.values()}
    held -= _documents(control, GONE)
    wanted = {chunk.id for document_id in held for chunk in control.faiss.document(document_id)}
    return {"chunks": len(saved), "wanted": len(wanted), "missing": len(wanted - saved)}


def _documents(control: Control, statement: str) -> set[int]:
    with control.connection() as connection:
        return {int(row[0]) for row in connection.execute(statement)}
