"""The tools that the model may call. None takes a user: whose facts and documents they reach is in the
context of the request (`src.utils.context`), which the model can neither read nor set.

The docstrings are what the model is told.
"""

from __future__ import annotations

from langchain_core.tools import BaseTool, StructuredTool

from src.tools import memory_tools, rag_tools
from src.tools.rag_tools.store import normalise_text


def remember_fact(key: str, value: str) -> str:
    """Keep a lasting fact about the user, such as key 'city', value 'Graz'; replaces the earlier value."""
    return memory_tools.remember_fact(normalise_text(key), normalise_text(value))


def recall_fact(key: str) -> str:
    """Look up a fact that was kept about the user, by its key."""
    return memory_tools.recall_fact(normalise_text(key))


def query_uploaded_documents(query: str) -> str:
    """Search the user's uploaded documents; gives the passages nearest in meaning, with their files."""
    return rag_tools.query_uploaded_documents(query)


def agent_tools() -> list[BaseTool]:
    """The three tools."""
    return [
        StructuredTool.from_function(function) for function in (remember_fact, recall_fact, query_uploaded_documents)
    ]
