"""What a bare `--plugin` arms proves itself on the real classes of every stock release.

Each wheel's own code is imported on the dependencies of the oldest lab release; no
server is started. The end-to-end tests run two releases; this says the same probe
that guards a server's start passes on all of them.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.config import PLUGIN_ENV
from sglang_scaling_fixes.fixes import ATTACH_POINTS
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from sglang_scaling_fixes.specguard.flags import ACTION
from tests import child
from tests.contract import wheels
from tests.machines import CLAIM, MACHINES
from tests.releases import NEW

FIXES = ("safe-reclaim", "early-send-ordering", "spec-guard")
WHEELS = ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")
ENVIRONMENTS: tuple[dict[str, str], ...] = ({}, {"MC_FORCE_TCP": "1"})

PROBE = (
    CLAIM
    + """
import json, os, sys, sglang
from sglang_scaling_fixes import fixes, flags
config = flags.from_env()
states = [state.as_dict() for state in fixes.arm_all(config)]

# The same start on other machines, with other Mooncakes.
from sglang_scaling_fixes import release
only, here, on = flags.from_env({"SGLANG_SCALING_FIXES_PLUGIN": "safe-reclaim"}), machine.here, []
for root, env, wheel in json.loads(sys.argv[1]):
    claim(root, env, {wheel: "0.3.13.post1"})
    state = fixes.arm_all(only)[0]
    found = release.mooncake()
    on.append({
        "state": state.as_dict(),
        "protocol": found.protocol,
        "once": release.mooncake_retries(),
        "posts": os.environ.pop(release.POSTS, None),
        "problem": release.mooncake_problem(found),
    })
machine.here = here

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

# What stays on a server's hot paths, by what it does.
from sglang_scaling_fixes.attach import is_wrapped, require_in_place, unwrap_other_roles
from sglang_scaling_fixes.reclaim import layout
ours = [p.target for p in fixes.ATTACH_POINTS if p.fix == "safe-reclaim" and p.wrapped]
require_in_place("safe-reclaim", "decode", "prefill", "both")
kept = {}
for role in ("decode", "null"):
    unwrap_other_roles("safe-reclaim", role)
    kept[role] = [target for target in ours if is_wrapped(target)]
hot = [point.target for point in (attach.finish_point(), *attach.PLACES)]
watched = [is_wrapped(target) for target in hot]
args.speculative_algorithm = None
args.disaggregation_mode = "prefill"
attach.bind(SimpleNamespace(page_size=64, tree_cache=tree), args, config)
watched += [is_wrapped(target) for target in hot]
args.disaggregation_mode = "decode"
attach.bind(SimpleNamespace(page_size=64, tree_cache=tree), args, flags.from_env({}))
watched += [is_wrapped(target) for target in hot]
print("probe:" + json.dumps({
    "file": sglang.__file__,
    "states": states,
    "on": on,
    "guard": SpecGuard.current.report(),
    "depth": settings.depth(args),
    "kept": kept,
    "watched": watched,
    "restores fail alone": layout.restores_fail_alone(),
}))
"""
)


def probe(environment: Environment, source: Path, claims: list[tuple[str, Any, str]]) -> Any:
    env = cpu_env({**environment.env, PLUGIN_ENV: ",".join(FIXES), ACTION.env: "abort"})
    env["PYTHONPATH"] = f"{source}:{env['PYTHONPATH']}"
    argv = json.dumps(claims)
    return child.said(environment.python, PROBE, argv, env=env, mark="probe:")


@pytest.mark.parametrize("release", wheels.RELEASES)
def test_both_fixes_hold(old: Environment, new: Environment, release: str, tmp_path: Path) -> None:
    """One process says it all: an import of SGLang takes a core for ten seconds or more."""
    source = wheels.source(release)
    roots = {
        name: str(made.under(tmp_path / name.replace("/", ""))) for name, made in MACHINES.items()
    }
    on = list(itertools.product(MACHINES, ENVIRONMENTS, WHEELS))
    claims = [(roots[name], env, wheel) for name, env, wheel in on]
    found = probe(new if release == NEW else old, source, claims)
    assert found["file"].startswith(str(source))
    states = {status["name"]: status for status in found["states"]}
    sends_nothing_early = release in wheels.between("0.5.11", "0.5.14")
    for fix in FIXES:
        native = fix == "early-send-ordering" and sends_nothing_early
        assert states[fix]["state"] == ("native" if native else "armed"), states[fix]["reason"]
    # A scheduler's arguments are read as the release keeps them, before and after it resolves them.
    assert found["depth"] == 3
    assert found["guard"]["action"] == "abort"
    assert found["guard"]["rules"]["after"] == 128
    # A decode server keeps what decode needs, and nothing of prefill's.
    decodes = [
        point.target
        for point in ATTACH_POINTS
        if point.fix == "safe-reclaim" and point.wrapped and point.role == "decode"
        if release in wheels.between(point.first, point.last)
    ]
    assert found["kept"] == {"decode": decodes, "null": []}
    # Where requests end, and twice where they are placed: with drafts, on prefill, with neither.
    assert found["watched"] == [True, True, True, False, True, True, False, False, False]
    assert found["restores fail alone"] == (release in wheels.between("0.5.13", "0.5.21"))
    # Nothing of the machine decides whether it can be proven; that is said of its transport.
    for (name, env, wheel), told in zip(on, found["on"], strict=True):
        case = f"{name}, {env}, {wheel}: {told}"
        assert told["state"]["state"] == "armed", case
        sees = bool(MACHINES[name].devices)
        assert told["protocol"] == ("rdma" if sees and not env else "tcp-v2"), case
        assert told["once"] == (sees or bool(MACHINES[name].doubt)), case
        assert told["posts"] == ("1" if told["once"] else None), case
        cuda = not wheel.endswith("-non-cuda")
        assert bool(told["problem"]) == (cuda and not sees and not env), case
