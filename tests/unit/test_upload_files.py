"""Names of uploads: what is shown, what the disk gets, and what a failure leaves."""

from __future__ import annotations

import io
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.api.upload_files import (
    ABANDONED_SECONDS,
    HALF,
    UnsupportedTypeError,
    UploadTooLargeError,
    display_name,
    stored,
    suffix_for,
    sweep,
)

SURROGATES_TOO = st.text(st.characters(exclude_categories=()), max_size=400)


@given(SURROGATES_TOO)
def test_a_name_of_any_characters_becomes_one_that_can_be_shown_and_stored(given: str) -> None:
    name = display_name(given)
    assert 1 <= len(name) <= 255
    name.encode()
    assert not {"/", "\\", "\0", "\n"} & set(name)
    assert not any(unicodedata.category(one) == "Cc" for one in name)
    assert name.strip(". ") != ""
    assert display_name(name) == name


@pytest.mark.parametrize("given", [None, "", "/", "..", "../..", " ", "\0", "\u202e", "a/"])
def test_a_name_that_says_nothing_is_replaced(given: str | None) -> None:
    assert display_name(given) == "document"


def test_a_long_name_keeps_its_suffix() -> None:
    assert display_name("é" * 300 + ".pdf") == "é" * 251 + ".pdf"
    assert len(display_name("x." + "y" * 300)) == 255


@pytest.mark.parametrize(
    ("name", "content_type", "suffix"),
    [
        ("a.pdf", None, ".pdf"),
        ("a.PDF", "text/plain", ".pdf"),
        ("a.tar.docx", None, ".docx"),
        ("a", "text/markdown", ".md"),
        ("a", "TEXT/PLAIN; charset=utf-8", ".txt"),
    ],
)
def test_the_suffix_says_how_to_read_it_else_the_content_type(name: str, content_type: str | None, suffix: str) -> None:
    assert suffix_for(name, content_type) == suffix


@pytest.mark.parametrize(
    ("name", "content_type"), [("a.exe", "application/pdf"), ("a", None), ("a", "image/png"), ("", "")]
)
def test_what_nobody_can_read_is_refused_with_what_can_be(name: str, content_type: str | None) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"\.pdf"):
        suffix_for(name, content_type)


def test_a_file_is_kept_whole_under_a_name_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    paths = []
    for _ in range(2):
        with stored(io.BytesIO(b"content"), folder, ".txt", 7) as path:
            paths.append(path)
    assert len(set(paths)) == 2
    assert sorted(folder.iterdir()) == sorted(paths)
    assert {path.read_bytes() for path in paths} == {b"content"}


def test_a_file_that_is_too_large_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UploadTooLargeError, match="8 bytes, 7 at most"):
        stored(io.BytesIO(b"contents"), tmp_path, ".txt", 7).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_the_file_was_written_removes_it(tmp_path: Path) -> None:
    storing = stored(io.BytesIO(b"x"), tmp_path, ".txt", 7)
    assert storing.__enter__().exists()
    error = KeyboardInterrupt()
    assert not storing.__exit__(KeyboardInterrupt, error, None)
    assert list(tmp_path.iterdir()) == []


def test_the_sweep_removes_only_what_was_left_half_written_long_ago(tmp_path: Path) -> None:
    now = 1_000_000.0
    ages = {f"old.txt{HALF}": 2.0, f"new.txt{HALF}": 0.5, "whole.txt": 2.0}
    for name, hours in ages.items():
        (tmp_path / name).touch()
        at = now - hours * ABANDONED_SECONDS
        os.utime(tmp_path / name, (at, at))
    assert sweep(tmp_path, now) == 1
    assert {path.name for path in tmp_path.iterdir()} == {f"new.txt{HALF}", "whole.txt"}
    assert sweep(tmp_path / "not there", now) == 0
