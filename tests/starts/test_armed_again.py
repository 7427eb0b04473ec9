"""One process of a whole release that is asked twice: it is armed for what it is asked, or ends."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_scaling_fixes.config import PLUGIN_ENV
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from sglang_scaling_fixes.lab.servers.checkpoints import Model
from tests import child

START = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import prepare_server_args
from sglang_scaling_fixes import plugin

def start(*flags):
    argv = ["--model-path", sys.argv[1], "--device", "cpu", "--skip-tokenizer-init", *flags]
    try:
        prepare_server_args(argv)
    except SystemExit as end:
        return str(end.code)
    return {s["name"]: s["state"] for s in plugin.statuses()}

def launch():
    try:
        Engine._launch_subprocesses(server_args=None)
    except SystemExit as end:
        return str(end.code)
"""

AGAIN = """
print("found:" + json.dumps({
    "environment": {s["name"]: s["state"] for s in plugin.statuses()},
    "more": start("--plugin", "safe-reclaim,hicache-ordering", "--safe-reclaim-audit"),
    "same": start(),
    "less": start("--plugin", "hicache-ordering"),
    "none": start("--plugin", "none"),
}))
"""

REFUSED = """
part = "sglang.srt.disaggregation.mooncake.conn"
there = sys.modules.pop(part, None)
sys.modules[part] = None  # cannot be imported
first = start("--plugin", "safe-reclaim")
del sys.modules[part]
if there is not None:
    sys.modules[part] = there
found = {"first": first, "second": start("--plugin", "safe-reclaim"), "launch": launch()}
print("found:" + json.dumps(found))
"""


def ask(environment: Environment, checkpoint: Model, script: str, **env: str) -> Any:
    return child.said(
        environment.python,
        START + script,
        str(checkpoint.folder),
        env=cpu_env({**environment.env, **env}),
        mark="found:",
    )


@pytest.mark.parametrize("release", ["old", "new"])
def test_flags_after_the_environment(
    checkpoint: Model, release: str, request: pytest.FixtureRequest
) -> None:
    environment: Environment = request.getfixturevalue(release)
    found = ask(environment, checkpoint, AGAIN, **{PLUGIN_ENV: "safe-reclaim"})
    assert found["environment"]["safe-reclaim"] == "armed"
    assert found["environment"]["hicache-ordering"] == "off"
    assert found["more"] == {
        "safe-reclaim": "armed",
        "early-send-ordering": "off",
        "hicache-ordering": "armed",
        "layer-split": "off",
        "spec-guard": "off",
        "resume": "off",
    }
    assert found["same"] == found["more"]
    assert "armed for safe-reclaim, hicache-ordering" in found["less"]
    assert "armed for safe-reclaim, hicache-ordering" in found["none"]


def test_a_refusal_is_for_good(old: Environment, checkpoint: Model) -> None:
    """What was missing is there again; what was half attached is so still."""
    found = ask(old, checkpoint, REFUSED)
    assert "cannot be imported" in found["first"]
    assert found["second"] == found["launch"] == found["first"]
