"""Gone, there, or nobody knows."""

from __future__ import annotations

import socket
import time

from sglang_scaling_fixes.reclaim.liveness import Liveness, refused


def test_a_listening_port_is_alive_and_a_closed_one_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        rank = f"127.0.0.1:{server.getsockname()[1]}"
        assert not refused(rank)
    assert refused(rank)


def test_what_cannot_be_reached_or_read_is_no_evidence() -> None:
    assert not refused("127.0.0.1:not-a-port")
    assert not refused("no.such.host.invalid:1")


def test_looking_happens_in_the_background() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        rank = f"127.0.0.1:{server.getsockname()[1]}"
    liveness = Liveness()
    liveness.look([rank])
    deadline = time.monotonic() + 10
    while not liveness.gone(rank) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert liveness.gone(rank)
