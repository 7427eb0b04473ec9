"""The few lines of `Scheduler` that decide an order, run as they stand in the release.

A scheduler cannot be built without a model. Its statements can be run without one: they are
cut out of the release's source by what they assign or call, compiled, and executed on a
stand-in `self`. Nothing is told again here: if the release has no such line, nothing happens.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.standin_objects import Lenient

_SCHEDULER = "sglang.srt.managers.scheduler"


def hand_over_streams(controller: Any, forward: Any) -> None:
    """Let the release's scheduler give its forward stream to the controller, if it does."""
    this = Lenient(
        enable_hierarchical_cache=True,
        tree_cache=SimpleNamespace(cache_controller=controller),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(forward_stream=forward)),
        forward_stream=forward,
    )
    _run(_hands_over, self=this)


def send_early(scheduler: Any, batch: Any) -> None:
    """The part of `Scheduler.run_batch` that sends cached prefixes early.

    Raises `AttachError` where it is gone.
    """
    if not _run(_sends_early, self=scheduler, batch=batch):
        raise AttachError(f"expected a call of {EARLY_SEND} in {_SCHEDULER}:Scheduler.run_batch")


EARLY_SEND = "maybe_send_cached_prefix_chunk"


def _run(wanted: Callable[[ast.If], bool], **names: Any) -> bool:
    """Execute the outermost `if` statements of `Scheduler` that are wanted; were there any?"""
    codes = _compiled(wanted)
    for code in codes:
        exec(code, vars(importlib.import_module(_SCHEDULER)), dict(names))
    return bool(codes)


@functools.cache
def _compiled(wanted: Callable[[ast.If], bool]) -> list[CodeType]:
    found = [node for node in _branches() if wanted(node)]
    inner = {id(child) for node in found for child in ast.walk(node) if child is not node}
    return [
        compile(ast.Module(body=[node], type_ignores=[]), _path(), "exec")
        for node in found
        if id(node) not in inner
    ]


def _sends_early(node: ast.If) -> bool:
    return any(
        isinstance(child, ast.Call)
        and isinstance(child.func, ast.Attribute)
        and child.func.attr == EARLY_SEND
        for child in ast.walk(node)
    )


def _hands_over(node: ast.If) -> bool:
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
        raise AttachError(f"expected {_SCHEDULER}:Scheduler")
    return spec.origin


@functools.cache
def _branches() -> tuple[ast.If, ...]:
    for node in ast.parse(Path(_path()).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Scheduler":
            return tuple(child for child in ast.walk(node) if isinstance(child, ast.If))
    raise AttachError(f"expected {_SCHEDULER}:Scheduler")
