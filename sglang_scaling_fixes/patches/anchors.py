"""Where our lines go in a stock file: beside a line that is known by its digest.

A line number would be right in one release only, and wrong without a word in another. A line's
text would be SGLang's. Its digest, within a class or function that is named, is neither.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable

from sglang_scaling_fixes.errors import ScalingFixesError
from sglang_scaling_fixes.patches.manifest import Insertion


class AnchorError(ScalingFixesError):
    """A stock file has not the line that lines of ours go beside, or has it too often."""


def digest(line: str) -> str:
    """How the manifest names a line: 16 hex digits."""
    return hashlib.sha256(line.strip().encode()).hexdigest()[:16]


def places(source: str, insertions: Iterable[Insertion]) -> list[tuple[int, str]]:
    """`[(line, text)]`: text goes behind so many lines of the stock file, from the top down.

    Raises `AnchorError` naming the file and the place.
    """
    module = ast.parse(source)
    found = [place for insertion in insertions for place in _places(source, module, insertion)]
    return sorted(found, key=lambda place: place[0])  # stable: in the order of the manifest


def inserted(source: bytes, insertions: Iterable[Insertion]) -> bytes:
    """The stock file with our lines. Raises `AnchorError`."""
    text = source.decode()
    lines = text.splitlines(keepends=True)
    for number, ours in reversed(places(text, insertions)):
        lines.insert(number, ours)
    return "".join(lines).encode()


def _places(source: str, module: ast.Module, insertion: Insertion) -> list[tuple[int, str]]:
    lines = source.splitlines()
    first, last = _span(module, insertion) if insertion.within else (0, len(lines))
    numbers = [n for n in range(first, last) if digest(lines[n]) == insertion.line]
    if len(numbers) != insertion.count:
        where = insertion.within or "the file"
        raise AnchorError(
            f"{insertion.file}: {where} has {len(numbers)} lines of digest {insertion.line}, "
            f"expected {insertion.count}"
        )
    return [(n + insertion.below, _indented(insertion.lines, lines[n])) for n in numbers]


def _span(module: ast.Module, insertion: Insertion) -> tuple[int, int]:
    """The lines of the class or function, from 0, the last one excluded."""
    node: ast.AST = module
    for name in insertion.within.split("."):
        named = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == name]
        if len(named) != 1:
            raise AnchorError(f"{insertion.file} has {len(named)} of {insertion.within}, not one")
        node = named[0]
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    return node.lineno - 1, node.end_lineno or node.lineno


def _indented(text: str, like: str) -> str:
    indent = like[: len(like) - len(like.lstrip())]
    return "".join(indent + line if line.strip() else line for line in text.splitlines(True))
