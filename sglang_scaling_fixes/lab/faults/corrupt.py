"""Overwrites KV of a running request, for showing what speculative decoding makes of it.

The request asks for it by its id, `corrupt:KIND:SHARE:AFTER:anything`: once AFTER tokens
have been generated, the first SHARE (0 to 1) of its context's latent KV is overwritten, in all
layers of the target model; the draft keeps its own. A prefix that the radix tree shares is
overwritten for all who share it, now and later. An id counts once. KIND says with what: `noise`,
Gaussian of each row's own size; `zero`; `mixed`, the same rows in another order, as if
pages had been exchanged. The same id is given the same noise and the same order.

Loaded only where SGLANG_SCALING_FIXES_LAB_CORRUPT=1. With
SGLANG_SCALING_FIXES_LAB_CORRUPT=KIND:SHARE:AFTER it is done to every request, whatever its id.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglang_scaling_fixes.lab.runtime import CORRUPT

_PREFIX = "corrupt:"
KINDS = ("noise", "zero", "mixed")


@dataclass
class _Request:
    kind: str
    share: float
    due: int  # context length from which on
    done: bool = False


class Corruptor:
    """One per target backend. `always`: the id that every request is taken to have."""

    def __init__(self, always: str | None = None) -> None:
        self._requests: dict[str, _Request] = {}
        self._always = always

    def visit(self, rid: str, slots: Tensor, pool: Any) -> None:
        """Called for each request before a decoding step; `slots` are its context's."""
        if self._always is None and not rid.startswith(_PREFIX):
            return
        request = self._requests.get(rid)
        if request is None:
            kind, share, after = parse(self._always or rid)
            request = _Request(kind, share, len(slots) + after)
            self._requests[rid] = request
        if not request.done and len(slots) >= request.due:
            request.done = True
            draw = torch.Generator().manual_seed(zlib.crc32(rid.encode()))
            for buffer in pool.kv_buffer:
                _overwrite(buffer, slots[: int(len(slots) * request.share)], request.kind, draw)


def parse(rid: str) -> tuple[str, float, int]:
    """KIND, SHARE and AFTER of a request's id; ValueError says what an id must look like."""
    _, *words = rid.split(":")
    try:
        kind, share, after = words[0], float(words[1]), int(words[2])
    except (IndexError, ValueError):
        kind, share, after = "", 0.0, 0
    if kind not in KINDS or not 0 <= share <= 1 or after < 0:
        raise ValueError(
            f"request id {rid!r} does not say what to corrupt: corrupt:KIND:SHARE:AFTER with KIND"
            f" one of {', '.join(KINDS)}, SHARE from 0 to 1, AFTER in tokens"
        )
    return kind, share, after


def _overwrite(buffer: Tensor, slots: Tensor, kind: str, draw: torch.Generator) -> None:
    rows = buffer[slots]
    if kind == "zero":
        new = torch.zeros_like(rows)
    elif kind == "mixed":
        new = rows[torch.randperm(len(rows), generator=draw)]
    else:
        size = rows.float().square().mean(-1, keepdim=True).sqrt()
        new = (torch.randn(rows.shape, generator=draw) * size).to(rows.dtype)
    buffer[slots] = new


def corruptor() -> Corruptor | None:
    """For a target backend of this process, if the environment asks for one."""
    said = os.environ.get(CORRUPT)
    if not said:
        return None
    return Corruptor(None if said == "1" else f"{_PREFIX}{said}")
