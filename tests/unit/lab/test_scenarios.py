"""The scenarios: rates, room for the victims, and the servers of each half."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sglang_scaling_fixes import cli
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.races import scenarios
from sglang_scaling_fixes.lab.servers.cluster import POOL_TOKENS


@pytest.mark.parametrize(
    ("release", "held"),
    [("0.5.12", False), ("0.5.20", False), ("0.5.21", True), ("0.5.15.post1", False)],
)
def test_the_rate_follows_what_the_release_does(release: str, held: bool) -> None:
    plan = scenarios.scenario("timeout")
    assert scenarios.holds(release) is held
    assert plan.rate_for(release) == (plan.rate_held if held else plan.rate)


@pytest.mark.parametrize("plan", scenarios.SCENARIOS.values(), ids=lambda plan: plan.name)
def test_the_victims_of_a_scenario_need_the_late_slots(plan: scenarios.Scenario) -> None:
    running = sum(plan.runners)
    assert sum(plan.late) + running <= POOL_TOKENS
    assert sum(plan.late) + running + sum(plan.victims) > POOL_TOKENS


def test_an_unknown_scenario_is_one_line_that_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lab", "reclaim", "--release", "0.5.12", "--scenario", "x"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(name in said for name in scenarios.SCENARIOS)
    with pytest.raises(LabError):
        scenarios.scenario("x")


@pytest.mark.parametrize("plan", scenarios.SCENARIOS.values(), ids=lambda plan: plan.name)
def test_the_halves_differ_by_the_plugin_alone(plan: scenarios.Scenario) -> None:
    stock, fixed = (plan.cluster("0.5.23", fixed=fixed) for fixed in (False, True))
    armed = ("--plugin",)
    assert fixed == replace(stock, flags=(*stock.flags, *armed))
    assert not any(flag.startswith(("--plugin", "--safe-reclaim")) for flag in stock.flags)
    assert stock.tokens == POOL_TOKENS and not stock.sleep_on_idle
