"""Reading an uploaded file and cutting it into the pieces that are embedded.

Owns which formats are read and how. Pieces and metadata are those that LangChain's PyPDFLoader and
Docx2txtLoader gave with the same splitter, so old and new documents are searched alike.
Nothing is written: a process that dies here reads the file again. The readers' packages are loaded with the
first file, for a process that starts should be ready soon.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import structlog

from src.tools.rag_tools.store import normalise_metadata, normalise_text

if TYPE_CHECKING:
    import pypdf

CHUNK_SIZE = 1000
CHUNK_OVERLAP = 200

_log = structlog.get_logger()
# Its warnings quote the file that it reads.
logging.getLogger("pypdf").setLevel(logging.CRITICAL)


class DocumentUnreadableError(Exception):
    """No text can be taken from this file, now or later; the message tells its owner what to do."""


@dataclass(frozen=True, slots=True)
class Piece:
    """At most 1,000 characters of a document (so at most 4,000 tokens), and where they stand."""

    content: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one file may unpack to, so that a small hostile one cannot take the process down."""

    text_characters: int = 20_000_000
    pdf_content_bytes: int = 500_000_000
    pdf_seconds: float = 600.0
    """Processor time, asked after every page; one page is bounded by pypdf's own limits."""
    docx_xml_bytes: int = 32 * 2**20
    docx_ratio: int = 200
    """Unpacked to packed, asked only above 1 MiB; text written by people stays below 50."""


LIMITS = Limits()

_Section = tuple[str, dict[str, Any]]
_Reader = Callable[[bytes, str, Limits], Iterator[_Section]]


def split(path: Path, source: str, limits: Limits = LIMITS) -> list[Piece]:
    """The pieces of the file at `path`, in reading order, never empty.

    `source` is the name it was uploaded under; its suffix says how to read the file.
    Raises DocumentUnreadableError; OSError where the disk, not the document, is at fault.
    """
    name = PurePath(source).name
    read = _reader(name)
    data = path.read_bytes()
    if not data:
        raise DocumentUnreadableError(f"{name} is empty: upload the file again")
    where = {"source": source, "file_name": name}
    pieces = [
        Piece(content, normalise_metadata(metadata | where))
        for text, metadata in _bounded(read(data, name, limits), name, limits)
        for content in _cut(text)
    ]
    if not pieces:
        raise DocumentUnreadableError(
            f"{name} holds no text, perhaps only scanned pages: run text recognition (OCR) first"
        )
    return pieces


def supported_suffixes() -> tuple[str, ...]:
    return tuple(_READERS)


def _reader(name: str) -> _Reader:
    suffix = PurePath(name).suffix.lower()
    if suffix not in _READERS:
        known = ", ".join(_READERS)
        raise DocumentUnreadableError(f"{name} is of no supported type: save it as one of {known}")
    return _READERS[suffix]


def _cut(text: str) -> list[str]:
    """Normalised after the cut, so that the cuts fall where they always fell; blank pieces go."""
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    splitter = RecursiveCharacterTextSplitter(chunk_size=CHUNK_SIZE, chunk_overlap=CHUNK_OVERLAP)
    pieces = (normalise_text(piece) for piece in splitter.split_text(text))
    return [piece for piece in pieces if piece.strip()]


def _bounded(sections: Iterator[_Section], name: str, limits: Limits) -> Iterator[_Section]:
    total = 0
    for text, metadata in sections:
        total += len(text)
        if total > limits.text_characters:
            raise _too_large(name, f"more than {limits.text_characters:,} characters of text")
        yield text, metadata


def _too_large(name: str, what: str) -> DocumentUnreadableError:
    return DocumentUnreadableError(f"{name} unpacks to {what}: split it into smaller files")


@contextmanager
def _untrusted(name: str, kind: str) -> Iterator[None]:
    """The boundary to parsers that fail with any exception on a damaged file."""
    from pypdf.errors import DependencyError, FileNotDecryptedError, LimitReachedError

    try:
        yield
    except (DocumentUnreadableError, MemoryError):
        raise
    except FileNotDecryptedError as error:
        raise DocumentUnreadableError(
            f"{name} is protected by a password: save it without one and upload it again"
        ) from error
    except LimitReachedError as error:
        raise _too_large(name, "more than the PDF reader allows") from error
    except DependencyError as error:
        raise DocumentUnreadableError(f"{name} needs a package that is not installed here: {error}") from error
    except Exception as error:
        _log.info("chunking.read.failed", file_name=name, kind=kind, error=type(error).__name__)
        raise DocumentUnreadableError(
            f"{name} is damaged, cut short or no {kind} file: export it anew and upload it again"
        ) from error


