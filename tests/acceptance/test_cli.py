"""The command `rollout` from outside: exit codes, one JSON object on stdout, and nothing changed until --execute."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout.removal import ALONE, ROUTED, SEAM
from src.database import Role
from src.tools.rag_tools.migration.stages import Stage
from tests.support import small
from tests.support.commands import ROOT, Commands, Ended, base_environment, commands_ready
from tests.support.routers import router_on, set_stage
from tests.support.small import Small
from tests.support.unchanged import contents, files

pytestmark = pytest.mark.migration

COMMANDS = (
    "status", "check", "advance", "rollback", "import-sql", "assign-owners", "backfill", "settle", "verify", "diffs",
    "save-faiss", "rehearse", "quarantine list", "quarantine assign", "quarantine discard", "instances list",
    "instances forget", "archive", "remove-faiss",
)  # fmt: skip
NO_MODEL = ("--override", "model=the test has no model")

Rollout = Callable[..., Ended]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with commands_ready(tmp_path_factory.mktemp("commands")) as ready:
        yield ready


@pytest.fixture
def installed(postgres: Any, template_database: str, tmp_path: Path) -> Iterator[Small]:
    with small.installed(postgres, template_database, tmp_path) as made:
        yield made


@pytest.fixture
def filled(postgres: Any, template_database: str, tmp_path: Path) -> Iterator[Small]:
    with small.filled(postgres, template_database, tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def untouched(postgres: Any, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """Shared by tests of what is refused."""
    with small.filled(postgres, template_database, tmp_path_factory.mktemp("untouched")) as made:
        yield made


def on(commands: Commands, made: Small, **settings: str) -> Rollout:
    """`rollout ARGUMENTS` on the installation; on failure the test shows what it printed."""

    def run(*arguments: str, code: int = 0) -> Ended:
        ended = commands(made.folder, made.environment() | settings, *arguments)
        assert ended.code == code, f"rollout {' '.join(arguments)}: {ended}"
        assert "Traceback" not in ended.err
        return ended

    return run


def stage(made: Small, *steps: tuple[Stage, int]) -> None:
    with made.database.connect(autocommit=True) as connection:
        for name, percent in steps:
            set_stage(connection, name, percent)


def transitions(made: Small) -> list[tuple[int, str, str]]:
    with made.database.connect() as connection:
        return connection.execute("SELECT id, stage, actor FROM rollout_transitions ORDER BY id").fetchall()


# -- nothing until --execute


def test_no_command_changes_anything_until_told_to(commands: Commands, filled: Small) -> None:
    rollout = on(commands, filled)
    listed = rollout("quarantine", "list", "--json").json["groups"]
    with filled.database.connect(autocommit=True) as connection:
        connection.execute(
            "INSERT INTO rollout_instances (instance, host, pid, transition_id, seen_at) VALUES"
            " ('00000000-0000-4000-8000-000000000001', 'gone.example', 7, 1, now() - interval '1 hour')"
        )
    before, on_disk = contents(filled.database), files(filled.folder)
    for arguments, code in [
        (("status",), 0),
        (("check",), 4),
        (("advance",), 4),
        (("rollback",), 0),
        (("assign-owners",), 0),
        (("backfill",), 0),
        (("settle", "--retry-aside"), 0),
        (("diffs",), 0),
        (("save-faiss",), 0),
        (("archive", "faiss.tar"), 0),
        (("archive", "faiss.tar", "--restore", "restored"), 0),
        (("quarantine", "list", "--discarded"), 0),
        (("quarantine", "assign", listed[0]["name"], str(listed[0]["candidates"][0]["document_id"])), 0),
        (("quarantine", "discard", listed[1]["name"], "--reason", "nobody misses it"), 0),
        (("instances", "list"), 0),
        (("instances", "forget", "0000"), 0),
    ]:
        ended = rollout(*arguments, "--json", code=code)
        named = " ".join(arguments[:2]) if arguments[0] in ("quarantine", "instances") else arguments[0]
        assert (ended.json["command"], ended.json["version"]) == (named, 1)
        assert contents(filled.database) == before, named
        assert files(filled.folder) == on_disk, named


def test_an_import_only_looks_until_told_to(
    commands: Commands, postgres: Any, template_database: str, database: Any, tmp_path: Path
) -> None:
    installation = small.made_installation(postgres, tmp_path)
    made = Small(tmp_path, database, installation)
    rollout, before, on_disk = on(commands, made), contents(database), files(tmp_path)
    found = rollout("import-sql", "sqlite:///victus.db", "--json").json
    assert (found["executed"], found["problems"]) == (False, [])
    assert {table["table"]: table["rows"] for table in found["tables"]}["users"] == 5
    assert contents(database) == before
    assert files(tmp_path) == on_disk
    rollout("import-sql", "sqlite:///victus.db", "--execute")
    assert contents(database) != before
    again = rollout("import-sql", "sqlite:///victus.db", "--execute", "--json", code=5).json
    assert "was moved to" in again["error"]


# -- the whole way, as on-call types it


def test_from_the_old_installation_to_shadow_and_back(commands: Commands, installed: Small) -> None:
    rollout = on(commands, installed, ROLLOUT_ACTOR="ada")
    assert "stage off at 0 percent (transition 1)" in rollout("status").out
    report = rollout("assign-owners", "--execute", "--json").json
    assert (report["assignment"], report["version"]) == (1, 1)
    assert (report["assigned"], report["quarantined"]) == (
        len(installed.installation.expected), installed.quarantined,
    )  # fmt: skip
    refused = rollout("advance", *NO_MODEL, "--execute", "--json", code=3).json
    assert f"--acknowledge-quarantine {installed.quarantined}" in refused["error"]
    assert refused["gate"]["verdict"] == "fail"
    acknowledged = ("--acknowledge-quarantine", str(installed.quarantined))
    assert "add --execute to go" in rollout("advance", *NO_MODEL, *acknowledged).out
    assert transitions(installed) == [(1, "off", "alembic")]
    gone = rollout("advance", *NO_MODEL, *acknowledged, "--execute", "--reason", "as agreed", "--json").json
    assert (gone["transition"], gone["late"]) == (2, [])
    assert transitions(installed)[-1] == (2, "dualwrite", "ada")

    copied = rollout("backfill", "--execute", "--json")
    assert copied.json["chunks"] == len(installed.installation.expected)
    assert "backfill 3/3" in copied.err
    assert "0 differences" in rollout("verify").out
    assert rollout("advance", "--execute", "--json").json["to"] == "shadow"

    evidence = rollout("check", "--json", code=4).json
    assert (evidence["to"], evidence["verdict"]) == ("live at 1 percent", "inconclusive")
    told = rollout("rollback").out
    assert "FAISS is owed nothing" in told
    assert "reopen the leak" in told
    assert rollout("rollback", "--to", "dualwrite", "--execute", "--json").json["transition"] == 4
    saved = rollout("save-faiss", "--execute", "--json").json
    assert saved["chunks"] == len(installed.installation.uploaded_by)


def test_the_profile_of_rehearsals_is_printed_wherever_it_is_in_force(commands: Commands, filled: Small) -> None:
    rollout = on(commands, filled, ROLLOUT_PROFILE="rehearsal")
    assert rollout("status").out.startswith("profile: rehearsal")
    assert rollout("status", "--json").json["profile"] == "rehearsal"
    assert "unknown" in on(commands, filled, ROLLOUT_PROFILE="lenient")("status", "--json", code=2).json["error"]


# -- exit codes


@pytest.mark.parametrize(
    "arguments",
    [
        ("advance", "--percent", "101"),
        ("advance", "--to", "compleet"),
        ("advance", "--override", "verify"),
        ("advance", "--override", "vreify=because"),
        ("settle", "--store", "redis"),
        ("diffs", "--cause", "weather"),
        ("verify", "--execute"),
        ("quarantine", "assign"),
        ("quarantine", "assign", "--csv", "missing.csv"),
        ("instances", "forget", "ffff"),
        ("assign-owners", "--from-sqlite", "sqlite:///victus.db", "--execute"),
        ("assign-owners", "--from-sqlite", "postgresql:///victus"),
        ("import-sql",),
        ("rehearse", "--queries", "0"),
        ("no-such-command",),
    ],
)
def test_a_mistake_in_the_command_exits_two_and_says_what_there_is(
    commands: Commands, untouched: Small, arguments: tuple[str, ...]
) -> None:
    ended = on(commands, untouched)(*arguments, "--json", code=2)
    assert ended.json["error"]
    assert ended.err.startswith("rollout: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("advance", "--to", "rampdown"),
        ("advance", "--to", "off"),
        ("check", "--to", "complete"),
        ("rollback", "--to", "shadow"),
        ("rollback", "--to", "live", "--percent", "1", "--execute"),
    ],
)
def test_what_is_not_one_step_that_way_exits_three(
    commands: Commands, untouched: Small, arguments: tuple[str, ...]
) -> None:
    assert "step" in on(commands, untouched)(*arguments, "--json", code=3).json["error"]
    assert transitions(untouched)[-1][1] == "dualwrite"


def test_missing_evidence_exits_four_with_the_gate(commands: Commands, untouched: Small) -> None:
    refused = on(commands, untouched)("advance", "--execute", "--json", code=4).json
    assert "verify is never run" in refused["error"]
    assert {each["name"] for each in refused["gate"]["criteria"]} == {"fleet", "owed", "verify"}


def test_the_backfill_is_refused_in_a_stage_that_does_not_write_both(commands: Commands, installed: Small) -> None:
    assert "rollout advance" in on(commands, installed)("backfill", "--execute", "--json", code=3).json["error"]


# -- verify, quarantine, fleet, diffs


def test_a_difference_exits_three_is_owed_again_and_settled(commands: Commands, filled: Small) -> None:
    rollout = on(commands, filled)
    with filled.database.connect(Role.ROLLOUT, autocommit=True) as connection:
        connection.execute("UPDATE document_chunks SET content = content || '?' WHERE document_id = 1 AND ordinal = 0")
    found = rollout("verify", "--json", code=3)
    assert (found.json["differences"], found.json["by_kind"]) == (1, {"content_drift": 1})
    assert "verify" in found.err
    assert "content_drift" in rollout("verify", "--repair", code=3).out
    mended = rollout("verify", "--repair", "--execute", "--json", code=3).json["repair"]
    assert (mended["executed"], [act["document_id"] for act in mended["acts"]]) == (True, [1])
    assert rollout("settle", "--json").json["owed"][0]["store"] == "pgvector"
    assert rollout("settle", "--execute", "--json").json["done"] == 1
    assert rollout("verify", "--json").json["differences"] == 0


def test_the_quarantine_is_decided_by_a_file_that_the_list_wrote(commands: Commands, filled: Small) -> None:
    rollout = on(commands, filled)
    listed = rollout("quarantine", "list", "--csv", "decide.csv", "--json").json
    assert listed["chunks"] == filled.quarantined
    rollout("quarantine", "list", "--csv", "decide.csv", code=2)
    first, second = listed["groups"]
    written = (filled.folder / "decide.csv").read_text(encoding="utf-8")
    document = first["candidates"][0]["document_id"]
    lines = [
        line.replace(f"{first['name']},,", f"{first['name']},assign,{document}").replace(
            f"{second['name']},,", f"{second['name']},discard,"
        )
        for line in written.splitlines(keepends=True)
    ]
    (filled.folder / "decide.csv").write_text("".join(lines), encoding="utf-8")
    given = ("quarantine", "assign", "--csv", "decide.csv")
    assert "reason" in rollout(*given, "--execute", "--json", code=2).json["error"]
    done = rollout(*given, "--reason", "nobody knows", "--execute", "--json").json
    assert (done["assigned"], done["discarded"], done["documents"]) == (first["chunks"], second["chunks"], [document])
    assert rollout("quarantine", "list", "--json").json["groups"] == []
    assert rollout("backfill", "--execute", "--json").json["documents"] == 1
    assert rollout("verify", "--json").json["differences"] == 0
    again = rollout("quarantine", "discard", first["name"], "--reason", "no", "--execute", "--json", code=3).json
    assert "assigned already" in again["error"]


def test_the_list_as_a_file_on_stdout_is_nothing_but_the_file(commands: Commands, filled: Small) -> None:
    out = on(commands, filled)("quarantine", "list", "--csv", "-").out
    assert out.splitlines()[0].startswith("group,action,document_id,")
    assert len(out.splitlines()) == 3


def test_a_process_that_is_gone_is_forgotten_and_one_that_is_alive_is_not(commands: Commands, filled: Small) -> None:
    rollout = on(commands, filled)
    with filled.database.connect(autocommit=True) as connection:
        connection.execute(
            "INSERT INTO rollout_instances (instance, host, pid, transition_id, seen_at) VALUES"
            " ('aaaaaaaa-0000-4000-8000-000000000001', 'stuck.example', 7, 1, now() - interval '30 seconds'),"
            " ('aaaaaaaa-0000-4000-8000-000000000002', 'alive.example', 8, 1, now())"
        )
    states = {each["host"]: each["state"] for each in rollout("instances", "list", "--json").json["instances"]}
    assert states == {"stuck.example": "late", "alive.example": "late"}
    assert "names 2 processes" in rollout("instances", "forget", "aaaa", "--execute", "--json", code=2).json["error"]
    alive = rollout("instances", "forget", "aaaaaaaa-0000-4000-8000-000000000002", "--execute", "--json", code=3).json
    assert "alive" in alive["error"]
    assert "process 7 on stuck.example" in rollout("instances", "forget", "aaaaaaaa-0000-4000-8000-000000000001").out
    rollout("instances", "forget", "aaaaaaaa-0000-4000-8000-000000000001", "--execute")
    left = rollout("instances", "list", "--json").json["instances"]
    assert [each["host"] for each in left] == ["alive.example"]


def test_diffs_are_counted_by_cause_and_the_newest_are_listed(commands: Commands, filled: Small) -> None:
    stage(filled, (Stage.SHADOW, 0))
    with filled.database.connect(Role.ROLLOUT, autocommit=True) as connection:
        connection.execute("DELETE FROM document_chunks WHERE document_id = 2")
        connection.execute("UPDATE vector_ledger SET changed_at = now() - interval '1 hour'")
    with router_on(filled.database, filled.folder) as router:
        router.shadow.start()
        for document, user in ((2, filled.installation.users["ben"]), (1, filled.installation.users["ada"])):
            chunk = router.stores.faiss.document(document)[0]
            router.search(user, chunk.vector, 3)
    rollout = on(commands, filled)
    found = rollout("diffs", "--json").json
    assert (found["comparisons"], found["causes"]) == (2, {"match": 1, "missing_in_pgvector": 1})
    assert [row["cause"] for row in found["rows"]] == ["missing_in_pgvector"]
    assert (found["rows"][0]["shadow"], len(found["rows"][0]["served"])) == ([], 3)
    assert [row["cause"] for row in rollout("diffs", "--cause", "match", "--json").json["rows"]] == ["match"]
    assert rollout("diffs", "--transition", "1", "--json").json["comparisons"] == 0
    assert "missing_in_pgvector" in rollout("diffs", "--limit", "1").out


# -- the end


@pytest.fixture
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a file that goes and the line that changes."""
    place = tmp_path_factory.mktemp("tree")
    (place / "rollout").mkdir()
    (place / "rollout" / "cli.py").write_text("faiss\n")
    (place / SEAM).parent.mkdir(parents=True)
    (place / SEAM).write_bytes(ROUTED)
    (place / SEAM).with_name("documents.py").touch()
    (place / "requirements.lock").touch()
    (place / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    for arguments in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message", "all")):
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        subprocess.run(["git", "-C", place, *identity, *arguments], check=True)
    return place


def test_faiss_is_archived_and_removed_through_the_last_gate_only(
    commands: Commands, filled: Small, tree: Path
) -> None:
    rollout = on(commands, filled)
    shown = rollout("remove-faiss", "--tree", str(tree), "--json").json
    assert (shown["executed"], shown["difference"][-1]) == (False, "deleted: rollout/cli.py")
    remove = ("remove-faiss", "--tree", str(tree), "--execute", "--json")
    assert "stage is dualwrite" in rollout(*remove, code=5).json["error"]
    stage(filled, (Stage.COMPLETE, 100))
    with router_on(filled.database, filled.folder) as router:
        router.refresh()
        assert "written in this stage" in rollout(*remove, code=4).json["error"]
        rollout("archive", "faiss.tar", "--execute")
        restored = rollout("archive", "faiss.tar", "--restore", "restored", "--execute", "--json").json
        assert (restored["differences"], restored["recorded"]) == (0, True)
        told = rollout("check", "--json", code=4).json
        lacking = [each["name"] for each in told["criteria"] if each["verdict"] != "pass"]
        assert (told["to"], lacking) == ("removal", ["soak"]), "all but a week"
        assert "remove-faiss" in rollout("advance", "--json", code=3).json["error"]
        assert (tree / "rollout" / "cli.py").exists()
        rollout(*remove, "--override", "soak=the test has no week")
    assert not (tree / "rollout").exists()
    assert (tree / SEAM).read_bytes() == ALONE
    assert "does not import the router" in rollout("remove-faiss", "--tree", str(tree), "--json", code=3).json["error"]


# -- whose chunks


def test_the_report_before_anything_is_installed_only_reads_two_files_and_a_directory(
    commands: Commands, postgres: Any, tmp_path: Path
) -> None:
    installation = small.made_installation(postgres, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    on_disk = files(tmp_path)
    ended = commands(tmp_path, {}, "assign-owners", "--from-sqlite", "sqlite:///victus.db", "--json")
    found = ended.json
    assert (found["assigned"], found["executed"], found["assignment"]) == (len(installation.expected), False, None)
    kept = {user["username"]: user["kept"] for user in found["users"]}
    assert kept["dan"] == kept["cleo"] == 0
    assert kept["ada"] + kept["ben"] == found["assigned"]
    assert files(tmp_path) == on_disk
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_same_report_where_the_old_release_runs_on_postgresql(commands: Commands, installed: Small) -> None:
    on_disk, before = files(installed.folder), contents(installed.database)
    given = ("assign-owners", "--from-postgres", installed.database.url(Role.APP), "--json")
    found = commands(installed.folder, {}, *given).json
    assert (found["assigned"], found["quarantined"]) == (
        len(installed.installation.expected), installed.quarantined,
    )  # fmt: skip
    assert (files(installed.folder), contents(installed.database)) == (on_disk, before)
    for url, code in (("nonsense", 2), ("postgresql:///x?host=/nonexistent", 5)):
        assert commands(installed.folder, {}, "assign-owners", "--from-postgres", url).code == code


def test_a_document_whose_file_is_gone_is_accepted_by_number_or_nothing_is_assigned(
    commands: Commands, installed: Small
) -> None:
    (installed.folder / "uploads" / "heaps.docx").unlink()
    rollout, before = on(commands, installed), contents(installed.database)
    assert "documents whose file is gone (1)" in rollout("assign-owners").out
    refused = rollout("assign-owners", "--execute", "--json", code=5).json["error"]
    assert "first document 1 of user 1: uploads/heaps.docx" in refused
    assert "--accept-missing-files 1" in refused
    rollout("assign-owners", "--execute", "--accept-missing-files", "2", code=5)
    assert contents(installed.database) == before
    accepted = rollout("assign-owners", "--execute", "--accept-missing-files", "1", "--json").json
    assert accepted["assigned"] == len(installed.installation.expected)


def test_an_assignment_asks_for_the_rows_that_could_not_be_moved(commands: Commands, installed: Small) -> None:
    (installed.folder / "victus.db").rename(installed.folder / "old.db")
    rollout, before = on(commands, installed), contents(installed.database)
    assert "--imported-from" in rollout("assign-owners", "--execute", "--json", code=2).json["error"]
    rollout("assign-owners", "--execute", "--imported-from", "sqlite:///gone.db", code=5)
    assert contents(installed.database) == before
    rollout("assign-owners", "--execute", "--imported-from", "sqlite:///old.db")
    rollout("assign-owners", "--execute", "--imported-from", "none")


# -- help, and the script that pip installs


def test_every_command_explains_itself(commands: Commands, tmp_path: Path) -> None:
    ended = commands(tmp_path, {}, "--help")
    assert ended.code == 0
    assert "Exit codes" in ended.out
    for command in COMMANDS:
        assert command.split()[0] in ended.out
        told = commands(tmp_path, {}, *command.split(), "--help")
        assert (told.code, told.err) == (0, "")
        assert len(told.out.split()) > 30, command


def test_help_loads_neither_the_stores_nor_a_database() -> None:
    heavy = ("faiss", "langchain_core", "langchain_community", "sqlalchemy", "psycopg", "numpy", "src")
    code = f"import sys, rollout.cli; print([name for name in {heavy!r} if name in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=base_environment(), capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_the_installed_script_runs_on_a_server_that_starts_by_itself_and_is_gone_afterwards(
    server_folder: Path, tmp_path: Path
) -> None:
    script = Path(sys.executable).with_name("rollout")
    if not script.exists():
        pytest.skip("the project is not installed here")
    environment = {**base_environment(), "DATABASE_URL": f"embedded:{server_folder}"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    ended = run(str(script), "status", "--json")
    assert ended.returncode == 5
    assert "alembic upgrade head" in json.loads(ended.stdout)["error"]
    upgraded = run(sys.executable, "-m", "alembic", "-c", str(ROOT / "alembic.ini"), "upgrade", "head")
    assert upgraded.returncode == 0, upgraded.stderr
    ended = run(str(script), "status", "--json")
    assert (ended.returncode, json.loads(ended.stdout)["stage"]) == (0, "off")
    assert not (server_folder / "pgdata" / "postmaster.pid").exists()
