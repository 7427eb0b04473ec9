"""The metrics as Prometheus would read them, and as /server_info shows them."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from sglang_scaling_fixes.fixes import FIXES
from sglang_scaling_fixes.metrics import Family, Metrics, of_process
from sglang_scaling_fixes.reclaim.metrics import DECODE
from sglang_scaling_fixes.retry.metrics import RETRY_PROXY

EXPORT = """
from types import SimpleNamespace
from prometheus_client import generate_latest
from sglang_scaling_fixes.metrics import export_states, of_process
from sglang_scaling_fixes.reclaim.metrics import DECODE

manager = SimpleNamespace(
    server_args=SimpleNamespace(enable_metrics=True),
    disaggregation_mode=SimpleNamespace(value="decode"),
    kv_args=SimpleNamespace(engine_rank=3),
    system_dp_rank=1,
)
found = of_process(DECODE, manager)
found.inc("aborts_sent")
found.inc("frees", "P2")
found.set("held_tokens", 12)
found.set("holds", 1, "no answer yet")
found.observe("hold_seconds", 0.02)
export_states([("safe-reclaim", "armed")])
print(generate_latest().decode())
"""


def test_series_carry_role_rank_and_their_own_label() -> None:
    # A process of its own: prometheus_client's registry is global.
    text = subprocess.run(
        [sys.executable, "-c", EXPORT], capture_output=True, text=True, check=True
    ).stdout
    common = 'dp_rank="1",'
    for line in (
        f'sglang_scaling_fixes_reclaim_aborts_sent_total{{{common}rank="3",role="decode"}} 1.0',
        'sglang_scaling_fixes_reclaim_frees_total{dp_rank="1",proof="P2",rank="3",role="decode"}',
        f'sglang_scaling_fixes_reclaim_held_tokens{{{common}rank="3",role="decode"}} 12.0',
        'reason="no answer yet"',
        "sglang_scaling_fixes_reclaim_hold_seconds_bucket",
        'sglang_scaling_fixes_fix_state{fix="safe-reclaim",state="armed"} 1.0',
    ):
        assert line in text, line


GUARD = """
from types import SimpleNamespace
from prometheus_client import generate_latest
from sglang_scaling_fixes.metrics import of_scheduler
from sglang_scaling_fixes.specguard.metrics import SPEC_GUARD

args = SimpleNamespace(enable_metrics=True, disaggregation_mode="decode")
of_scheduler(SPEC_GUARD, SimpleNamespace(), args)
print(generate_latest().decode())
"""


def test_counters_that_alerts_watch_begin_at_zero() -> None:
    """Prometheus sees no increase in a counter that appears with its first count."""
    text = subprocess.run(
        [sys.executable, "-c", GUARD], capture_output=True, text=True, check=True
    ).stdout
    for labels in (
        'anomalies_total{action="aborted",dp_rank="0",kind="high_accept_rate"',
        'notifications_total{dp_rank="0",outcome="failed"',
    ):
        (line,) = (line for line in text.splitlines() if labels in line)
        assert line.startswith("sglang_scaling_fixes_spec_guard_") and line.endswith(" 0.0")


def test_without_stocks_metrics_counts_go_to_server_info_only() -> None:
    found = of_process(DECODE, SimpleNamespace(server_args=SimpleNamespace(enable_metrics=False)))
    found.inc("aborts_sent")
    found.inc("frees", "P4")
    found.set("held_tokens", 3)
    found.observe("ack_seconds", 0.1)
    report = found.report()
    assert report["aborts_sent"] == 1 and report["frees"] == {"P4": 1} and report["fences"] == 0


@pytest.mark.parametrize("family", [*(f for fix in FIXES for f in fix.metrics), RETRY_PROXY])
def test_names_follow_the_conventions(family: Family) -> None:
    known = family.metrics
    assert len({metric.name for metric in known}) == len(known)
    for metric in known:
        assert metric.help.endswith(".")
        assert not metric.name.endswith("_total")  # the client adds it
        assert metric.kind != "histogram" or metric.name.endswith(("_seconds", "_tokens"))


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError):
        Metrics(DECODE, None).inc("nonsense")
    with pytest.raises(KeyError):
        Metrics(DECODE, None).set("nonsense", 1)
