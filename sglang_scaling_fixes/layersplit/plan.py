"""Which pages one forward pass reads, and where each of them lies in the scratch.

    scratch page   0          1 ... prefix          prefix + 1 ... prefix + chunk
    holds          nothing    pages read before     pages first written by this pass
                   (padding)  they were written
                              by this pass

A plan comes from the *whole* batch, so that it is the same on every rank: `req_to_token` and the
lengths that the scheduler gave. Page tables of the attention backend will not do: with interleaved
context parallelism stock drops from them the requests of which this rank holds no row.

Page 0 stays reserved. Stock's writers skip row 0 of a buffer, and whatever the plan does not know
is sent there: a stale table entry can only ever name padding, never another request's page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_scaling_fixes.layersplit.sharing import several
from sglang_scaling_fixes.layersplit.translate import translate


@dataclass(frozen=True)
class Plan:
    """The pages of one forward pass."""

    prefix: Tensor
    """int64 `[prefix pages]`: pool pages to send; the one at `i` lies in scratch page `i + 1`."""
    pages: Tensor
    """int64 `[1 + prefix pages + chunk pages]`: the pool page of each scratch page; 0 for 0."""
    table: Tensor
    """int32 `[pool pages]`: the scratch page of each pool page, 0 where the pass has none."""
    page_size: int

    def page(self, pages: Tensor) -> Tensor:
        """Scratch pages of pool pages, of the same shape and dtype."""
        return self.table[pages.long()].to(pages.dtype)

    def slot(self, slots: Tensor) -> Tensor:
        """Scratch rows of KV slots, of the same shape and dtype. Below 0 (padding) stays."""
        return translate(slots, self.table, self.page_size)

    def slot_back(self, rows: Tensor) -> Tensor:
        """KV slots of scratch rows: what leaves the forward pass must be in the pool's words."""
        return translate(rows, self.pages, self.page_size)


def make(
    req_to_token: Tensor,
    requests: Tensor,
    prefix_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    page_size: int,
    pool_pages: int,
    room: int,
    shared: Sequence[int] | None = None,
) -> Plan:
    """The plan of an extend batch.

    `req_to_token`: int `[requests, tokens]`, slots by position. `requests`: int `[batch]`, its rows
    of this batch. `prefix_lens`, `seq_lens`: tokens before this pass, and after it; host numbers.
    `pool_pages`: pages that slots can name, page 0 included. `room`: pages of a scratch.
    `shared`: for each request the pages at its beginning that an earlier request of the batch has,
    too (`sharing.py`); None if that is not known.

    A page that the prefix fills only partly counts as prefix: it is sent, and then written to.
    The host waits for the device where two requests have a prefix and what they share is not known,
    and where the lengths say more than `room`: stock's warm-ups (FlashInfer's autotune) are batches
    of thousands of requests that are all in page 0.

    A page said to be shared that no earlier request has ends the process (on a GPU: by an assertion
    on the device): it would be read from padding.
    """
    # `index_select`, since indexing with one element of a tensor on a device waits for it.
    starts = req_to_token[:, : max(seq_lens, default=0) : page_size].index_select(0, requests)
    pages = torch.div(starts.long(), page_size, rounding_mode="floor")
    skipped = shared or [0] * len(prefix_lens)
    read = [
        pages[i, skip : -(-before // page_size)]
        for i, (skip, before) in enumerate(zip(skipped, prefix_lens, strict=True))
    ]
    written = [
        pages[i, -(-before // page_size) : -(-after // page_size)]
        for i, (before, after) in enumerate(zip(prefix_lens, seq_lens, strict=True))
    ]
    prefix = torch.cat([pages.new_empty(0), *read])
    if shared is None and several(prefix_lens):
        prefix = torch.unique(prefix)
    new = torch.cat([pages.new_empty(0), *written])
    if 1 + len(prefix) + len(new) > room:
        prefix, new = _distinct(prefix, new)
    order = torch.cat([pages.new_zeros(1), prefix, new])
    table = torch.zeros(pool_pages, dtype=torch.int32, device=pages.device)
    table[order] = torch.arange(len(order), dtype=torch.int32, device=pages.device)
    table[:1] = 0  # a warm-up's requests are in page 0
    if any(skipped):
        elsewhere = torch.cat([pages[i, :skip] for i, skip in enumerate(skipped)])
        torch._assert_async((table[elsewhere] > 0).all(), "layer-split: a shared page is missing")
    return Plan(prefix, order, table, page_size)


def _distinct(prefix: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Each page once, and page 0 not at all: it is padding, and has its place."""
    prefix, new = torch.unique(prefix), torch.unique(new)
    prefix = prefix[prefix > 0]
    return prefix, new[(new > 0) & ~torch.isin(new, prefix)]
