"""A decode server whose first messages that say "stop" never leave it.

What a lost message looks like (a peer's full queue, a broken connection): stock
sends its ABORT once and ignores what becomes of it. Loaded only where
SGLANG_SCALING_FIXES_LAB_LOSE gives a number: so many are lost per room and kind.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

MODULE = "zmq"
_ABORT = b"ABORT"


def attacher(count: int, lost: Callable[[int], None]) -> Callable[[ModuleType], None]:
    """A hook for `MODULE`: `lost(room)` is called for each message that is dropped."""

    def attach(module: ModuleType) -> None:
        socket: Any = module.Socket
        stock_send = socket.send_multipart
        dropped: Counter[tuple[str, int]] = Counter()

        @functools.wraps(stock_send)
        def send_multipart(self: Any, frames: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            stop = stop_message(frames)
            if stop is not None and dropped[stop] < count:
                dropped[stop] += 1
                lost(stop[1])
                return None
            return stock_send(self, frames, *args, **kwargs)

        socket.send_multipart = send_multipart

    return attach


def stop_message(frames: Sequence[Any]) -> tuple[str, int] | None:
    """Kind and room of a message that asks prefill to stop; None for any other."""
    first = bytes(frames[0]) if frames and isinstance(frames[0], bytes | memoryview) else b""
    if first == _ABORT and len(frames) > 1:
        return "ABORT", int(bytes(frames[1]))
    if len(frames) == 1 and first[:1] == b"\x00":
        from sglang_scaling_fixes.reclaim import messages  # msgspec: a server's, not the lab's

        message = messages.decode(first)
        if isinstance(message, messages.Abort):
            return "Abort", message.room
    return None


def count() -> int:
    """How many messages to lose per room and kind in this process."""
    from sglang_scaling_fixes.lab.runtime import LOSE

    return int(os.environ.get(LOSE) or 0)
