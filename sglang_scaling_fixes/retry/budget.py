"""How much all requests together may keep in memory."""

from __future__ import annotations


class Budget:
    """Bytes. It never waits: whoever finds it spent gives way, so that none waits for another."""

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
    """One holder's share; `resize(0)` gives it back."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.size = 0

    def resize(self, size: int) -> bool:
        """False, and nothing changed, if the budget has no room for it."""
        if size == self.size:
            return True
        if not self._budget._change(size - self.size):
            return False
        self.size = size
        return True
