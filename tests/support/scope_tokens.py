"""Attempts with tokens: forged, tampered with, expired, swapped, or somewhere else than they belong.

Each is tried at every operation; as the owner the same request carries the owner's own token.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import jwt

from src.auth.tokens import issue_token
from src.config import DEFAULT_SECRET_KEY
from tests.support.backend import PASSWORD, SECRET_KEY, User
from tests.support.scope import Attempt, World
from tests.support.scope_http import ACTS, Act, Sending

Headers = list[tuple[str, str]]
HOUR = timedelta(hours=1)


def _claims(world: World, **changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {"sub": str(world.owner.id), "iat": now, "exp": now + 3600, **changes}
    return {name: value for name, value in claims.items() if value is not None}


def _encoded(part: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def _unsigned(world: World, algorithm: str, signature: str = "") -> str:
    return f"{_encoded({'alg': algorithm, 'typ': 'JWT'})}.{_encoded(_claims(world))}.{signature}"


def _signed(world: World, key: str = SECRET_KEY, algorithm: str = "HS256", **changes: Any) -> str:
    header = {"alg": algorithm, "typ": "JWT"}
    body = f"{_encoded(header)}.{_encoded(_claims(world, **changes))}"
    return f"{body}.{_signature(body, key, algorithm)}"


def _signature(body: str, key: str, algorithm: str = "HS256") -> str:
    made = jwt.get_algorithm_by_name(algorithm)
    return base64.urlsafe_b64encode(made.sign(body.encode(), key.encode())).rstrip(b"=").decode()


def _parts(user: User) -> list[str]:
    return user.token.split(".")


def _tampered(world: World) -> str:
    """The stranger's own token, naming the owner."""
    header, _, signature = _parts(world.stranger)
    return f"{header}.{_encoded(_claims(world))}.{signature}"


def _with_header(world: World, key: str = "k", **header: Any) -> str:
    body = f"{_encoded({'alg': 'HS256', 'typ': 'JWT', **header})}.{_encoded(_claims(world))}"
    return f"{body}.{_signature(body, key)}"


def _spliced(world: World) -> str:
    """The owner's claims, as an old log may show them, under the stranger's signature."""
    return ".".join([*_parts(world.owner)[:2], _parts(world.stranger)[2]])


def _bent(world: World) -> str:
    token = world.owner.token
    return token[:-5] + ("A" if token[-5] != "A" else "B") + token[-4:]


