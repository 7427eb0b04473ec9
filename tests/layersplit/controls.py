"""Faults put into one rank's split pool. Each must be seen by the test that has none."""

from __future__ import annotations

from typing import Any

from .rank import Rank


def owners_off_by_one(rank: Rank) -> None:
    """Each layer is sent by the rank after its owner."""
    channel = rank.split.channel
    send = channel.broadcast
    channel.broadcast = lambda owner, tensors: send((owner + 1) % rank.ranks, tensors)


def nothing_new_in_the_scratch(rank: Rank) -> None:
    """New tokens reach the owner's layer only."""
    view = rank.split._view
    view.set_mla_kv_buffer = lambda *_args, **_kwargs: None


def nobody_waits(rank: Rank) -> None:
    """Readers do not wait for the broadcast, which takes its time."""
    import time

    channel = rank.split.channel
    send = channel.broadcast

    def broadcast(owner: int, tensors: Any) -> None:
        time.sleep(0.05)
        send(owner, tensors)

    channel.broadcast = broadcast
    lane = rank.split.lane
    launch = lane.launch
    waits: list[Any] = []

    def unwaited(work: Any, *used: Any) -> Any:
        sent = launch(work, *used)
        waits.append(sent.wait)
        sent.wait = lambda: None
        return sent

    lane.launch = unwaited

    def undo() -> None:
        for wait in waits:  # the lane must be idle before pools go
            wait()

    rank.undo = undo


def the_page_that_a_prefix_fills_partly_is_not_sent(rank: Rank) -> None:
    from sglang_scaling_fixes.layersplit import plan

    stock = plan.make

    def make(table: Any, requests: Any, prefix: Any, lengths: Any, **sizes: Any) -> Any:
        page = sizes["page_size"]
        return stock(table, requests, [p // page * page for p in prefix], lengths, **sizes)

    setattr(plan, "make", make)  # noqa: B010, the types are those of a wrapper
    rank.undo = lambda: setattr(plan, "make", stock)


def collectives_of_rank_local_plans(rank: Rank, parts: list[tuple[int, int, int]]) -> list[int]:
    """Bytes that this rank would send for a layer if it planned for the requests of which it holds
    rows under interleaved context parallelism. `parts`: (request, tokens before, after)."""
    import torch

    from sglang_scaling_fixes.layersplit import plan

    held, first = [], 0
    for request, before, after in parts:
        rows = range(first, first + after - before)
        if any(row % rank.ranks == rank.rank for row in rows):
            held.append((request, before, after))
        first += after - before
    table = torch.arange(4 * 1024, dtype=torch.int32).view(4, 1024) + 64
    found = plan.make(
        table,
        torch.tensor([request for request, _, _ in held], dtype=torch.long),
        [before for _, before, _ in held],
        [after for _, _, after in held],
        page_size=64,
        pool_pages=100,
        room=100,
    )
    return [len(found.prefix)]


def put_right(rank: Rank) -> None:
    rank.undo()
