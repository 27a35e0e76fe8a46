"""The page: a report as one HTML text that needs nothing else. Pure.

What people and files have named is escaped twice over: characters that do not print are spelled out, then the
template escapes all text. The content policy lets only this page's own style and script run, so that markup which
slipped through would be dead.
"""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from rollout.gates import Criterion, Verdict
from rollout.output import printable
from rollout.report import charts, panels
from rollout.report.alarms import Level, alarms
from rollout.report.data import SPANS, Report
from rollout.report.scales import moment, short_number
from src.tools.rag_tools.migration.stages import ORDER, parse_stage
from src.tools.rag_tools.migration.transitions import ramps

FOLDER = Path(__file__).parent
COMMAND = re.compile(r"`([^`]+)`")
BADGES = {
    Verdict.PASS: ("good", "pass"),
    Verdict.FAIL: ("bad", "fail"),
    Verdict.INCONCLUSIVE: ("warn", "not yet"),
    Verdict.OVERRIDDEN: ("warn", "overridden"),
}
SYMBOLS = {"good": "✓", "bad": "✕", "warn": "!", "note": "i"}


def render(report: Report, *, refresh_seconds: int | None = None) -> str:
    """The page; with `refresh_seconds` it asks the address it came from for a newer one."""
    return _template("page.html.j2").render(
        report=report,
        status=report.status,
        refresh_seconds=refresh_seconds,
        alarms=alarms(report),
        stages=ORDER,
        spans=SPANS,
        evidence=panels.evidence(report),
        reads=panels.reads(report),
        totals=panels.totals(report),
        **_parts(script=refresh_seconds is not None),
    )


def render_failure(reason: str, *, refresh_seconds: int) -> str:
    """What is shown where nothing could be collected."""
    return _template("failure.html.j2").render(reason=reason, refresh_seconds=refresh_seconds, **_parts(script=True))


def policy(*, script: bool) -> str:
    """The Content-Security-Policy that fits a page; the page names it itself, for it may lie in a file."""
    allowed = [f"style-src '{_hash(_text('page.css'))}'", "img-src data:"]
    if script:
        allowed += [f"script-src '{_hash(_text('refresh.js'))}'", "connect-src 'self'"]
    return "; ".join(["default-src 'none'", *allowed, "base-uri 'none'", "form-action 'none'"])


def _parts(*, script: bool) -> dict[str, Any]:
    return {
        "policy": policy(script=script),
        "style": Markup(_text("page.css")),  # noqa: S704 - a file of this package
        "script": Markup(_text("refresh.js")) if script else "",  # noqa: S704 - likewise
    }


@cache
def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "moment": moment,
        "iso": lambda at: at.isoformat(timespec="seconds"),
        "said": _said,
        "number": lambda value: f"{value:,}",
        "short": short_number,
        "since": _since,
        "similarity": lambda value: "-" if value is None else f"{value:.4f}",
        "dash": lambda value: "-" if value is None else value,
    }
    environment.globals |= {
        "badge": _badge,
        "verdict": _verdict,
        "swatch": charts.swatch,
        "level": _level,
        "ramps": _ramps,
    }
    return environment.get_template(name)


def _said(text: object) -> Markup:
    """What somebody wrote, with commands in backticks set as code."""
    escaped = str(escape(printable(str(text))))
    return Markup(COMMAND.sub(r"<code>\1</code>", escaped))  # noqa: S704 - escaped in the line before


def _since(seconds: float) -> str:
    """A length of time in its two greatest units."""
    whole = timedelta(seconds=round(seconds))
    hours, rest = divmod(whole.seconds, 3600)
    parts = [(whole.days, "d"), (hours, "h"), (rest // 60, "min"), (rest % 60, "s")]
    first = next((place for place, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count) or "0 s"


def _badge(kind: str, words: str) -> Markup:
    """A state in colour, symbol and words: none of them alone."""
    return Markup('<span class="badge {}"><span aria-hidden="true">{}</span> {}</span>').format(
        kind, SYMBOLS[kind], words
    )


def _verdict(criterion: Criterion) -> Markup:
    return _badge(*BADGES[Verdict(criterion.verdict)])


def _ramps(stage: str) -> bool:
    """Whether its percent says something."""
    return ramps(parse_stage(stage))


def _level(level: Level) -> Markup:
    words = {Level.BAD: "act now", Level.WARN: "look", Level.NOTE: "note"}
    return _badge(level.value, words[level])
