"""The wire format: what is ours is told apart from what is stock's, whatever arrives."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.reclaim import messages as m

REPLY, RANK = "tcp://127.0.0.1:1", "127.0.0.1:2"
MESSAGES = [
    m.Hello(REPLY, RANK),
    m.Hello("tcp://[::1]:1", RANK, seq=3),
    m.Bind(REPLY, RANK, "g-1", "e-1"),
    m.Bind(REPLY, RANK, "g-1", "e-1", expects="inc"),
    m.SuccessTag("g-1", RANK),
    m.Abort(REPLY, RANK, 2**63 - 1, "g-1"),
    m.HelloAck(RANK, "inc"),
    m.HelloAck(RANK, "inc", "g-1"),
    m.HelloAck(RANK, "inc", seq=3),
    m.AbortAck(RANK, "inc", "g-1", "poisoned", "returned -1"),
    m.Bind(REPLY, RANK, "g-1", "e-1", waited=0.5),
    m.AttemptEnded(RANK, "inc", "g-1", "drained", "aborted on prefill"),
]
LONG = "x" * 300
OUT_OF_BOUNDS = [
    m.Hello("127.0.0.1:1", RANK),
    m.Hello("ipc:///tmp/x", RANK),
    m.Hello("tcp://127.0.0.1:1;tcp://127.0.0.1:2", RANK),
    m.Hello("tcp://*:1", RANK),
    m.Hello("tcp://127.0.0.1:1\n", RANK),
    m.Hello(f"tcp://{LONG}:1", RANK),
    m.Hello(REPLY, LONG),
    m.Hello(REPLY, RANK, seq=-1),
    m.Bind(REPLY, RANK, LONG, "e-1"),
    m.Bind(REPLY, RANK, "g-1", LONG),
    m.Bind(REPLY, RANK, "g-1", "e-1", expects=LONG),
    m.Bind(REPLY, RANK, "g-1", "e-1", stock=-1),
    m.Bind(REPLY, RANK, "g-1", "e-1", stock=m.TRAILER_AT + 1),
    m.SuccessTag(LONG, RANK),
    m.Abort(REPLY, RANK, -1, "g-1"),
    m.HelloAck(RANK, LONG),
    m.HelloAck(RANK, "inc", seq=-1),
    m.AbortAck(RANK, "inc", "g-1", "gone"),  # type: ignore[arg-type]
    m.AbortAck(RANK, "inc", "g-1", "poisoned", "x" * 5000),
    m.AbortAck(RANK, "inc", "g-1", "poisoned", "x" * m.MAX_FRAME_BYTES),
    m.Bind(REPLY, RANK, "g-1", "e-1", waited=-0.5),
    m.AttemptEnded(RANK, "inc", "g-1", "unknown"),  # type: ignore[arg-type]
    m.AttemptEnded(RANK, "inc", LONG, "drained"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_round_trip(message: m.Message) -> None:
    frame = m.encode(message)
    assert m.decode(frame) == message
    if isinstance(message, m.Hello | m.Bind):
        frames = m.attach_trailer([b"77", b"127.0.0.1"], message)
        known = isinstance(message, m.Bind) and message.expects == "inc"
        assert len(frames) == 1 + (m.KNOWN_TRAILER_AT if known else m.TRAILER_AT)
        assert set(frames[2:-1]) == {b""}
        stock, received = m.strip_trailer(frames)
        assert stock == [b"77", b"127.0.0.1"]
        assert type(received) is type(message)
    elif isinstance(message, m.SuccessTag):
        assert m.strip_trailer([b"77", b"4", b"0", frame]) == ([b"77", b"4", b"0"], message)
    else:
        assert m.strip_trailer([frame]) == ([], message)


@pytest.mark.parametrize("message", OUT_OF_BOUNDS, ids=lambda x: type(x).__name__)
def test_out_of_bounds_is_garbage(message: m.Message) -> None:
    assert m.decode(m.encode(message)) is m.GARBAGE


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_in_the_wrong_place_is_garbage(message: m.Message) -> None:
    frame = m.encode(message)
    assert m.strip_trailer([frame, b"1"]) == ([], m.GARBAGE)
    if isinstance(message, m.Hello | m.Bind):
        more = msgspec.structs.replace(message, stock=3)
        assert m.strip_trailer([b"77", b"x", m.encode(more)]) == ([], m.GARBAGE), (
            "fewer than it says"
        )
        less = msgspec.structs.replace(message, stock=1)
        assert m.strip_trailer([b"77", b"x", m.encode(less)]) == ([], m.GARBAGE), (
            "it cuts stock's off"
        )
    elif isinstance(message, m.SuccessTag):
        assert m.strip_trailer([frame]) == ([], m.GARBAGE)
    else:
        assert m.strip_trailer([b"77", frame]) == ([], m.GARBAGE)


def test_peers_of_before_the_numbers_are_understood() -> None:
    """A Hello without a number, a HelloAck without an echo, a Bind to whoever gets it."""

    def bare(kind: str, **fields: object) -> bytes:
        return m.TAG + msgspec.msgpack.encode({"type": kind, **fields})

    hello = m.decode(bare("hello", reply_to=REPLY, rank=RANK, stock=2))
    assert isinstance(hello, m.Hello) and hello.seq == 0
    bind = m.decode(bare("bind", reply_to=REPLY, rank=RANK, lease="g", attempt_id="e", stock=2))
    assert isinstance(bind, m.Bind) and bind.expects is None
    assert bind.waited is None, "it reads no AttemptEnded, and is sent none"
    here = m.decode(bare("hello_ack", rank=RANK, incarnation="inc"))
    assert isinstance(here, m.HelloAck) and here.seq is None
    newer = m.decode(bare("hello_ack", rank=RANK, incarnation="inc", more=1))
    assert newer == here, "what we do not know yet is skipped"


@given(st.lists(st.binary(max_size=64), max_size=12))
def test_stock_messages_pass_untouched(frames: list[bytes]) -> None:
    if frames and (frames[-1].startswith(m.TAG) or frames[0].startswith(m.TAG)):
        return
    assert m.strip_trailer(frames) == (frames, None)


@given(st.binary(max_size=64))
def test_our_tag_and_rubbish_is_garbage(rubbish: bytes) -> None:
    if m.decode(m.TAG + rubbish) is m.GARBAGE:
        assert m.strip_trailer([b"1", m.TAG + rubbish]) == ([], m.GARBAGE)
