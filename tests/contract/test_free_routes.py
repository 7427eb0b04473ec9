"""Every way by which KV slots return to a free list passes a method the gate wraps."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

import pytest

from sglang_scaling_fixes.reclaim.decode.gate import (
    COMPOSED_FREES,
    PAGE_FREES,
    SEGMENT_FREES,
    TOKEN_FREES,
)
from tests.contract.wheel_ast import Class, Wheel
from tests.contract.wheels import ARMED

KNOWN = {*TOKEN_FREES, *SEGMENT_FREES, *PAGE_FREES, *COMPOSED_FREES}

REFUSED = {"HiSparseTokenToKVPoolAllocator", "DeepSeekV4HiSparseTokenToKVPoolAllocator"}
"""Device slots are a cache of host slots, freed on their own terms: the gate refuses these."""
INNER = {"MultiEndedAllocator", "FloatMultiEndedAllocator"}
"""Sub-pools of the unified allocators, freed only through them."""

FREE_LISTS = {"free_pages", "release_pages", "staged_pages"}
WRITERS = {
    "TokenToKVPoolAllocator": {"free"},
    "PagedTokenToKVPoolAllocator": {"free", "_release_page_ids", "merge_and_sort_free"},
}
RELEASERS = {"free", "free_segment", "free_page_ids", "free_group_end"}
"""Methods that call `_release_page_ids`, the one sink of paged allocators from 0.5.17.

`free_group_end` hands on what `free` and `free_segment` collected."""

DERIVES = re.compile(r"^class \w+\([^)]*(Allocator|ABC)\b", re.MULTILINE)
"""Which files may define one: parsing all of them would take minutes."""

pytestmark = pytest.mark.parametrize("release", ARMED)


@functools.lru_cache(maxsize=1)  # three tests ask, one release after the other
def allocators(wheel: Wheel) -> list[Class]:
    """Every class that is a BaseTokenToKVPoolAllocator, in the whole runtime."""
    srt = wheel.root / "sglang" / "srt"
    names = [
        ".".join(path.relative_to(wheel.root).with_suffix("").parts)
        for path in sorted(srt.rglob("*.py"))
        if path.name != "__init__.py" and DERIVES.search(path.read_text())
    ]
    bases = [
        Class(module, node).name
        for name in names
        if (module := wheel.module(name))
        and (node := module.definitions.get("BaseTokenToKVPoolAllocator"))
        and isinstance(node, ast.ClassDef)
    ]
    assert len(bases) == 1, f"{wheel.release}: BaseTokenToKVPoolAllocator is in {bases}"
    return wheel.subclasses(bases[0], names)


def writes(method: ast.AST) -> bool:
    """Whether it assigns one of self's free lists, or adds to it in place."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr in FREE_LISTS
        and (isinstance(node.ctx, ast.Store) or in_place)
        for node, in_place in _with_mutations(method)
    )


def _with_mutations(tree: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    for node in ast.walk(tree):
        yield node, False
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("append", "extend")
        ):
            yield node.func.value, True


def test_every_free_method_is_known(wheel: Wheel) -> None:
    found = allocators(wheel)
    assert {"TokenToKVPoolAllocator", "PagedTokenToKVPoolAllocator"} <= {
        cls.node.name for cls in found
    }
    unknown = {
        f"{cls.node.name}.{name}"
        for cls in found
        if cls.node.name not in REFUSED | INNER
        for owner in wheel.mro(cls)
        for name in owner.methods
        if name.startswith("free") and name not in KNOWN
    }
    assert not unknown


def test_refused_allocators_are_refused(wheel: Wheel) -> None:
    # With only known frees, the gate would take them for ordinary ones.
    for cls in allocators(wheel):
        if cls.node.name in REFUSED:
            names = {name for owner in wheel.mro(cls) for name in owner.methods}
            assert {n for n in names if n.startswith("free")} - KNOWN


def test_free_lists_are_written_in_known_places_only(wheel: Wheel) -> None:
    for cls in allocators(wheel):
        if cls.node.name not in WRITERS:
            continue
        writers = {
            name
            for name, method in cls.methods.items()
            if writes(method) and name not in ("__init__", "clear") and "alloc" not in name
        }
        assert writers, "this test looks at the wrong lists"
        assert writers <= WRITERS[cls.node.name]
        releasers = {
            name
            for name, method in cls.methods.items()
            if any(
                isinstance(node, ast.Attribute) and node.attr == "_release_page_ids"
                for node in ast.walk(method)
            )
        }
        assert releasers <= RELEASERS
