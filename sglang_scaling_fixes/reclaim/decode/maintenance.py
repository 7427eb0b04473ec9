"""What stock does on an idle server only, asked for while slots are held.

Stock asserts that it is idle before it releases its memory, and, in most releases, that it could
flush its cache after new weights. A hold keeps it from being idle, and a failed assertion ends the
scheduler. So such an operation waits for the holds first. What is still held after that is said
in its answer, and nothing is freed for it:

    release memory      refused: nothing was released
    new weights         taken, but the cache stays: success is false, the message says so
    flush the cache     refused (with a time-out of its own, stock waits as long as that)
    HiCache storage     refused

From 0.5.19 stock keeps the slots of an aborted request until its prefill has acknowledged, and is
not idle either until then. It looks for that once a turn, so the wait looks in its place.

All ranks get these operations in the same turn of their loops, so all wait and stop alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.attach import resolve
from sglang_scaling_fixes.ranks import TpGroup
from sglang_scaling_fixes.reclaim import points
from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger
from sglang_scaling_fixes.reclaim.rules.reasons import why_held

logger = logging.getLogger(__name__)

WAIT_S = 5.0
"""Seconds that an operation waits for holds: most end with a round trip and the rest of a write."""
LOOK_AGAIN_S = 0.005
"""Seconds between two looks. The receive thread takes the proofs meanwhile."""
NOT_RELEASED = "safe-reclaim: no memory was released: "
"""How the answer to a refused release begins."""


class NotReleased(RuntimeError):
    """Decode holds slots, so its memory was not released."""

    status_code = 503
    """Stock's HTTP server answers with it from 0.5.17 on, before with 400."""


class Maintenance:
    """The operations of one decode scheduler that need it idle."""

    def __init__(
        self, ledger: DecodeLedger, tick: Callable[[], None], scheduler: Any, group: TpGroup
    ) -> None:
        self._ledger = ledger
        self._tick = tick
        """Gives back what is proven, as every turn of the scheduler's loop does."""
        self._scheduler = scheduler
        self._group = group
        """The ranks that get an operation in the same turn: with DP attention of all DP ranks."""
        self._not_released: set[str] = set()
        """Parts of the memory whose release was refused, until stock is to resume them."""

    # -- what stock is asked for --------------------------------------------------------

    def release(self, stock: Callable[..., Any], owner: Any, request: Any) -> Any:
        """Release the memory, if nothing in it may still be written."""
        if self._nothing_held():
            return stock(owner, request)
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqOutput

        self._not_released.update(_tags(request))
        answer = NOT_RELEASED + self._why()
        logger.error("%s", answer)
        # Stock's answer has no field for it. Nothing reads the request's number in it.
        return ReleaseMemoryOccupationReqOutput(rid=answer)

    def resume(self, stock: Callable[..., Any], owner: Any, request: Any) -> Any:
        """Resume what was released. Stock's scheduler dies of the rest, see `release`."""
        kept = self._not_released.intersection(_tags(request)) - owner.offload_tags
        self._not_released.clear()
        if not kept:
            return stock(owner, request)
        logger.warning("safe-reclaim: %s was not released and is not resumed", ", ".join(kept))
        request.tags = [tag for tag in _tags(request) if tag not in kept]
        if request.tags:
            return stock(owner, request)
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqOutput

        return ResumeMemoryOccupationReqOutput()

    def update(self, stock: Callable[..., Any], owner: Any, request: Any) -> Any:
        """Take new weights in any case: whoever sends them waits for all ranks to take them."""
        if not request.flush_cache or self._nothing_held():
            return stock(owner, request)
        request.flush_cache = False
        output = stock(owner, request)
        if output.success:
            output.success = False
            output.message = (
                "the weights were updated, but the cache was not flushed; call /flush_cache: "
                + self._why()
            )
        return output

    def flush(self, stock: Callable[..., Any], owner: Any, request: Any) -> Any:
        """Flush the cache. With a time-out in the request, stock waits by itself."""
        self._nothing_held(waits=not request.timeout_s and self._idle_but_for_holds())
        output = stock(owner, request)
        if output is not None:
            self._explain(output)
        return output

    def storage(self, stock: Callable[..., Any], owner: Any, request: Any) -> Any:
        """Attach or detach a storage backend of HiCache."""
        self._nothing_held(waits=self._idle_but_for_holds())
        output = stock(owner, request)
        self._explain(output)
        return output

    # -- holds --------------------------------------------------------------------------

    def _nothing_held(self, *, waits: bool = True) -> bool:
        """Nothing is held on any rank, after a wait if all ranks wait. A collective."""
        until = time.monotonic() + WAIT_S
        while True:
            self._tick()
            self._let_stock_look()
            idle = not self._stock_keeps() and not self._ledger.holding
            early = waits and time.monotonic() < until
            nothing, early = self._group.all_true([idle, early])
            if nothing or not early:
                return nothing
            time.sleep(LOOK_AGAIN_S)

    def _let_stock_look(self) -> None:
        """Give back what stock keeps and may. A collective, as in stock's own loop."""
        if self._stock_keeps():
            self._scheduler.disagg_decode_transfer_queue.resolve_deferred_releases()

    def _stock_keeps(self) -> bool:
        """Whether stock itself still keeps slots of aborted requests: on all ranks or none."""
        queue = getattr(self._scheduler, "disagg_decode_transfer_queue", None)
        pending = getattr(queue, "has_pending_deferred_releases", None)
        return pending is not None and bool(pending())

    def _idle_but_for_holds(self) -> bool:
        """Stock's own word: nobody else is kept waiting."""
        return bool(resolve(points.FULLY_IDLE.target)[2].__wrapped__(self._scheduler))

    def _explain(self, output: Any) -> None:
        """A refusal says what is held."""
        if not output.success and self._ledger.holding:
            output.message = f"{output.message} {self._why()}".strip()

    def _why(self) -> str:
        held = self._ledger.held
        if not held and self._stock_keeps():
            return "stock keeps the slots of aborted requests until prefill acknowledges; try again"
        if not held:
            return "another rank holds KV slots; try again later"
        oldest = held[0]
        seconds = time.monotonic() - oldest.gave_up_at
        return (
            f"{len(held)} ended transfers hold KV slots that a prefill may still write; "
            f"the oldest: room {oldest.room} for {seconds:.0f} s, "
            f"{why_held(oldest, self._ledger.peers)}; "
            "try again later; /server_info and the log say what each waits for"
        )


def _tags(request: Any) -> list[str]:
    """The parts of the memory that a request is about: all of them where it names none."""
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES

    return list(request.tags or GPU_MEMORY_ALL_TYPES)


async def answers(stock: Callable[..., Any], communicator: Any, request: Any) -> Any:
    """In the main process: what the schedulers answered. A refused release raises `NotReleased`."""
    found = await stock(communicator, request)
    for answer in found or ():
        said = getattr(answer, "rid", None)
        if isinstance(said, str) and said.startswith(NOT_RELEASED):
            raise NotReleased(said)
    return found
