"""The accept length that this server has with its own traffic, and whether it has fallen.

A KV cache that is corrupt for everybody, or more and more, breaks no rule of a single request: an
accept length of 1.9 is sound for some models. But it is a decline where it was 3.4. Traffic changes
it too, so a decline is an alert and ends no request.

    blocks of requests   3.4 3.5 3.3 3.4 ...   3.0 2.6 2.2 1.9
    recent               median of the last `BLOCKS`
    reference            the highest that `recent` has been since the start
    declined             recent < `DECLINED` * reference, until > `RECOVERED` * reference

A corruption that is there from the start is the reference itself, and is not seen. No I/O and no
clock.
"""

from __future__ import annotations

import statistics
from collections import deque

BLOCK = 8_192
"""Verifications in a block: 10,000 to 30,000 tokens."""
BLOCKS = 5
"""Of which the median is taken: one block of odd requests neither lowers nor raises it."""
DECLINED, RECOVERED = 0.75, 0.9


class Baseline:
    """Fed with what each request has verified since it was looked at last."""

    def __init__(self, block: int = BLOCK) -> None:
        self._block = block
        self._verifications = 0
        self._accepted = 0
        self._lengths: deque[float] = deque(maxlen=BLOCKS)
        self.recent: float | None = None
        """Accept length; None for too little traffic."""
        self.reference: float | None = None
        self.declined = False

    def add(self, verifications: int, accepted: int) -> bool:
        """Whether a block is full: `recent`, `reference` and `declined` are new then."""
        self._verifications += verifications
        self._accepted += accepted
        if self._verifications < self._block:
            return False
        self._lengths.append(1 + self._accepted / self._verifications)
        self._verifications = self._accepted = 0
        if len(self._lengths) < BLOCKS:
            return False
        self.recent = statistics.median(self._lengths)
        self.reference = max(self.recent, self.reference or 0.0)
        limit = RECOVERED if self.declined else DECLINED
        self.declined = self.recent < limit * self.reference
        return True
