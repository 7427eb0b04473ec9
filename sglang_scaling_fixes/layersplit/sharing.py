"""How much of a prefix an earlier request of the same batch has, too. The scheduler's tree knows.

    request    prefix pages          shared    sends
       0       a b c d                  0      a b c d
       1       a b c e f                3      e f
       2       a b g                    2      g

The host must know how many distinct pages a batch has: it is the size of a broadcast. To ask the
device for it would wait for all that was launched before: with the overlap schedule, for the
forward pass before this one. The tree is on the host, and the same on every rank. What it says is
checked on the device, behind which nobody waits (`plan.make`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sglang_scaling_fixes.attach import wrap
from sglang_scaling_fixes.layersplit import points, report, tree
from sglang_scaling_fixes.layersplit.tree import Path


def attach() -> None:
    wrap(points.PREPARE, _prepare)


def _prepare(stock: Callable[..., None], batch: Any, *args: Any, **kwargs: Any) -> None:
    stock(batch, *args, **kwargs)
    if (pool := report.pool()) is not None:
        pool.sharing.note(batch, pool.page_size)


class Sharing:
    """What the tree said of the batch that was put together last."""

    def __init__(self) -> None:
        self._of: tuple[list[str], list[int]] | None = None
        self._pages: list[int] | None = None

    def note(self, batch: Any, page_size: int) -> None:
        """Ask the tree about a `ScheduleBatch` whose requests have their slots."""
        prefixes = list(batch.prefix_lens)
        self._of = [req.rid for req in batch.reqs], prefixes
        self._pages = None
        if several(prefixes):
            paths = [tree.path(batch.tree_cache, req.last_node) for req in batch.reqs]
            self._pages = shared_pages(paths, prefixes, page_size)

    def take(self, rids: Sequence[str] | None, prefixes: Sequence[int]) -> list[int] | None:
        """Pages of each request as `shared_pages`, once. None if this is not that batch."""
        of, self._of = self._of, None
        same = rids is not None and of == (list(rids), list(prefixes))
        return self._pages if same else None


def several(prefixes: Sequence[int]) -> bool:
    """Whether prefixes of these lengths can have a page in common."""
    return sum(prefix > 0 for prefix in prefixes) > 1


def shared_pages(
    paths: Sequence[Path], prefixes: Sequence[int], page_size: int
) -> list[int] | None:
    """For each request of a batch: the whole pages at its beginning that an earlier one has, too.

    `paths`: as `tree.path` gives them. `prefixes`: tokens. None if the tree cannot say.
    """
    if any(prefix and not path for path, prefix in zip(paths, prefixes, strict=True)):
        return None
    covered = Covered(page_size)
    shared = []
    for path, prefix in zip(paths, prefixes, strict=True):
        shared.append(covered.pages(prefix, path))
        covered.add(prefix, path)
    return shared


class Covered:
    """What the requests that a batch has so far have of the tree."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._tokens: dict[int, int] = {}  # by node: from the root, as far as one has them

    def pages(self, prefix: int, path: Path) -> int:
        """Whole pages that one of them has of a prefix of so many tokens, in these nodes."""
        tokens = max((self._tokens.get(node, 0) for node, _ in path), default=0)
        return min(tokens, prefix) // self._page_size

    def add(self, prefix: int, path: Path) -> None:
        """A request more. Its prefix may end before its last node does."""
        for node, end in path:
            self._tokens[node] = max(self._tokens.get(node, 0), min(end, prefix))
