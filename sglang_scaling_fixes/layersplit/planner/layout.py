"""How a plan's text is laid out, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WIDTH = 100


def section(title: str, lines: Iterable[str]) -> list[str]:
    """A title and what is below it."""
    return ["", title, *(f"  {line}".rstrip() for line in lines)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def wrapped(texts: Iterable[str]) -> list[str]:
    """Each text in lines of its own, as wide as a section."""
    return [
        line for text in texts for line in textwrap.wrap(text, WIDTH - 2, subsequent_indent="  ")
    ]


def assumptions(found: dict[str, dict[str, Any]]) -> list[str]:
    """Of a plan's JSON."""
    lines = []
    for name, one in found.items():
        value = "-" if one["value"] is None else one["value"]
        value = f"{value:,}" if isinstance(value, int) else str(value)
        words = " ".join(filter(None, (value, one["unit"], f"({one['from']})")))
        start = f"{name:<15} {one['kind']:<10} "
        lines += textwrap.wrap(start + words, WIDTH - 2, subsequent_indent=" " * len(start))
    return lines


def formulas(plan: Mapping[str, Any]) -> list[str]:
    """Of the figures, then the symbols in them."""
    formulas = [f"{path} = {label['formula']}" for path, label in plan["labels"].items()]
    return formulas + [f"{symbol}: {what}" for symbol, what in plan["symbols"].items()]
