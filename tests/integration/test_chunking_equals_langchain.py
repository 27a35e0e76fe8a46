"""Uploads are read exactly as LangChain's loaders read them for the old index.

Goes with FAISS, for langchain-community goes then; `tests/unit/test_chunking.py` stays.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from langchain_text_splitters import RecursiveCharacterTextSplitter
from pypdf import PdfWriter
from pypdf.constants import PageLabelStyle
from pypdf.generic import (
    ArrayObject,
    BooleanObject,
    ByteStringObject,
    DictionaryObject,
    FloatObject,
    NameObject,
    NumberObject,
    TextStringObject,
)

from src.tools.rag_tools.chunking import split
from tests.support import files

pytestmark = pytest.mark.migration


def by_langchain(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """What the old release put into its index for this file."""
    # Imported here, for this file is collected also where langchain-community is not installed.
    with warnings.catch_warnings():
        # It announces its own end.
        warnings.simplefilter("ignore", DeprecationWarning)
        from langchain_community.document_loaders import Docx2txtLoader, PyPDFLoader

    loader = PyPDFLoader(str(path)) if path.suffix == ".pdf" else Docx2txtLoader(str(path))
    splitter = RecursiveCharacterTextSplitter(chunk_size=1000, chunk_overlap=200)
    documents = splitter.split_documents(loader.load())
    for document in documents:
        document.metadata |= {"source": str(path), "file_name": path.name}
    return [(document.page_content, document.metadata) for document in documents]


def by_us(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(piece.content, piece.metadata) for piece in split(path, str(path))]


def assert_equal(folder: Path, name: str, content: bytes) -> list[tuple[str, dict[str, Any]]]:
    path = folder / name
    path.write_bytes(content)
    ours = by_us(path)
    assert ours == by_langchain(path)
    return ours


@pytest.mark.parametrize(
    "pages",
    [
        ["A short page."],
        [files.numbered(25, files.FIRST), files.numbered(25, files.SECOND)],
        ["first", "", "third, after an empty page"],
        ["word" * 700],
        ["  indented\n\n\n\nand spaced   \n"],
    ],
)
def test_the_pages_of_a_pdf_are_equal(tmp_path: Path, pages: Sequence[str]) -> None:
    assert assert_equal(tmp_path, "report.pdf", files.pdf(pages))


INFORMATION = {
    "/Title": "  Übersicht, 東京 ",
    "/Author": "Zoë\tMüller\n",
    "/Creator": " a maker ",
    "/Producer": "another",
    "/Keywords": "",
    "/Subject": "x" * 2_000,
    "/Source": "elsewhere.pdf",
    "/File_Name": "elsewhere.pdf",
    "/File_Path": " spaces stay here ",
    "/Page_Count": " 99 ",
    "/Total_Pages": "98",
    "/Page": "97",
    "/Page_Label": "96",
    "/CREATIONDATE": "neither a date",
}


def test_the_information_of_a_pdf_is_equal(tmp_path: Path) -> None:
    made = files.pdf(["one", "two"], information=INFORMATION)
    metadata = assert_equal(tmp_path, "report.pdf", made)[1][1]
    assert metadata["title"] == "Übersicht, 東京"
    assert metadata["page_count"] == " 99 "
    assert (metadata["page"], metadata["total_pages"], metadata["page_label"]) == (1, 2, "2")


@pytest.mark.parametrize(
    "date",
    [
        "D:20240229123000Z",
        "D:20240229123000+01'00'",
        "D:20240229123000-05'30",
        "D:20240229123000+0100",
        "D:20240229123000",
        "D:20240229",
        "20240229123000Z",
        "D:20240230123000Z",
        " D:20240229123000Z ",
        "yesterday",
        "",
    ],
)
def test_a_date_of_a_pdf_is_equal_however_it_is_written(tmp_path: Path, date: str) -> None:
    information = {"/CreationDate": date, "/ModDate": date}
    assert assert_equal(tmp_path, "report.pdf", files.pdf(information=information))


def test_a_date_in_another_zone_is_equal(tmp_path: Path) -> None:
    for zone in (UTC, timezone(timedelta(hours=-5, minutes=-30)), timezone(timedelta(hours=14))):
        created = datetime(2023, 12, 31, 23, 59, 59, tzinfo=zone)
        metadata = assert_equal(tmp_path, "report.pdf", files.pdf(created=created))[0][1]
        assert datetime.fromisoformat(metadata["creationdate"]) == created


def test_information_that_is_no_text_is_equal(tmp_path: Path) -> None:
    def odd(writer: PdfWriter) -> None:
        reference = writer._add_object(TextStringObject("  by reference "))
        assert writer._info is not None
        writer._info.update(
            {
                NameObject("/Number"): NumberObject(7),
                NameObject("/Float"): FloatObject(1.5),
                NameObject("/True"): BooleanObject(True),
                NameObject("/Trapped"): NameObject("/Unknown"),
                NameObject("/Bytes"): ByteStringObject(b"\xff\xfe"),
                NameObject("/List"): ArrayObject([NumberObject(1)]),
                NameObject("/Nested"): DictionaryObject({NameObject("/A"): NumberObject(1)}),
                NameObject("/Reference"): reference,
                NameObject("/CreationDate"): NumberObject(20240229),
            }
        )

    metadata = assert_equal(tmp_path, "report.pdf", files.rewritten(files.pdf(), odd))[0][1]
    assert metadata["reference"] == "by reference"
    assert metadata["number"] == "7"


def test_page_labels_are_equal(tmp_path: Path) -> None:
    def label(writer: PdfWriter) -> None:
        writer.set_page_label(0, 1, style=PageLabelStyle.LOWERCASE_ROMAN)
        writer.set_page_label(2, 4, style=PageLabelStyle.UPPERCASE_LETTER, prefix="Annex ", start=3)

    made = files.rewritten(files.pdf([str(number) for number in range(6)]), label)
    labels = [metadata["page_label"] for _, metadata in assert_equal(tmp_path, "a.pdf", made)]
    assert labels == ["i", "ii", "Annex C", "Annex D", "Annex E", "1"]


def test_a_pdf_without_information_is_equal(tmp_path: Path) -> None:
    def bare(writer: PdfWriter) -> None:
        writer.metadata = None

    metadata = assert_equal(tmp_path, "a.pdf", files.rewritten(files.pdf(), bare))[0][1]
    assert (metadata["producer"], metadata["creationdate"]) == ("PyPDF", "")


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-256"])
def test_a_pdf_protected_by_its_owner_only_is_equal(tmp_path: Path, algorithm: str) -> None:
    made = files.pdf(["one", "two"], information={"/Title": "T"})
    assert assert_equal(tmp_path, "a.pdf", files.encrypted_pdf(made, user="", algorithm=algorithm))


@pytest.mark.parametrize(
    "content",
    [
        files.word([files.FIRST]),
        files.word([files.numbered(40, files.SECOND)], header="Head", footer="Foot", table=True),
        files.word(["tab\there", "line\nbreak", " ", "", "東京 🙂", "x" * 2_500]),
        files.word([f"{number}. {files.FIRST}" for number in range(3)], header="H" * 1_500),
    ],
)
def test_a_docx_is_equal(tmp_path: Path, content: bytes) -> None:
    assert assert_equal(tmp_path, "letter.docx", content)


printable = st.text(st.characters(codec="latin-1", exclude_categories=["C"]), max_size=400)


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pages=st.lists(st.lists(printable, max_size=6), min_size=1, max_size=3), title=printable)
def test_any_pdf_of_latin_text_is_equal(tmp_path: Path, pages: list[list[str]], title: str) -> None:
    texts = ["always some text", *("\n\n".join(paragraphs) for paragraphs in pages)]
    made = files.pdf(texts, information={"/Title": title or "-"})
    assert assert_equal(tmp_path, "a.pdf", made)
