"""A test hangs when no byte moves any more. How long it takes in all depends on the machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

TICK = 0.1
"""Seconds between two looks. A busy machine makes them longer, and with them the limit."""
STILL_TICKS = 600
"""So many looks in a row without a byte that moved, and the test hangs."""


class Moves:
    """Counts what tells that a test goes on: bytes of requests and answers, not of probes."""

    def __init__(self) -> None:
        self.count = 0

    def note(self) -> None:
        self.count += 1


moves = Moves()


class Hangs(AssertionError):
    """Nothing has moved for `STILL_TICKS`."""


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Runs it in an event loop of its own. Raises Hangs."""
    asyncio.run(_watched(test))


async def _watched(test: Callable[[], Awaitable[None]]) -> None:
    work = asyncio.ensure_future(test())
    before, still = moves.count, 0
    while not work.done():
        await asyncio.wait({work}, timeout=TICK)
        still = still + 1 if moves.count == before else 0
        before = moves.count
        if still > STILL_TICKS:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            raise Hangs(f"no byte has moved in {STILL_TICKS} looks, {TICK} s apart or more")
    work.result()


async def eventually(true: Callable[[], bool]) -> None:
    """Waits until it is true, or `run` finds that the test hangs."""
    while not true():
        await asyncio.sleep(0.01)


async def stands_still(sent: Callable[[], int], blocked: Callable[[], bool], total: int) -> None:
    """Waits until a sender has sent all of `total`, or can send no more.

    It can send no more if it is blocked and nothing moves in five looks. In each of them the
    event loop has done all the work there was.
    """
    before, still = -1, 0
    while sent() < total and still < 5:
        await asyncio.sleep(TICK)
        still = still + 1 if blocked() and sent() == before else 0
        before = sent()
