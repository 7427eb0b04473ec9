"""What stock SGLang asks of a Mooncake engine: the names our engine wrapper must know.

A new name here may be a new way to write into a peer's memory, past the wrapper's
accounting. It fails until someone has read what it does.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.contract.wheel_ast import Module, Wheel
from tests.contract.wheels import ARMED

TRANSFERS = {"batch_transfer_sync"}
"""Calls that write into a peer's memory: counted."""
REGISTRATION = {"batch_register", "batch_deregister"}
HARMLESS = {"get_session_id", "send_probe"}

MODULES = (
    "sglang.srt.disaggregation.mooncake.conn",
    "sglang.srt.disaggregation.mooncake.utils",
    "sglang.srt.disaggregation.common.conn",
    "sglang.srt.disaggregation.common.staging_buffer",
    "sglang.srt.disaggregation.common.staging_handler",
)

pytestmark = pytest.mark.parametrize("release", ARMED)


def is_engine(node: ast.AST) -> bool:
    """`self.engine`, `kv_mgr.engine`, or a parameter of that name."""
    if isinstance(node, ast.Attribute):
        return node.attr == "engine" and isinstance(node.ctx, ast.Load)
    return isinstance(node, ast.Name) and node.id in ("engine", "transfer_engine")


def engine_names(module: Module) -> Iterator[str]:
    """Attributes read from an engine, by dot or by `getattr(engine, "name")`."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and is_engine(node.value):
            yield node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr")
            and is_engine(node.args[0])
        ):
            name = node.args[1]
            yield str(name.value) if isinstance(name, ast.Constant) else ast.unparse(node)


def test_engine_names_are_known(wheel: Wheel) -> None:
    modules = [module for name in MODULES if (module := wheel.module(name))]
    assert modules[0].name == MODULES[0]
    used = {name for module in modules for name in engine_names(module)}
    assert used <= TRANSFERS | REGISTRATION | HARMLESS
    assert used >= TRANSFERS | {"batch_register", "get_session_id"}


def test_transfers_run_in_the_manager(wheel: Wheel) -> None:
    # The wrapper replaces the manager's own attribute: a second engine would escape it.
    module = wheel.module(MODULES[0])
    assert module is not None
    sources = {
        ast.unparse(node.value)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Attribute) and t.attr == "engine" for t in node.targets)
    }
    assert sources == {"get_mooncake_transfer_engine()"}
