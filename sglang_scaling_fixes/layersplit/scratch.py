"""The two compact buffers in which attention finds every layer, and how large they are.

    pages   | 0: padding | prefix pages, at most `prefix` | pages first written, at most `chunk` |

Both hold the pages of one plan, at the same places: layer `l` lies in scratch `l % 2`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

REQUESTS = 128
"""Requests of one batch, at most: each may begin a page of its own beside the chunk's."""
CONTEXTS = 2
"""Contexts that a scratch holds unless told otherwise. It trades capacity for batches of requests
with long prefixes: GLM-5.1 over 8 ranks keeps 7.71, 7.62 or 7.45 times the tokens of an unsplit
pool with 1, 2 or 4 (`layersplit plan`)."""


@dataclass(frozen=True)
class Size:
    """Of one scratch, in pages."""

    prefix: int
    chunk: int
    requests: int = REQUESTS

    @property
    def pages(self) -> int:
        return 1 + self.prefix + self.chunk


def size(prefix_tokens: int, chunk_tokens: int, requests: int, page_size: int) -> Size:
    """For prefixes of `prefix_tokens` and `chunk_tokens` new tokens of `requests` requests."""
    requests = min(requests, REQUESTS)
    return Size(
        prefix=-(-prefix_tokens // page_size),
        chunk=-(-chunk_tokens // page_size) + requests,
        requests=requests,
    )


@dataclass(frozen=True)
class Scratch:
    """KV `[pages * page size, 1, dim]` and index keys `[pages, bytes of a page]`."""

    kv: Tensor
    index: Tensor

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + self.index.nbytes
