"""What decode and prefill say to each other, and how it travels beside stock messages.

    decode -> prefill   Hello       trailer frame on stock's registration message
                        Bind        trailer frame on stock's metadata message: the lease and
                                    the attempt that these destinations belong to
                        Abort       a message of its own: the owner of a lease gave up
                        Refusal     a message of its own: this request is not taken at all
    prefill -> decode   HelloAck    answers a Hello, and a Bind that expected another process
                        SuccessTag  trailer frame on stock's success: the lease it is of
                        AbortAck    answers an Abort
                        AttemptEnded  prefill ended a request without success

Stock peers must never see a message they cannot read: a stock prefill's receive thread dies of
one. So the first words travel as one extra frame behind a message that stock sends anyway, and
behind every frame of it that a release reads (`attach_trailer`). `Abort` and `Refusal` have no
such carrier: they go only to a rank that has sent a `HelloAck`. `HelloAck`, `SuccessTag` and
`AbortAck` go only to whoever spoke first, and `AttemptEnded` only to whoever said in its `Bind`
that it reads one. A request without trouble costs two frames, behind its destinations and behind
its success, and no message.

Wire format: one frame, `TAG` followed by a msgpack-encoded tagged struct. `Abort`, `Refusal`,
`HelloAck`, `AbortAck` and `AttemptEnded` travel alone, as a message of a single frame.

A receive thread must outlive whatever arrives. A message that claims to be ours and
is not readable, out of bounds or misplaced is `GARBAGE`: dropped as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from sglang_scaling_fixes.reclaim.rules.types import EndVerdict, Rank, Verdict

TAG = b"\x00ssf1\x00"
"""Opens every frame of ours. Stock frames open with ASCII digits, letters or packed
pointers; seven fixed bytes make an accidental match on a trailing frame negligible."""

MAX_FRAME_BYTES = 65536
"""Bytes. Ours have a few hundred."""

TRAILER_AT = 32
"""Frame index of a trailer from decode: far beyond any frame a stock prefill reads."""
KNOWN_TRAILER_AT = 10
"""The same behind destinations for a rank that is known to speak this: beyond any frame of
that message which a supported release reads, should it be replaced by a stock one."""

RankField = Annotated[Rank, Meta(max_length=256)]
Name = Annotated[str, Meta(max_length=256)]
"""A lease, attempt_id or incarnation."""
Address = Annotated[
    str, Meta(max_length=256, pattern=r"^tcp://(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}\Z")
]
"""`"tcp://ip:port"`. Whoever receives it connects to it."""
MAX_REASON = 4096
Room = Annotated[int, Meta(ge=0)]
"""Every room that stock's buffer of rooms takes: unsigned, 64 bits. A larger integer does not
exist in msgpack."""
Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Stock = Annotated[int, Meta(ge=0, le=TRAILER_AT)]
"""How many frames of the message are stock's (see `ride`)."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Decode's first word to a prefill rank, and again whenever it registers anew.

    `seq` numbers the Hellos from one decode rank to one prefill rank, from 1.
    """

    reply_to: Address
    rank: RankField
    stock: Stock = 0
    seq: Number = 0


class Bind(msgspec.Struct, frozen=True, tag="bind"):
    """These destinations belong to `lease` of the room in this message.

    `attempt_id` is common to all decode ranks that send destinations for one attempt.
    `expects` is the process that serves `rank` as far as decode knows: that one need
    not answer, so a request without trouble costs no message of ours. `pages`, `states`
    and `tokens`: what the destinations stand for (see `coverage.Extent`). `waited`: seconds
    since the request came to this decode, None from one that reads no `AttemptEnded`.
    """

    reply_to: Address
    rank: RankField
    lease: Name
    attempt_id: Name
    stock: Stock = 0
    expects: Name | None = None
    pages: Number = 0
    states: Annotated[tuple[Number, ...], Meta(max_length=64)] | None = None
    tokens: Number | None = None
    waited: Annotated[float, Meta(ge=0)] | None = None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """The owner of `lease` gave up: stop writing, and say when nothing is left."""

    reply_to: Address
    rank: RankField
    room: Room
    lease: Name


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """Decode takes no part in the request of this room, and has sent no destinations for it."""

    rank: RankField
    room: Room


class HelloAck(msgspec.Struct, frozen=True, tag="hello_ack"):
    """A prefill process with safe reclaim in force serves `rank`.

    `incarnation` is unique per process: a restarted prefill cannot vouch for
    writes its predecessor posted. `lease` echoes a Bind, `seq` a Hello.
    """

    rank: RankField
    incarnation: Name
    lease: Name | None = None
    seq: Number | None = None


class SuccessTag(msgspec.Struct, frozen=True, tag="success_tag"):
    """This success is of `lease`, by `rank`."""

    lease: Name
    rank: RankField


class AbortAck(msgspec.Struct, frozen=True, tag="abort_ack"):
    """What prefill can say of `lease`.

    `verdict` is "drained" (nothing posted, nothing will be), "writing" (the chunk in
    hand is being written; another answer follows), "poisoned" (a write failed in a way
    that may still land; `reason` says which) or "unknown" (this process never received
    the destinations and now never will accept them).
    """

    rank: RankField
    incarnation: Name
    lease: Name
    verdict: Verdict
    reason: Annotated[str, Meta(max_length=MAX_REASON)] = ""


class AttemptEnded(msgspec.Struct, frozen=True, tag="attempt_ended"):
    """Prefill ended the request of `lease` without success, unasked. Sent once.

    `verdict` as in an AbortAck, never "unknown". `reason` says why it ended.
    """

    rank: RankField
    incarnation: Name
    lease: Name
    verdict: EndVerdict
    reason: Annotated[str, Meta(max_length=MAX_REASON)] = ""


Message = Hello | Bind | Abort | Refusal | HelloAck | SuccessTag | AbortAck | AttemptEnded


class Garbage(Enum):
    """A message that opens like ours and is none."""

    GARBAGE = "garbage"


GARBAGE: Final = Garbage.GARBAGE

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
_FIELD = re.compile(r"\$\.(\w+)")
"""How msgspec names the field that it did not take."""


def encode(message: Message) -> bytes:
    """One frame."""
    return TAG + _encoder.encode(message)


def decode(frame: bytes) -> Message | Garbage | None:
    """The message in `frame`; None when the frame does not open with `TAG`."""
    if not frame.startswith(TAG):
        return None
    if len(frame) > MAX_FRAME_BYTES:
        return GARBAGE
    try:
        message: Message = _decoder.decode(memoryview(frame)[len(TAG) :])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return GARBAGE
    return message


def unsayable(message: Message) -> str:
    """Why whoever receives `message` could not read it, with the value; empty if it can."""
    try:
        if _decoder.decode(_encoder.encode(message)) == message:
            return ""
        why, fields = "it reads as another message", []
    except msgspec.ValidationError as error:
        why, fields = str(error), _FIELD.findall(str(error))
    except (msgspec.MsgspecError, OverflowError, TypeError, ValueError) as error:
        why, fields = str(error), [n for n in message.__struct_fields__ if not _encodes(message, n)]
    said = ", ".join(f"{name}={_shown(getattr(message, name))}" for name in fields)
    return f"{said or _shown(message)} ({why})"


def _encodes(message: Message, name: str) -> bool:
    try:
        _encoder.encode(getattr(message, name))
    except (msgspec.MsgspecError, OverflowError, TypeError, ValueError):
        return False
    return True


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def attach_trailer(frames: Sequence[bytes], message: Hello | Bind) -> list[bytes]:
    """Stock's message with ours behind it, at a position no stock release reads.

    A prefill of a newer release has more optional frames than a decode of an older
    one sends; right behind them ours would be taken for one. Empty frames between
    read as absent (contract-tested for every pair of releases). They are not free: ZMQ's
    binding lets go of the GIL for each. So a rank known to speak this gets few.
    """
    known = isinstance(message, Bind) and message.expects is not None
    padding = [b""] * ((KNOWN_TRAILER_AT if known else TRAILER_AT) - len(frames))
    trailer = msgspec.structs.replace(message, stock=len(frames))
    return [*frames, *padding, encode(trailer)]


def strip_trailer(frames: Sequence[bytes]) -> tuple[list[bytes], Message | Garbage | None]:
    """Separate a received multipart message into stock's frames and our part.

    Ours alone gives `([], message)`; a stock message without a trailer gives
    `(frames, None)`; garbage gives `([], GARBAGE)`, nothing of it is for stock.
    """
    message = decode(frames[-1]) if frames else None
    if message is None:
        if frames and frames[0].startswith(TAG):
            return [], GARBAGE  # something was put behind ours
        return list(frames), None
    ahead = frames[:-1]
    if isinstance(message, Hello | Bind):
        carried, padding = ahead[: message.stock], ahead[message.stock :]
        if len(carried) != message.stock or any(padding):
            return [], GARBAGE
        return list(carried), message
    if bool(ahead) != isinstance(message, SuccessTag):
        return [], GARBAGE
    return list(ahead), message
