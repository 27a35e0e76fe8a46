"""The rollout as one page: `collect` asks, `render` writes HTML, `serve` shows it to a browser.

Nothing here changes anything: what a gate would write or send to answer is left out, and said to be.
"""

from __future__ import annotations

from rollout.report.collect import collect
from rollout.report.data import Report
from rollout.report.page import render

__all__ = ["Report", "collect", "render"]
