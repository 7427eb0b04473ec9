"""Stock SGLang loads the plugin in every process, before what the plugin changes runs."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from wheel_ast import Module, Wheel
from wheels import RELEASES

pytestmark = pytest.mark.parametrize(
    "release", [pytest.param(r, marks=pytest.mark.xdist_group(r)) for r in RELEASES]
)


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


@pytest.mark.parametrize("module", ["sglang.launch_server", "sglang.cli.serve"])
def test_launcher_loads_plugins_before_it_parses(wheel: Wheel, module: str) -> None:
    order = [
        name
        for name in calls(present(wheel, module).tree)
        if name in ("load_plugins", "prepare_server_args")
    ]
    assert order[0] == "load_plugins"
    assert "prepare_server_args" in order


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
