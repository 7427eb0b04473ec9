"""What the TP ranks of one server agree on. All of them call the same things in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TpGroup:
    """A torch.distributed group of CPU tensors, or none: then this rank is alone.

    The methods are collectives: a rank that does not call them blocks the others.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group

    @property
    def size(self) -> int:
        if self._group is None:
            return 1
        import torch.distributed as dist

        return int(dist.get_world_size(self._group))

    @property
    def first(self) -> bool:
        """Whether this is the first of them."""
        if self._group is None:
            return True
        import torch.distributed as dist

        return int(dist.get_rank(self._group)) == 0

    def all_true(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether it is true on every rank. All ranks pass equally many."""
        if self.size == 1:
            return list(flags)
        import torch
        import torch.distributed as dist

        agreed = torch.tensor(list(flags), dtype=torch.int32)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._group)
        return [bool(flag) for flag in agreed.tolist()]

    def any_true(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether it is true on any rank."""
        return [not flag for flag in self.all_true([not flag for flag in flags])]

    def of_first(self, text: str) -> str:
        """TP rank 0's `text`, on every rank."""
        if self.size == 1:
            return text
        import torch.distributed as dist

        found = [text]
        first = dist.get_global_rank(self._group, 0)
        dist.broadcast_object_list(found, src=first, group=self._group)
        return found[0]

    def union(self, numbers: set[int]) -> set[int]:
        """The numbers of all ranks together, once all of them have got here."""
        if self.size == 1:
            return numbers
        import torch.distributed as dist

        found: list[set[int]] = [set()] * self.size
        dist.all_gather_object(found, numbers, group=self._group)
        return set().union(*found)
