"""Attempts over HTTP: others' ids in every path, query and body, and another user named beside the token.

What is attempted follows the published schema; `ACTS` says, for each operation in it, how to use it and what
it is to reach something with it. An operation without an act, or an id that nobody knows, is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from src.tools import rag_tools
from tests.support.backend import User
from tests.support.obedient_model import order
from tests.support.scope import FACT, QUESTION, SECRET, Attempt, World, told

Parts = dict[str, Any]


@dataclass(frozen=True)
class Sending:
    """How a request is sent: as whom, and with which parts besides its own.

    `spelled` writes an id of the owner's; `headers` replace the user's own.
    """

    world: World
    user: User
    extra: Parts | None = None
    headers: list[tuple[str, str]] | None = None
    spelled: Callable[[Any], str] = str

    def __call__(self, method: str, path: str, **parts: Any) -> Any:
        for name, value in (self.extra or {}).items():
            parts[name] = {**parts.get(name, {}), **value}
        own = self.headers if self.headers is not None else list(self.user.headers.items())
        headers = [*own, *parts.pop("headers", {}).items()]
        return self.world.backend.client.request(method, path, headers=headers, **parts)

    def shows(self, method: str, path: str, **parts: Any) -> bool:
        return SECRET in told(self(method, path, **parts))

    def deletes(self, path: str, id_: Any) -> bool:
        """Whether the owner, who asks next, finds the thing gone."""
        self("DELETE", f"{path}/{self.spelled(id_)}")
        return bool(self.world.owner.delete(f"{path}/{id_}").status_code == 404)


Act = Callable[[Sending], bool]


def _upload(send: Sending) -> bool:
    """Something new among the owner's documents."""
    name = f"{send.world.name(send.user)}.txt"
    send("POST", "/api/upload", files={"file": (name, b"Nothing of interest.", "text/plain")}, data={})
    return name in told(send.world.owner.get("/api/documents?limit=9"))


def _create_conversation(send: Sending) -> bool:
    title = send.world.name(send.user)
    send("POST", "/api/conversations", json={"title": title})
    return title in told(send.world.owner.get("/api/conversations?limit=9"))


def _delete_conversation(send: Sending) -> bool:
    made = send.world.owner.post("/api/conversations", json={"title": send.world.name(send.world.owner)})
    return send.deletes("/api/conversations", made.json()["id"])


def _chat(send: Sending) -> bool:
    """The owner's fact in what the model or the user hears, or the message in the owner's conversation."""
    world, said = send.world, send.world.name(send.user)
    before = len(world.model.chats)
    message = f"{said}. {order('recall_fact', key=FACT)}"
    answer = send("POST", "/api/chat", json={"message": message, "conversation_id": send.spelled(world.conversation)})
    heard = told(answer) + "".join(str(request.body) for request in world.model.chats[before:])
    return SECRET in heard.replace(said, "") or said in told(
        world.owner.get(f"/api/conversations/{world.conversation}?limit=9")
    )


def _chat_anew(send: Sending) -> bool:
    world, said = send.world, send.world.name(send.user)
    before = len(world.model.chats)
    answer = send("POST", "/api/chat", json={"message": f"{said}. {order('recall_fact', key=FACT)}"})
    heard = told(answer) + "".join(str(request.body) for request in world.model.chats[before:])
    return SECRET in heard.replace(said, "")


def _delete_fact(send: Sending) -> bool:
    return send.deletes("/api/facts", send.world.remember(send.world.owner, send.world.name(send.world.owner)))


def _delete_document(send: Sending) -> bool:
    """Deleting it twice is no error, so its row is looked at."""
    document = send.world.received(send.world.owner)
    send("DELETE", f"/api/documents/{send.spelled(document)}")
    return bool(rag_tools.service().load(document).status == "deleted")


