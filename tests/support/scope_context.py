"""Attempts below HTTP: the identity lost, or left behind, in threads and tasks.

Each way of calling is one in which the owner was there just before. As the owner, the identity is carried over
as the service itself does it.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from src.tools import memory_tools, rag_tools
from src.tools.rag_tools.documents import DocumentNotFoundError
from src.utils.context import IdentityUnsetError, acting_as, get_user_id
from tests.support.backend import User
from tests.support.scope import FACT, QUESTION, SECRET, Attempt, World

Tool = Callable[[World], str]
Way = Callable[[World, Callable[[], str]], str]


def _unset_is_nothing(call: Callable[[], Any]) -> str:
    try:
        return str(call())
    except (IdentityUnsetError, DocumentNotFoundError) as error:
        return f"refused: {error}"


# -- what is called

TOOLS: dict[str, Tool] = {
    "query_uploaded_documents": lambda _world: rag_tools.query_uploaded_documents(QUESTION),
    "recall_fact": lambda _world: memory_tools.recall_fact(FACT),
    "get_user_id": lambda world: SECRET if get_user_id() == world.owner.id else "another",
    "remember_fact": lambda world: _remember(world),
    "delete_document": lambda world: _delete(world),
}


def _remember(world: World) -> str:
    """The secret where the fact is the owner's afterwards."""
    value = world.name(world.stranger)
    memory_tools.remember_fact("note", value)
    with acting_as(world.owner.id):
        return memory_tools.recall_fact("note").replace(value, SECRET)


def _delete(world: World) -> str:
    """The secret where the document, which is the owner's, is gone afterwards."""
    document = world.received(world.owner)
    with suppress(IdentityUnsetError, DocumentNotFoundError):
        rag_tools.delete_document(document)
    return SECRET if rag_tools.service().load(document).status == "deleted" else "still there"


# -- how the stranger comes to call it: with no identity, or with their own, just after the owner


def _plain_thread(_world: World, call: Callable[[], str]) -> str:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def _thread_of_the_owner(world: World, call: Callable[[], str]) -> str:
    """A thread that has just worked for the owner."""
    with ThreadPoolExecutor(1) as thread:
        with acting_as(world.owner.id):
            thread.submit(contextvars.copy_context().run, rag_tools.query_uploaded_documents, QUESTION).result()
        return thread.submit(call).result()


def _thread_begun_by_the_owner(world: World, call: Callable[[], str]) -> str:
    """Begun while the owner was there, without their context."""
    heard: list[str] = []
    with acting_as(world.owner.id):
        thread = threading.Thread(target=lambda: heard.append(call()))
        thread.start()
        thread.join(30)
    return heard[0]


def _executor_of_a_loop(world: World, call: Callable[[], str]) -> str:
    async def run() -> str:
        with acting_as(world.owner.id):
            return await asyncio.get_running_loop().run_in_executor(None, call)

    return asyncio.run(run())


def _after_the_owner(world: World, call: Callable[[], str]) -> str:
    with acting_as(world.owner.id):
        rag_tools.query_uploaded_documents(QUESTION)
    return call()


def _after_the_owner_failed(world: World, call: Callable[[], str]) -> str:
    with suppress(ZeroDivisionError), acting_as(world.owner.id):
        raise ZeroDivisionError
    return call()


def _inside_the_owner(world: World, call: Callable[[], str]) -> str:
    """The stranger's request handled within the owner's, as a nested call would."""
    with acting_as(world.owner.id), acting_as(world.stranger.id):
        return call()


def _task_beside_the_owner(world: World, call: Callable[[], str]) -> str:
    """Two tasks of one loop, each with an identity, waiting for one another."""

    async def act(user_id: int, barrier: asyncio.Barrier, call: Callable[[], str]) -> str:
        with acting_as(user_id):
            await barrier.wait()
            heard = await asyncio.to_thread(call)
            await barrier.wait()
            return heard

    async def both() -> str:
        barrier = asyncio.Barrier(2)
        mine = act(world.stranger.id, barrier, call)
        theirs = act(world.owner.id, barrier, lambda: rag_tools.query_uploaded_documents(QUESTION))
        return (await asyncio.gather(mine, theirs))[0]

    return asyncio.run(both())


def _callback_of_a_loop(world: World, call: Callable[[], str]) -> str:
    async def run() -> str:
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        with acting_as(world.owner.id):
            asyncio.get_running_loop().call_soon(lambda: done.set_result(call()), context=contextvars.Context())
        return await done

    return asyncio.run(run())


def _empty_context(world: World, call: Callable[[], str]) -> str:
    with acting_as(world.owner.id):
        return contextvars.Context().run(call)


def _as_the_stranger(world: World, call: Callable[[], str]) -> str:
    with acting_as(world.stranger.id), ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, call).result()


WAYS: dict[str, Way] = {
    "a plain thread": _plain_thread,
    "a thread that worked for the owner": _thread_of_the_owner,
    "a thread begun by the owner": _thread_begun_by_the_owner,
    "the executor of the owner's loop": _executor_of_a_loop,
    "after the owner": _after_the_owner,
    "after the owner failed": _after_the_owner_failed,
    "inside the owner's": _inside_the_owner,
    "beside the owner's": _task_beside_the_owner,
    "a callback of the owner's loop": _callback_of_a_loop,
    "an empty context in the owner's": _empty_context,
    "as the stranger in a thread": _as_the_stranger,
}


def context_attempts() -> Iterator[Attempt]:
    """Each tool, called in each way."""
    for tool_name, tool in TOOLS.items():
        for way_name, way in WAYS.items():
            yield Attempt("context lost", f"{tool_name}, {way_name}", _called(tool, way))


def _called(tool: Tool, way: Way) -> Callable[[World, User], bool]:
    def reach(world: World, user: User) -> bool:
        def call() -> str:
            return _unset_is_nothing(lambda: tool(world))

        if user is world.owner:
            with acting_as(user.id), ThreadPoolExecutor(1) as thread:
                return SECRET in thread.submit(contextvars.copy_context().run, call).result()
        return SECRET in way(world, call)

    return reach
