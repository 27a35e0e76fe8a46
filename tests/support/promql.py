"""Which metrics and labels a PromQL expression asks for: enough of the grammar for the queries of this project."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

FUNCTIONS = frozenset(
    "sum min max rate increase delta changes histogram_quantile max_over_time absent vector".split()  # noqa: SIM905
)
WORDS = frozenset({"by", "on", "group_left", "and", "or", "unless", "offset"})
GROUPING = re.compile(r"\b(?:by|on|group_left)\s*\(([^)]*)\)")
SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


@dataclass(frozen=True, slots=True)
class Matcher:
    """`label operator "value"`, of `metric`."""

    metric: str
    label: str
    operator: str
    value: str

    @property
    def values(self) -> list[str]:
        """The values that are named; none for a pattern that names none."""
        if self.operator in ("=", "!="):
            return [self.value]
        return [each for each in self.value.split("|") if re.fullmatch(r"[\w/.+ -]+", each) and each != ".+"]


def metrics(expression: str) -> set[str]:
    """The names of the metrics, as they are written: with _total, _bucket and so on."""
    bare = GROUPING.sub("", SELECTOR.sub(r" \1 ", expression))
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    bare = re.sub(r"\boffset\s+\w+", "", bare)
    return {name for name in NAME.findall(bare) if name not in FUNCTIONS | WORDS and not re.fullmatch(r"e\d*", name)}


def matchers(expression: str) -> Iterator[Matcher]:
    for metric, inside in SELECTOR.findall(expression):
        for label, operator, value in MATCHER.findall(inside):
            yield Matcher(metric, label, operator, value)


def grouped(expression: str) -> set[str]:
    """The labels that the expression groups or joins by."""
    return {label.strip() for group in GROUPING.findall(expression) for label in group.split(",") if label.strip()}