ACTS: dict[tuple[str, str], Act] = {
    ("POST", "/api/upload"): _upload,
    ("GET", "/api/documents"): lambda send: send.shows("GET", "/api/documents"),
    ("GET", "/api/documents/{document_id}"): lambda send: send.shows(
        "GET", f"/api/documents/{send.spelled(send.world.document)}"
    ),
    ("DELETE", "/api/documents/{document_id}"): _delete_document,
    ("GET", "/api/search"): lambda send: send.shows("GET", "/api/search", params={"q": QUESTION, "k": "20"}),
    ("POST", "/api/conversations"): _create_conversation,
    ("GET", "/api/conversations"): lambda send: send.shows("GET", "/api/conversations"),
    ("GET", "/api/conversations/{conversation_id}"): lambda send: send.shows(
        "GET", f"/api/conversations/{send.spelled(send.world.conversation)}", params={"limit": "200"}
    ),
    ("DELETE", "/api/conversations/{conversation_id}"): _delete_conversation,
    ("POST", "/api/chat"): _chat_anew,
    ("GET", "/api/facts"): lambda send: send.shows("GET", "/api/facts"),
    ("DELETE", "/api/facts/{fact_id}"): _delete_fact,
    ("GET", "/api/traces"): lambda send: send.shows("GET", "/api/traces"),
}
"""What each operation below /api reaches when it is used as it is meant to be."""


def _before(send: Sending) -> bool:
    """Whether an id of the owner's is answered otherwise than one that nobody has."""
    at = send.user.get("/api/conversations").json()[-1]["id"] if send.user is send.world.stranger else None
    path = f"/api/conversations/{at or send.world.conversation}"
    known = send("GET", path, params={"before": send.spelled(send.world.message)})
    unknown = send("GET", path, params={"before": "00000000-0000-4000-8000-000000000000"})
    return bool(known.status_code == 200 and known.json() != unknown.json())


def _traces_of(send: Sending) -> bool:
    asked = {"conversation_id": send.spelled(send.world.conversation)}
    return send.shows("GET", "/api/traces", params=asked)


IDS: dict[tuple[str, str, str], Act] = {
    ("GET", "/api/documents/{document_id}", "document_id"): ACTS["GET", "/api/documents/{document_id}"],
    ("DELETE", "/api/documents/{document_id}", "document_id"): ACTS["DELETE", "/api/documents/{document_id}"],
    ("GET", "/api/conversations/{conversation_id}", "conversation_id"): ACTS[
        "GET", "/api/conversations/{conversation_id}"
    ],
    ("GET", "/api/conversations/{conversation_id}", "before"): _before,
    ("DELETE", "/api/conversations/{conversation_id}", "conversation_id"): _delete_conversation,
    ("POST", "/api/chat", "conversation_id"): _chat,
    ("DELETE", "/api/facts/{fact_id}", "fact_id"): _delete_fact,
    ("GET", "/api/traces", "conversation_id"): _traces_of,
}
"""Each id that a request may hold, by operation."""


# -- others' ids, as they are and disguised

PLAIN: dict[str, dict[str, Callable[[Any], str]]] = {
    "number": {"plain": str, "zeros": lambda id_: f"000{id_}", "space": lambda id_: f"%20{id_}"},
    "uuid": {
        "plain": str,
        "capitals": lambda id_: str(id_).upper(),
        "no dashes": lambda id_: str(id_).replace("-", ""),
        "urn": lambda id_: f"urn:uuid:{id_}",
    },
}
"""Spellings that the service understands."""
HOSTILE = {
    "or true": "{} OR 1=1", "quote": "{}' OR 'a'='a", "comment": "{}--", "union": "0 UNION SELECT {}",
    "list": "[{}]", "comma": "1,{}", "wildcard": "%", "star": "*", "path": "../documents/{}",
    "encoded path": "..%2Fdocuments%2F{}", "NUL": "{}%00", "null": "null", "percent": "%25{}",
    "line feed": "{}%0a1", "wide digits": "\uff11", "unsigned": "+{}", "hexadecimal": "0x{}", "float": "{}.0",
    "exponent": "{}e0", "minus": "-{}", "semicolon": "{};user_id={}", "parameter": "{}?user_id=1",
}  # fmt: skip
"""Spellings that it should not understand; as the owner the plain id is sent."""


