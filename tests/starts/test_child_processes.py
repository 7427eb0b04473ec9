"""Which child processes of a whole release are armed, by the functions that really run in them.

Each is called in a process of its own, up to what it would start: that looks around, and ends it.
"""

from __future__ import annotations

from typing import Any

from sglang_scaling_fixes.config import PLUGIN_ENV
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from tests import child

LOOK = """
import json, sys
from unittest import mock

def look():
    from sglang_scaling_fixes import plugin
    return {
        "called": plugin.activated(),
        "states": {s["name"]: s["state"] for s in plugin.statuses()},
        "scheduler": "sglang.srt.managers.scheduler" in sys.modules,
        "probes": sorted(m for m in sys.modules if m.startswith("sglang_scaling_fixes.reclaim.d")),
    }

def build():
    from sglang.srt.managers.scheduler import Scheduler
    try:
        Scheduler(mock.MagicMock(disaggregation_mode="null", speculative_algorithm=None))
    except BaseException:
        pass  # stock's own start fails for want of a model

class Started(BaseException):
    pass

def started(*_, **__):
    found["loaded"] = look()
    build()
    found["built"] = look()
    raise Started

def run(function, *args, **replaced):
    module = sys.modules[function.__module__]
    for name in ("kill_itself_when_parent_died", "configure_logger", "publish"):
        replaced.setdefault(name, lambda *_, **__: None)
    with mock.patch.multiple(module, **replaced, create=True):
        try:
            function(*args)
        except Started:
            print("found:" + json.dumps(found))

found = {}
"""

DETOKENIZER = """
from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
run(run_detokenizer_process, None, None, started)
"""

CONTROLLER = """
from sglang.srt.managers.data_parallel_controller import run_data_parallel_controller_process
observed = mock.MagicMock()
observed().enable_trace = False
run(
    run_data_parallel_controller_process, None, None, None,
    DataParallelController=started, get_observability=observed,
)
"""

SCHEDULER = """
from sglang.srt.managers.scheduler import run_scheduler_process
run(run_scheduler_process, None, None, 0, 0, 0, None, None, resolve_spawn_dp_rank=started)
"""

ARMED = {
    "safe-reclaim": "armed",
    "early-send-ordering": "armed",
    "hicache-ordering": "off",
    "layer-split": "off",
    "spec-guard": "armed",
    "resume": "armed",
}


def processes(environment: Environment, script: str) -> Any:
    env = cpu_env({**environment.env, PLUGIN_ENV: "default"})
    found = child.said(environment.python, LOOK + script, env=env, mark="found:")
    assert found["loaded"]["called"]
    return found


def test_a_detokenizer_is_not_armed_until_a_scheduler_is_built_there(new: Environment) -> None:
    found = processes(new, DETOKENIZER)
    assert found["loaded"]["states"] == {}
    assert found["loaded"]["probes"] == [] and not found["loaded"]["scheduler"]
    assert found["built"]["states"] == ARMED


def test_a_data_parallel_controller_is_not_armed_until_a_scheduler_is_built_there(
    new: Environment,
) -> None:
    found = processes(new, CONTROLLER)
    assert found["loaded"]["scheduler"]  # it imports what its children run
    assert found["loaded"]["states"] == {} and found["loaded"]["probes"] == []
    assert found["built"]["states"] == ARMED


def test_a_scheduler_is_armed_before_it_is_built(new: Environment) -> None:
    found = processes(new, SCHEDULER)
    assert found["loaded"]["states"] == ARMED
    assert found["loaded"]["probes"]
