"""Negative control of the start-up probe: with any one part out of force it says so."""

from __future__ import annotations

import json
import subprocess

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env

SABOTAGE = """
import json
from unittest import mock
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.reclaim import arm, decode, gate, ledger, messages, probe, taps

def verdict():
    try:
        probe.run()
    except (AttachError, RuntimeError) as error:
        return str(error)
    return "armed"

arm(Config())
found = {"nothing": verdict()}
for name, owner, attribute, broken in (
    ("gate", gate.Gate, "_kept", lambda *a: False),
    ("trailer", decode.DecodeGuard, "outgoing", lambda self, rank, route, frames, *_: frames),
    ("drop", ledger.PrefillLedger, "take", lambda self, a: setattr(a, "active", 1) or True),
    ("poison", ledger.PrefillLedger, "failed", lambda *a: []),
):
    with mock.patch.object(owner, attribute, broken):
        found[name] = verdict()
print("found:" + json.dumps(found))
"""


def test_the_probe_notices_each_missing_part(old: Environment) -> None:
    done = subprocess.run(
        [str(old.python), "-c", SABOTAGE],
        env=cpu_env(old.env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("found:")]
    assert lines, done.stderr[-2000:]
    found = json.loads(lines[0].removeprefix("found:"))
    assert found.pop("nothing") == "armed"
    assert "past the gate" in found["gate"]  # the gate's own check is first
    assert "without a generation" in found["trailer"]
    assert "did not skip" in found["drop"]
    assert "failed write" in found["poison"]
