"""Overwrites KV of a running request, for showing what speculative decoding makes of it.

The request asks for it by its id, `corrupt:KIND:SHARE:AFTER:anything`: once AFTER tokens
have been generated, the first SHARE (0 to 1) of its context's latent KV is overwritten, in all
layers of the target model. The draft keeps its own. KIND says with what: `noise`, Gaussian of
each row's own size; `zero`; `mixed`, the same rows in another order, as if pages had
been exchanged. Loaded only where SGLANG_SCALING_FIXES_LAB_CORRUPT=1.
"""

from __future__ import annotations

import os
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
    """One per target backend."""

    def __init__(self) -> None:
        self._requests: dict[str, _Request] = {}

    def visit(self, rid: str, slots: Tensor, pool: Any) -> None:
        """Called for each request before a decoding step; `slots` are its context's."""
        if not rid.startswith(_PREFIX):
            return
        request = self._requests.get(rid)
        if request is None:
            _, kind, share, after, *_ = rid.split(":")
            if kind not in KINDS:
                raise ValueError(f"request id {rid!r}: the kind is one of {', '.join(KINDS)}")
            request = _Request(kind, float(share), len(slots) + int(after))
            self._requests[rid] = request
        if not request.done and len(slots) >= request.due:
            request.done = True
            for buffer in pool.kv_buffer:
                _overwrite(buffer, slots[: int(len(slots) * request.share)], request.kind)


def _overwrite(buffer: Tensor, slots: Tensor, kind: str) -> None:
    rows = buffer[slots]
    if kind == "zero":
        new = torch.zeros_like(rows)
    elif kind == "mixed":
        new = rows[torch.randperm(len(rows))]
    else:
        size = rows.float().square().mean(-1, keepdim=True).sqrt()
        new = (torch.randn(rows.shape) * size).to(rows.dtype)
    buffer[slots] = new


def corruptor() -> Corruptor | None:
    """For a target backend of this process, if the environment asks for one."""
    return Corruptor() if os.environ.get(CORRUPT) == "1" else None
