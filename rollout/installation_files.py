"""The files that users of a made installation uploaded: real English text as PDF and DOCX.

The text is the standard library's own documentation, which every Python has. Nothing outside the
given path is written; a process that dies midway leaves at most that one file unfinished.
"""

from __future__ import annotations

import importlib
import pydoc
import re
import textwrap
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from rollout.errors import PreconditionError, RolloutError, UsageError

WRITTEN_ON = datetime(2024, 3, 1, 9, tzinfo=UTC)
LINES_ON_A_PAGE = 64
CHARACTERS_IN_A_LINE = 105

# What follows these headings are values and paths of this machine: os.environ is one of them.
_MACHINE = re.compile(r"^(?:DATA|VERSION|DATE|AUTHOR|CREDITS|FILE)$", re.MULTILINE)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+", re.IGNORECASE)
_MARGIN = re.compile(r"^[ |]+", re.MULTILINE)
_CONTROL = re.compile(r"[^\S \n]|[\x00-\x09\x0b-\x1f\x7f]")
_PLAIN = pydoc.plaintext  # type: ignore[attr-defined]  # documented, not in the type stubs
_BLANK_LINES = re.compile(r"\n{3,}")


class InstallationError(RolloutError):
    """An installation could not be made as asked; the message says what to do next."""


class WriterMissingError(InstallationError, PreconditionError):
    """A package that writes PDF or DOCX is not installed."""


class FileTypeError(InstallationError, UsageError):
    """The old release accepted .pdf and .docx only."""


def reference_text(modules: Sequence[str]) -> str:
    """The documentation of these modules of the standard library, without margins or addresses."""
    return "\n\n".join(_documentation(module) for module in modules)


def write_file(path: Path, text: str) -> None:
    """Write `text` as the type that the name says.

    Raises WriterMissingError without the extra `dev`, FileTypeError for another type.
    """
    match path.suffix:
        case ".pdf":
            _write_pdf(path, text)
        case ".docx":
            _write_docx(path, text)
        case other:
            raise FileTypeError(f"{path.name} ends in {other!r}; name it .pdf or .docx")


def _documentation(name: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at every member touches deprecated ones
        rendered = pydoc.render_doc(importlib.import_module(name), renderer=_PLAIN)
    text = _MARGIN.sub("", _ADDRESS.sub("", _MACHINE.split(rendered)[0]))
    return _BLANK_LINES.sub("\n\n", _CONTROL.sub(" ", text)).strip()


def _write_pdf(path: Path, text: str) -> None:
    """Places each line itself: fpdf's own line breaking takes twenty times as long."""
    pdf = _writer("fpdf", "fpdf2").FPDF(format="A4")
    pdf.set_creation_date(WRITTEN_ON)
    pdf.set_title(path.stem)
    lines = [piece for line in text.splitlines() for piece in _wrapped(line)]
    for start in range(0, len(lines), LINES_ON_A_PAGE):
        pdf.add_page()
        pdf.set_font("Helvetica", size=9)
        for row, line in enumerate(lines[start : start + LINES_ON_A_PAGE]):
            if line:
                # The built-in fonts have no characters beyond Latin-1.
                pdf.text(12, 16 + 4 * row, line.encode("latin-1", "replace").decode("latin-1"))
    pdf.output(str(path))


def _write_docx(path: Path, text: str) -> None:
    document = _writer("docx", "python-docx").Document()
    for paragraph in text.split("\n\n"):
        document.add_paragraph(paragraph)
    document.save(str(path))


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, CHARACTERS_IN_A_LINE) or [""]


def _writer(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise WriterMissingError(
            f"{package} is not installed, and a made installation needs it to write its files;"
            ' install the extra `dev` (pip install -e ".[dev,faiss]"),'
            " or rehearse on a copy of a real installation with --legacy"
        ) from error
