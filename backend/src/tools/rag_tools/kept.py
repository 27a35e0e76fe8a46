"""The result of parsing, cutting and embedding, kept beside the upload until both stores have it.

Embedding the same text twice gives different vectors, so every store must be given the same result:
the first one kept wins, and whoever comes second uses it too. If the process dies, the file is
either wholly there or not there at all; what may be left over is a `.part` file, which `forget`
removes.

A kept file is a numpy archive without pickles (`version`, `document_id`, `vectors`, `chunks`). Its
last 64 bytes, the archive's comment, are the SHA-256 of everything before them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from src.tools.rag_tools import faults
from src.tools.rag_tools.store import Chunk, StoreError, canonical_json

FORMAT_VERSION = 1
SUFFIX = ".kept.npz"
_DIGEST_LENGTH = 64


class KeepError(StoreError):
    """The kept result of a document could not be written, read or removed."""


class KeptDamagedError(KeepError):
    """The file is there but cannot be used as it is."""


def kept_path(upload: Path, document_id: int | None = None) -> Path:
    """Where the result for the uploaded file `upload` is kept: in the same folder.

    With `document_id` where two documents may have been uploaded to one path.
    """
    number = "" if document_id is None else f".{document_id}"
    return upload.with_name(f"{upload.name}{number}{SUFFIX}")


def keep(path: Path, chunks: Sequence[Chunk]) -> list[Chunk]:
    """Keep all chunks of one document at `path` (from kept_path) and return what is kept there now.

    That is another process' result if it came first: give the stores what is returned, only that.
    When this returns, the file survives a power cut. Raises KeepError (a full disk, for instance),
    KeptDamagedError if what came first cannot be read.
    """
    document_id = _document_id(path, chunks)
    with _explained("write", path):
        first = _publish(path, _encode(document_id, chunks))
    if first is None:
        return keep(path, chunks)
    if first:
        return list(chunks)
    kept = load(path, document_id)
    return kept if kept is not None else keep(path, chunks)


def load(path: Path, document_id: int) -> list[Chunk] | None:
    """The chunks kept at `path`, in their order; None if nothing is kept there.

    Raises KeptDamagedError if the file is not what was kept for this document, KeepError if it
    cannot be read at all.
    """
    with _explained("read", path), faults.point("kept.load"):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        # Whoever kept it may not have come to this yet, and a store must not outlive its source.
        _sync_folder(path.parent)
    return _decode(path, data, document_id)


def forget(path: Path) -> None:
    """Remove what is kept at `path` and what crashed writers left; fine if there is nothing."""
    with _explained("remove", path), faults.point("kept.forget"):
        for leftover in path.parent.glob(f"{escape(path.name)}.*.part"):
            leftover.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def results_in(folder: Path) -> dict[Path, int]:
    """What is kept in `folder` by document id, of the documents that have their own place (see kept_path)."""
    found = {path: path.name.removesuffix(SUFFIX).rpartition(".")[2] for path in folder.glob(f"*{SUFFIX}")}
    return {path: int(number) for path, number in found.items() if number.isdecimal()}


def _document_id(path: Path, chunks: Sequence[Chunk]) -> int:
    if not path.name.endswith(SUFFIX):
        raise ValueError(f"{path} is no place for a kept result: use kept_path(upload)")
    documents = {chunk.document_id for chunk in chunks}
    if len(documents) != 1:
        raise ValueError(f"{path} keeps the chunks of one document, not of {sorted(documents)}")
    return documents.pop()


@contextmanager
def _explained(act: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KeepError(
            f"cannot {act} {path}: {error.strerror or error}; make room on the disk or mend its rights, then try again"
        ) from error


def _publish(path: Path, data: bytes) -> bool | None:
    """Put `data` at `path` durably, unless something is there already; True if it was put.

    None where another process forgot the document in between, and this one's half with it.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with faults.point("kept.write"):
            _write_durably(part, data)
        with faults.point("kept.link"):
            first = _linked(part, path)
    finally:
        with faults.point("kept.unlink"):
            part.unlink(missing_ok=True)
    with faults.point("kept.sync"):
        _sync_folder(path.parent)
    return first


def _linked(part: Path, path: Path) -> bool | None:
    try:
        # A rename would replace what another process kept first and has given to a store.
        os.link(part, path)
    except FileExistsError:
        return False
    except FileNotFoundError:
        return None
    return True


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(document_id: int, chunks: Sequence[Chunk]) -> bytes:
    described = [
        {
            "id": str(chunk.id),
            "ordinal": chunk.ordinal,
            "content": chunk.content,
            "metadata": dict(chunk.metadata),
        }
        for chunk in chunks
    ]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        allow_pickle=False,
        version=np.int64(FORMAT_VERSION),
        document_id=np.int64(document_id),
        vectors=np.stack([chunk.vector for chunk in chunks]).astype(np.float32),
        chunks=np.frombuffer(canonical_json(described).encode(), dtype=np.uint8),
    )
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"0" * _DIGEST_LENGTH
    body = buffer.getvalue()[:-_DIGEST_LENGTH]
    return body + _digest(body)


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def _decode(path: Path, data: bytes, document_id: int) -> list[Chunk]:
    body, digest = data[:-_DIGEST_LENGTH], data[-_DIGEST_LENGTH:]
    if _digest(body) != digest:
        raise _damaged(path, "is damaged or cut short")
    # Intact from here on, so only what another release or another document wrote can be wrong.
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        if (version := int(archive["version"])) != FORMAT_VERSION:
            raise _damaged(path, f"has format {version}, this release reads {FORMAT_VERSION}")
        if (owner := int(archive["document_id"])) != document_id:
            raise _damaged(path, f"belongs to document {owner}, not {document_id}")
        described: list[dict[str, Any]] = json.loads(archive["chunks"].tobytes())
        vectors = archive["vectors"]
    return [
        Chunk(
            id=uuid.UUID(one["id"]),
            document_id=document_id,
            ordinal=one["ordinal"],
            content=one["content"],
            metadata=one["metadata"],
            vector=vector,
        )
        for one, vector in zip(described, vectors, strict=True)
    ]


def _damaged(path: Path, what: str) -> KeptDamagedError:
    return KeptDamagedError(
        f"{path} {what}; take the document from the store that has it."
        " Only if no store has any of it, forget this file and parse and embed again:"
        " embedding again gives other vectors, so two stores would no longer agree"
    )
