"""Decisions in a CSV file: what is read, and that a file with bad lines is refused whole."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from rollout.quarantine_csv import Action, Choice, CsvError, from_csv, to_csv

pytestmark = pytest.mark.migration


def written(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "decisions.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_each_line_is_a_decision_with_the_line_it_stands_in(tmp_path: Path) -> None:
    path = written(tmp_path, "group,action,document_id\na,assign,7\nb,discard,\n")
    assert from_csv(path) == [
        Choice("a", Action.ASSIGN, 7, "line 2: "),
        Choice("b", Action.DISCARD, None, "line 3: "),
    ]


def test_a_line_without_an_action_decides_nothing_yet(tmp_path: Path) -> None:
    assert from_csv(written(tmp_path, "group,action,document_id\na,,\n")) == []


@pytest.mark.parametrize(
    "text",
    [
        "document_id,action,group\n7,assign,a\n",
        "group,action,document_id,source,chunks\na,assign,7,uploads/x.pdf,3\n",
        'group,action,document_id\r\n" a ",ASSIGN, 7\r\n',
        "\ufeffgroup,action,document_id\na,assign,7\n",
        "group,action,document_id\n\na,assign,7\n",
    ],
    ids=["other order", "more columns", "spaces and capitals", "a spreadsheet's mark", "an empty line"],
)
def test_what_a_spreadsheet_makes_of_the_file_is_understood(text: str, tmp_path: Path) -> None:
    (choice,) = from_csv(written(tmp_path, text))
    assert (choice.group, choice.action, choice.document_id) == ("a", Action.ASSIGN, 7)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (",assign,7", "names no group"),
        ("a,assign,", "assign needs the number of a document, not ''"),
        ("a,assign,seven", "not 'seven'"),
        ("a,assign,-7", "not '-7'"),
        ("a,assign,²", "not '²'"),
        ("a,discard,7", "the action must be assign"),
        ("a,,7", "the action must be assign"),
        ("a,delete,", "action 'delete' is neither assign nor discard"),
        ("first,discard,", "group 'first' is in line 2 already"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(line: str, complaint: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"group,action,document_id\nfirst,assign,1\n{line}\n")
    with pytest.raises(CsvError) as refused:
        from_csv(path)
    assert "line 3: " in str(refused.value)
    assert complaint in str(refused.value)
    assert refused.value.exit_code == 2


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "group,action,document_id\na,sell,\nb,assign,1\nc,assign,x\nb,discard,\n")
    with pytest.raises(CsvError) as refused:
        from_csv(path)
    lines = [line.strip().partition(":")[0] for line in str(refused.value).splitlines()[1:]]
    assert lines == ["line 2", "line 4", "line 5"]


@pytest.mark.parametrize("text", ["", "group,document_id\na,1\n", "a,assign,7\n"])
def test_a_file_without_the_columns_says_which_are_missing(text: str, tmp_path: Path) -> None:
    with pytest.raises(CsvError, match=r"has no column .*action"):
        from_csv(written(tmp_path, text))


def test_a_file_that_is_not_there_or_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CsvError, match="cannot be read"):
        from_csv(tmp_path / "nowhere.csv")
    with pytest.raises(CsvError, match="cannot be read"):
        from_csv(written(tmp_path, "group,action,document_id\nä,assign,7\n", "latin-1"))


def test_what_is_written_to_be_filled_in_can_be_read_back(tmp_path: Path) -> None:
    file = io.StringIO()
    source = 'uploads/a "b", c\n.pdf'
    to_csv([{"group": "a", "source": source, "chunks": 3, "why": "no_row", "candidates": ""}], file)
    path = written(tmp_path, file.getvalue().replace("a,,", "a,assign,7", 1))
    (choice,) = from_csv(path)
    assert (choice.group, choice.document_id) == ("a", 7)
