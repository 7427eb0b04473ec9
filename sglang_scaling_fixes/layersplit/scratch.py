"""The two compact buffers in which attention finds every layer, and how large they are.

    pages   | 0: padding | prefix pages, at most `prefix` | pages first written, at most `chunk` |

Both hold the pages of one plan, at the same places: layer `l` lies in scratch `l % 2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the planner counts with these sizes, and runs without torch
    from torch import Tensor

REQUESTS = 128
"""Requests of one batch, at most: each may begin a page of its own beside the chunk's."""
CONTEXTS = 2
"""Contexts that a scratch has room for unless told otherwise, its chunk included. More would let
more requests with long prefixes into one batch, and take KV from the pool: GLM-5.1 over 8 ranks
keeps 7.71, 7.62 or 7.45 times the tokens of an unsplit pool with 1, 2 or 4 (`layersplit plan`)."""


@dataclass(frozen=True)
class Size:
    """Of one scratch, in pages."""

    prefix: int
    chunk: int
    requests: int = REQUESTS

    @property
    def pages(self) -> int:
        return 1 + self.prefix + self.chunk


def size(tokens: int, chunk: int, requests: int, page_size: int) -> Size:
    """Of a scratch of `tokens`: what `chunk` new tokens of `requests` requests leave is for
    prefixes, which may be less than nothing."""
    requests = min(requests, REQUESTS)
    new = -(-chunk // page_size) + requests
    return Size(prefix=-(-tokens // page_size) - 1 - new, chunk=new, requests=requests)


def least(context: int, chunk: int, requests: int, page_size: int) -> int:
    """Tokens of a scratch in which one request with a prefix of `context` tokens fits."""
    return page_size * (-(-context // page_size) - size(0, chunk, requests, page_size).prefix)


@dataclass(frozen=True)
class Scratch:
    """KV `[pages * page size, 1, dim]` and index keys `[pages, bytes of a page]`."""

    kv: Tensor
    index: Tensor

    @property
    def nbytes(self) -> int:
        return int(self.kv.nbytes + self.index.nbytes)
