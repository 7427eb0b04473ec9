"""What stands in for an object of stock's: everything not intercepted goes to that object.

Wrapping the object is what outlives upstream's refactorings: receive loops are
closures and method bodies change, but a socket is still read with `recv_multipart`.
"""

from __future__ import annotations

from typing import Any


class Passthrough:
    """Everything not intercepted goes to the stock object."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)