TOKENS: dict[str, Callable[[World], str]] = {
    "alg none": lambda world: _unsigned(world, "none"),
    "alg None": lambda world: _unsigned(world, "None"),
    "alg NONE": lambda world: _unsigned(world, "NONE"),
    "alg nOnE, a signature": lambda world: _unsigned(world, "nOnE", _parts(world.stranger)[2]),
    "no alg": lambda world: _unsigned(world, ""),
    "HS256 without a signature": lambda world: _unsigned(world, "HS256"),
    "another key": lambda world: _signed(world, "x" * 40),
    "an empty key": lambda world: _signed(world, ""),
    "the default key": lambda world: _signed(world, DEFAULT_SECRET_KEY),
    "the owner's password as key": lambda world: _signed(world, PASSWORD),
    "the name of the setting as key": lambda world: _signed(world, "SECRET_KEY"),
    "another algorithm": lambda world: _signed(world, algorithm="HS512"),
    "RS256 signed as HS256": lambda world: _with_header(world, SECRET_KEY, alg="RS256"),
    "a key id that is a path": lambda world: _with_header(world, "", kid="../../../dev/null"),
    "a key id that is SQL": lambda world: _with_header(world, "x", kid="' UNION SELECT 'x"),
    "a key of its own": lambda world: _with_header(world, "x", jwk={"kty": "oct", "k": "eA"}),
    "a key elsewhere": lambda world: _with_header(world, "x", jku="http://127.0.0.1:1/keys"),
    "critical extensions": lambda world: _with_header(world, SECRET_KEY, crit=["exp"], b64=False),
    "tampered payload": _tampered,
    "the owner's claims, another signature": _spliced,
    "one character changed": _bent,
    "signature cut off": lambda world: ".".join(_parts(world.owner)[:2]) + ".",
    "signature missing": lambda world: ".".join(_parts(world.owner)[:2]),
    "half a signature": lambda world: world.owner.token[:-20],
    "one part too many": lambda world: world.owner.token + ".e30",
    "reversed": lambda world: world.owner.token[::-1],
    "expired": lambda world: issue_token(world.owner.id, SECRET_KEY, HOUR, now=time.time() - 7200),
    "expired a second ago": lambda world: _signed(world, exp=int(time.time()) - 1),
    "not yet valid": lambda world: issue_token(world.owner.id, SECRET_KEY, HOUR, now=time.time() + 7200),
    "not before tomorrow": lambda world: _signed(world, nbf=int(time.time()) + 86_400),
    "without an end": lambda world: _signed(world, exp=None),
    "without a beginning": lambda world: _signed(world, iat=None),
    "without a user": lambda world: _signed(world, sub=None),
    "for another service": lambda world: _signed(world, aud="another"),
    "a user in words": lambda world: _signed(world, sub="ada"),
    "a user with blanks": lambda world: _signed(world, sub=f" {world.owner.id} "),
    "a user as SQL": lambda world: _signed(world, sub=f"{world.owner.id} OR 1=1"),
    "a user as a list": lambda world: _signed(world, sub=[str(world.owner.id)]),
    "a user as a float": lambda world: _signed(world, sub=f"{world.owner.id}.0"),
    "a user in wide digits": lambda world: _signed(world, sub=chr(0xFF10 + world.owner.id % 10)),
    "a negative user": lambda world: _signed(world, sub=f"-{world.owner.id}"),
    "user nought": lambda world: _signed(world, sub="0"),
    "the stranger's own": lambda world: world.stranger.token,
    "the owner's id alone": lambda world: str(world.owner.id),
    "empty": lambda _world: "",
}
"""Tokens that must not make anybody the owner."""


def _bearer(token: str) -> Headers:
    return [("Authorization", f"Bearer {token}")]


HEADERS: dict[str, Callable[[World], Headers]] = {
    "no header": lambda _world: [],
    "two headers": lambda world: [*_bearer(world.stranger.token), *_bearer(_signed(world, "x" * 40))],
    "the owner's token beside one's own": lambda world: [
        *_bearer(world.stranger.token),
        ("X-Authorization", f"Bearer {world.owner.token}"),
    ],
    "basic": lambda _world: [("Authorization", "Basic " + base64.b64encode(b"ada:").decode())],
    "another scheme": lambda world: [("Authorization", f"Token {world.owner.token}")],
    "no scheme": lambda world: [("Authorization", world.owner.token)],
    "a cookie": lambda world: [("Cookie", f"access_token={world.owner.token}; token={world.owner.token}")],
    "another path in a header": lambda world: [("X-Original-URL", "/healthz"), ("X-User-Id", str(world.owner.id))],
}
"""The token where it does not belong, even a good one."""


WRITERS = ("alg none", "another key", "tampered payload", "expired", "without a user", "the stranger's own")
"""Tried where something is written: to prove anything there takes writing it as the owner."""


def token_attempts() -> Iterator[Attempt]:
    """Every forged token wherever something is read, the commonest wherever something is written."""
    for (method, path), act in ACTS.items():
        for how, forge in TOKENS.items():
            if method != "GET" and how not in WRITERS:
                continue
            yield Attempt(
                "tokens", f"{method} {path} ({how})", _sent(act, lambda world, forge=forge: _bearer(forge(world)))
            )
        for how, headers in HEADERS.items():
            yield Attempt("tokens elsewhere", f"{method} {path} ({how})", _sent(act, headers))


def _sent(act: Act, headers: Callable[[World], Headers]) -> Callable[[World, User], bool]:
    def reach(world: World, user: User) -> bool:
        return act(Sending(world, user, headers=None if user is world.owner else headers(world)))

    return reach
