"""Nothing that index.pkl names is run, and what LangChain saved in any version is read."""

from __future__ import annotations

import builtins
import datetime
import os
import pickle
import struct
import sys
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import langchain_core.load
import pydantic.v1
import pytest
from langchain_core.documents import Document

from src.tools.rag_tools.migration import faiss_pickle
from src.tools.rag_tools.migration.faiss_disk import FaissDirectoryError
from src.tools.rag_tools.migration.faiss_pickle import (
    DamagedPickleError,
    HostilePickleError,
    MismatchedPairError,
    read_pickle,
)
from tests.support.faiss_directory import save_legacy

pytestmark = pytest.mark.migration


class Docstore:
    """Stands for InMemoryDocstore, under whatever name a version gave it."""

    def __init__(self, documents: dict[str, Any]) -> None:
        self._dict = documents


class OldDocument(pydantic.v1.BaseModel):
    """As it was on pydantic 1, with the fields of the first versions."""

    page_content: str
    lookup_str: str = ""
    metadata: dict[str, Any] = {}


class Runs:
    """Unpickles into a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Pickles documents under the names that a version of LangChain gave its classes."""
    path = tmp_path / "index.pkl"

    def save(
        documents: dict[str, Any],
        positions: Any = None,
        *,
        docstore_module: str = "langchain_community.docstore.in_memory",
        protocol: int = pickle.DEFAULT_PROTOCOL,
    ) -> Path:
        docstore = _named(monkeypatch, Docstore, docstore_module, "InMemoryDocstore")
        numbered = dict(enumerate(documents)) if positions is None else positions
        path.write_bytes(pickle.dumps((docstore(documents), numbered), protocol))
        return path

    return save


def _named(monkeypatch: pytest.MonkeyPatch, kind: type, module: str, name: str) -> Any:
    """A copy of the class that pickle takes for `module.name`."""
    fake = types.ModuleType(module)
    copy = type(name, (kind,), {"__module__": module, "__qualname__": name})
    setattr(fake, name, copy)
    monkeypatch.setitem(sys.modules, module, fake)
    return copy


def test_what_langchain_saves_today_is_read_in_order(tmp_path: Path) -> None:
    save_legacy(tmp_path, ["b", "a", "c"])
    chunks = read_pickle(tmp_path / "index.pkl").chunks(3)
    assert chunks.docstore_ids == ["b", "a", "c"]
    assert chunks.contents == ["text of b", "text of a", "text of c"]
    assert chunks.metadatas[1] == {"source": "uploads/a.pdf", "page": 1}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    ("docstore", "document"),
    [
        ("langchain.docstore.in_memory", "langchain.schema"),
        ("langchain.docstore.in_memory", "langchain.docstore.document"),
        ("langchain.docstore.in_memory", "langchain.schema.document"),
        ("langchain_community.docstore.in_memory", "langchain_core.documents.base"),
        ("langchain_classic.docstore.in_memory", "langchain_core.documents.base"),
    ],
)
def test_what_earlier_versions_saved_with_pydantic_1_is_read(
    saved: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    docstore: str,
    document: str,
    protocol: int,
) -> None:
    old = _named(monkeypatch, OldDocument, document, "Document")
    one = old(page_content="one", metadata={"page": 1})
    path = saved({"x": one}, docstore_module=docstore, protocol=protocol)
    chunks = read_pickle(path).chunks(1)
    assert (chunks.contents, chunks.metadatas) == (["one"], [{"page": 1}])