def _pdf(data: bytes, name: str, limits: Limits) -> Iterator[_Section]:
    """One section a page, as PyPDFLoader: text stripped, page counted from 0, the page's label."""
    import pypdf

    with _untrusted(name, "PDF"):
        reader = pypdf.PdfReader(io.BytesIO(data))
        document = _pdf_metadata(reader)
        labels = reader.page_labels
        content_bytes, began = 0, time.thread_time()
        for number, page in enumerate(reader.pages):
            contents = page.get_contents()
            content_bytes += len(contents.get_data()) if contents is not None else 0
            if content_bytes > limits.pdf_content_bytes:
                raise _too_large(name, f"more than {limits.pdf_content_bytes:,} bytes of pages")
            text = page.extract_text().strip()
            if time.thread_time() - began > limits.pdf_seconds:
                raise _too_large(name, f"more than {limits.pdf_seconds:g} seconds of work")
            yield text, document | {"page": number, "page_label": labels[number]}


def _pdf_metadata(reader: pypdf.PdfReader) -> dict[str, Any]:
    """The document information under lower-case keys, dates in ISO 8601 where they are dates."""
    found: dict[str, Any] = {"producer": "PyPDF", "creator": "PyPDF", "creationdate": ""}
    for name, value in dict(reader.metadata or {}).items():
        key = str(name).removeprefix("/").lower()
        found[key] = _pdf_value(key, str(value))
    return found | {"total_pages": len(reader.pages)}


def _pdf_value(key: str, value: str) -> str:
    match key:
        case "creationdate" | "moddate":
            return _pdf_date(value)
        case "page_count" | "file_path":
            # LangChain takes these for other loaders' keys, and leaves their spaces.
            return value
        case _:
            return value.strip()


def _pdf_date(value: str) -> str:
    try:
        return datetime.strptime(value.replace("'", ""), "D:%Y%m%d%H%M%S%z").isoformat()
    except ValueError:
        return value


_OLE = bytes.fromhex("d0cf11e0a1b11ae1")
_DOCX_TEXT = re.compile(r"word/(document\.xml$|header|footer)")


def _docx(data: bytes, name: str, limits: Limits) -> Iterator[_Section]:
    """One section: headers, body and footers, as Docx2txtLoader."""
    if data.startswith(_OLE):
        raise DocumentUnreadableError(
            f"{name} is protected by a password or an old .doc file: save it as .docx without one"
        )
    import docx2txt

    with _untrusted(name, "DOCX"):
        _check_zip(data, name, limits)
        yield docx2txt.process(io.BytesIO(data)), {}


def _check_zip(data: bytes, name: str, limits: Limits) -> None:
    """Refuses a bomb by the declared sizes; zipfile unpacks no part beyond what it declares."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # By name: of two parts with one name docx2txt reads the last one twice.
        parts = [archive.getinfo(part) for part in archive.namelist() if _DOCX_TEXT.match(part)]
    if any(part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for part in parts):
        raise DocumentUnreadableError(f"{name} is packed in a way that no DOCX file is: save it anew")
    unpacked = sum(part.file_size for part in parts)
    packed = sum(part.compress_size for part in parts)
    if unpacked > limits.docx_xml_bytes:
        raise _too_large(name, f"{unpacked:,} bytes of text, {limits.docx_xml_bytes:,} at most")
    if unpacked > 2**20 and unpacked > packed * limits.docx_ratio:
        raise _too_large(name, f"more than {limits.docx_ratio} times its size")


_BYTE_ORDER_MARKS = (
    # UTF-32's mark begins with UTF-16's.
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _text(data: bytes, name: str, limits: Limits) -> Iterator[_Section]:
    """One section; UTF-8 unless a byte order mark says otherwise, line ends as on Unix."""
    encoding = next((codec for mark, codec in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentUnreadableError(
            f"{name} is not {error.encoding} text at byte {error.start}: save it as UTF-8"
        ) from error
    yield text.replace("\r\n", "\n").replace("\r", "\n"), {}


_READERS: dict[str, _Reader] = {".pdf": _pdf, ".docx": _docx, ".txt": _text, ".md": _text}
