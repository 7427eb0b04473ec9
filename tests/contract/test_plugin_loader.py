"""Stock SGLang loads the plugin in every process, before what the plugin changes runs."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from sglang_scaling_fixes import points
from sglang_scaling_fixes.attach import AttachPoint
from tests.contract.wheel_ast import Module, Wheel
from tests.contract.wheels import RELEASES, between

pytestmark = pytest.mark.parametrize("release", RELEASES)


def calls(tree: ast.AST) -> list[str]:
    """Names of the functions called, in the order of the source."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found.sort(key=lambda node: (node.lineno, node.col_offset))
    return [ast.unparse(node.func) for node in found]


def present(wheel: Wheel, name: str) -> Module:
    module = wheel.module(name)
    assert module is not None, f"{wheel.release} has no {name}"
    return module


def test_entry_point_group(wheel: Wheel) -> None:
    constant = present(wheel, "sglang.srt.plugins").definitions["GENERAL_PLUGINS_GROUP"]
    assert isinstance(constant, ast.Assign)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert ast.literal_eval(constant.value) in project["project"]["entry-points"]


def test_loader_calls_every_plugin_and_swallows_its_errors(wheel: Wheel) -> None:
    # The reason why a fix proves itself in force instead of trusting the loader.
    loader = wheel.find("sglang.srt.plugins:load_plugins").node
    guarded = [node for node in ast.walk(loader) if isinstance(node, ast.Try)]
    assert any("func" in calls(node) and "logger.exception" in calls(node) for node in guarded)


def test_launch_server_loads_plugins_before_it_parses(wheel: Wheel) -> None:
    order = calls(present(wheel, "sglang.launch_server").tree)
    assert order.index("load_plugins") < order.index("prepare_server_args")


def test_sglang_serve_loads_plugins_before_it_runs(wheel: Wheel) -> None:
    # Only `--help`, which starts nothing, is answered before the plugins are there.
    order = calls(wheel.find("sglang.cli.serve:serve").node)
    starts = [i for i, name in enumerate(order) if name in ("run_server", "registered.backend.run")]
    assert starts
    assert order.count("load_plugins") == 1
    assert order.index("load_plugins") < starts[0]


def test_parsing_goes_through_the_class(wheel: Wheel) -> None:
    order = calls(wheel.find("sglang.srt.server_args:prepare_server_args").node)
    assert order.index("ServerArgs.add_cli_args") < order.index("ServerArgs.from_cli_args")


def test_server_args_methods(wheel: Wheel) -> None:
    adder = wheel.require("sglang.srt.server_args:ServerArgs.add_cli_args", ("parser",))
    maker = wheel.require("sglang.srt.server_args:ServerArgs.from_cli_args", ("args",))
    assert (adder.kind, maker.kind) == ("staticmethod", "classmethod")


def test_scheduler_process_loads_plugins_first(wheel: Wheel) -> None:
    entry = wheel.find("sglang.srt.managers.scheduler:run_scheduler_process").node
    order = calls(entry)
    assert order.index("load_plugins") < order.index("Scheduler")


def test_engine_loads_plugins(wheel: Wheel) -> None:
    launch = wheel.find("sglang.srt.entrypoints.engine:Engine._launch_subprocesses").node
    assert "load_plugins" in calls(launch)


CALLERS = {
    "sglang/cli/serve.py",
    "sglang/launch_server.py",
    "sglang/srt/entrypoints/engine.py",
    "sglang/srt/managers/scheduler.py",
}
"""The files whose code loads plugins: every start of a server, and its schedulers."""


def test_who_loads_plugins_is_known(wheel: Wheel) -> None:
    """A caller that is not known is armed at once; it may be one that needs no fix."""
    found = {
        file.relative_to(wheel.root).as_posix()
        for file in (wheel.root / "sglang").rglob("*.py")
        if any(line.strip() == b"load_plugins()" for line in file.read_bytes().splitlines())
    }
    without = {
        point.target.partition(":")[0].replace(".", "/") + ".py" for point in points.WITHOUT_KV
    }
    more = without if wheel.release in between("0.5.22", "0.5.23") else set()
    assert found == CALLERS | more


@pytest.mark.parametrize("point", points.WITHOUT_KV, ids=lambda point: point.target)
def test_a_process_without_kv_builds_no_scheduler_and_launches_no_server(
    wheel: Wheel, point: AttachPoint
) -> None:
    made = calls(present(wheel, point.target.partition(":")[0]).tree)
    assert not [name for name in made if name.endswith(("Scheduler", "_launch_subprocesses"))]