def test_no_code_of_langchain_runs(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("run")

    document = _named(monkeypatch, OldDocument, "langchain.schema", "Document")
    path = saved({"x": document(page_content="one")})
    monkeypatch.setattr(document, "__setstate__", refuse)
    monkeypatch.setattr(document, "__new__", refuse)
    assert read_pickle(path).chunks(1).contents == ["one"]


def test_plain_values_and_times_in_metadata_are_read(saved: Callable[..., Path]) -> None:
    metadata = {
        "none": None,
        "flags": (True, False),
        "numbers": [1, -2.5, 2**80],
        "bytes": b"\x00\xff",
        "set": {1, 2},
        "frozen": frozenset({"a"}),
        "at": datetime.datetime(2024, 5, 6, 7, 8, 9, 10, datetime.UTC),
        "day": datetime.date(2024, 5, 6),
        "long": datetime.timedelta(days=1, seconds=2),
        "id": uuid.UUID(int=7),
        "nested": {"a": [{"b": "c"}]},
    }
    document = Document(page_content="one", metadata=metadata)
    assert read_pickle(saved({"x": document})).chunks(1).metadatas == [metadata]


def test_a_document_whose_content_a_pdf_library_made_is_read(saved: Callable[..., Path]) -> None:
    text = "naïve \ud800 \0 text"
    assert read_pickle(saved({"x": Document(page_content=text)})).chunks(1).contents == [text]


CALLS: dict[str, Callable[[Path], Runs]] = {
    "os.system": lambda trace: Runs(os.system, f"touch {trace}"),
    "eval": lambda trace: Runs(eval, f"open({str(trace)!r}, 'w')"),
    "exec": lambda trace: Runs(exec, f"open({str(trace)!r}, 'w')"),
    "open": lambda trace: Runs(open, str(trace), "w"),
    "getattr": lambda trace: Runs(getattr, Path(trace), "touch"),
    "import": lambda _: Runs(builtins.__import__, "antigravity"),
    "a path": lambda trace: Runs(Path, str(trace)),
    "a function of LangChain": lambda _: Runs(langchain_core.load.loads, "{}"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("where", ["metadata", "content", "key", "position", "docstore", "all"])
def test_a_call_anywhere_in_the_file_is_refused_and_not_run(
    saved: Callable[..., Path], tmp_path: Path, name: str, where: str
) -> None:
    trace = tmp_path / "trace"
    bomb = CALLS[name](trace)
    match where:
        case "metadata":
            document = Document(page_content="x", metadata={"a": [{"b": None}]})
            document.metadata["a"][0]["b"] = bomb
            path = saved({"x": document})
        case "content":
            document = Document(page_content="x")
            document.__dict__["page_content"] = bomb
            path = saved({"x": document})
        case "key":
            path = saved({bomb: Document(page_content="x")}, {0: "x"})
        case "position":
            path = saved({"x": Document(page_content="x")}, {0: bomb})
        case "docstore":
            path = saved({"x": bomb})
        case _:
            path = tmp_path / "index.pkl"
            path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(HostilePickleError, match="nothing of the file was run") as refused:
        read_pickle(path).chunks(1)
    assert str(path) in str(refused.value)
    assert not trace.exists()


def _global(module: str, name: str) -> bytes:
    """The opcodes of protocol 4 that push `module.name`; a dot in the name walks attributes."""
    return b"".join(b"\x8c" + struct.pack("<B", len(text)) + text.encode() for text in (module, name)) + (b"\x93")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("datetime", "sys.modules"),
        ("datetime", "datetime.__class__"),
        ("uuid", "os.system"),
        ("uuid", "UUID.__init__"),
        ("builtins", "str.__class__.__subclasses__"),
        ("builtins", "dict.fromkeys"),
        ("langchain_core.documents.base", "Document.__init__.__globals__"),
        ("src.tools.rag_tools.migration.faiss_pickle", "pickle.loads"),
        ("builtins", "object"),
        ("builtins", "type"),
        ("copyreg", "_reconstructor"),
        ("", ""),
    ],
)
def test_a_dotted_or_unlisted_name_is_refused_by_name(tmp_path: Path, module: str, name: str) -> None:
    path = tmp_path / "index.pkl"
    path.write_bytes(b"\x80\x04" + _global(module, name) + b".")
    with pytest.raises(HostilePickleError) as refused:
        read_pickle(path).chunks(0)
    assert f"{module}.{name}" in str(refused.value)


def test_names_in_the_old_opcodes_are_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "index.pkl"
    for data in (b"cos\nsystem\n.", b"(S'true'\nios\nsystem\n.", b"\x80\x02cposix\nsystem\n."):
        path.write_bytes(data)
        with pytest.raises(HostilePickleError, match=r"(os|posix)\.system"):
            read_pickle(path).chunks(0)


@pytest.mark.parametrize(("module", "name"), [key for key in faiss_pickle.ALLOWED if key != ("builtins", "bool")])
def test_a_state_cannot_change_a_class_that_is_allowed(tmp_path: Path, module: str, name: str) -> None:
    """BUILD on the class itself, with a state that sets one of its attributes."""
    kind = faiss_pickle.ALLOWED[module, name]
    before = dict(vars(kind))
    state = pickle.dumps((None, {"__setstate__": 1, "planted": 2}), 4)[2:-1]
    path = tmp_path / "index.pkl"
    path.write_bytes(b"\x80\x04" + _global(module, name) + state + b"b.")
    with pytest.raises(DamagedPickleError):
        read_pickle(path).chunks(0)
    assert dict(vars(kind)) == before


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    save_legacy(tmp_path, ["a", "b"])
    path = tmp_path / "index.pkl"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FaissDirectoryError):
            read_pickle(path).chunks(2)


