"""What may arrive at a receive thread: never raises, never frees, is counted.

The guards are real, over stand-ins for stock's manager. What they pass on to stock
is what stock would have got without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import messages as m
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide
from sglang_scaling_fixes.reclaim.transport import ReplySockets

REPLY, RANK = "tcp://127.0.0.1:1", "127.0.0.1:2"
STOCK = [b"7", b"127.0.0.1", b"1", b"s:1", b"\0" * 4, b"0", b"", b"1"]
REGISTRATION = [b"None", *STOCK[1:]]
SUCCESS = [b"7", b"4", b"0"]


@pytest.fixture
def guards() -> Iterator[tuple[DecodeSide, PrefillSide]]:
    saved = DecodeSide.current, PrefillSide.current
    yield decode_guard(), prefill_guard()
    DecodeSide.current, PrefillSide.current = saved


def decode_guard() -> DecodeSide:
    """With one exposure held, of a rank that is known."""
    guard = DecodeSide(
        SimpleNamespace(
            server_socket=SimpleNamespace(),
            local_ip="127.0.0.1",
            rank_port=1,
            kv_args=SimpleNamespace(state_types=[]),
            request_status={},
            prefill_response_tracker={},
        ),
        Config(),
    ).install()
    guard.peers.outgoing(RANK, lambda: (None, None), REGISTRATION)
    held, waits = (guard.ledger.expose(room, [RANK]) for room in (7, 8))
    for exposure in (held, waits):
        guard.ledger.sent(exposure, RANK)
    guard.ledger.hello_acked(RANK, "process", held.lease, 1)
    guard.ledger.give_up(held, now=0.0)
    return guard


def prefill_guard() -> PrefillSide:
    """With one attempt bound."""
    guard = PrefillSide(
        SimpleNamespace(
            engine=SimpleNamespace(),
            transfer_queues=[],
            request_status={},
            transfer_infos={},
            decode_kv_args_table={},
            record_failure=lambda room, reason: None,
            update_status=lambda room, status: None,
        )
    ).install()
    guard._replies = SimpleNamespace(send=lambda to, frame: True)  # type: ignore[assignment]
    assert guard.read(m.attach_trailer(STOCK, m.Bind(REPLY, RANK, "g1", "e1"))) == STOCK
    return guard


def valid(lease: str) -> list[list[bytes]]:
    """Messages as they should be, of either direction."""
    return [
        m.attach_trailer(REGISTRATION, m.Hello(REPLY, RANK, seq=2)),
        m.attach_trailer(STOCK, m.Bind(REPLY, RANK, "g2", "e2")),
        m.attach_trailer(STOCK, m.Bind(REPLY, RANK, "g3", "e3", expects="process")),
        m.attach_trailer(STOCK, m.Bind(REPLY, RANK, "g4", "e4", waited=0.5)),
        [m.encode(m.Abort(REPLY, RANK, 7, "g1"))],
        [m.encode(m.HelloAck(RANK, "process", lease, 1))],
        [m.encode(m.AbortAck(RANK, "process", lease, "drained"))],
        [m.encode(m.AttemptEnded(RANK, "process", lease, "drained"))],
        [*SUCCESS, m.encode(m.SuccessTag(lease, RANK))],
    ]


VALUES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.just("x" * 1000),
    st.just("tcp://no such host:1"),
    st.lists(st.integers(0, 3), max_size=3),
)


@st.composite
def mutated(draw: st.DrawFn) -> list[bytes]:
    """A valid message with a frame cut, changed, dropped, repeated or put elsewhere."""
    frames = list(draw(st.sampled_from(valid("nobody's"))))
    at = draw(st.integers(0, len(frames) - 1))
    frame = frames[at]
    kind = draw(st.sampled_from(["cut", "flip", "drop", "repeat", "move", "append", "alone"]))
    if kind == "cut":
        frames[at] = frame[: draw(st.integers(0, len(frame)))]
    elif kind == "flip" and frame:
        i = draw(st.integers(0, len(frame) - 1))
        frames[at] = frame[:i] + bytes([frame[i] ^ draw(st.integers(1, 255))]) + frame[i + 1 :]
    elif kind == "drop":
        del frames[at]
    elif kind == "repeat":
        frames.insert(at, frame)
    elif kind == "move":
        frames.insert(draw(st.integers(0, len(frames) - 1)), frames.pop(at))
    elif kind == "append":
        frames.append(draw(st.binary(max_size=20)))
    elif kind == "alone":
        frames = frames[-1:]
    return frames


@st.composite
def wrong_fields(draw: st.DrawFn) -> list[bytes]:
    """A valid message in which fields are of other types, lengths and values."""
    *ahead, last = draw(st.sampled_from(valid("nobody's")))
    fields: dict[str, Any] = msgspec.msgpack.decode(last[len(m.TAG) :])
    for name in draw(st.sets(st.sampled_from(sorted(fields)), min_size=1)):
        fields[name] = draw(VALUES)
    return [*ahead, m.TAG + msgspec.msgpack.encode(fields)]


RUBBISH = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.binary(max_size=40).map(lambda rest: m.TAG + rest),
        st.sampled_from([b"AUX_DATA", b"4", b"7", b"9" * 5000, b"\xb2", b"None", b"-1"]),
    ),
    max_size=12,
)
ARRIVES = st.one_of(RUBBISH, mutated(), wrong_fields())
fuzzed = settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(arrives=ARRIVES)
def test_decode_outlives_it_and_frees_nothing(arrives: list[bytes], guards: Any) -> None:
    guard = guards[0]
    before = {e.lease: len(e.unproven) for e in guard.ledger.exposures()}
    assert set(before.values()) == {1}
    counted = guard.metrics.report()["garbage"] + guard.metrics.report()["stale"]
    passed = guard.inbox.read(list(arrives))
    assert {e.lease: len(e.unproven) for e in guard.ledger.exposures()} == before
    assert set(guard.ledger.peers) == {RANK}
    if passed is not None:
        assert passed and passed == arrives[: len(passed)]
        assert not any(frame.startswith(m.TAG) for frame in (passed[0], passed[-1]))
    elif not isinstance(m.strip_trailer(arrives)[1], m.HelloAck):
        assert guard.metrics.report()["garbage"] + guard.metrics.report()["stale"] == counted + 1


@fuzzed
@given(arrives=ARRIVES)
def test_prefill_outlives_it_and_vouches_for_nothing(arrives: list[bytes]) -> None:
    saved = PrefillSide.current
    try:
        guard = prefill_guard()
    finally:
        PrefillSide.current = saved
    sent: list[tuple[str, Any]] = []
    guard._replies = SimpleNamespace(  # type: ignore[assignment]
        send=lambda to, frame: sent.append((to, m.decode(frame)))
    )
    attempt = guard._ledger.attempt_of("g1")
    assert attempt is not None
    guard._ledger.sender_made("sender", 7)
    assert guard._ledger.take(attempt)
    passed = guard.read(list(arrives))
    assert attempt.active == 1
    for _, said in sent:
        assert isinstance(said, m.HelloAck | m.AbortAck)
        if isinstance(said, m.AbortAck) and said.lease == "g1":
            assert said.verdict == "writing"
    if passed is not None:
        assert passed == arrives[: len(passed)]
    elif not isinstance(m.strip_trailer(arrives)[1], m.Abort | m.Bind | m.Refusal):
        assert guard.metrics.report()["garbage"] == 1 or guard._deferred


def test_what_is_dropped_is_counted(guards: tuple[DecodeSide, PrefillSide]) -> None:
    decode, prefill = guards
    rubbish = [m.TAG + b"rubbish"]
    huge = [m.TAG + b"\0" * (m.MAX_FRAME_BYTES + 1)]
    for frames in (rubbish, huge, [*STOCK, *rubbish], []):
        assert decode.inbox.read(frames) is None
        assert prefill.read(frames) is None
    assert decode.metrics.report()["garbage"] == prefill.metrics.report()["garbage"] == 4
    ours, theirs = m.HelloAck("elsewhere:1", "inc"), m.Abort(REPLY, RANK, 7, "g1")
    for message in (ours, theirs):
        assert decode.inbox.read([m.encode(message)]) is None
    assert prefill.read([m.encode(ours)]) is None
    assert (decode.metrics.report()["garbage"], prefill.metrics.report()["garbage"]) == (6, 5)
    assert prefill.read(STOCK[:5]) is None, "destinations cut short"
    assert prefill.read(m.attach_trailer(STOCK[:5], m.Bind(REPLY, RANK, "g2", "e2"))) is None
    assert prefill.read(m.attach_trailer(STOCK, m.Hello(REPLY, RANK))) is None, (
        "a Hello on destinations"
    )
    assert prefill.metrics.report()["garbage"] == 8


def test_the_genuine_answer_still_frees(guards: tuple[DecodeSide, PrefillSide]) -> None:
    guard = guards[0]
    (held,) = guard.ledger.held
    stale = m.encode(m.AbortAck(RANK, "process", "older", "drained"))
    assert guard.inbox.read([stale]) is None
    assert held.unproven and guard.metrics.report()["stale"] == 1
    assert guard.inbox.read([m.encode(m.AbortAck(RANK, "process", held.lease, "drained"))]) is None
    assert not held.unproven
    assert guard.metrics.report()["garbage"] == 0


def test_a_hello_is_answered_with_its_number(
    guards: tuple[DecodeSide, PrefillSide],
) -> None:
    decode, prefill = guards
    said: list[bytes] = []
    prefill._replies = SimpleNamespace(  # type: ignore[assignment]
        send=lambda to, frame: said.append(frame)
    )
    hello = decode.peers.outgoing(RANK, lambda: (None, None), REGISTRATION)
    assert not decode.ledger.peers
    assert prefill.read(hello) == REGISTRATION
    assert decode.inbox.read(said) is None
    assert set(decode.ledger.peers) == {RANK}
    here = m.decode(said[0])
    assert isinstance(here, m.HelloAck) and here.seq == 2


def test_replies_to_addresses_that_are_none_are_not_sent() -> None:
    sockets = ReplySockets(limit=3)
    for to in ("nonsense", "tcp://", "tcp://127.0.0.1", "carrier-pigeon://x:1"):
        assert not sockets.send(to, b"x")
    assert not sockets._sockets


def test_replies_keep_so_many_sockets_and_no_more() -> None:
    sockets = ReplySockets(limit=3)
    pull: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
    pull.setsockopt(zmq.RCVTIMEO, 20_000)
    live = f"tcp://127.0.0.1:{pull.bind_to_random_port('tcp://127.0.0.1')}"
    try:
        for port in range(1, 100):
            sockets.send(f"tcp://127.0.0.1:{port}", b"x")  # nobody there
            assert sockets.send(live, b"%d" % port)
            assert len(sockets._sockets) <= 3
            assert live in sockets._sockets, "the one in use stays"
        assert [pull.recv() for _ in range(99)] == [b"%d" % port for port in range(1, 100)]
    finally:
        pull.close(linger=0)
