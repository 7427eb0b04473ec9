"""Every way in which a request ends on prefill is told to decode, by every release's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from sglang_scaling_fixes.reclaim.retry_after import ENDED
from tests import child
from tests.contract import wheels
from tests.releases import NEW

CASES = Path(__file__).with_name("ending_cases.py").read_text()
NOT_TOLD = {
    "ended_well",
    "of_an_older_decode",
    "a_newer_request_came",
    "a_newer_request_may_come",
}


def played(environment: Environment, source: Path) -> Any:
    env = cpu_env(environment.env)
    env["PYTHONPATH"] = f"{source}:{env['PYTHONPATH']}"
    return child.said(environment.python, CASES, env=env, mark="told:")


@pytest.mark.parametrize("release", wheels.ARMED)
def test_what_ends_on_prefill_is_told_to_decode(
    old: Environment, new: Environment, release: str
) -> None:
    found = played(new if release == NEW else old, wheels.source(release))
    assert len(found["told"]) == 14
    for case, told in found["told"].items():
        assert told == ([] if case in NOT_TOLD else ["drained"]), case
    ended, lost = found["answers"]
    assert (ended[0], ended[1].partition(" (")[0]) == (503, ENDED)
    assert lost[0] == 500 and lost[1].endswith("lost"), "stock's own end of a transfer"
    assert set(map(tuple, found["untold"].values())) == {()}, "with the telling taken out"
