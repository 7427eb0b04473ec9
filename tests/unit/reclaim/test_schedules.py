"""Random schedules of worlds too large to explore.

Schedules are seeded: `SCHEDULES=1000000 SEED=42 pytest tests/unit/reclaim/test_schedules.py`
runs more and others. A failure names its seed and tells its story; Hypothesis, which
draws the same choices, shrinks what it finds.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.explore import RANDOM, schedule
from tests.model.world import Violation

SCHEDULES = int(os.environ.get("SCHEDULES", "10500"))
SEED = int(os.environ.get("SEED", "0"))


@pytest.mark.parametrize("name", RANDOM)
def test_random_schedules_are_safe_and_end(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    steps = 0
    for seed in range(SEED, SEED + SCHEDULES // len(RANDOM)):
        try:
            steps += len(schedule(RANDOM[name], random.Random(seed).choice))
        except Violation as error:
            pytest.fail(f"{name!r}, seed {seed}: {error}")
    record_property("explored", f"{name}: seeds {SEED} to {seed}, {steps} events")


@settings(max_examples=200)
@given(name=st.sampled_from(sorted(RANDOM)), choices=st.lists(st.integers(0, 63), max_size=120))
def test_drawn_schedules_are_safe_and_end(name: str, choices: list[int]) -> None:
    rest = iter(choices)
    schedule(RANDOM[name], lambda events: events[next(rest) % len(events)], len(choices))
