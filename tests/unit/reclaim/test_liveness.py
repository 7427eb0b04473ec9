"""Gone, there, or nobody knows."""

from __future__ import annotations

import socket
import time

from sglang_scaling_fixes.reclaim.decode.liveness import Liveness, serves


def test_a_listening_port_is_alive_and_a_closed_one_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        rank = f"127.0.0.1:{server.getsockname()[1]}"
        assert serves(rank) is True
    assert serves(rank) is False


def test_what_cannot_be_reached_or_read_is_no_evidence() -> None:
    assert serves("127.0.0.1:not-a-port") is None
    assert serves("no.such.host.invalid:1") is None


def test_looking_happens_in_the_background() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        rank = f"127.0.0.1:{server.getsockname()[1]}"
    liveness = Liveness()
    liveness.look([rank])
    deadline = time.monotonic() + 120
    while not liveness.gone(rank) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert liveness.gone(rank)


def test_a_rank_that_is_served_again_is_not_gone() -> None:
    liveness = Liveness()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    rank = f"127.0.0.1:{port}"
    liveness._look([rank])
    assert liveness.gone(rank)
    liveness._look(["no.such.host.invalid:1", rank])
    assert liveness.gone(rank)
    with socket.create_server(("127.0.0.1", port)):
        liveness._look([rank])
    assert not liveness.gone(rank)
