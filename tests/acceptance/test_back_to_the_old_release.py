"""At each stage before the last: the old release takes over the directory, and the new one what that wrote.

The new release is the command and a backend process' router; the old release is what it did, in LangChain's own calls:
`load_local`, a search over everybody's chunks, `add_texts`, `save_local`, and a plain row in `documents`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from tests.support import small
from tests.support.commands import Commands, commands_ready
from tests.support.old_release import OldRelease
from tests.support.routers import HashEmbeddings, router_on, set_stage, write_note
from tests.support.small import Small

pytestmark = [pytest.mark.migration, pytest.mark.xdist_group("commands")]

BEFORE, MEANWHILE, NOBODYS = "The tide turns at four.", "The lamp is lit at nine.", "Whose is this?"
STAGES = [stage for stage in Stage if Store.FAISS in ROUTING[stage].writes]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with commands_ready(tmp_path_factory.mktemp("commands")) as ready:
        yield ready


@pytest.fixture
def filled(postgres: Any, template_database: str, tmp_path: Path) -> Iterator[Small]:
    with small.filled(postgres, template_database, tmp_path) as made:
        yield made


def ask(folder: Path, question: str) -> list[str]:
    """The old release's answer: the three nearest chunks of everybody's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from langchain_community.vectorstores import FAISS
    store = FAISS.load_local(str(folder / "faiss_index"), HashEmbeddings(), allow_dangerous_deserialization=True)
    return [document.page_content for document in store.similarity_search(question, k=3)]


def upload(router: Router, user: int, folder: Path, text: str) -> int:
    path = write_note(folder, "before.md", text)
    document_id = router.receive(user, path, path.name)
    router.index(document_id)
    return document_id


def answers(router: Router, user: int, question: str) -> list[str]:
    return [hit.content for hit in router.query(user, question, 3)]


@pytest.mark.parametrize("stage", STAGES)
def test_what_each_release_wrote_is_found_by_the_other(commands: Commands, filled: Small, stage: Stage) -> None:
    def rollout(*arguments: str) -> dict[str, Any]:
        ended = commands(filled.folder, filled.environment(), *arguments, "--json")
        assert ended.code == 0, f"rollout {' '.join(arguments)}: {ended}"
        return ended.json

    ada, ben = filled.installation.users["ada"], filled.installation.users["ben"]
    with filled.database.connect(autocommit=True) as connection:
        set_stage(connection, stage, 50 if len(ROUTING[stage].reads) == 2 else 0)
    with router_on(filled.database, filled.folder) as router:
        new = upload(router, ada, filled.folder, BEFORE)
        deleted = router.stores.faiss.document(filled.documents("ada")[0])
        router.delete(ada, filled.documents("ada")[0])
    rollout("save-faiss", "--execute")

    old = OldRelease(filled.folder, filled.database)
    assert ask(filled.folder, BEFORE)[0] == BEFORE
    assert not {chunk.content for chunk in deleted}.intersection(ask(filled.folder, deleted[0].content))
    made, _ = old.upload(ben, write_note(filled.folder, "meanwhile.docx", MEANWHILE).name, [MEANWHILE])
    old.add_chunks("uploads/nobodys.docx", [NOBODYS])
    assert ask(filled.folder, MEANWHILE)[0] == MEANWHILE

    with router_on(filled.database, filled.folder) as router:
        assert rollout("status")["undecided"] == 2
        assert MEANWHILE not in answers(router, ben, MEANWHILE), "whose it is has not been decided"
        decided = rollout("assign-owners", "--execute")
        assert (decided["assigned"], decided["quarantined"]) == (1, 1)
        router.refresh()
        assert rollout("status")["undecided"] == 0
        assert answers(router, ben, MEANWHILE)[0] == MEANWHILE, "from FAISS, which alone has it so far"
        for user in (ada, ben):
            assert NOBODYS not in answers(router, user, NOBODYS)
        if Store.PGVECTOR not in ROUTING[stage].writes:
            with filled.database.connect(autocommit=True) as connection:
                set_stage(connection, Stage.DUALWRITE)
            router.refresh()
            router.refresh()
        rollout("backfill", "--execute")
        rollout("settle", "--execute")
        assert rollout("verify")["differences"] == 0
        router.refresh()
        for user, document, text in ((ada, new, BEFORE), (ben, made, MEANWHILE)):
            assert answers(router, user, text)[0] == text
            for store in Store:
                assert [chunk.content for chunk in router.stores.copy_of(store, user, document)] == [text], store
        assert not router.stores.copy_of(Store.PGVECTOR, ada, deleted[0].document_id)
