"""What is read from an uploaded file, and what its owner is told when nothing can be."""

from __future__ import annotations

import codecs
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from src.tools.rag_tools import chunking
from src.tools.rag_tools.chunking import DocumentUnreadableError, Limits, Piece, split
from tests.support import files

Upload = Callable[..., list[Piece]]


@pytest.fixture
def upload(tmp_path: Path) -> Upload:
    """Write a file of that name, and split it."""

    def written(name: str, content: bytes, limits: Limits = chunking.LIMITS) -> list[Piece]:
        path = tmp_path / name
        path.write_bytes(content)
        return split(path, f"uploads/{name}", limits)

    return written


def refusal(upload: Upload, name: str, content: bytes, *more: Limits) -> str:
    with pytest.raises(DocumentUnreadableError) as caught:
        upload(name, content, *more)
    return str(caught.value)


def test_a_pdf_is_cut_page_by_page_with_its_page_and_label(upload: Upload) -> None:
    pieces = upload("report.pdf", files.pdf([files.numbered(30), "The second page."]))
    assert [piece.metadata["page"] for piece in pieces] == [0, 0, 0, 1]
    assert pieces[-1] == Piece(
        "The second page.",
        {
            "source": "uploads/report.pdf",
            "file_name": "report.pdf",
            "page": 1,
            "page_label": "2",
            "total_pages": 2,
            "producer": pieces[0].metadata["producer"],
            "creator": "PyPDF",
            "creationdate": "2024-02-29T12:30:00+00:00",
        },
    )


def test_a_docx_is_one_text_with_header_and_footer(upload: Upload) -> None:
    pieces = upload("a.docx", files.word(["Grüße, 東京"], header="At the top", footer="Below"))
    assert pieces == [
        Piece(
            "At the top\n\nGrüße, 東京\n\nBelow",
            {"source": "uploads/a.docx", "file_name": "a.docx"},
        )
    ]


def test_the_suffix_counts_in_either_case(upload: Upload) -> None:
    assert upload("REPORT.PDF", files.pdf(["text"]))[0].content == "text"


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_a_text_file_is_read_by_its_byte_order_mark(upload: Upload, mark: bytes, encoding: str) -> None:
    pieces = upload("notes.md", mark + "# Käse\r\n\r\nEnde\r".encode(encoding))
    assert [piece.content for piece in pieces] == ["# Käse\n\nEnde"]


def test_text_that_is_not_utf8_is_refused_with_the_place(upload: Upload) -> None:
    message = refusal(upload, "notes.txt", "abc Käse".encode("latin-1"))
    assert message == "notes.txt is not utf-8 text at byte 5: save it as UTF-8"


def test_an_owner_only_protection_does_not_hinder_reading(upload: Upload) -> None:
    plain = files.pdf(["Anyone may read this."])
    for algorithm in ("RC4-128", "AES-128", "AES-256"):
        locked = files.encrypted_pdf(plain, user="", algorithm=algorithm)
        assert upload("a.pdf", locked)[0].content == "Anyone may read this."


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-256"])
def test_a_pdf_with_a_password_is_refused_as_such(upload: Upload, algorithm: str) -> None:
    locked = files.encrypted_pdf(files.pdf(["secret"]), user="pass", algorithm=algorithm)
    assert "protected by a password" in refusal(upload, "a.pdf", locked)


def test_a_docx_with_a_password_is_refused_as_such(upload: Upload) -> None:
    ole = bytes.fromhex("d0cf11e0a1b11ae1") + b"\0" * 512
    assert "protected by a password or an old .doc" in refusal(upload, "a.docx", ole)


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.txt", "a.md"])
def test_an_empty_file_is_refused_as_such(upload: Upload, name: str) -> None:
    assert refusal(upload, name, b"") == f"{name} is empty: upload the file again"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scan.pdf", files.pdf([""])),
        ("blank.docx", files.word([])),
        ("blank.txt", b" \r\n\t \0 \n"),
        ("mark.txt", codecs.BOM_UTF8),
    ],
)
def test_a_file_without_text_is_sent_to_text_recognition(upload: Upload, name: str, content: bytes) -> None:
    assert "holds no text" in refusal(upload, name, content)


@pytest.mark.parametrize("part", [1, 10, 100, 300, 600, -100, -30, -8])
def test_a_pdf_cut_short_is_refused_and_logged(upload: Upload, part: int) -> None:
    whole = files.pdf(["some text"])
    with capture_logs() as logs:
        message = refusal(upload, "a.pdf", whole[:part])
    assert message == ("a.pdf is damaged, cut short or no PDF file: export it anew and upload it again")
    assert [(entry["event"], entry["kind"]) for entry in logs] == [("chunking.read.failed", "PDF")]


@pytest.mark.parametrize("part", [1, 100, 3000, -100, -10, -1])
def test_a_docx_cut_short_is_refused(upload: Upload, part: int) -> None:
    assert "damaged, cut short or no DOCX" in refusal(upload, "a.docx", files.word()[:part])


