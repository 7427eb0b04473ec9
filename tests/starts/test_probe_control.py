"""Negative control of the start-up probes: with any one part out of force they say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from tests import child
from tests.machines import CLAIM, MACHINES

RECLAIM = (
    CLAIM
    + """
import json, sys
from unittest import mock
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.reclaim import FIX, probe
from sglang_scaling_fixes.reclaim.decode import gate, peers, side as decode
from sglang_scaling_fixes.reclaim.prefill import interposers, side as prefill
from sglang_scaling_fixes.reclaim.rules import coverage, prefill_ledger

def verdict():
    try:
        probe.run()
    except (AttachError, SystemExit, TypeError) as error:
        return str(error)
    return "armed"

def forgets(stock, guard, once):
    return interposers.EngineInterposer(stock, guard)

def deaf(self, write, name):
    return write

def retried(self, *write):
    return self._stock.batch_transfer_sync(*write)

FIX.arm(Config())
found = {"nothing": verdict()}
for name, owner, attribute, broken in (
    ("success", decode.DecodeSide, "_complete", lambda *a: True),
    ("gate", gate.Gate, "_kept", lambda *a: False),
    ("trailer", peers.Peers, "outgoing", lambda self, rank, route, frames, *_: frames),
    ("drop", prefill_ledger.PrefillLedger, "take", lambda self, a, *_: a.begin() or True),
    ("poison", prefill_ledger.PrefillLedger, "failed", lambda *a: []),
    ("deaf", interposers.EngineInterposer, "_watched", deaf),
    ("once", interposers.EngineInterposer, "_once", lambda self, session, *write: 0),
    ("retried", interposers.EngineInterposer, "_once", retried),
    ("pessimist", interposers.EngineInterposer, "_once", lambda self, *write: -1),
    ("covers", coverage.Coverage, "missing", lambda *a: ""),
    ("computes", prefill.PrefillSide, "computes", lambda *a: None),
    ("stingy", coverage.Coverage, "missing", lambda *a: "everything"),
    ("arguments", interposers.EngineInterposer, "_once", lambda self, session, sources: -1),
):
    with mock.patch.object(owner, attribute, broken):
        found[name] = verdict()
claim(sys.argv[1], {}, {})
with mock.patch.object(prefill, "EngineInterposer", forgets):
    found["forgets"] = verdict()
print("found:" + json.dumps(found))
"""
)

GUARD = """
import json
from unittest import mock
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.specguard import FIX, abort, attach, detector, guard, probe, taint

def verdict():
    try:
        probe.run()
    except AttachError as error:
        return str(error)
    return "armed"

def plain(anomaly, name, generated):
    from sglang.srt.managers.schedule_batch import FINISH_ABORT
    return FINISH_ABORT("an anomaly")

def nameless(anomaly, name, generated):
    made = reason(anomaly, name, generated)
    made.message = made.message.partition(" [")[0]
    return made

reason = abort.reason

always = detector.Anomaly("low_accept_length", "life", 1.0, 1.6, None, 256, 256, 0, 768)

FIX.arm(Config())
found = {"nothing": verdict()}
for name, owner, attribute, broken in (
    ("look", guard.SpecGuard, "inspect", lambda self, req: None),
    ("judge", detector.Watch, "_judge", lambda *a: always),
    ("status", abort, "reason", plain),
    ("name", abort, "reason", nameless),
    ("keep", guard.SpecGuard, "_taint_request", lambda self, req, name, **unshared: None),
    ("place", guard.SpecGuard, "choose_namespace", lambda self, req: None),
    ("everybody", taint.Taint, "number", lambda self, own, forms: 1),
):
    with mock.patch.object(owner, attribute, broken):
        found[name] = verdict()
print("found:" + json.dumps(found))
"""


def verdicts(environment: Environment, script: str, *argv: str) -> dict[str, str]:
    """What the probe says, by what was taken out of force."""
    env = cpu_env(environment.env)
    found: dict[str, str] = child.said(environment.python, script, *argv, env=env, mark="found:")
    assert found.pop("nothing") == "armed"
    return found


def test_safe_reclaims_probe_notices_each_missing_part(old: Environment, tmp_path: Path) -> None:
    found = verdicts(old, RECLAIM, str(MACHINES["one HCA"].under(tmp_path / "root")))
    assert "success of another attempt" in found["success"]
    assert "past the gate" in found["gate"]  # the gate's own check is first
    assert "without a lease" in found["trailer"]
    assert "did not skip" in found["drop"]
    assert "failed write" in found["poison"]
    assert "a failed write was not noticed" in found["deaf"]
    assert "a part of the prompt was let through" in found["covers"]
    assert "a part of the prompt was let through" in found["computes"]
    assert "the whole prompt was held back" in found["stingy"]
    # Whatever machine this is: both ways of writing are proven on each.
    assert "to be submitted as once, was []" in found["once"]
    assert "to be submitted as once, was ['stock']" in found["retried"]
    assert "to be submitted as once, was []" in found["pessimist"]
    assert "arguments" in found["arguments"]
    # And on a machine with a device the one in force is the right one.
    assert "to be submitted as once, was ['stock']" in found["forgets"]


@pytest.mark.parametrize("release", ["old", "new"])
def test_the_guards_probe_notices_each_missing_part(
    release: str, request: pytest.FixtureRequest
) -> None:
    environment: Any = request.getfixturevalue(release)
    assert verdicts(environment, GUARD) == {
        "look": "probe: a request without an accepted draft was not aborted",
        "judge": "probe: a sound request was aborted",
        "status": "probe: the abort does not carry status 503 and its type",
        "name": "probe: the abort does not name its suspicion",
        "keep": "probe: an aborted request may enter the prefix cache",
        "place": "probe: a later request may read suspect KV",
        "everybody": "probe: a request with another beginning was moved",
    }
