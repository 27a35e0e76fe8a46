"""The dashboard and the report in a real browser, on an empty, a healthy and a poisoned rollout.

With VICTUS_SCREENSHOTS=1 the pictures of docs/images are made anew; otherwise nothing is written there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rollout.control import Control
from rollout.profiles import PRODUCTION
from rollout.report import collect, render
from src.tools.rag_tools.migration.shadow import fingerprint
from tests.support import rollouts
from tests.support.control import control_on
from tests.support.rollouts import HOSTILE, difference

pytest.importorskip("playwright")
from tests.support import browser as browsers
from tests.support.browser import CHROMIUM, Clock, Seen, keep_screenshot, opened

pytestmark = [
    pytest.mark.migration,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
SCREENSHOTS = bool(os.environ.get("VICTUS_SCREENSHOTS"))
LOOKS = [(width, scheme) for width in (360, 1280) for scheme in ("light", "dark")]
PICTURES = {
    ("empty", 1280, "light"): 900, ("healthy", 1280, "light"): 2100, ("healthy", 360, "dark"): 1100,
    ("poisoned", 1280, "dark"): 2100, ("poisoned", 360, "light"): 1100,
}  # fmt: skip

# WCAG 2.2, 1.4.3 and 1.4.11: the contrast of each element with what lies behind it.
CONTRASTS = """
(selectors) => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const found = parse(getComputedStyle(each).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    throw new Error("no background");
  };
  const found = {};
  for (const [selector, property] of selectors) {
    for (const element of document.querySelectorAll(selector)) {
      const colour = getComputedStyle(element)[property];
      const [a, b] = [luminance(parse(colour)), luminance(behind(element))].sort((x, y) => y - x);
      found[selector] = Math.min(found[selector] ?? 99, (a + 0.05) / (b + 0.05));
    }
  }
  return found;
}
"""
TEXTS = [
    (selector, "color")
    for selector in (
        "body", "p", ".quiet", "a", "th", "td", "caption", ".badge", "summary", "code", "dt", "dd", ".legend li",
        ".alarms li", ".cause", ".other", ".question", ".spans a", ".rail li",
    )
] + [("svg text", "fill")]  # fmt: skip
SHAPES = [(".l-bound", "stroke"), (".l-faiss", "stroke"), (".l-pgvector", "stroke"), (".threshold", "stroke")] + [
    (f".c-{cause}", "fill")
    for cause in ("stale", "reorder", "missing_in_pgvector", "content_drift", "owner_mismatch", "error", "timeout")
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsers.browser() as launched:
        yield launched


@pytest.fixture(params=["empty", "healthy", "poisoned"])
def rollout(
    request: pytest.FixtureRequest, configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Control]]:
    """Its name, and what a command would work on."""
    name = request.param
    if name != "empty":
        getattr(rollouts, name)(configured_database, tmp_path)
    with control_on(tmp_path, monkeypatch, profile=PRODUCTION) as control:
        yield name, control


@pytest.fixture
def poisoned(
    configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, rollouts.Made, Control]]:
    made = rollouts.poisoned(configured_database, tmp_path)
    with control_on(tmp_path, monkeypatch, profile=PRODUCTION) as control:
        yield configured_database, made, control


def test_every_rollout_is_shown_whole_on_phone_and_desk_in_light_and_dark(
    browser: Any, rollout: tuple[str, Control]
) -> None:
    name, control = rollout
    with browsers.dashboard(control, clock=Clock()) as url:
        for width, scheme in LOOKS:
            with opened(browser, url, width=width, scheme=scheme) as seen:
                quiet_and_self_contained(seen, url)
                assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, scheme)
                in_good_order(seen)
                legible(seen)
                if SCREENSHOTS and (name, width, scheme) in PICTURES:
                    IMAGES.mkdir(exist_ok=True)
                    picture = IMAGES / f"dashboard-{name}-{'phone' if width < 500 else 'desk'}-{scheme}.png"
                    keep_screenshot(seen, picture, PICTURES[name, width, scheme])


def test_a_report_in_a_file_needs_nothing_else(browser: Any, rollout: tuple[str, Control], tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(collect(rollout[1])), encoding="utf-8")
    with opened(browser, file.as_uri(), java_script_enabled=False) as seen:
        quiet_and_self_contained(seen, file.as_uri())
        assert seen.page.locator("script").count() == 0
        assert seen.page.locator("h1").inner_text() == "Rollout: FAISS to pgvector"


def test_what_people_and_files_are_called_stays_text(browser: Any, poisoned: tuple[Any, Any, Control]) -> None:
    with browsers.dashboard(poisoned[2], clock=Clock()) as url, opened(browser, url) as seen:
        assert seen.page.title() == "Rollout: live at 0 percent"
        assert seen.page.locator("img").count() == 0
        assert seen.page.locator("script").count() == 1
        text = seen.page.locator("main").inner_text()
        # The character that turns the reading direction is spelled out.
        assert text.count(HOSTILE.replace("\u202e", "\\u202e")) >= 5
        assert "\u202e" not in text
        assert "7006652" not in seen.page.locator("#timeline ~ .scroll").inner_text()
        assert seen.errors == []


def test_the_keyboard_reaches_a_difference_and_opens_its_explanation(
    browser: Any, poisoned: tuple[Any, Any, Control]
) -> None:
    with browsers.dashboard(poisoned[2], clock=Clock()) as url, opened(browser, url) as seen:
        page, visited = seen.page, []
        for _ in range(200):
            page.keyboard.press("Tab")
            visited.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", visited[-1]
            if visited[-1].startswith("difference-"):
                break
        assert visited[0] == "to the contents"
        assert {"pause", "span-24h", "scroll-t-gate"} <= set(visited)
        page.keyboard.press("Enter")
        inside = page.locator(f"#{visited[-1].removesuffix('-s')} .inside")
        assert inside.is_visible()
        assert "faiss gives it to user 2, the question was user 1's" in inside.inner_text()
        assert "rollout rollback --execute" in inside.inner_text()


def test_the_skip_link_leads_past_the_navigation(browser: Any, poisoned: tuple[Any, Any, Control]) -> None:
    with browsers.dashboard(poisoned[2], clock=Clock()) as url, opened(browser, url) as seen:
        seen.page.keyboard.press("Tab")
        assert seen.page.locator(".skip").evaluate("(each) => each.getBoundingClientRect().left") >= 0
        seen.page.keyboard.press("Enter")
        assert seen.page.evaluate("document.activeElement.id") == "main"


def test_a_renewed_page_keeps_what_is_open_and_where_the_focus_is(
    browser: Any, poisoned: tuple[Any, rollouts.Made, Control]
) -> None:
    database, made, control = poisoned
    clock = Clock()
    with browsers.dashboard(control, clock=clock) as url, opened(browser, url) as seen:
        page = seen.page
        first = page.locator("details.difference").first
        first.locator("summary").focus()
        page.keyboard.press("Enter")
        focused = page.evaluate("document.activeElement.id")
        with database.connect(autocommit=True) as connection:
            number = difference(connection, made.users[0], "error", served=made.chunks[0], shadow=None, age=1)
        clock.now += 3_600
        page.clock.fast_forward(16_000)
        page.locator(f"#difference-{number}").wait_for()
        assert first.get_attribute("open") is not None
        assert page.evaluate("document.activeElement.id") == focused
        assert seen.errors == []


def test_a_paused_page_is_left_as_it_is(browser: Any, poisoned: tuple[Any, rollouts.Made, Control]) -> None:
    with browsers.dashboard(poisoned[2], clock=Clock()) as url, opened(browser, url) as seen:
        seen.page.locator("#pause").check()
        seen.page.clock.fast_forward(16_000)
        seen.page.locator("#pause").uncheck()
        with seen.page.expect_request(url):
            seen.page.clock.fast_forward(16_000)
        assert seen.requests == [url, url]


def test_a_page_that_cannot_be_renewed_says_that_it_is_old(
    browser: Any, poisoned: tuple[Any, rollouts.Made, Control]
) -> None:
    with browsers.dashboard(poisoned[2], clock=Clock()) as url:
        opening = opened(browser, url)
        seen = opening.__enter__()
    try:
        seen.page.clock.fast_forward(16_000)
        seen.page.locator("#renewal").wait_for()
        assert "Not renewed since the time above" in seen.page.locator("#renewal").inner_text()
    finally:
        opening.__exit__(None, None, None)


def test_another_span_is_a_link_away(browser: Any, poisoned: tuple[Any, rollouts.Made, Control]) -> None:
    with browsers.dashboard(poisoned[2], clock=Clock()) as url, opened(browser, url) as seen:
        seen.page.locator("#span-1h").click()
        seen.page.wait_for_url("**/?span=1h")
        assert "charts: the last hour" in seen.page.locator("header").inner_text()
        assert seen.page.locator("#span-1h").get_attribute("aria-current") == "true"


# -- what is asked of every page


def quiet_and_self_contained(seen: Seen, url: str) -> None:
    assert seen.errors == []
    assert set(seen.requests) == {url}


def in_good_order(seen: Seen) -> None:
    """Headings step by step, every table with a caption, a heading cell for every column and row, no id twice."""
    levels = seen.page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((each) => Number(each.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels)), levels
    assert seen.page.locator("table:not(:has(caption))").count() == 0
    assert seen.page.locator("th:not([scope])").count() == 0
    ids = seen.page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))


def legible(seen: Seen) -> None:
    texts = seen.page.evaluate(CONTRASTS, TEXTS)
    assert min(texts.values()) >= 4.5, texts
    shapes = seen.page.evaluate(CONTRASTS, SHAPES)
    assert min(shapes.values(), default=3) >= 3, shapes


AN_HOUR_WITH_FEW = """
WITH stepped AS (
    INSERT INTO rollout_transitions (id, stage, read_percent, shadow_sample_rate, actor, reason, created_at)
    SELECT max(id) + 1, 'shadow', 0, 1, 'test', 'test', clock_timestamp() - interval '1 hour' FROM rollout_transitions
    RETURNING id
)
INSERT INTO shadow_diffs (at, transition_id, stage, user_id, cohort, cause, served_by, overlap_at_k, served_ms,
                          shadow_ms, fingerprint, event)
SELECT clock_timestamp() - interval '1 minute', id, 'shadow', 1, 'small', 'match', 'faiss', 1, 4, 5, %s, '{}'
FROM stepped, generate_series(1, 200)
"""


def test_the_gate_shows_value_and_threshold_and_how_long_until_there_is_enough(
    browser: Any, poisoned: tuple[Any, rollouts.Made, Control]
) -> None:
    database, _, control = poisoned
    with database.connect(autocommit=True) as connection:
        connection.execute(AN_HOUR_WITH_FEW, (fingerprint(3),))
    with browsers.dashboard(control, clock=Clock()) as url, opened(browser, url) as seen:
        rows = seen.page.locator("section[aria-labelledby=gate] tbody tr")
        told = {row.locator("th").inner_text().split()[0]: row.locator("td").all_inner_texts() for row in rows.all()}
        _, value, needed, todo = told["comparisons"]
        assert (value, needed) == ("200 comparisons", ">= 1000")
        # 800 more, at 200 an hour.
        assert re.fullmatch(r"wait for traffic, about 4:0\d:\d\d at the pace so far", todo)
        assert (told["soak"][1][:3], told["soak"][2]) == ("1:0", ">= 2 days, 0:00:00")
