"""docker-compose.yml against the code: paths, ports, names, variables, roles, commands. Needs no container engine."""

from __future__ import annotations

import configparser
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import typer
import yaml  # type: ignore[import-untyped]
from psycopg.conninfo import conninfo_to_dict

from rollout.cli import app
from rollout.report.server import TOKEN_LENGTH
from src.config import Settings
from src.database import Role
from src.tools.rag_tools.migration.settings import MigrationSettings

pytestmark = pytest.mark.migration

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "backend" / "Dockerfile").read_text(encoding="utf-8")
SOURCES = "\n".join(
    path.read_text(encoding="utf-8") for folder in ("backend/src", "rollout") for path in (ROOT / folder).rglob("*.py")
)
GIVEN = {
    "POSTGRES_PASSWORD": "p0", "VICTUS_OWNER_PASSWORD": "p1", "VICTUS_APP_PASSWORD": "p2",
    "VICTUS_ROLLOUT_PASSWORD": "p3", "SECRET_KEY": "s" * 64, "GRAFANA_ADMIN_PASSWORD": "p4",
}  # fmt: skip
VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:-|:\?)([^}]*))?\})")


class MissingVariableError(Exception):
    """A variable that has no default."""


def interpolated(text: str, given: dict[str, str]) -> str:
    """`text` as Compose reads it: ${NAME:-default}, ${NAME:?message}, and $$ for a dollar sign."""

    def value(found: re.Match[str]) -> str:
        dollar, name, operator, argument = found.groups()
        if dollar:
            return "$"
        if given.get(name):
            return given[name]
        if operator == ":?":
            raise MissingVariableError(argument)
        return argument or ""

    return VARIABLE.sub(value, text)


def uncommented(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


COMPOSE: dict[str, Any] = yaml.safe_load(interpolated(uncommented(TEXT), GIVEN))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
WORKDIR = PurePosixPath(re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)[-1])


def mounts(service: str) -> dict[str, str]:
    """What lies where: target to source."""
    pairs = [each.removesuffix(":ro").rsplit(":", 1) for each in SERVICES[service].get("volumes", [])]
    return {target: source for source, target in pairs}


def published(service: str) -> list[tuple[str, int, int]]:
    """Address and port outside, port inside."""
    parts = [each.split(":") for each in SERVICES[service].get("ports", [])]
    return [(address, int(outside), int(inside)) for address, outside, inside in parts]


def urls() -> Iterator[tuple[str, str, str]]:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if str(value).startswith("postgresql://"):
                yield name, variable, value


# -- what is started


def test_all_parts_are_there() -> None:
    assert set(SERVICES) == {
        "postgres", "pgbouncer", "schema", "backend", "rollout", "dashboard", "prometheus", "grafana",
    }  # fmt: skip


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_is_built_here_or_pinned_to_a_version(name: str) -> None:
    service = SERVICES[name]
    if name in OURS:
        assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        return
    repository, _, tag = service["image"].rpartition(":")
    assert re.search(r"\d+\.\d+", tag), service["image"]
    assert re.fullmatch(r"[a-z0-9-]+/[a-z0-9-]+", repository), "a public image, and no registry's host"


@pytest.mark.parametrize("name", OURS)
def test_our_own_run_without_rights(name: str) -> None:
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert users[-1] not in ("root", "0")
    service = SERVICES[name]
    assert "user" not in service
    assert "privileged" not in service
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])


def test_only_this_machine_reaches_a_port_and_no_two_ask_for_the_same() -> None:
    ports = [each for name in SERVICES for each in published(name)]
    assert {address for address, _, _ in ports} == {"127.0.0.1"}
    assert len({outside for _, outside, _ in ports}) == len(ports)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_services_that_can_say_when_they_are_ready(name: str) -> None:
    waits = SERVICES[name].get("depends_on", {})
    for other in waits:
        condition = waits[other]["condition"] if isinstance(waits, dict) else "service_started"
        match condition:
            case "service_healthy":
                assert "healthcheck" in SERVICES[other]
            case "service_completed_successfully":
                assert "restart" not in SERVICES[other]
            case _:
                assert other in SERVICES


def test_what_runs_for_good_comes_back_after_a_restart_and_what_runs_once_does_not() -> None:
    assert {name for name in SERVICES if "restart" not in SERVICES[name]} == {"schema", "rollout"}
    assert SERVICES["rollout"]["profiles"] == ["rollout"]


# -- what must last


def test_every_volume_is_declared_and_used() -> None:
    sources = {source for name in SERVICES for source in mounts(name).values()}
    assert {source for source in sources if "/" not in source} == set(COMPOSE["volumes"])


@pytest.mark.parametrize("name", SERVICES)
def test_every_folder_that_is_mounted_exists(name: str) -> None:
    for source in mounts(name).values():
        if source.startswith("."):
            assert (ROOT / source).is_dir(), source


