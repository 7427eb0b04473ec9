"""Requests over a tree of cached prefixes, drawn."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from sglang_scaling_fixes.layersplit.tree import Path

from .stand_ins import PAGE


@dataclass(frozen=True)
class Asked:
    """A request: what it has in the tree, and tokens behind that which are its own."""

    path: Path
    own: int

    @property
    def tokens(self) -> int:
        return (self.path[0][1] if self.path else 0) + self.own

    def pages(self, name: int) -> set[tuple[str, int, int]]:
        """Each page that it reads, by its place in the tree; its own by its own name."""
        found, begin = set[tuple[str, int, int]](), 0
        for node, end in reversed(self.path):
            found |= {("node", node, i) for i in range(begin // PAGE, end // PAGE)}
            begin = end
        return found | {("own", name, i) for i in range(-(-self.own // PAGE))}


@st.composite
def requests(draw: st.DrawFn) -> list[Asked]:
    """Requests over a tree whose nodes have whole pages."""
    ends: list[tuple[int | None, int]] = []  # parent, tokens from the root
    for node in range(draw(st.integers(1, 6))):
        parent = draw(st.one_of(st.none(), st.integers(0, node - 1))) if node else None
        before = ends[parent][1] if parent is not None else 0
        ends.append((parent, before + PAGE * draw(st.integers(1, 4))))
    asked = []
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.one_of(st.none(), st.integers(0, len(ends) - 1)))
        path: Path = []
        while at is not None:
            path.append((at, ends[at][1]))
            at = ends[at][0]
        asked.append(Asked(path, draw(st.integers(0, 5 * PAGE))))
    return asked
