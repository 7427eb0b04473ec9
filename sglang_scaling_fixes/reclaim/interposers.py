"""What both roles put between stock and its socket for control messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.passthrough import Passthrough


class ReceivingSocket(Passthrough):
    """A ZMQ socket whose incoming messages pass a filter before stock sees them.

    `read(frames)` returns the frames for stock, or None when the message was
    ours. `deferred()` returns a message kept back earlier whose time has come.
    While something is kept back the socket is polled, so that its time is noticed.
    """

    POLL_MS = 10

    def __init__(
        self,
        stock: Any,
        read: Callable[[list[bytes]], list[bytes] | None],
        deferred: Callable[[], list[bytes] | None] | None = None,
        deferring: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__(stock)
        self.read = read
        self._deferred = deferred or (lambda: None)
        self._deferring = deferring or (lambda: False)

    def recv_multipart(self, *args: Any, **kwargs: Any) -> list[bytes]:
        while True:
            if (ready := self._deferred()) is not None:
                return ready
            if self._deferring() and not self._stock.poll(self.POLL_MS):
                continue
            frames = self.read(self._stock.recv_multipart(*args, **kwargs))
            if frames is not None:
                return frames
