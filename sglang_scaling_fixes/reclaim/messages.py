"""What decode and prefill say to each other, and how it travels beside stock messages.

    decode -> prefill   Hello   trailer frame on stock's registration message
                        Bind    trailer frame on stock's metadata message (the
                                destinations of one attempt, with its generation)
                        Ask     a message of its own: "room aborted; is it drained?"
    prefill -> decode   Here    answer to Hello and Bind: "I speak this, and I am
                                this process"
                        Answer  answer to Ask

Stock peers must never see a message they cannot read: a stock prefill's receive
thread dies of one. So the first words ride as one extra trailing frame on a
message stock sends anyway, far behind every frame a release reads (`ride`), and
`Ask`, which has no such carrier, goes only to a rank
that has answered `Here`. `Here`, `Mark` and `Answer` go only to whoever spoke first.

Wire format: one frame, `TAG` followed by a msgpack-encoded tagged struct. `Ask`,
`Here` and `Answer` travel alone as a single-frame message.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

TAG = b"\x00ssf1\x00"
"""Opens every frame of ours. Stock frames open with ASCII digits, letters or packed
pointers; seven fixed bytes make an accidental match on a trailing frame negligible,
and a frame that matches but does not decode is left to stock."""

TRAILER_AT = 32
"""Frame index of a trailer from decode: beyond any frame a stock prefill reads."""

Rank = str
"""A prefill rank as decode addresses it: `"ip:port"` of its ZMQ endpoint."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Decode's first word to a prefill rank. `reply_to` is `"tcp://ip:port"`.

    `stock` counts the frames of the message that are stock's (see `ride`).
    """

    reply_to: str
    rank: Rank
    stock: int = 0


class Bind(msgspec.Struct, frozen=True, tag="bind"):
    """These destinations belong to generation `gen` of the room in this message.

    `epoch` is common to all decode ranks that send destinations for one attempt.
    """

    reply_to: str
    rank: Rank
    gen: str
    epoch: str
    stock: int = 0


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """The owner of generation `gen` gave up: stop writing, and say when nothing is left."""

    reply_to: str
    rank: Rank
    room: int
    gen: str


class Here(msgspec.Struct, frozen=True, tag="here"):
    """A prefill process with safe reclaim in force serves `rank`.

    `incarnation` is unique per process: a restarted prefill cannot vouch for
    writes its predecessor posted. `gen` echoes a Bind, None for a Hello.
    """

    rank: Rank
    incarnation: str
    gen: str | None = None


class Mark(msgspec.Struct, frozen=True, tag="mark"):
    """This success is of generation `gen`, by `rank`."""

    gen: str
    rank: Rank


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """What prefill can say of `gen`.

    `verdict` is "drained" (nothing posted, nothing will be), "poisoned" (a write
    failed in a way that may still land; `reason` says which) or "unknown" (this
    process never received the destinations and now never will accept them).
    """

    rank: Rank
    incarnation: str
    gen: str
    verdict: str
    reason: str = ""


Message = Hello | Bind | Ask | Here | Mark | Answer

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """One frame."""
    return TAG + _encoder.encode(message)


def decode(frame: bytes) -> Message | None:
    """The message in `frame`, or None when the frame is not (readably) ours."""
    if not frame.startswith(TAG):
        return None
    try:
        message: Message = _decoder.decode(memoryview(frame)[len(TAG) :])
    except msgspec.MsgspecError:
        return None
    return message


def ride(frames: Sequence[bytes], message: Hello | Bind) -> list[bytes]:
    """Stock's message with ours behind it, at a position no stock release reads.

    A prefill of a newer release has more optional frames than a decode of an older
    one sends; right behind them ours would be taken for one. Empty frames between
    read as absent (contract-tested for every pair of releases).
    """
    padding = [b""] * (TRAILER_AT - len(frames))
    trailer = msgspec.structs.replace(message, stock=len(frames))
    return [*frames, *padding, encode(trailer)]


def split(frames: Sequence[bytes]) -> tuple[list[bytes], Message | None]:
    """Separate a received multipart message into stock's frames and our part.

    Ours alone gives `([], message)`; a stock message without a trailer gives
    `(frames, None)`.
    """
    message = decode(frames[-1]) if frames else None
    if message is None:
        return list(frames), None
    if isinstance(message, Hello | Bind):
        return list(frames[: message.stock]), message
    return list(frames[:-1]), message
