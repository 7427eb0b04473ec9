"""Several threads of a prefill send to one decode rank, and no message gets into another."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from sglang_scaling_fixes.reclaim.prefill.interposers import StatusInterposer

ENDPOINT = "tcp://127.0.0.1:1"
THREADS, EACH = 6, 3000
LEDGER: Any = SimpleNamespace()
"""Nothing is in hand, so it is asked for nothing."""


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def send_from_threads(count: int, each: int, socket: Any, lock: Any) -> None:
    """As stock's threads do: each asks for the socket, then sends a message of its own."""

    def send(number: int) -> None:
        for message in range(each):
            interposer = StatusInterposer(lambda: socket, ENDPOINT, LEDGER, lock)
            interposer.send_multipart([b"%d" % number, b"%d" % message, b"%d" % number])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def whole(message: list[bytes]) -> bool:
    return len(message) == 3 and message[0] == message[2]


@pytest.mark.usefixtures("switching")
def test_no_frame_gets_into_another_message() -> None:
    context = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket in (pull, push):
        socket.setsockopt(zmq.LINGER, 0)
    pull.setsockopt(zmq.RCVTIMEO, 60_000)
    push.connect(f"tcp://127.0.0.1:{pull.bind_to_random_port('tcp://127.0.0.1')}")
    sender = threading.Thread(
        target=send_from_threads, args=(THREADS, EACH, push, threading.Lock())
    )
    sender.start()
    try:
        arrived = [pull.recv_multipart() for _ in range(THREADS * EACH)]
        sender.join()
    finally:
        context.destroy(linger=0)
    assert sum(not whole(message) for message in arrived) == 0
    assert Counter(message[0] for message in arrived) == {b"%d" % n: EACH for n in range(THREADS)}


class FrameByFrame:
    """A socket at which two threads take turns after each frame, as ZMQ lets them."""

    def __init__(self) -> None:
        self.arrived: list[list[bytes]] = []
        self._turn = threading.Barrier(2)
        self._message: list[bytes] = []

    def send_multipart(self, frames: list[bytes]) -> None:
        for frame in frames:
            self._turn.wait(60)
            self._message.append(frame)
            self._turn.wait(60)
        self.arrived.append(self._message)
        self._message = []


def test_without_the_lock_frames_get_into_another_message() -> None:
    """The control."""
    socket = FrameByFrame()
    send_from_threads(2, 1, socket, nullcontext())
    assert not any(whole(message) for message in socket.arrived)


def test_stock_closes_a_socket_only_while_nobody_sends_on_it() -> None:
    """From 0.5.14 stock's `_connect` closes one that was disconnected, and makes another."""
    lock = threading.Lock()
    sockets: list[SimpleNamespace] = []

    def connect() -> SimpleNamespace:
        assert lock.locked()
        if not sockets or sockets[-1].disconnected:
            for old in sockets:
                old.closed = True
            sockets.append(SimpleNamespace(closed=False, disconnected=False, sent=[]))
            sockets[-1].send_multipart = sockets[-1].sent.append
        return sockets[-1]

    first = StatusInterposer(connect, ENDPOINT, LEDGER, lock)
    sockets[0].disconnected = True
    second = StatusInterposer(connect, ENDPOINT, LEDGER, lock)
    assert sockets[0].closed
    first.send_multipart([b"1"])
    second.send_multipart([b"2"])
    assert [socket.sent for socket in sockets] == [[], [[b"1"], [b"2"]]]
