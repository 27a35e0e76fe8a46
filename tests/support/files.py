"""Real files for tests to upload: PDFs by fpdf2, DOCX by python-docx, and damaged ones of both."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import docx
import fpdf
from pypdf import PdfReader, PdfWriter
from pypdf.generic import EncodedStreamObject, NameObject

FIRST = "The record says, for every document, what should be there and whether it is. "
SECOND = "Ein Zug fährt um 8:15 nach Zürich; der Kaffee kostet 3 €... "


def numbered(count: int, sentence: str = FIRST) -> str:
    """Text of `count` sentences, no two alike, in paragraphs of six."""
    sentences = [f"{number}. {sentence}" for number in range(count)]
    paragraphs = ["".join(sentences[start : start + 6]) for start in range(0, count, 6)]
    return "\n\n".join(paragraphs)


def pdf(
    pages: Sequence[str] = ("One page. " + FIRST,),
    *,
    information: dict[str, str] | None = None,
    created: datetime = datetime(2024, 2, 29, 12, 30, tzinfo=UTC),
) -> bytes:
    """A PDF with one page a text; `information` as in {"/Title": "..."}."""
    document = fpdf.FPDF()
    document.set_creation_date(created)
    document.set_font("helvetica", size=11)
    for text in pages:
        document.add_page()
        document.set_auto_page_break(False)
        document.multi_cell(0, 4, text.replace("€", "EUR"))
    made = bytes(document.output())
    return rewritten(made, lambda writer: writer.add_metadata(information)) if information else made


def rewritten(made: bytes, change: Callable[[PdfWriter], object]) -> bytes:
    """`made` after `change` by pypdf."""
    writer = PdfWriter(clone_from=io.BytesIO(made))
    change(writer)
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def encrypted_pdf(made: bytes, *, user: str, algorithm: str = "AES-256") -> bytes:
    """With an empty `user` password everybody may open it and only the owner may change it."""
    return rewritten(
        made,
        lambda writer: writer.encrypt(user_password=user, owner_password="owner", algorithm=algorithm),
    )


def pdf_with_content(content: bytes, pages: int = 1) -> bytes:
    """A PDF of `pages` pages that all show the content stream `content`, compressed."""

    def replace(writer: PdfWriter) -> None:
        stream = EncodedStreamObject()
        stream._data = zlib.compress(content, 9)
        stream[NameObject("/Filter")] = NameObject("/FlateDecode")
        reference = writer._add_object(stream)
        for page in writer.pages:
            page[NameObject("/Contents")] = reference

    return rewritten(pdf(["page"] * pages), replace)


def page_count(made: bytes) -> int:
    return len(PdfReader(io.BytesIO(made)).pages)


def word(paragraphs: Sequence[str] = (FIRST,), *, header: str = "", footer: str = "", table: bool = False) -> bytes:
    """A DOCX with these paragraphs, and perhaps header, footer and a small table."""
    document = docx.Document()
    for text in paragraphs:
        document.add_paragraph(text)
    if header:
        document.sections[0].header.paragraphs[0].text = header
    if footer:
        document.sections[0].footer.paragraphs[0].text = footer
    if table:
        cells = document.add_table(rows=2, cols=2)
        for number in range(4):
            cells.cell(number // 2, number % 2).text = f"cell {number}"
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def zipped(parts: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive of these parts; what makes a DOCX is only which parts are there."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def word_xml(body: bytes) -> bytes:
    """word/document.xml around `body`."""
    space = b"http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    return b'<w:document xmlns:w="' + space + b'"><w:body>' + body + b"</w:body></w:document>"
