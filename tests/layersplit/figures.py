"""The figures in what a command prints as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def figures(value: Any, path: str = "") -> Iterator[str]:
    """The path of every number (or None in place of one); of a list's, without the position."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from figures(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for inner in value:
            yield from figures(inner, path)
    elif value is None or isinstance(value, int | float):
        yield path
