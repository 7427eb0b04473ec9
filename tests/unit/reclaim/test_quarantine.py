"""The bound on what is held without proof."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.reclaim.rules.quarantine import (
    AT_LATEST_S,
    GRACE_S,
    IDLE_AFTER_S,
    Hold,
    Pressure,
    Quarantine,
)

BOUND = Quarantine(tokens=1000, metadata=8, max_held=0.05)
OLD = GRACE_S + 0.1


@pytest.mark.parametrize(
    ("holds", "over"),
    [
        ([], False),
        ([Hold(OLD, 50, True)], False),
        ([Hold(OLD, 51, True)], True),
        ([Hold(OLD, 30, True), Hold(OLD, 30, True)], True),
        ([Hold(GRACE_S, 900, True)], False),  # draining: the slots truly in flight
        ([Hold(OLD, 30, True), Hold(0.1, 900, True)], False),
        ([Hold(OLD, 1, True)] * 4, False),
        ([Hold(OLD, 1, True)] * 5, True),  # metadata slots: more than half
        ([Hold(OLD, 1, False)] * 5, False),
    ],
)
def test_only_old_holds_count_and_only_past_the_bound(holds: list[Hold], over: bool) -> None:
    assert BOUND.over(holds) is over


def gone(age: float) -> list[Hold]:
    return [Hold(age, 1, True, unproven=1, gone=1)]


def test_a_gone_writers_slots_come_back_below_the_bound_too() -> None:
    def fences(holds: list[Hold], flying: int) -> bool:
        decision = BOUND.decide(holds, flying=flying, may_fence=False)
        assert not decision.refuse
        return decision.fence

    assert not fences([], flying=0), "no such hold"
    assert not fences(gone(IDLE_AFTER_S), flying=0)
    assert fences(gone(IDLE_AFTER_S + 1), flying=0)
    assert not fences(gone(IDLE_AFTER_S + 1), flying=3)
    assert fences(gone(AT_LATEST_S + 1), flying=3)
    assert not fences([Hold(AT_LATEST_S + 1, 1, True, unproven=1)], flying=0), "it may still answer"


@pytest.mark.parametrize(
    ("may_fence", "unproven", "are_gone", "fence"),
    [
        (False, 1, 0, False),  # only refuse: nobody allowed a fence for a writer that lives
        (False, 1, 1, True),
        (True, 1, 0, True),
        (True, 0, 0, False),  # proven here: it waits for the other ranks
        (None, 1, 1, False),  # there is no fence
    ],
)
def test_past_the_bound(may_fence: bool | None, unproven: int, are_gone: int, fence: bool) -> None:
    holds = [Hold(OLD, 51, True, unproven=unproven, gone=are_gone)]
    decided = BOUND.decide(holds, flying=3, may_fence=may_fence)
    assert decided == Pressure(refuse=True, fence=fence)


def test_one_means_no_limit() -> None:
    unlimited = Quarantine(tokens=1000, metadata=8, max_held=1.0)
    assert not unlimited.over([Hold(OLD, 1000, True)] * 8)
