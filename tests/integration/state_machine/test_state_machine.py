"""Any order of uploads, deletions, failures, crashes and steps keeps every promise, on the real stores.

STATE_MACHINE_EXAMPLES and STATE_MACHINE_STEPS make a longer run of it, STATE_MACHINE_SEED repeats one, and
STATE_MACHINE_SHRINK looks for the shortest example, which takes minutes.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from tests.integration.state_machine import hunt

pytestmark = pytest.mark.migration

EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", "50"))
STEPS = int(os.environ.get("STATE_MACHINE_STEPS", "30"))
SHRINK = bool(os.environ.get("STATE_MACHINE_SHRINK"))


@pytest.mark.timeout(0)
@pytest.mark.parametrize("half", [1, 2])
def test_no_order_of_events_breaks_a_promise(database: Any, half: int) -> None:
    seed = int(os.environ.get("STATE_MACHINE_SEED", random.randrange(2**32)))
    print(f"STATE_MACHINE_SEED={seed}")
    with hunt.no_logs(), hunt.world_on(database) as world:
        hunt.run(world, seed=seed, examples=EXAMPLES, steps=STEPS, shrink=SHRINK)