@pytest.mark.parametrize("name", ["backend", "rollout", "dashboard"])
def test_uploads_and_index_lie_on_a_volume_that_all_of_ours_share(name: str) -> None:
    environment = SERVICES[name]["environment"]
    for setting, default in (
        ("UPLOAD_DIR", Settings.model_fields["UPLOAD_DIR"].default),
        ("FAISS_INDEX_PATH", MigrationSettings.model_fields["FAISS_INDEX_PATH"].default),
    ):
        path = WORKDIR / environment.get(setting, str(default))
        assert any(path.is_relative_to(target) for target in mounts(name)), path
    assert mounts(name) == mounts("backend")
    # The directory of an index belongs to one host, and containers are told apart by their name.
    assert SERVICES[name]["hostname"] == SERVICES["backend"]["hostname"]


def test_an_existing_installation_can_take_the_place_of_the_volume() -> None:
    made = yaml.safe_load(interpolated(uncommented(TEXT), {**GIVEN, "VICTUS_DATA": "/srv/victus"}))
    assert made["services"]["backend"]["volumes"] == [f"/srv/victus:{WORKDIR}"]


# -- variables


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_that_the_code_reads(name: str) -> None:
    settings = {*Settings.model_fields, *MigrationSettings.model_fields}
    for variable in SERVICES[name].get("environment", {}):
        assert variable in settings or f'"{variable}"' in SOURCES, variable


def test_every_variable_that_compose_asks_for_is_explained_in_the_example() -> None:
    documented = set(re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=", EXAMPLE, re.MULTILINE))
    named = {name for _, name, _, _ in VARIABLE.findall(uncommented(TEXT)) if name}
    passed_on = {
        variable for service in SERVICES.values() for variable, value in service.get("environment", {}).items()
        if value is None
    }  # fmt: skip
    secrets = {secret["environment"] for secret in COMPOSE["secrets"].values()}
    assert named | passed_on | secrets <= documented


@pytest.mark.parametrize("variable", GIVEN)
def test_nothing_starts_without_its_secret(variable: str) -> None:
    with pytest.raises(MissingVariableError, match=f"set {variable}"):
        interpolated(uncommented(TEXT), {**GIVEN, variable: ""})


def test_no_secret_stands_in_the_file() -> None:
    for line in uncommented(TEXT).splitlines():
        # `environment: NAME` says where a secret comes from.
        if re.search(r"password|secret|token|key", line, re.IGNORECASE) and "environment:" not in line:
            value = line.partition(":")[2].strip()
            assert not re.fullmatch(r"[\"']?[A-Za-z0-9+/=_-]{16,}[\"']?", value), line


@pytest.mark.parametrize(("name", "variable", "url"), list(urls()))
def test_every_database_url_names_the_role_the_service_and_the_port_that_exist(
    name: str, variable: str, url: str
) -> None:
    role, host = {
        "DATABASE_URL": (Role.APP, "pgbouncer"),
        "DATABASE_ROLLOUT_URL": (Role.ROLLOUT, "postgres"),
        "DATABASE_ADMIN_URL": (Role.OWNER, "postgres"),
    }[variable]
    found = conninfo_to_dict(url)
    assert (found["user"], found["host"]) == (role, host)
    assert found["dbname"] == SERVICES["postgres"]["environment"]["POSTGRES_DB"]
    assert found["port"] == {"pgbouncer": pgbouncer()["pgbouncer"]["listen_port"], "postgres": "5432"}[host]
    assert host in SERVICES[name]["depends_on"] or "pgbouncer" in SERVICES[name]["depends_on"]


def test_the_backend_holds_no_credential_that_passes_row_level_security() -> None:
    environment = json.dumps(SERVICES["backend"]["environment"])
    assert GIVEN["VICTUS_ROLLOUT_PASSWORD"] not in environment
    assert GIVEN["VICTUS_OWNER_PASSWORD"] not in environment


# -- PostgreSQL and PgBouncer


def pgbouncer() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read_string(COMPOSE["configs"]["pgbouncer"]["content"])
    return parser


def test_pgbouncer_pools_transactions_and_lets_in_the_backend_alone() -> None:
    configuration = pgbouncer()
    assert configuration["pgbouncer"]["pool_mode"] == "transaction"
    assert configuration["databases"] == {"victus": "host=postgres port=5432 dbname=victus"}
    assert COMPOSE["configs"]["pgbouncer_users"]["content"].split() == [
        f'"{Role.APP}"', f'"{GIVEN["VICTUS_APP_PASSWORD"]}"',
    ]  # fmt: skip
    targets = {each["target"] for each in SERVICES["pgbouncer"]["configs"]}
    assert configuration["pgbouncer"]["auth_file"] in targets
    assert "/etc/pgbouncer/pgbouncer.ini" in targets


def test_what_goes_through_pgbouncer_prepares_no_statements() -> None:
    for name, _, url in urls():
        if "@pgbouncer:" in url:
            assert SERVICES[name]["environment"]["DATABASE_PREPARE"] == "false"


def test_the_roles_are_made_with_the_rights_that_the_code_wants() -> None:
    script = COMPOSE["configs"]["roles"]["content"]
    made = dict(re.findall(r"^\s*CREATE ROLE (\w+) LOGIN( BYPASSRLS)?", script, re.MULTILINE))
    assert made == {Role.OWNER: "", Role.APP: "", Role.ROLLOUT: " BYPASSRLS"}
    assert f"ALTER DATABASE victus OWNER TO {Role.OWNER};" in script
    passed = {name for name in SERVICES["postgres"]["environment"] if name.startswith("VICTUS_")}
    assert set(re.findall(r"\$(VICTUS_\w+)", script)) == passed


# -- commands, ports and health


def test_the_schema_is_brought_up_by_alembic_with_the_file_of_the_image() -> None:
    service = SERVICES["schema"]
    assert service["command"] == ["alembic", "upgrade", "head"]
    copied = dict(re.findall(r"^COPY --from=packages (\S+) (\S+)$", DOCKERFILE, re.MULTILINE)).values()
    for name in ("schema", "rollout", "dashboard"):
        assert SERVICES[name]["environment"]["ALEMBIC_CONFIG"] in copied


@pytest.mark.parametrize("name", ["rollout", "dashboard"])
def test_the_commands_exist_with_their_options(name: str) -> None:
    service = SERVICES[name]
    assert service["entrypoint"] == ["rollout"]
    command, *arguments = service["command"]
    group: Any = typer.main.get_command(app)
    group.commands[command].make_context(command, arguments)


def test_the_dashboard_listens_where_it_is_published_behind_a_token_that_is_mounted() -> None:
    service = SERVICES["dashboard"]
    options = dict(zip(service["command"][1::2], service["command"][2::2], strict=True))
    ((_, _, inside),) = published("dashboard")
    assert options["--port"] == str(inside)
    assert PurePosixPath(options["--token-file"]) == PurePosixPath("/run/secrets") / service["secrets"][0]
    assert service["secrets"][0] in COMPOSE["secrets"]
    assert f"{TOKEN_LENGTH} characters" in EXAMPLE


@pytest.mark.parametrize(("name", "path"), [("backend", "/readyz"), ("dashboard", "/healthz")])
def test_health_is_asked_at_a_path_and_a_port_that_answer(name: str, path: str) -> None:
    (url,) = re.findall(r"urlopen\('([^']+)'\)", SERVICES[name]["healthcheck"]["test"][-1])
    ((_, _, inside),) = published(name)
    assert url == f"http://127.0.0.1:{inside}{path}"
    assert path in routes(name)


def test_the_image_serves_on_the_port_that_is_published() -> None:
    (command,) = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    words = json.loads(command)
    ((_, _, inside),) = published("backend")
    assert words[words.index("--port") + 1] == str(inside)
    assert words[:3] == ["python", "-m", "src.serve"]
    assert re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE) == [str(inside)]


