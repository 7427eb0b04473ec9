"""An owner's pages, gathered from a layer into a scratch: the only copy that it makes.

On a GPU one kernel takes KV and index keys together. Addresses are 64-bit: a layer of 3.25M tokens
has 2.1 GB, and an offset beyond 2 GiB does not fit 32 bits.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

_BLOCK = 1024  # words of a program: 4 KiB


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _gather(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    pages, kv, kv_to, index, index_to, kv_words, index_words, kv_blocks, block: tl.constexpr
):
    """Program (i, b) copies block b of page `pages[i]`: first the blocks of KV, then of the index.

    Words have 4 bytes. `kv_words`, `index_words`: of a page.
    """
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    page = tl.load(pages + place)
    words = tl.arange(0, block)
    if part < kv_blocks:
        at = part * block + words
        inside = at < kv_words
        tl.store(kv_to + place * kv_words + at, tl.load(kv + page * kv_words + at, inside), inside)
    else:
        at = (part - kv_blocks) * block + words
        inside = at < index_words
        tl.store(
            index_to + place * index_words + at,
            tl.load(index + page * index_words + at, inside),
            inside,
        )


def pack(pages: Tensor, kv: Tensor, kv_to: Tensor, index: Tensor, index_to: Tensor) -> None:
    """`kv_to[i] = kv[pages[i]]` and the same for `index`, as bytes.

    `pages`: int64 `[n]`. `kv`: any contiguous `[pages, ...]`, `kv_to` the same with `n` pages;
    `index` likewise, or with no page at all (a layer without an indexer of its own). Bytes of a
    page are multiples of 4.
    """
    if not len(pages):
        return
    kv, kv_to, index, index_to = (_words(t) for t in (kv, kv_to, index, index_to))
    if kv.device.type != "cuda":
        torch.index_select(kv, 0, pages, out=kv_to)
        if len(index):
            torch.index_select(index, 0, pages, out=index_to)
        return
    launch(pages, kv, kv_to, index, index_to)


def launch(pages: Tensor, kv: Tensor, kv_to: Tensor, index: Tensor, index_to: Tensor) -> None:
    """The kernel, over int32 words `[pages, words of a page]`."""
    kv_blocks = triton.cdiv(kv.shape[1], _BLOCK)
    index_blocks = triton.cdiv(index.shape[1], _BLOCK) if len(index) else 0
    _gather[(len(pages), kv_blocks + index_blocks)](
        pages, kv, kv_to, index, index_to, kv.shape[1], index.shape[1], kv_blocks, block=_BLOCK
    )


def _words(pages: Tensor) -> Tensor:
    if not len(pages):
        return pages.new_empty(0, 0)
    return pages.view(len(pages), -1).view(torch.int32)
