"""What was tried and how it ended, counted; handed to the end of the run as properties of the tests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.fault_table import PROPERTY


@dataclass
class Tally:
    """`places`: how often at each fault point. `within`: how many fell between the first point and the answer."""

    attack: str
    places: Counter[str] = field(default_factory=Counter)
    within: int = 0

    def add(self, place: str, *, within: bool) -> None:
        self.places[place] += 1
        self.within += within

    @property
    def count(self) -> int:
        return self.places.total()

    def record(self, record_property: Callable[[str, object], None]) -> None:
        record_property(PROPERTY, json.dumps([self.attack, dict(self.places), self.within]))
