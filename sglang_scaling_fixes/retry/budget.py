"""How many bytes all requests together may keep in memory."""

from __future__ import annotations


class Budget:
    """A limit in bytes. It never waits for memory: requests that wait could wait for each other."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def lease(self) -> Lease:
        return Lease(self)

    def _change(self, by: int) -> bool:
        if by > 0 and self.held + by > self._limit:
            return False
        self.held += by
        return True


class Lease:
    """One holder's bytes; `resize(0)` returns them."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.size = 0

    def resize(self, size: int) -> bool:
        """False if the budget has no room; the lease then keeps its size."""
        if size == self.size:
            return True
        if not self._budget._change(size - self.size):
            return False
        self.size = size
        return True
