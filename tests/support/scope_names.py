"""Attempts with names: metacharacters of SQL, paths and text wherever a name is taken, and names that others have."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from src.auth.throttle import Throttle
from src.tools import memory_tools
from src.utils.context import acting_as
from tests.support.backend import PASSWORD, User
from tests.support.scope import LOOT, QUESTION, SECRET, TEXT, Attempt, World, told

Reach = Callable[[World, User], bool]

META = {
    "quote": "vault' OR '1'='1", "double quote": 'vault" OR ""="', "comment": "vault'--",
    "semicolon": "x'; SELECT 1;--",
    "union": "' UNION SELECT value FROM user_facts--", "percent": "%", "underscore": "_____", "star": "*",
    "regular expression": ".*", "backslash": "vault\\", "dollar": "$$vault$$", "format": "%(user_id)s %s {user_id}",
    "cast": "vault::text", "bind": ":user_id", "path": "../../etc/passwd", "windows path": "..\\..\\vault",
    "absolute": "/etc/passwd", "NUL": "vault\0", "line feed": "vault\nuser_id: 1", "tab": "vault\t",
    "right to left": "vault\u202e", "zero width": "va\u200bult", "wide": "ｖａｕｌｔ", "combining": "vau\u0301lt",
    "cyrillic": "v\u0430ult", "emoji": "vault \U0001f511", "capitals": "VAULT", "blanks": "  vault  ",
    "long": "vault" * 40,
    "shell": "$(cat vault) `id` | x", "template": "{{7*7}} ${7*7}", "tag": "<script>vault</script>",
    "json": '{"$ne": null}',
}  # fmt: skip


def name_attempts() -> Iterator[Attempt]:
    """Every name, wherever a name is taken."""
    for how, name in META.items():
        yield Attempt("names: fact", how, _fact(name))
        yield Attempt("names: question", how, _question(name))
        yield Attempt("names: filename", how, _filename(name))
        yield Attempt("names: title", how, _title(name))
        yield Attempt("names: log-in", how, _login(name))
    for how, spell in ALIKE.items():
        yield Attempt("names: account", how, _account(spell))
    for how, name in SHARED.items():
        yield Attempt("two users, one filename", f"{how}, another text", _shared(name))
        yield Attempt("two users, one filename", f"{how}, deleted by the one", _shared_deletion(name))


def _fact(name: str) -> Reach:
    """The key by which the owner keeps the secret, asked for by another."""

    def reach(world: World, user: User) -> bool:
        with acting_as(world.owner.id):
            memory_tools.remember_fact(name.replace("\0", " "), SECRET)
        with acting_as(user.id):
            return SECRET in memory_tools.recall_fact(name.replace("\0", " "))

    return reach


def _question(name: str) -> Reach:
    return lambda world, user: (
        SECRET in world.send(user, "GET", "/api/search", params={"q": f"{QUESTION} {name}"[:4000], "k": "20"})
    )


def _filename(name: str) -> Reach:
    """A file of that name changes nothing of the owner's, and finds nothing."""

    def reach(world: World, user: User) -> bool:
        before = _lying(world)
        text = TEXT if user is world.owner else LOOT
        answer = user.post("/api/upload", files={"file": (f"{name}.txt", text.encode(), "text/plain")})
        if answer.status_code == 200:
            world.backend.indexed()
        after = _lying(world)
        assert {path: after.get(path) for path in before} == before, "a file of somebody else's has changed"
        return SECRET in world.send(user, "GET", "/api/documents?limit=200") + _searched(world, user)

    return reach


def _lying(world: World) -> dict[str, tuple[int, int]]:
    """The files in the upload folder, each with what changes when it is written again."""
    found = (path for path in world.backend.files() if not path.name.endswith((".npz", ".part")))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def _title(name: str) -> Reach:
    def reach(world: World, user: User) -> bool:
        user.post("/api/conversations", json={"title": name[:200]})
        return SECRET in world.send(user, "GET", "/api/conversations?limit=200")

    return reach


def _login(name: str) -> Reach:
    """Who does not know the password is not let in by a name; the owner is, by name and address."""

    def reach(world: World, user: User) -> bool:
        if user is world.owner:
            return _logged_in(world, "ada", PASSWORD) and _logged_in(world, "ada@example.org", PASSWORD)
        given = name.replace("vault", "ada")
        return any(_logged_in(world, given, guess) for guess in (name, f"{PASSWORD}\0"))

    return reach


