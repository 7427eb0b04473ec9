"""What limits repeated requests: no I/O and no clock, every time is a `now` in seconds.

A fleet that is overloaded refuses requests. If each is asked again at once, the load grows by as
much as it is too large already. A request that ends its worker ends every worker that it is asked
of. So both kinds of retries are bounded.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from hashlib import blake2b

SHARE, LEAST = 0.2, 10
"""Retries of refused requests that may run at once: a share of all requests, and at least so many.
Envoy's retry budget has the same shape and the same share."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.025, 1.0
REMEMBERED = 4096
"""Requests that lost workers, at most."""


class RetryBudget:
    """How many retries of refused requests run now."""

    def __init__(self) -> None:
        self.running = 0

    def take(self, requests: int) -> bool:
        """`requests`: those in flight. If True, `give_back` when the retry is over."""
        if self.running >= max(LEAST, SHARE * requests):
            return False
        self.running += 1
        return True

    def give_back(self) -> None:
        self.running -= 1


def wait_seconds(retry: int, chance: random.Random) -> float:
    """Before the retry of this number, from 1: doubled each time, and spread."""
    longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(retry - 1, 16))
    return chance.uniform(longest / 2, longest)


class LostRequests:
    """Requests that two workers lost their connection over. They are not asked of a third."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, path: str, body: bytes, now: float) -> None:
        digest = _digest(path, body)
        self._until.pop(digest, None)  # the order is that of the times
        self._until[digest] = now + self._seconds
        while len(self._until) > REMEMBERED:
            self._until.popitem(last=False)

    def refused_for(self, path: str, body: bytes, now: float) -> float:
        """For how many seconds more this request is refused; 0 if it is not."""
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        if not self._until:  # as nearly always: a large body is not hashed for nothing
            return 0.0
        return max(0.0, self._until.get(_digest(path, body), now) - now)


def _digest(path: str, body: bytes) -> bytes:
    return blake2b(path.encode() + b"\0" + body, digest_size=16).digest()
