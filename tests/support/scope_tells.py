"""Attempts to learn whether something is there: what is somebody else's must be answered as what is nobody's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.support.backend import User
from tests.support.scope import Attempt, Reach, World
from tests.support.scope_http import ids_in

NOBODYS = {"number": 2**31 - 1, "uuid": "00000000-0000-4000-8000-000000000000"}


def tell_attempts(schema: dict[str, Any]) -> Iterator[Attempt]:
    """For every id that a request may hold: the owner's, and one that nobody has."""
    for (method, path, name), kind in ids_in(schema).items():
        yield Attempt("ids that tell", f"{method} {path} {name}", _tells(method, path, name, NOBODYS[kind]))


def _tells(method: str, path: str, name: str, nobodys: Any) -> Reach:
    def reach(world: World, user: User) -> bool:
        ids = (_owners(world, method, name), nobodys)
        known, unknown = (_answer(world, user, method, path, name, str(each)) for each in ids)
        return known != unknown

    return reach


def _owners(world: World, method: str, name: str) -> Any:
    """Something of the owner's; a new thing where it may be deleted."""
    match name, method:
        case "document_id", "DELETE":
            return world.received(world.owner)
        case "conversation_id", "DELETE":
            return world.owner.post("/api/conversations").json()["id"]
        case "fact_id", _:
            return world.remember(world.owner, world.name(world.owner))
        case "document_id", _:
            return world.document
        case "before", _:
            return world.message
        case _:
            return world.conversation


def _answer(world: World, user: User, method: str, path: str, name: str, id_: str) -> tuple[int, str]:
    """Status and words of the answer, the id itself taken out."""
    in_path = f"{{{name}}}" in path
    own = world.conversation if user is world.owner else user.get("/api/conversations").json()[-1]["id"]
    url = path.replace(f"{{{name}}}", id_).replace("{conversation_id}", own)
    parts: dict[str, Any] = {}
    if method == "POST":
        parts["json"] = {"message": "Hello.", name: id_}
    elif not in_path:
        parts["params"] = {name: id_}
    answer = user.request(method, url, **parts)
    return answer.status_code, answer.text.replace(id_, "ID")
