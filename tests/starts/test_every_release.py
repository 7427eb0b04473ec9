"""Safe reclaim and the anomaly guard prove themselves on the real classes of every stock release.

Each wheel's own code is imported on the dependencies of the oldest lab release; no
server is started. The end-to-end tests run two releases; this says the same probe
that guards a server's start passes on all of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.config import GUARD_ENV, PLUGIN_ENV
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from tests import child
from tests.contract import wheels
from tests.releases import NEW

FIXES = ("safe-reclaim", "spec-guard")
PROBE = """
import json, sglang
from sglang_scaling_fixes import fixes
from sglang_scaling_fixes.config import Config
config = Config.from_env()
states = [state.as_dict() for state in fixes.arm_all(config)]

# What a scheduler with speculation would make of it.
from types import SimpleNamespace
from sglang_scaling_fixes.specguard import attach, settings
from sglang_scaling_fixes.specguard.guard import SpecGuard
args = SimpleNamespace(
    speculative_algorithm="EAGLE", speculative_num_steps=3, speculative_eagle_topk=1,
    speculative_num_draft_tokens=4, disaggregation_mode="null", host="host", port=1,
    model_path="model", served_model_name=None, enable_metrics=False,
)
tree = SimpleNamespace(page_size=64)
attach.bind(SimpleNamespace(page_size=64, tree_cache=tree), args, config)
guard = {"report": SpecGuard.current.report(), "depth": settings.depth(args)}
print("probe:" + json.dumps([sglang.__file__, states, guard]))
"""


def probe(environment: Environment, source: Path) -> Any:
    env = cpu_env({**environment.env, PLUGIN_ENV: ",".join(FIXES), GUARD_ENV: "abort"})
    env["PYTHONPATH"] = f"{source}:{env['PYTHONPATH']}"
    return child.said(environment.python, PROBE, env=env, mark="probe:", timeout_s=400)


@pytest.fixture(scope="module")
def found(old: Environment, new: Environment) -> dict[str, Any]:
    """Two at a time: an import of SGLang takes one core for ten seconds or more."""
    with ThreadPoolExecutor(2) as pool:
        pending = {
            release: pool.submit(probe, new if release == NEW else old, wheels.source(release))
            for release in wheels.RELEASES
        }
        return {release: future.result() for release, future in pending.items()}


@pytest.mark.parametrize("fix", FIXES)
@pytest.mark.parametrize("release", wheels.RELEASES)
def test_armed(found: dict[str, Any], release: str, fix: str) -> None:
    origin, states, _ = found[release]
    assert origin.startswith(str(wheels.source(release)))
    (status,) = (state for state in states if state["name"] == fix)
    assert status["state"] == "armed", status["reason"]


@pytest.mark.parametrize("release", wheels.RELEASES)
def test_a_scheduler_is_guarded(found: dict[str, Any], release: str) -> None:
    """Its arguments are read as the release keeps them, before and after it has resolved them."""
    *_, guard = found[release]
    assert guard["depth"] == 3
    assert guard["report"]["action"] == "abort"
    assert guard["report"]["rules"]["after"] == 128
