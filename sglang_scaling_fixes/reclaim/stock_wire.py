"""What stock's own messages look like, as far as both roles read or change them."""

from __future__ import annotations

from sglang_scaling_fixes import kv_poll

SUCCESS_FRAME, FAILED_FRAME = (str(state).encode() for state in (kv_poll.SUCCESS, kv_poll.FAILED))
"""Stock's states as they stand in a status message."""

AUX_DATA = b"AUX_DATA"
"""Opens stock's message with the content of a metadata slot (SGLANG_MOONCAKE_SEND_AUX_TCP)."""

SESSION_FRAME = 3
"""Where both of stock's messages to prefill name decode's session (contract-tested)."""

PAGES_FRAME, PAGE_BYTES = 4, 4
"""Where stock's metadata message has the destination pages, and the bytes of each
(contract-tested)."""


def is_number(frame: bytes) -> bool:
    """Digits that `int` reads as a room, slot or port: no more than 20 of them."""
    return len(frame) <= 20 and frame.isdigit()


def is_room(frame: bytes) -> bool:
    """A room as stock's buffer of rooms takes it: unsigned, 64 bits."""
    return is_number(frame) and int(frame) < 2**64


def is_success(frames: list[bytes]) -> bool:
    """Stock's `[room, status, prefill rank, ...]` with KVPoll.Success."""
    return len(frames) >= 3 and frames[1] == SUCCESS_FRAME and is_room(frames[0])


def is_metadata(frames: list[bytes]) -> bool:
    """A room and at least the 7 frames behind it that every release sends with destinations."""
    return len(frames) >= 8 and is_room(frames[0])
