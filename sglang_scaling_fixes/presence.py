"""What this release has at all, before it is asked whether that is ordered."""

from __future__ import annotations

import importlib.util

from sglang_scaling_fixes.attach import resolve


def exists(module: str) -> bool:
    """Whether this release has the module. One that cannot be imported exists."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def own_method(target: str, method: str) -> bool:
    """Whether this release has the class, with a method of its own by this name.

    Raises `AttachError` if the module is there and the class is not to be had.
    """
    module, _, name = target.partition(":")
    if not exists(module):
        return False
    cls = resolve(target)[2]
    assert cls.__name__ == name
    return method in vars(cls)