@pytest.mark.parametrize(
    "content",
    [None, (), ({}, {}), [1, 2], "text", {"a": 1}, (1, 2, 3)],
    ids=repr,
)
def test_what_is_no_docstore_and_mapping_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "index.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DamagedPickleError, match="no pair of a docstore and a mapping"):
        read_pickle(path).chunks(0)


@pytest.mark.parametrize("entry", [None, "text", {"page_content": "x", "metadata": {}}, b"x"])
def test_an_entry_that_is_no_document_is_refused(saved: Callable[..., Path], entry: Any) -> None:
    with pytest.raises(DamagedPickleError, match="'x' is no document"):
        read_pickle(saved({"x": entry})).chunks(1)


def test_a_document_that_was_never_filled_is_refused(tmp_path: Path) -> None:
    store = _global("langchain_community.docstore.in_memory", "InMemoryDocstore") + b")\x81"
    empty = _global("langchain_core.documents.base", "Document") + b")\x81"
    path = tmp_path / "index.pkl"
    filled = b"}\x8c\x05_dict}\x8c\x01x" + empty + b"ssb"
    path.write_bytes(b"\x80\x04" + store + filled + b"}K\x00\x8c\x01xs\x86.")
    with pytest.raises(DamagedPickleError, match="'x' is no document"):
        read_pickle(path).chunks(1)


@pytest.mark.parametrize(
    ("positions", "total", "counts"),
    [
        ({0: "x", 1: "y"}, 3, ("2 positions", "3 vectors")),
        ({0: "x", 1: "y"}, 1, ("2 positions", "1 vectors")),
        ({0: "x", 2: "y"}, 2, ("2 positions", "position 1")),
        ({0: "x", 1: "x"}, 2, ("2 positions", "1 docstore ids")),
        ({0: "x", 1: "gone"}, 2, ("1 of 2", "docstore of 2", "'gone'")),
    ],
)
def test_a_mapping_that_does_not_fit_the_index_is_refused_with_both_counts(
    saved: Callable[..., Path], positions: dict[int, str], total: int, counts: tuple[str, ...]
) -> None:
    documents = {name: Document(page_content=name) for name in "xy"}
    with pytest.raises(MismatchedPairError) as refused:
        read_pickle(saved(documents, positions)).chunks(total)
    assert all(count in str(refused.value) for count in counts)
    assert "restore index.faiss and index.pkl together" in str(refused.value)


def test_positions_that_name_no_text_are_refused(saved: Callable[..., Path]) -> None:
    with pytest.raises(DamagedPickleError, match="no text"):
        read_pickle(saved({"x": Document(page_content="x")}, {0: ["x"]})).chunks(1)


def test_documents_without_a_vector_are_left_out(saved: Callable[..., Path]) -> None:
    documents = {name: Document(page_content=name) for name in "xy"}
    assert read_pickle(saved(documents, {0: "y"})).chunks(1).contents == ["y"]
