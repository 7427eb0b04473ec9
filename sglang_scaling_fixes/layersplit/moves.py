"""Index keys of tokens, moved from one place to another."""

from __future__ import annotations

from torch import Tensor


def move_index_keys(
    index: Tensor, target: Tensor, source: Tensor, page_size: int, key_bytes: int
) -> None:
    """`index`: uint8 `[pages, page_size * (key_bytes + scale bytes)]`.

    A page holds the keys of all its tokens, then their scales. `target`, `source`: int64 `[n]`,
    slots. A layer of no page has nothing to move.
    """
    if not len(index):
        return
    keys = index[:, : page_size * key_bytes].view(len(index), page_size, -1)
    scales = index[:, page_size * key_bytes :].view(len(index), page_size, -1)
    to, place = target // page_size, target % page_size
    of, there = source // page_size, source % page_size
    for part in (keys, scales):
        part[to, place] = part[of, there]
