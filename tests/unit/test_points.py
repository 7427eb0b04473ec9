"""Nothing in stock is touched that is not listed, and no place is written twice."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import sglang_scaling_fixes
from sglang_scaling_fixes.attach import AttachPoint
from sglang_scaling_fixes.fixes import ATTACH_POINTS, FIXES
from sglang_scaling_fixes.points import NAME as PLUGIN

PACKAGE = Path(sglang_scaling_fixes.__file__).parent
LISTS = [PACKAGE / "points.py", *(PACKAGE.glob("*/points.py"))]
SOURCES = [
    path
    for path in PACKAGE.rglob("*.py")
    # The lab stands outside of the plugin; it knows stock by itself, or it could not check on us.
    if path not in LISTS and "lab" not in path.relative_to(PACKAGE).parts
]


def made(source: str) -> Iterator[ast.Call]:
    """Where a record is made: `AttachPoint(...)`, or `partial(AttachPoint, ...)`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            maker = ast.unparse(node.func)
            first = ast.unparse(node.args[0]) if node.args else ""
            if maker == "AttachPoint" or (maker, first) == ("partial", "AttachPoint"):
                yield node


def used(source: str) -> set[str]:
    """Names taken from a module called `points`, as in `points.FINISH`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "points"
    }


def test_points_are_made_in_their_lists_only() -> None:
    elsewhere = {path.name for path in SOURCES if any(made(path.read_text()))}
    assert elsewhere == set()
    assert all(any(made(path.read_text())) for path in LISTS)
    assert any(made('wrap(AttachPoint("fix", "both", "module:Name"), around)'))


def test_every_point_is_of_the_fix_that_lists_it() -> None:
    names = {PLUGIN, *(fix.name for fix in FIXES)}
    assert {point.fix for point in ATTACH_POINTS} <= names
    for fix in FIXES:
        assert {point.fix for point in fix.attach_points} <= {fix.name}


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.parent.name)
def test_what_is_listed_as_wrapped_is_wrapped_by_its_package(path: Path) -> None:
    namespace: dict[str, object] = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    listed = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, AttachPoint) and value.wrapped
    }
    assert listed and set(listed.values()) <= set(ATTACH_POINTS)
    near = [p for p in SOURCES if path.parent in p.parents]
    assert set(listed) <= set().union(*(used(p.read_text()) for p in near))


def test_no_target_is_written_a_second_time() -> None:
    targets = {point.target for point in ATTACH_POINTS}
    again = {
        f"{path.relative_to(PACKAGE)}: {node.value}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in targets
    }
    assert again == set()


def twice(points: Iterable[AttachPoint]) -> list[str]:
    """Targets that more than one record has wrapped."""
    counted = Counter(point.target for point in points if point.wrapped)
    return [target for target, count in counted.items() if count > 1]


def test_no_two_fixes_wrap_the_same_place() -> None:
    """The second would be refused, and a server that asks for both would not start."""
    assert twice(ATTACH_POINTS) == []
    assert twice([*ATTACH_POINTS, next(point for point in ATTACH_POINTS if point.wrapped)])
