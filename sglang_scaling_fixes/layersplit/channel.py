"""The ranks that share one set of layers, and the broadcasts between them.

They have a communicator of their own: a collective that waited behind the forward pass's would be
exposed, and two threads must not use one communicator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_CTAS = 4
"""Thread blocks that NCCL may take for a broadcast. At 120K tokens a layer's 95 MB have some 5 ms
of computing to travel in: few blocks suffice. More would make DeepEP's cooperative launches, which
wait for free blocks on every rank, wait for us (deepseek-ai/DeepEP #496)."""


class Channel:
    """Broadcasts from a layer's owner to the other ranks of `ranks` (global ranks, in CP order)."""

    def __init__(self, ranks: Sequence[int], device: Any) -> None:
        self._ranks = list(ranks)
        nccl = torch.device(device).type == "cuda"
        self._group = dist.new_group(
            self._ranks,
            backend="nccl" if nccl else "gloo",
            # Only these ranks call: other groups of ranks build pools of their own.
            use_local_synchronization=True,
            pg_options=_few_blocks() if nccl else None,
        )
        # The communicator is made at the first collective, which takes a second.
        self.broadcast(0, [torch.zeros(1, dtype=torch.uint8, device=device)])

    def broadcast(self, owner: int, tensors: Sequence[Tensor]) -> None:
        """Fill `tensors` (contiguous) on every rank with those of rank `owner` of the channel."""
        for tensor in tensors:
            dist.broadcast(tensor.view(torch.uint8), src=self._ranks[owner], group=self._group)


def _few_blocks() -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = MAX_CTAS
    return options
