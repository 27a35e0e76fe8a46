"""What other people's tools ask of the backend exists: metrics, labels and their values, alerts, sections, queries."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from src.api import metrics as service_metrics
from src.tools.rag_tools.migration import metrics as migration_metrics
from src.tools.rag_tools.migration.causes import Cause
from src.tools.rag_tools.migration.guard import Window
from src.tools.rag_tools.migration.stages import Stage, Store
from tests.support import promql

pytestmark = pytest.mark.migration

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))
TESTS = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))
GRAFANA = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
GUIDE = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
RECORDED = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}

# What Prometheus itself adds to every series, and the labels that it has.
OF_PROMETHEUS = {"up": set[str]()}
ADDED = {"job", "instance"}
VALUES = {
    "store": {*Store, "+".join(Store)},
    "stage": {*Stage},
    "cause": {*Cause},
    "outcome": {"ok", "error", "timeout"},
    "criterion": {field.name for field in fields(Window)},
}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def wrapped(module: Any) -> Iterator[MetricWrapperBase]:
    return (each for each in vars(module).values() if isinstance(each, Counter | Gauge | Histogram))


def exposed() -> dict[str, set[str]]:
    """Every series that Prometheus gets from us, by its full name, with its labels."""
    found = {**OF_PROMETHEUS}
    for metric in [*wrapped(service_metrics), *wrapped(migration_metrics)]:
        labels = set(metric._labelnames)
        family = next(iter(metric.describe()))
        match metric:
            case Counter():
                found[f"{family.name}_total"] = labels
            case Histogram():
                found |= {f"{family.name}_bucket": labels | {"le"}}
                found |= {f"{family.name}_{part}": labels for part in ("count", "sum")}
            case _:
                found[family.name] = labels
    return found


def of_the_rules() -> dict[str, str]:
    return {rule.get("alert") or rule["record"]: rule["expr"] for group in RULES["groups"] for rule in group["rules"]}


def of_the_dashboard() -> dict[str, str]:
    panels = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in GRAFANA["panels"]
        for target in panel.get("targets", [])
    }
    notes = {each["name"]: each["expr"] for each in GRAFANA["annotations"]["list"]}
    return {
        name: expr.replace("$__rate_interval", "5m").replace("$job", ".+") for name, expr in (panels | notes).items()
    }


EXPRESSIONS = of_the_rules() | of_the_dashboard()


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_query_asks_for_what_exists(name: str) -> None:
    expression, known = EXPRESSIONS[name], exposed()
    named = promql.metrics(expression)
    assert named or expression == "vector(0.99)"
    assert named <= known.keys() | RECORDED
    labels = ADDED.union(*(known.get(metric, {"store", "job"}) for metric in named))
    assert promql.grouped(expression) <= labels
    for matcher in promql.matchers(expression):
        assert matcher.label in ADDED | known.get(matcher.metric, {"store", "job"}), matcher
        assert set(matcher.values) <= VALUES.get(matcher.label, set(matcher.values)), matcher


def test_the_routes_that_a_query_names_are_routes_of_the_service() -> None:
    from src.api import documents

    routes = {route.path for route in documents.router.routes}  # type: ignore[attr-defined]
    named = {
        value
        for expression in EXPRESSIONS.values()
        for matcher in promql.matchers(expression)
        if matcher.label == "route"
        for value in matcher.values
    }
    assert named
    assert named <= routes


def test_a_query_for_something_else_would_be_noticed() -> None:
    expression = 'sum by (job, colour) (rate(rag_readz_total{stores="faiss"}[5m] offset 1h)) and on (job) up == 1'
    assert promql.metrics(expression) == {"rag_readz_total", "up"}
    assert promql.grouped(expression) == {"job", "colour"}
    assert [(each.metric, each.label, each.values) for each in promql.matchers(expression)] == [
        ("rag_readz_total", "stores", ["faiss"])
    ]


@needs_promtool
def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("check", "config", "--syntax-only", "prometheus.yml")


@needs_promtool
def test_promtool_accepts_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": expr} for number, expr in enumerate(of_the_dashboard().values())]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", str(file))


@needs_promtool
def test_the_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", "alerts_test.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not(alert: str) -> None:
    asked = [each for test in TESTS["tests"] for each in test["alert_rule_test"] if each["alertname"] == alert]
    assert any(each["exp_alerts"] for each in asked)
    assert any(not each["exp_alerts"] for each in asked)


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_says_how_urgent_it_is_and_where_the_runbook_goes_on(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("page", "ticket")
    file, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor in anchors(ROOT / file), rule["annotations"]["runbook"]


def test_the_guide_lists_the_alerts_with_their_urgency_and_their_section() -> None:
    listed = {name: (urgency, link) for name, urgency, link in re.findall(
        r"^\| `(Rollout\w+)` \| (\w+) \| .* \| \[.*\]\(\.\./(\S+)\) \|$", GUIDE, re.MULTILINE
    )}  # fmt: skip
    assert listed == {
        name: (rule["labels"]["severity"], rule["annotations"]["runbook"]) for name, rule in ALERTS.items()
    }


def test_the_runbook_begins_with_the_alert_and_leads_to_the_same_section() -> None:
    page = (ROOT / "RUNBOOK.md").read_text(encoding="utf-8")
    table = page.partition("## What now?")[2].partition("\n## ")[0]
    led = {
        name: f"RUNBOOK.md#{anchor}"
        for row, anchor in re.findall(r"^\| (.*) \| \[.*\]\(#(\S+)\) \|$", table, re.MULTILINE)
        for name in re.findall(r"`(Rollout\w+)`", row)
    }
    assert led == {name: rule["annotations"]["runbook"] for name, rule in ALERTS.items()}


def test_the_guide_lists_the_metrics_with_their_labels() -> None:
    listed = {
        name: set(re.findall(r"`(\w+)`", labels))
        for name, labels in re.findall(r"^\| `(rag_\w+)` \|([^|]*)\|", GUIDE, re.MULTILINE)
    }
    made = {
        name: labels - {"le"}
        for name, labels in exposed().items()
        if name.startswith("rag_") and not name.endswith(("_count", "_sum"))
    }
    assert listed == made


def test_the_dashboard_has_no_two_panels_in_one_place() -> None:
    places = [panel["gridPos"] for panel in GRAFANA["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in GRAFANA["panels"]}) == len(places)


def anchors(file: Path) -> set[str]:
    """The anchors that a Markdown file's headings get on the usual hosts."""
    headings = re.findall(r"^#{1,6} +(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def promtool(*arguments: str) -> None:
    ended = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_of_a_worker_that_is_behind_both_transitions_are_told() -> None:
    migration_metrics.show_stage(Stage.LIVE, 10, acts_on=4, newest=5, halted=False)
    told = {name: REGISTRY.get_sample_value(name) for name in ("rag_transition", "rag_newest_transition")}
    assert told == {"rag_transition": 4, "rag_newest_transition": 5}
