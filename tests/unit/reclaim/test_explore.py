"""Every interleaving of small worlds: safe everywhere, live at every end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest

from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.reclaim.rules.coverage import Coverage
from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure, Writer
from sglang_scaling_fixes.reclaim.rules.prefill_ledger import PrefillLedger
from tests.model.explore import CONTROLS, OPEN, SMALL, explore, is_harm, reached, story

KNOWN = {
    Writer: "rank incarnation hello bound_by disputed sent reported proof stuck poisoned writes_at "
    "ended aborts next_abort",
    Exposure: "lease attempt_id room writers engine prefill state gave_up_at untagged late slots "
    "tokens metadata waits last_word blames stands",
    Attempt: "room attempt_id bindings exposed coverage short awaiting_ack untold ended reported "
    "phase closed closed_for over sender active poisoned",
    Coverage: "pages states tokens writes unwritten unqueued in_hand looked_at",
    DecodeLedger: "_incarnation group _number engine peers answered_by _hellos _exposed _held "
    "_rooms _questions _causes _given_up_rooms _memory successes endings",
    PrefillLedger: "incarnation _memory _unserved_limit _rooms _by_attempt_id _by_lease _senders "
    "_waiting _finished _unsent _unserved _forgotten kept refused_rooms ended_rooms",
}
"""What `decode_key` and `prefill_key` tell apart, or may leave out."""


def test_states_are_told_apart_by_everything_the_ledgers_know() -> None:
    """A field the keys do not know would make two different worlds one."""
    for kind in (Writer, Exposure, Attempt, Coverage):
        assert " ".join(f.name for f in fields(kind)) == KNOWN[kind]
    assert " ".join(vars(DecodeLedger("d"))) == KNOWN[DecodeLedger]
    assert " ".join(vars(PrefillLedger("p"))) == KNOWN[PrefillLedger]


@pytest.mark.parametrize("name", SMALL)
def test_every_interleaving_is_safe_and_ends(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    found = explore(SMALL[name])
    record_property("explored", f"{name}: {found}")
    assert not found.violation, f"{found.violation}\n{story(SMALL[name], found.trace)}"
    assert found.complete
    assert found.terminal > 0


@pytest.mark.parametrize("name", CONTROLS)
def test_without_one_rule_the_corruption_is_found(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    """Negative controls: a checker that finds nothing here proves nothing above."""
    found = explore(CONTROLS[name])
    record_property("explored", f"{name}: found after {found}")
    print(f"{name}: {found}\n{story(CONTROLS[name], found.trace)}")
    assert found.violation.startswith("Violation: ")
    assert is_harm(CONTROLS[name], found.violation)


@pytest.mark.parametrize("name", OPEN)
def test_known_limits_are_still_limits(name: str) -> None:
    """When this fails, something got better: move the configuration to SMALL."""
    found = explore(OPEN[name])
    print(f"{name}: {found}\n{story(OPEN[name], found.trace)}")
    assert found.violation.startswith("Violation: ")


def test_looking_at_the_end_of_a_world_leaves_the_others_alone() -> None:
    """Worlds share their ranks; one that is settled must not change them."""
    config = SMALL["slot reuse"]
    assert explore(config).states == len(reached(config, {}))
