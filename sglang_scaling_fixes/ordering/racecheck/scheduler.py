"""The few lines of `Scheduler` that decide an order, run as they stand in the release.

A scheduler cannot be built without a model. Its statements can be run without one: they are
cut out of the release's source by what they assign or call, compiled, and executed on a
stand-in `self`. Nothing is re-told here: if the release has no such line, nothing happens.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang_scaling_fixes.ordering.racecheck.stack import Lenient, Moved, Stack

_SCHEDULER = "sglang.srt.managers.scheduler"


def takes(world: Stack) -> None:
    """Let the release's scheduler hand its forward stream to the controller, if it does."""
    this = Lenient(
        enable_hierarchical_cache=True,
        tree_cache=SimpleNamespace(cache_controller=world.controller),
        tp_worker=SimpleNamespace(
            model_runner=SimpleNamespace(forward_stream=world.forward), worker=None
        ),
        forward_stream=world.forward,
        schedule_stream=world.schedule,
    )
    run(lambda node: isinstance(node, ast.If) and _assigns_fence(node), self=this)


def run(wanted: Callable[[ast.stmt], bool], **names: Any) -> bool:
    """Execute the outermost statements of `Scheduler` that are `wanted`; were there any?"""
    found = [node for node in _statements() if wanted(node)]
    inner = {id(child) for node in found for child in ast.walk(node) if child is not node}
    found = [node for node in found if id(node) not in inner]
    for node in found:
        module = ast.Module(body=[node], type_ignores=[])
        exec(compile(module, _path(), "exec"), _globals(), dict(names))
    return bool(found)


def sends_early(node: ast.stmt) -> bool:
    """The `if` of `run_batch` around the early sends of a prefill server."""
    return isinstance(node, ast.If) and any(
        isinstance(child, ast.Call)
        and isinstance(child.func, ast.Attribute)
        and child.func.attr == "maybe_send_cached_prefix_chunk"
        for child in ast.walk(node)
    )


def _assigns_fence(node: ast.AST) -> bool:
    return any(
        isinstance(target, ast.Attribute) and target.attr.endswith("_fence_stream")
        for child in ast.walk(node)
        if isinstance(child, ast.Assign)
        for target in child.targets
    )


@functools.cache
def _path() -> str:
    spec = importlib.util.find_spec(_SCHEDULER)
    if spec is None or spec.origin is None:
        raise Moved(f"expected {_SCHEDULER}:Scheduler")
    return spec.origin


@functools.cache
def _statements() -> list[ast.stmt]:
    tree = ast.parse(Path(_path()).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Scheduler":
            return [child for child in ast.walk(node) if isinstance(child, ast.stmt)]
    raise Moved(f"expected {_SCHEDULER}:Scheduler")


def _globals() -> dict[str, Any]:
    import sglang.srt.managers.scheduler as module

    return vars(module)
