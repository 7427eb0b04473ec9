"""Races on real servers whose Mooncake writes with its own RDMA transport, over verbs in software.

Each stock half is the negative control: the same schedule, the same release, no flag.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_scaling_fixes.lab.races import run as race
from sglang_scaling_fixes.lab.races import scenarios
from sglang_scaling_fixes.lab.servers.link import link
from tests.releases import OLD
from tests.verbs.needs import verbs_in_software

pytestmark = [pytest.mark.e2e, verbs_in_software]


@pytest.mark.parametrize("scenario", ["abort", "poisoned"])
def test_stock_corrupts_and_fixed_does_not(scenario: str, tmp_path: Path) -> None:
    """ "abort" waits for prefill's proof; "poisoned" has none but a fence."""
    with link(1, tmp_path) as way:
        if way.mode == "stalled" and not scenarios.scenario(scenario).stallable:
            pytest.skip(way.reason)
    result = race.run(OLD, scenario, rounds=1, transport="rdma")
    stock, fixed = result["stock"], result["fixed"]
    assert stock["corrupted_pages"] > 0
    assert (fixed["aborted"], fixed["corrupted_pages"], fixed["wrong_outputs"]) == (1, 0, 0)
    assert fixed["victims"] > fixed["refused"]
    for half in ("stock", "fixed"):
        assert all(one["slots_shared"] > 0 for one in result["rounds"][half])
