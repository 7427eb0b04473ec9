"""The abort race on real servers: stock corrupts its next owner's KV, armed servers do not.

The stock half is the negative control: the same schedule, the same release, no flag.
"""

from __future__ import annotations

from typing import Any

import pytest

from sglang_scaling_fixes.lab.races import run as race
from sglang_scaling_fixes.lab.races import scenarios
from tests.releases import OLD

ROUNDS = 1


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return race.run(OLD, "abort", rounds=ROUNDS)


def test_stock_corrupts(result: dict[str, Any]) -> None:
    assert result["stock"]["aborted"] == ROUNDS
    assert result["stock"]["corrupted_pages"] > 0


def test_fixed_does_not(result: dict[str, Any]) -> None:
    fixed = result["fixed"]
    assert (fixed["aborted"], fixed["victims"]) == (ROUNDS, ROUNDS)
    assert (fixed["corrupted_pages"], fixed["wrong_outputs"]) == (0, 0)


def test_the_victims_waited_in_the_very_slots_of_the_aborted_requests(
    result: dict[str, Any],
) -> None:
    """Otherwise nothing was raced for, and nothing corrupted proves nothing."""
    for half in ("stock", "fixed"):
        for one in result["rounds"][half]:
            assert one["slots_shared"] > 0


@pytest.fixture(scope="module")
def lost() -> dict[str, Any]:
    return race.run(OLD, "lost-abort", rounds=1, fixed_only=True)


def test_decode_repeats_a_stop_that_is_lost(lost: dict[str, Any]) -> None:
    """The first three Aborts never leave decode; had it not asked again, prefill would have
    written every chunk. Stock of this release has no such message to lose: its half would be
    the one above."""
    assert [one["lost"] for one in lost["rounds"]["fixed"]] == [scenarios.LOST_MESSAGES]
    fixed = lost["fixed"]
    assert (fixed["victims"], fixed["refused"]) == (1, 0)
    assert (fixed["corrupted_pages"], fixed["wrong_outputs"]) == (0, 0)
