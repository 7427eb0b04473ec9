"""A batch's prefixes fit the scratch: what does not fit waits its turn, the same on all ranks.

    sum over the batch of  ceil(prefix / page) - pages shared with an earlier request  <=  scratch

Nothing is refused: the scratch holds one context, so that a request alone always fits, and one
that is in the middle of its chunks comes first. Every rank decides from the same lengths and the
same tree, so every rank decides the same.

A prefix that HiCache is still to load back counts before stock starts the load: once started, its
batch has to consume it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.attach import wrap
from sglang_scaling_fixes.layersplit import points, report, tree
from sglang_scaling_fixes.layersplit.scratch import Size
from sglang_scaling_fixes.layersplit.sharing import Covered
from sglang_scaling_fixes.layersplit.tree import Path


class Admission:
    """The pages of one batch that is being put together."""

    def __init__(self, size: Size, page_size: int) -> None:
        self._size = size
        self._page_size = page_size
        self._pages = 0
        self._requests = 0
        self._covered = Covered(page_size)

    def fits(self, tokens: int, path: Path) -> bool:
        """Whether a request with a prefix of `tokens` may join. The first one always may.

        `path`: `(node, tokens from the root to its end)` for each node of the tree in which its
        prefix lies, deepest first.
        """
        if not self._requests:
            return True
        pages = self._pages + self._needed(tokens, path)
        return self._requests < self._size.requests and pages <= self._size.prefix

    def take(self, tokens: int, path: Path) -> None:
        self._pages += self._needed(tokens, path)
        self._requests += 1
        self._covered.add(tokens, path)

    def _needed(self, tokens: int, path: Path) -> int:
        return -(-tokens // self._page_size) - self._covered.pages(tokens, path)


_ADMISSION = "sglang_scaling_fixes_layer_split"
"""Attribute of stock's `PrefillAdder`, of which there is one for each batch."""


def attach() -> None:
    wrap(points.ADD_REQUEST, _add_one)
    wrap(points.ADD_CHUNKED, _add_chunked)


def _add_one(stock: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    admission = _admission(adder)
    if admission is None:
        return stock(adder, req, *args, **kwargs)
    from sglang.srt.managers.schedule_policy import AddReqResult

    if not admission.fits(
        _prefix(req) + req.host_hit_length, tree.path(adder.tree_cache, req.last_node)
    ):
        _count_deferred()
        return AddReqResult.OTHER
    before = len(adder.can_run_list)
    result = stock(adder, req, *args, **kwargs)
    if len(adder.can_run_list) > before:  # its prefix is now what was really loaded
        admission.take(_prefix(req), tree.path(adder.tree_cache, req.last_node))
    return result


def _add_chunked(stock: Callable[..., Any], adder: Any, req: Any) -> Any:
    before = len(adder.can_run_list)
    result = stock(adder, req)
    admission = _admission(adder)
    if admission is not None and len(adder.can_run_list) > before:
        admission.take(_prefix(req), tree.path(adder.tree_cache, req.last_node))
    return result


def _admission(adder: Any) -> Admission | None:
    """None where this process has no split pool."""
    found: Admission | None = getattr(adder, _ADMISSION, None)
    if found is None and (pool := report.pool()) is not None:
        found = Admission(pool.size_of_scratch, pool.page_size)
        setattr(adder, _ADMISSION, found)
    return found


def _count_deferred() -> None:
    """Once for each batch: it is closed then, and the request asks again for the next."""
    if (pool := report.pool()) is not None:
        pool.stats.inc("deferred")


def _prefix(req: Any) -> int:
    """Tokens of a request that were computed before: `prefix_len` since 0.5.22."""
    length = getattr(req, "prefix_len", None)
    return len(req.prefix_indices) if length is None else int(length)
