"""What a hold costs, and whom."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_scaling_fixes.reclaim.rules.quarantine import GRACE_S, Hold, Quarantine

BOUND = Quarantine(tokens=1000, metadata=8, max_held=0.5)
OLD = GRACE_S + 0.1


def hold(quiet_s: float = 0.0, tokens: int = 1, *, metadata: bool = True, **counts: int) -> Hold:
    """One writer without proof, unless `counts` say otherwise."""
    told: dict[str, Any] = {"unproven": 1, **counts}
    return Hold(quiet_s, tokens, metadata, **told)


@pytest.mark.parametrize(
    ("holds", "over"),
    [
        ([], False),
        ([hold(OLD, 500)], False),
        ([hold(OLD, 501)], True),
        ([hold(OLD, 300), hold(OLD, 300)], True),
        ([hold(GRACE_S, 900)], False),  # drains: its writer answered a moment ago
        ([hold(OLD, 300), hold(0.1, 900)], False),
        ([hold(0.1, 900, poisoned=1)], True),
        ([hold(0.1, 900, gone=1)], True),
        ([hold(0.1, 900, replaced=1)], True),
        ([hold(OLD, 900, unproven=0)], False),  # waits for the other TP ranks
        ([hold(OLD, 900, mute=1)], True),
        ([hold(OLD)] * 4, False),
        ([hold(OLD)] * 5, True),  # metadata slots: more than half
        ([hold(OLD, metadata=False)] * 5, False),
    ],
)
def test_only_what_stands_counts_and_only_past_the_bound(holds: list[Hold], over: bool) -> None:
    assert BOUND.over(holds) is over
    assert not Quarantine(tokens=1000, metadata=8, max_held=1.0).over(holds)


@pytest.mark.parametrize(
    ("found", "blames"),
    [
        (hold(GRACE_S), False),
        (hold(OLD), True),
        (hold(OLD, unproven=0), False),
        (hold(poisoned=1), True),
        (hold(gone=1), True),
        (hold(OLD, replaced=1), False),  # its successor did nothing
        (hold(OLD, unproven=2, replaced=1), True),  # the other one is silent
        (hold(OLD, mute=1), False),  # runs without the plugin: refusing would not help
        (hold(OLD, unproven=2, replaced=1, poisoned=1), True),
        (Hold(0.0, 1, True, unproven=1, poisoned=1, fencing=True), False),
        (Hold(OLD, 1, True, unproven=1, poisoned=1, fencing=True), False),
        (Hold(0.0, 1, True, unproven=1, gone=1, fencing=True), True),
        (Hold(OLD, 1, True, unproven=1, gone=1, back=True), False),
        (Hold(OLD, 1, True, unproven=1, succeeded=1), False),
        (Hold(OLD, 1, True, unproven=2, succeeded=1), True),
        (Hold(OLD, 1, True, unproven=1, fencing=True), True),
    ],
)
def test_whose_new_requests_are_refused(found: Hold, blames: bool) -> None:
    assert found.blames is blames


@pytest.mark.parametrize(
    ("found", "modes"),
    [
        (hold(0.0), ()),
        (hold(OLD), ("always",)),
        (hold(poisoned=1), ("auto", "always")),
        (hold(gone=1), ("auto", "always")),
        (hold(replaced=1), ("auto", "always")),
        (hold(OLD, unproven=0), ()),
        (hold(GRACE_S, mute=1), ()),  # stock up to 0.5.12 sends its success when it has landed
        (hold(OLD, mute=1), ("auto", "always")),  # since 0.5.13 it sends nothing
        (Hold(OLD, 1, True, unproven=1, poisoned=1, fencing=True), ()),  # under way already
    ],
)
def test_when_a_fence_is_called_for(found: Hold, modes: tuple[str, ...]) -> None:
    for mode in ("off", "auto", "always"):
        assert BOUND.decide([found], mode=mode).fence is (mode in modes)
