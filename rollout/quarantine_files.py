"""Whether a file that is still on the disk is the one that a run of chunks was made of.

The old release wrote every upload of one name over the one before, so a file is evidence for the
last upload only. Reads uploads and tells shares; no text of a document leaves this module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import structlog

from rollout.owner_report import upload_of
from rollout.owner_rules import DocumentRow
from src.tools.rag_tools.chunking import DocumentUnreadableError, split
from src.tools.rag_tools.store import content_hash, normalise_text

log = structlog.get_logger(__name__)


def hashes_of(contents: Iterable[tuple[str, str]], wanted: Collection[str]) -> dict[str, bytes]:
    """The content hash of each chunk (docstore id, text) that is `wanted`."""
    return {
        docstore_id: content_hash(normalise_text(content)) for docstore_id, content in contents if docstore_id in wanted
    }


class Matcher:
    """Compares chunks, by their hashes, with uploads; each file is read once."""

    def __init__(self, uploads: Path | None, hashes: Mapping[str, bytes]) -> None:
        self._uploads = uploads
        self._hashes = hashes
        self._files: dict[Path, frozenset[bytes] | None] = {}

    def share(self, row: DocumentRow, docstore_ids: Sequence[str]) -> float | None:
        """Which part of the chunks is in the row's file, 0 to 1; None where that cannot be told."""
        known = [self._hashes[name] for name in docstore_ids if name in self._hashes]
        file = upload_of(row, self._uploads) if self._uploads is not None else None
        if file is None or not known:
            return None
        pieces = self._pieces(file, row)
        return None if pieces is None else sum(one in pieces for one in known) / len(known)

    def _pieces(self, file: Path, row: DocumentRow) -> frozenset[bytes] | None:
        if file not in self._files:
            self._files[file] = _read(file, row)
        return self._files[file]


def _read(file: Path, row: DocumentRow) -> frozenset[bytes] | None:
    try:
        return frozenset(content_hash(piece.content) for piece in split(file, row.path))
    except (DocumentUnreadableError, OSError) as error:
        log.info("quarantine.match.unreadable", document_id=row.id, error=type(error).__name__)
        return None
