"""Where an uploaded file lies, and under what name its owner sees it: two names that share nothing.

On disk a file is called by a random id and one of our own suffixes, so no name that a user sends can
collide, escape the folder or be run. It is written whole and closed before the upload is recorded. A
process that dies between the two leaves a file that no row knows; `sweep` removes what is only half
written, and what is whole but unknown costs nothing but its room.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import structlog

from src.tools.rag_tools.chunking import supported_suffixes
from src.tools.rag_tools.store import StoreError, normalise_text

LONGEST_NAME = 255
LONGEST_SUFFIX = 16
HALF = ".half"
ABANDONED_SECONDS = 3600.0
COPY_BYTES = 1 << 20
SUFFIX_OF_TYPE = {
    "application/pdf": ".pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": ".docx",
    "text/plain": ".txt",
    "text/markdown": ".md",
}
# Control characters, and those that reorder text: with them "gpj.exe" is shown as "exe.jpg".
_INVISIBLE = frozenset({"Cc", "Cf", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"
_BLANKS = re.compile(r"\s+")

log = structlog.get_logger(__name__)


class UploadError(Exception):
    """An upload is refused; the message says what to send instead."""


class UnsupportedTypeError(UploadError):
    """Neither name nor content type says how to read the file."""


class UploadTooLargeError(UploadError):
    """The file is larger than MAX_UPLOAD_BYTES."""


def display_name(given: str | None) -> str:
    """The last part of the name that a user sent, as it may be shown: at most 255 characters."""
    last = re.split(r"[/\\]", normalise_text(given or ""))[-1]
    kept = (one for one in last if one in _JOINERS or unicodedata.category(one) not in _INVISIBLE)
    name = _BLANKS.sub(" ", "".join(kept)).strip()
    if name.strip(". ") == "":
        return "document"
    if len(name) <= LONGEST_NAME:
        return name
    suffix = PurePosixPath(name).suffix[:LONGEST_SUFFIX]
    return name[: LONGEST_NAME - len(suffix)] + suffix


def suffix_for(name: str, content_type: str | None) -> str:
    """One of the suffixes that we can read. Raises UnsupportedTypeError."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in supported_suffixes():
        return suffix
    declared = (content_type or "").partition(";")[0].strip().lower()
    if not suffix and declared in SUFFIX_OF_TYPE:
        return SUFFIX_OF_TYPE[declared]
    known = ", ".join(supported_suffixes())
    raise UnsupportedTypeError(f"this file is of no supported type: send one of {known}")


@contextlib.contextmanager
def stored(source: BinaryIO, folder: Path, suffix: str, limit: int) -> Iterator[Path]:
    """The path of a new file with what `source` holds; removed again if the block fails.

    Raises UploadTooLargeError above `limit` bytes, StoreError where the disk refuses.
    """
    path = folder / f"{uuid.uuid4().hex}{suffix}"
    try:
        with _explained(folder):
            _write(source, path, limit)
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def sweep(folder: Path, now: float | None = None) -> int:
    """Removes what dead processes left half written; returns how many files that were."""
    before = (time.time() if now is None else now) - ABANDONED_SECONDS
    removed = 0
    for path in folder.glob(f"*{HALF}"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < before:
                path.unlink()
                removed += 1
    if removed:
        log.info("upload.sweep.done", removed=removed)
    return removed


def _write(source: BinaryIO, path: Path, limit: int) -> None:
    """Under another name until it is whole, so that what `sweep` may remove is told by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + HALF)
    try:
        with half.open("xb") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)
            size = target.tell()
            if size > limit:
                raise UploadTooLargeError(f"the file has {size:,} bytes, {limit:,} at most are taken")
            target.flush()
            os.fsync(target.fileno())
        half.rename(path)
    finally:
        half.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{folder}: {error.strerror}; make room on the disk or correct UPLOAD_DIR") from error
