"""A server's arguments as they are in force."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

_GROUPS = (
    "get_spec",
    "get_memory",
    "get_disagg",
    "get_serving",
    "get_schedule",
    "get_parallel",
    "get_exec.kernel",
    "get_exec.graph",
)
"""Functions of stock's `runtime_context` that each return some of the arguments, in themselves or
in a part of theirs."""


def resolved(server_args: Any, name: str) -> Any:
    """A server argument as it is in force, None if there is none of that name.

    Since 0.5.19 stock leaves what the operator gave as it was and keeps what it made of it (step
    counts it chose, algorithms it turned off) elsewhere, from the start of a scheduler on.
    """
    with contextlib.suppress(ImportError):
        context = importlib.import_module("sglang.srt.runtime_context")
        for group in _GROUPS:
            # Not filled in this process yet, or the name belongs to another group.
            with contextlib.suppress(Exception):
                function, _, part = group.partition(".")
                found = getattr(context, function)()
                return getattr(getattr(found, part) if part else found, name)
    return getattr(server_args, name, None)
