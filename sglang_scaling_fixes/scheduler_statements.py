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
from types import CodeType
from typing import Any

from sglang_scaling_fixes.errors import AttachError

SCHEDULER = "sglang.srt.managers.scheduler"


def run(wanted: Callable[[ast.If], bool], **names: Any) -> bool:
    """Execute the outermost `if` statements of `Scheduler` that are wanted; were there any?"""
    codes = _compiled(wanted)
    for code in codes:
        exec(code, vars(importlib.import_module(SCHEDULER)), dict(names))
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


@functools.cache
def _path() -> str:
    spec = importlib.util.find_spec(SCHEDULER)
    if spec is None or spec.origin is None:
        raise AttachError(f"expected {SCHEDULER}:Scheduler")
    return spec.origin


@functools.cache
def _branches() -> tuple[ast.If, ...]:
    for node in ast.parse(Path(_path()).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Scheduler":
            return tuple(child for child in ast.walk(node) if isinstance(child, ast.If))
    raise AttachError(f"expected {SCHEDULER}:Scheduler")
