"""Alerts and dashboard: Prometheus reads them, alerts fire when they should, metrics exist."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sglang_scaling_fixes import metrics
from sglang_scaling_fixes.fixes import FIXES
from sglang_scaling_fixes.retry.metrics import RETRY_PROXY
from sglang_scaling_fixes.specguard.metrics import SPEC_GUARD

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "glm-5.1"
ALERTS = RECIPE / "prometheus" / "alerts.yml"
DASHBOARD = RECIPE / "grafana" / "kv-integrity.json"
STOCK = {"sglang:spec_accept_length"}


@pytest.fixture(scope="session")
def promtool() -> str:
    found = subprocess.run(
        [ROOT / "tools" / "promtool.sh"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip(found.stderr.strip().splitlines()[-1])
    return found.stdout.strip()


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )


def expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def exported() -> set[str]:
    """The series names of every metric of ours, as Prometheus sees them."""
    names = {metrics.PREFIX + metrics.FIX_STATE.name}
    for family in (*(f for fix in FIXES for f in fix.metrics), RETRY_PROXY):
        for metric in family.metrics:
            ends = {
                "counter": ("_total",),
                "gauge": ("",),
                "histogram": ("_bucket", "_sum", "_count"),
            }
            names |= {family.prefix + metric.name + end for end in ends[metric.kind]}
    return names


def used(text: str) -> set[str]:
    return set(re.findall(r"\b(?:sglang_scaling_fixes_\w+|sglang:\w+)", text))


def test_promtool_accepts_the_alerts(promtool: str) -> None:
    done = run(promtool, "check", "rules", ALERTS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alerts_fire_when_they_should_and_only_then(promtool: str) -> None:
    done = run(promtool, "test", "rules", ALERTS.with_name("alerts.test.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


ALERT_NAMES = re.findall(r"- alert: (\w+)", ALERTS.read_text())


@pytest.mark.parametrize("alert", ALERT_NAMES)
def test_an_alert_that_never_fires_fails_its_test(
    promtool: str, tmp_path: Path, alert: str
) -> None:
    """The control: each alert has a case in which it must fire."""
    rules = yaml.safe_load(ALERTS.read_text())
    (rule,) = (r for group in rules["groups"] for r in group["rules"] if r["alert"] == alert)
    rule["expr"] = "vector(0) > 1"
    (tmp_path / ALERTS.name).write_text(json.dumps(rules))  # JSON is YAML
    tests = tmp_path / "alerts.test.yml"
    tests.write_text(ALERTS.with_name("alerts.test.yml").read_text())
    assert run(promtool, "test", "rules", tests).returncode != 0


def test_promtool_accepts_every_expression_of_the_dashboard(promtool: str, tmp_path: Path) -> None:
    rules: dict[str, Any] = {
        "groups": [
            {
                "name": "panels",
                "rules": [
                    # Grafana fills these in.
                    {"record": f"panel:{n}", "expr": expr.replace("$__rate_interval", "5m")}
                    for n, expr in enumerate(expressions())
                ],
            }
        ]
    }
    file = tmp_path / "panels.yml"
    file.write_text(json.dumps(rules))
    done = run(promtool, "check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr
    rules["groups"][0]["rules"][0]["expr"] += ")"
    file.write_text(json.dumps(rules))
    assert run(promtool, "check", "rules", file).returncode != 0


def test_every_metric_that_is_shown_or_alerted_on_exists() -> None:
    known = exported() | STOCK
    text = " ".join([ALERTS.read_text(), *expressions()])
    assert used(text) <= known
    assert used("sglang_scaling_fixes_nonsense_total") - known


def test_every_anomaly_metric_is_shown() -> None:
    shown = used(" ".join(expressions()))
    for metric in SPEC_GUARD.metrics:
        name = f"{metrics.PREFIX}spec_guard_{metric.name}"
        assert (
            any(series.startswith(name) for series in shown)
            or metric.name == "notifications_received"
        )


def test_the_panels_have_ids_and_places_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)
    assert all(panel["description"].endswith(".") for panel in panels)
