"""The bound on what is held without proof."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.reclaim.quarantine import (
    AT_LATEST,
    GRACE,
    IDLE_AFTER,
    Hold,
    Quarantine,
    worth_a_fence,
)

BOUND = Quarantine(tokens=1000, metadata=8, max_held=0.05)
OLD = GRACE + 0.1


@pytest.mark.parametrize(
    ("holds", "over"),
    [
        ([], False),
        ([Hold(OLD, 50, True)], False),
        ([Hold(OLD, 51, True)], True),
        ([Hold(OLD, 30, True), Hold(OLD, 30, True)], True),
        ([Hold(GRACE, 900, True)], False),  # draining: the slots truly in flight
        ([Hold(OLD, 30, True), Hold(0.1, 900, True)], False),
        ([Hold(OLD, 1, True)] * 4, False),
        ([Hold(OLD, 1, True)] * 5, True),  # metadata slots: more than half
        ([Hold(OLD, 1, False)] * 5, False),
    ],
)
def test_only_old_holds_count_and_only_past_the_bound(holds: list[Hold], over: bool) -> None:
    assert BOUND.over(holds) is over


def test_a_gone_writers_slots_come_back_below_the_bound_too() -> None:
    assert not worth_a_fence(0.0, flying=0), "no such hold"
    assert not worth_a_fence(IDLE_AFTER, flying=0)
    assert worth_a_fence(IDLE_AFTER + 1, flying=0)
    assert not worth_a_fence(IDLE_AFTER + 1, flying=3)
    assert worth_a_fence(AT_LATEST + 1, flying=3)


def test_one_means_no_limit() -> None:
    unlimited = Quarantine(tokens=1000, metadata=8, max_held=1.0)
    assert not unlimited.over([Hold(OLD, 1000, True)] * 8)
