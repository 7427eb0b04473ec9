"""Which of stock's messages the receive threads of this release can read.

Most of them end at the first message that they cannot: a frame too many, a word where a number
should be. Such messages arrive. Up to 0.5.16 several threads of a prefill without the plugin send
on one socket, and frames of one message get into another. So a message is let through only in
the shape that this release reads; whatever it does not is `False` here, for the caller to count.

Nothing reads a version number. A release that has `parse_kv_status_message` outlives a status of
another shape; destinations and registrations are read by the release's own classes first; and a
kind of message that is not known here passes if the release's own code names it.
"""

from __future__ import annotations

import functools
import inspect
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from sglang_scaling_fixes import kv_poll
from sglang_scaling_fixes.reclaim.stock_wire import (
    AUX_DATA,
    FAILED_FRAME,
    SUCCESS_FRAME,
    is_metadata,
    is_number,
    is_room,
)

_TAG = re.compile(rb"[A-Z][A-Z_]{2,}")
"""How stock spells kinds of messages."""
_INTEGER = re.compile(rb"-?[0-9]{1,20}")
_WAITING_FRAME = str(kv_poll.WAITING).encode()
"""From 0.5.22, with deferred allocation, prefill says that it waits."""


@dataclass(frozen=True)
class _Kind:
    """Frames behind the tag, by what stock makes of them. Fewer than `least` end its thread."""

    least: int
    integers: tuple[int, ...]
    words: tuple[int, ...] = ()
    staged: bool = False
    """Stock asserts that its staging handler is there."""

    def fits(self, frames: list[bytes]) -> bool:
        there = len(frames)
        return (
            there >= self.least
            and all(_INTEGER.fullmatch(frames[i]) for i in self.integers if i < there)
            and all(frames[i].isascii() for i in self.words if i < there)
        )


_TO_DECODE = {
    b"CHUNK_READY": _Kind(6, (1, 2, 3, 4), (5,), staged=True),
    b"STAGING_REQ": _Kind(5, (1, 2, 3, 5), (4,), staged=True),
    b"ABORT_ACK": _Kind(2, (1, 2, 3)),
}
_TO_PREFILL = {
    b"WATERMARK": _Kind(3, (1, 2), (3,)),
    b"STAGING_RSP": _Kind(7, (1, 2, 3, 4, 5), (6,)),
    b"ABORT": _Kind(4, (1, 3, 4), (2,)),
    b"BOOTSTRAP": _Kind(4, (1, 3), (2,)),
}


def decode_reads(manager: Any, frames: list[bytes]) -> bool:
    """Can the receive thread of this decode's stock manager read `frames`?"""
    kind = frames[0]
    if kind.isdigit():
        return _is_status(manager, frames)
    if kind == AUX_DATA:
        return _is_metadata_slot(manager.kv_args, frames)
    known = _TO_DECODE.get(kind)
    if known is not None and not known.fits(frames):
        return False
    if known is not None and known.staged and getattr(manager, "_staging_handler", None) is None:
        return False
    return _lenient(manager.__class__) or (kind not in _TO_PREFILL and _named(manager, kind))


def prefill_reads(manager: Any, frames: list[bytes]) -> bool:
    """The same of a prefill's."""
    kind = frames[0]
    if kind.isdigit():
        return is_metadata(frames) and _reads(manager, "TransferInfo", frames)
    if kind == b"None":  # a registration: stock reads ten frames and more of it
        return len(frames) >= 10 and _reads(manager, "KVArgsRegisterInfo", frames)
    known = _TO_PREFILL.get(kind)
    if known is not None and not known.fits(frames):
        return False
    return kind != AUX_DATA and kind not in _TO_DECODE and _named(manager, kind)


def _is_status(manager: Any, frames: list[bytes]) -> bool:
    """Room, status and prefill rank; where a release outlives more, a reason behind a failure."""
    lenient = _lenient(manager.__class__)
    if len(frames) != 3 and not (lenient and len(frames) == 4 and frames[1] == FAILED_FRAME):
        return False
    says = (SUCCESS_FRAME, FAILED_FRAME, *((_WAITING_FRAME,) if lenient else ()))
    return is_room(frames[0]) and frames[1] in says and is_number(frames[2])


def _is_metadata_slot(kv_args: Any, frames: list[bytes]) -> bool:
    """Tag, room, number of the buffer, metadata slot, length, content: it is copied as it is."""
    if len(frames) != 6 or not (is_room(frames[1]) and all(map(is_number, frames[2:4]))):
        return False
    if len(frames[4]) != 4 or struct.unpack(">I", frames[4])[0] != len(frames[5]):
        return False
    lengths = getattr(kv_args, "aux_item_lens", None)
    number = int(frames[2])
    return lengths is None or (number < len(lengths) and len(frames[5]) <= lengths[number])


def _reads(manager: Any, name: str, frames: list[bytes]) -> bool:
    """Does the release's own class of this name read the message?"""
    if (reader := _class(manager.__class__, name)) is None:
        return True
    try:
        reader.from_zmq(frames)
    except Exception:  # whatever it is, stock's thread would end of it
        return False
    return True


def _named(manager: Any, kind: bytes) -> bool:
    """Does the release's own code name this kind of message?"""
    names = _names(manager.__class__)
    return _TAG.fullmatch(kind) is not None and (not names or kind in names)


@functools.cache
def _lenient(manager: Any) -> bool:
    return hasattr(manager, "parse_kv_status_message")


@functools.cache
def _class(manager: Any, name: str) -> Any:
    found = (function.__globals__.get(name) for function in _functions(manager))
    return next((cls for cls in found if cls is not None), None)


@functools.cache
def _names(manager: Any) -> frozenset[bytes]:
    """Constants in the code of a manager's class and in the modules that it is written in.

    Of a class that receives nothing, none.
    """
    found: set[Any] = set()
    if not hasattr(manager, "start_decode_thread"):
        return frozenset()
    for function in _functions(manager):
        found.update(_constants(function.__code__))
        found.update(v for v in function.__globals__.values() if isinstance(v, bytes))
    texts = (c.encode() for c in found if isinstance(c, str) and c.isascii())
    return frozenset([*texts, *(c for c in found if isinstance(c, bytes))])


def _functions(manager: Any) -> Iterator[FunctionType]:
    for cls in manager.__mro__:
        for function in vars(cls).values():
            if isinstance(function, FunctionType):
                yield inspect.unwrap(function)  # of our own wrapper


def _constants(code: CodeType) -> Iterator[Any]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _constants(constant)
        elif isinstance(constant, str | bytes):
            yield constant
