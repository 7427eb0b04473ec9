"""The wire format: what is ours is told apart from what is stock's, whatever arrives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.reclaim import messages as m

MESSAGES = [
    m.Hello("tcp://127.0.0.1:1", "127.0.0.1:2"),
    m.Bind("tcp://127.0.0.1:1", "127.0.0.1:2", "g-1", "e-1"),
    m.Mark("g-1", "127.0.0.1:2"),
    m.Ask("tcp://127.0.0.1:1", "127.0.0.1:2", 2**63 - 1, "g-1"),
    m.Here("127.0.0.1:2", "inc"),
    m.Here("127.0.0.1:2", "inc", "g-1"),
    m.Answer("127.0.0.1:2", "inc", "g-1", "poisoned", "returned -1"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda x: type(x).__name__)
def test_round_trip_alone_and_as_a_trailer(message: m.Message) -> None:
    frame = m.encode(message)
    assert m.decode(frame) == message
    assert m.split([frame]) == ([], message)
    if isinstance(message, m.Hello | m.Bind):
        frames = m.ride([b"77", b"127.0.0.1"], message)
        assert len(frames) == m.TRAILER_AT + 1
        assert set(frames[2:-1]) == {b""}
    else:
        frames = [b"77", b"127.0.0.1", frame]
    stock, received = m.split(frames)
    assert stock == [b"77", b"127.0.0.1"]
    assert type(received) is type(message)


@given(st.lists(st.binary(max_size=64), max_size=12))
def test_stock_messages_pass_untouched(frames: list[bytes]) -> None:
    if frames and frames[-1].startswith(m.TAG):
        return
    assert m.split(frames) == (frames, None)


@given(st.binary(max_size=64))
def test_a_frame_with_our_tag_and_rubbish_is_left_to_stock(rubbish: bytes) -> None:
    decoded = m.decode(m.TAG + rubbish)
    if decoded is None:
        assert m.split([b"1", m.TAG + rubbish]) == ([b"1", m.TAG + rubbish], None)