def id_attempts(schema: dict[str, Any]) -> Iterator[Attempt]:
    """For every id in the schema that a request may hold: the owner's, sent with the user's own token."""
    for (method, path, name), kind in ids_in(schema).items():
        act = IDS[method, path, name]
        for how, spelled in PLAIN[kind].items():
            yield Attempt("others' ids", f"{method} {path} {name} ({how})", _spelled(act, spelled, spelled))
        for how, template in HOSTILE.items():
            hostile = _filled(template)
            yield Attempt("disguised ids", f"{method} {path} {name} ({how})", _spelled(act, hostile, str))


def ids_in(schema: dict[str, Any]) -> dict[tuple[str, str, str], str]:
    """Every id in paths, queries and bodies, and whether it is a number or a UUID."""
    found = {}
    for (method, path), operation in operations(schema).items():
        fields = {one["name"]: one["schema"] for one in operation.get("parameters", ())}
        fields |= _body(schema, operation)
        for name, field in fields.items():
            if (kind := _kind(name, field)) is not None:
                found[method, path, name] = kind
    return found


def operations(schema: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Everything that the service does below /api, as the schema describes it."""
    return {
        (method.upper(), path): operation
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
        if path.startswith("/api/")
    }


def _body(schema: dict[str, Any], operation: dict[str, Any]) -> dict[str, Any]:
    content = operation.get("requestBody", {}).get("content", {})
    found: dict[str, Any] = {}
    for media in content.values():
        for reference in (media["schema"], *media["schema"].get("anyOf", ())):
            if "$ref" in reference:
                found |= schema["components"]["schemas"][reference["$ref"].rpartition("/")[2]].get("properties", {})
    return found


def _kind(name: str, field: dict[str, Any]) -> str | None:
    options = (field, *field.get("anyOf", ()))
    if any(one.get("format") == "uuid" for one in options):
        return "uuid"
    if name.endswith("id"):
        return "number"
    return None


def _spelled(act: Act, stranger: Callable[[Any], str], owner: Callable[[Any], str]) -> Callable[[World, User], bool]:
    def reach(world: World, user: User) -> bool:
        return act(Sending(world, user, spelled=owner if user is world.owner else stranger))

    return reach


def _filled(template: str) -> Callable[[Any], str]:
    return lambda id_: template.replace("{}", str(id_))


# -- somebody else's name beside one's own token

NAMES = ("user_id", "userId", "owner_id", "uid", "sub", "as_user", "on_behalf_of", "tenant_id", "app.user_id")
HEADERS = ("X-User-Id", "X-Forwarded-User", "X-Authenticated-User", "X-Remote-User", "X-Original-User", "Remote-User")


def named_attempts(schema: dict[str, Any]) -> Iterator[Attempt]:
    """Every operation, with the owner's id wherever another service might look for it."""
    for method, path in operations(schema):
        for how, extra in _places(method, path):
            yield Attempt("named beside the token", f"{method} {path} ({how})", _named(ACTS[method, path], extra))


def _places(method: str, path: str) -> Iterator[tuple[str, Callable[[World], Parts]]]:
    for name in NAMES:
        yield f"query {name}", lambda world, name=name: {"params": {name: str(world.owner.id)}}
        if path == "/api/upload":
            yield f"form {name}", lambda world, name=name: {"data": {name: str(world.owner.id)}}
        elif method == "POST":
            yield f"body {name}", lambda world, name=name: {"json": {name: world.owner.id}}
    for name in HEADERS:
        yield f"header {name}", lambda world, name=name: {"headers": {name: str(world.owner.id)}}
    for name in ("user_id", "session", "access_token"):
        yield f"cookie {name}", lambda world, name=name: {"headers": {"Cookie": f"{name}={world.owner.id}"}}


def _named(act: Act, extra: Callable[[World], Parts]) -> Callable[[World, User], bool]:
    def reach(world: World, user: User) -> bool:
        return act(replace(Sending(world, user), extra=extra(world)))

    return reach


def schema_of(world: World) -> dict[str, Any]:
    """The schema that the service publishes."""
    schema: dict[str, Any] = json.loads(world.backend.client.get("/openapi.json").text)
    return schema
