"""What runs in a server imports nothing of what proves it, measures it or commands it.

    server                                     command line
    entry > plugin > flags > fixes             cli > {racecheck, benchmarks} > lab
      > {reclaim, ordering, specguard, ...}    cli, doctor, racecheck > patches
      > ground: every other module             retry: the proxy, a process of its own

The command line may import modules of the server, never the other way round. Every import counts,
also one inside a function or for type checkers only.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_scaling_fixes.paths import PACKAGE, ROOT

COMMAND_LINE = {"lab", "racecheck", "benchmarks", "retry", "cli", "doctor", "child_process"}
COMMAND_LINE |= {"console", "doctor_command", "loading", "loading_probe", "proof_store", "patches"}
FIXES = {"reclaim", "early_send_ordering", "ordering", "specguard", "layersplit", "resume"}
FLOORS = [{"entry"}, {"plugin"}, {"flags"}, {"fixes"}, FIXES]
"""Of the server, from the top: a floor imports only what is below it. Ground is below them all."""
PARTS = {path.stem for path in PACKAGE.iterdir()}

Arrows = dict[str, set[str]]
"""The other parts that each part imports. A part is a module or folder of the package."""


def part(dotted: str) -> str | None:
    """The part that a module belongs to; None outside this repository."""
    top, _, rest = dotted.partition(".")
    name = rest.partition(".")[0]
    if top == "benchmarks":
        return top
    return name if top == PACKAGE.name and name in PARTS else None


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: an import is to be written with its whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def arrows() -> Arrows:
    found: Arrows = {}
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        own = part(".".join(file.relative_to(ROOT).with_suffix("").parts))
        if own is not None:
            found.setdefault(own, set()).update(filter(None, map(part, imported(file))))
    return {own: others - {own} for own, others in found.items()}


def test_a_server_imports_nothing_of_the_command_line(arrows: Arrows) -> None:
    assert {"plugin", "reclaim", "lab", "racecheck"} <= arrows.keys()
    server = {own: to & COMMAND_LINE for own, to in arrows.items() if own not in COMMAND_LINE}
    assert {own: to for own, to in server.items() if to} == {}


def test_imports_of_a_server_lead_downwards(arrows: Arrows) -> None:
    ground = len(FLOORS)
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert [
        (own, to)
        for own, others in arrows.items()
        for to in others
        if own not in COMMAND_LINE and floor.get(to, ground + 1) <= floor.get(own, ground)
    ] == []


def test_no_parts_import_each_other(arrows: Arrows) -> None:
    graphlib.TopologicalSorter(arrows).prepare()