def _logged_in(world: World, login: str, password: str) -> bool:
    world.backend.client.app.state.throttle = Throttle()  # type: ignore[attr-defined]  # it would end the attempts
    body = {"username": login, "password": password}
    answer = world.backend.client.post("/auth/login", json=body)
    if answer.status_code != 200:
        return False
    headers = {"Authorization": f"Bearer {answer.json()['access_token']}"}
    return SECRET in told(world.backend.client.get("/api/facts?limit=200", headers=headers))


# -- accounts that look like the owner's

ALIKE: dict[str, tuple[str, str]] = {
    "capital name": ("ADA", "x{}@example.org"),
    "mixed name": ("Ada", "x{}@example.org"),
    "the name again": ("ada", "x{}@example.org"),
    "capital address": ("other{}", "ADA@EXAMPLE.ORG"),
    "mixed address": ("other{}", "Ada@Example.org"),
    "the address again": ("other{}", "ada@example.org"),
    "address with a blank": ("other{}", "ada@example.org "),
    "address with a NUL": ("other{}", "ada@example.org\0"),
    "cyrillic address": ("other{}", "\u0430da@example.org"),
    "dotless address": ("other{}", "ad\u0251@example.org"),
    "wide address": ("other{}", "ａｄａ@example.org"),
    "plus address": ("other{}", "ada+x@example.org"),
    "the name as address": ("other{}", "ada@ada"),
    "name with a dot": ("ada.", "y{}@example.org"),
    "name with a line": ("ada_", "z{}@example.org"),
}


def _account(spell: tuple[str, str]) -> Reach:
    """An account made to look like the owner's is another one, or none."""

    def reach(world: World, user: User) -> bool:
        if user is world.owner:
            return _logged_in(world, "ada", PASSWORD)
        number = time.monotonic_ns()
        username, email = (part.format(number) for part in spell)
        password = "a password of the stranger's"
        account = {"username": username, "email": email, "password": password, "full_name": "Ada"}
        world.backend.client.post("/auth/register", json=account)
        return any(_logged_in(world, login, password) for login in (username, email, "ada", "ada@example.org"))

    return reach


# -- two users, one filename

SHARED: dict[str, str] = {
    "plain": "report.txt", "capitals": "REPORT.TXT", "markdown": "report.md", "blank": "my report.txt",
    "path": "../uploads/report.txt", "absolute": "/work/report.txt", "emoji": "\U0001f511.txt", "dots": "...txt",
    "long": "r" * 300 + ".txt", "NUL": "report\0.txt", "no suffix": "report", "hidden": ".txt",
    "quote": "report'.txt", "unicode": "r\u00e9sum\u00e9.txt", "decomposed": "re\u0301sume\u0301.txt",
}  # fmt: skip


def _shared(name: str) -> Reach:
    """The owner has a file of that name; another sends one, and each finds their own."""

    def reach(world: World, user: User) -> bool:
        mine = _sent(world, world.owner, name, TEXT)
        theirs = _sent(world, user, name, LOOT)
        assert mine != theirs
        found = _searched(world, user)
        assert (user.get(f"/api/documents/{mine}").status_code == 200) == (user is world.owner)
        for owner, document in ((world.owner, mine), (user, theirs)):
            assert owner.delete(f"/api/documents/{document}").status_code == 204
        return SECRET in found

    return reach


def _shared_deletion(name: str) -> Reach:
    """Whose deletion of a file of that name takes the owner's away: the owner's, nobody else's."""

    def reach(world: World, user: User) -> bool:
        text = f"The {world.name(world.stranger)}th report."
        mine = _sent(world, world.owner, name, text)
        theirs = mine if user is world.owner else _sent(world, user, name, text)
        assert user.delete(f"/api/documents/{theirs}").status_code == 204
        asked = {"q": text, "k": "5"}
        found = [hit["document_id"] for hit in world.owner.get("/api/search", params=asked).json()]
        shown = world.owner.get(f"/api/documents/{mine}").status_code
        assert (mine in found) == (shown == 200)
        if shown == 200:
            world.owner.delete(f"/api/documents/{mine}")
        return shown == 404

    return reach


def _sent(world: World, user: User, name: str, text: str) -> int:
    answer: Any = user.upload(name, text.encode())
    assert answer.status_code == 200, answer.text
    world.backend.indexed()
    return int(answer.json()["document_id"])


def _searched(world: World, user: User) -> str:
    return world.send(user, "GET", "/api/search", params={"q": QUESTION, "k": "20"})