@pytest.mark.parametrize(
    "content",
    [
        b"plain text",
        files.pdf(["a PDF"]),
        files.zipped({"xl/workbook.xml": b"<a/>"}),
        files.zipped({"word/document.xml": b"<w:p"}),
    ],
)
def test_what_is_no_docx_is_refused(upload: Upload, content: bytes) -> None:
    assert "no DOCX file" in refusal(upload, "a.docx", content)


def test_a_damaged_part_inside_a_docx_is_refused(upload: Upload) -> None:
    content = bytearray(files.zipped({"word/document.xml": files.word_xml(b"")}, 0))
    content[60] ^= 0xFF
    assert "damaged" in refusal(upload, "a.docx", bytes(content))


def test_an_entity_bomb_in_a_docx_is_refused(upload: Upload) -> None:
    levels = b"".join(b'<!ENTITY e%d "%s">' % (level, b"&e%d;" % (level - 1) * 10) for level in range(1, 10))
    bomb = b'<!DOCTYPE w [<!ENTITY e0 "lol">' + levels + b"]><w>&e9;</w>"
    assert "damaged" in refusal(upload, "a.docx", files.zipped({"word/document.xml": bomb}))


def test_a_docx_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(upload: Upload) -> None:
    content = files.zipped({"word/document.xml": files.word_xml(b" " * 1_000)})
    message = refusal(upload, "a.docx", content, Limits(docx_xml_bytes=1_000))
    assert "bytes of text, 1,000 at most: split it into smaller files" in message


def test_a_docx_zip_bomb_is_refused_by_its_ratio(upload: Upload) -> None:
    bomb = files.zipped({"word/document.xml": files.word_xml(b" " * 20 * 2**20)})
    assert len(bomb) < 30_000
    assert "more than 200 times its size" in refusal(upload, "a.docx", bomb)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_part_named_often_counts_as_often_as_it_is_read(tmp_path: Path, upload: Upload) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for size in [0] * 9 + [200]:
            archive.writestr("word/header1.xml", b" " * size)
    assert "unpacks to 2,000 bytes" in refusal(upload, "a.docx", path.read_bytes(), Limits(docx_xml_bytes=1_999))


def test_a_docx_packed_by_another_method_than_words_is_refused(upload: Upload) -> None:
    packed = files.zipped({"word/document.xml": files.word_xml(b"")}, zipfile.ZIP_BZIP2)
    assert "packed in a way that no DOCX" in refusal(upload, "a.docx", packed)


def test_a_pdf_decompression_bomb_is_refused(upload: Upload) -> None:
    bomb = files.pdf_with_content(b" " * 80_000_000)
    assert len(bomb) < 90_000
    assert "more than the PDF reader allows" in refusal(upload, "a.pdf", bomb)


def test_a_pdf_whose_pages_together_unpack_to_too_much_is_refused(upload: Upload) -> None:
    bomb = files.pdf_with_content(b" " * 1_000, pages=3)
    message = refusal(upload, "a.pdf", bomb, Limits(pdf_content_bytes=2_500))
    assert "more than 2,500 bytes of pages" in message


def test_a_pdf_that_takes_too_long_is_refused(upload: Upload) -> None:
    message = refusal(upload, "a.pdf", files.pdf(["a", "b"]), Limits(pdf_seconds=-1))
    assert "seconds of work" in message


def test_too_much_text_is_refused(upload: Upload) -> None:
    limits = Limits(text_characters=1_000)
    assert upload("a.txt", b"x" * 1_000, limits)
    message = refusal(upload, "a.txt", b"x" * 1_001, limits)
    assert message == ("a.txt unpacks to more than 1,000 characters of text: split it into smaller files")


@pytest.mark.parametrize("name", ["a.doc", "a.xlsx", "a", ".pdf", "a.pdf.exe"])
def test_another_type_is_refused_with_the_types_that_are_read(upload: Upload, name: str) -> None:
    assert refusal(upload, name, b"content") == (
        f"{name} is of no supported type: save it as one of .pdf, .docx, .txt, .md"
    )


def test_a_file_that_is_gone_is_the_disks_fault_not_the_documents(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        split(tmp_path / "gone.pdf", "uploads/gone.pdf")


def test_nul_becomes_a_space_and_blank_pieces_are_dropped(upload: Upload) -> None:
    title = {"/Title": "A\0B"}
    piece = upload("a.pdf", files.pdf(["text"], information=title))[0]
    assert piece.metadata["title"] == "A B"
    content = b"\0" * 3_000 + b"\n\n" + b"word\0s" * 150
    assert [piece.content for piece in upload("a.txt", content)] == ["word s" * 150]


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=5_000))
def test_no_piece_is_blank_or_larger_than_an_embedding_model_takes(text: str) -> None:
    pieces = chunking._cut(text)
    assert all(piece.strip() and len(piece) <= 1_000 for piece in pieces)
    assert all(len(piece.encode()) <= 4_000 for piece in pieces)