# -- Prometheus and Grafana


def test_prometheus_reads_its_configuration_from_the_mounted_folder_and_asks_the_backend() -> None:
    options = dict(each.removeprefix("--").split("=", 1) for each in SERVICES["prometheus"]["command"])
    folder = ROOT / mounts("prometheus")["/etc/prometheus"]
    configuration = yaml.safe_load((folder / PurePosixPath(options["config.file"]).name).read_text())
    assert options["storage.tsdb.path"] in mounts("prometheus")
    (rules,) = configuration["rule_files"]
    assert [path.name for path in folder.glob(PurePosixPath(rules).name)] == ["alerts.yml"]
    (job,) = configuration["scrape_configs"]
    ((target,),) = [each["targets"] for each in job["static_configs"]]
    ((_, _, inside),) = published("backend")
    assert target == f"backend:{inside}"
    assert job["metrics_path"] in routes("backend")
    assert f'job="{job["job_name"]}"' in (folder / "alerts.yml").read_text()


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    provisioning = ROOT / mounts("grafana")["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    ((_, _, inside),) = published("prometheus")
    assert source["url"] == f"http://prometheus:{inside}"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "files.yml").read_text())["providers"]
    folder = ROOT / mounts("grafana")[provider["options"]["path"]]
    assert [path.name for path in folder.rglob("*.json")] == ["dashboard.json"]


def routes(name: str) -> set[str]:
    match name:
        case "backend":
            from src.api import health, metrics

            found = [*health.router.routes, *metrics.router.routes]
        case "dashboard":
            from rollout.report.server import application

            found = application(None, None).routes  # type: ignore[arg-type]  # only its routes are asked for
        case _:
            raise LookupError(name)
    return {route.path for route in found}  # type: ignore[attr-defined]


def test_the_lines_about_the_migration_can_be_taken_out() -> None:
    kept, inside = [], False
    for line in TEXT.splitlines():
        match line.strip():
            case "# migration":
                assert not inside
                inside = True
            case "# end of migration":
                assert inside
                inside = False
            case _:
                kept += [] if inside else [line]
    assert not inside
    left = "\n".join(kept)
    made = yaml.safe_load(interpolated(uncommented(left), {**GIVEN, "VICTUS_ROLLOUT_PASSWORD": "p3"}))
    assert set(made["services"]) == {"postgres", "pgbouncer", "schema", "backend", "prometheus", "grafana"}
    assert "SHADOW" not in json.dumps(made)
