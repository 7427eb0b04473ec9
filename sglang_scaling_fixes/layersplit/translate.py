"""Addresses moved from one set of pages to another, one launch for any table.

Eager PyTorch would take nine small kernels for it, in each of 78 layers twice.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _translate(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    addresses, table, moved, count, page_size: tl.constexpr, block: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    address = tl.load(addresses + at, inside, other=0)
    kept = tl.maximum(address, 0)
    page = tl.load(table + kept // page_size, inside, other=0).to(address.dtype)
    tl.store(
        moved + at, tl.where(address < 0, address, page * page_size + kept % page_size), inside
    )


def translate(addresses: Tensor, table: Tensor, page_size: int) -> Tensor:
    """`table[a // page_size] * page_size + a % page_size` for every address; below 0 it stays.

    `addresses`: int32 or int64 of any shape, also a strided one. `table`: int `[pages]`.
    """
    if addresses.device.type != "cuda":
        page = torch.div(addresses, page_size, rounding_mode="floor").clamp_(min=0)
        moved = table[page.long()].to(addresses.dtype) * page_size + addresses % page_size
        return torch.where(addresses < 0, addresses, moved)
    return launch(addresses, table, page_size)


def launch(addresses: Tensor, table: Tensor, page_size: int) -> Tensor:
    """The kernel."""
    addresses = addresses.contiguous()
    moved = torch.empty_like(addresses)
    count = addresses.numel()
    if count:
        blocks = triton.cdiv(count, _BLOCK)
        _translate[(blocks,)](addresses, table, moved, count, page_size=page_size, block=_BLOCK)
    return moved
