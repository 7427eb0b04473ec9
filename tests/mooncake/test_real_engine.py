"""P4 and P3 against the real Mooncake, over TCP and over RDMA verbs in software: what a fence
stops, and what nothing else does."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_scaling_fixes.lab.verbs import Transport
from tests.mooncake.engines import SIZE, SMALL
from tests.mooncake.processes import Process, processes
from tests.verbs.needs import verbs_in_software

TRIES = 5


@pytest.fixture(params=["tcp", pytest.param("rdma", marks=verbs_in_software)])
def transport(request: pytest.FixtureRequest) -> Transport:
    found: Transport = request.param
    return found


def interrupted(transport: Transport, mode: str, once: str = "stock") -> dict[str, Any]:
    """A long write, interrupted by `mode`; then small ones, to where the receiver was and is now.

    A write that was over before the receiver came to it shows nothing, and is made again.
    """
    for _ in range(TRIES):
        with processes(transport, mode, once) as (receiver, sender):
            target = receiver.heard()
            assert sender.heard() == {"ready": True}
            sender.tell({**target, "size": SIZE})
            assert receiver.heard() == {"begun": True}
            with sender.stopped():
                receiver.tell("on")
                found: dict[str, Any] = receiver.heard()
            found["long"] = sender.heard()
            receiver.tell("late")
            found |= receiver.heard()
            if found["landed"] + found["late"] == 0 or found["landed"] == SIZE:
                continue
            sender.tell({**target, "size": SMALL})
            found["old session"] = sender.heard()
            to = {"session": found["session"], "address": found["address"]}
            sender.tell({**to, "size": SMALL})
            found["new session"] = sender.heard()
            receiver.tell("count")
            return found | receiver.heard()
    raise AssertionError(f"no write was under way in {TRIES} tries")


def test_a_buffer_whose_registration_was_renewed_is_still_written(transport: Transport) -> None:
    """The control. Over TCP a registration is looked at when a write begins, not while it lands;
    over RDMA the sender fetches the new key and posts again by itself."""
    assert interrupted(transport, "renew")["late"] > 0


@verbs_in_software
def test_over_rdma_nothing_lands_in_a_buffer_that_is_not_registered() -> None:
    assert interrupted("rdma", "unregister")["late"] == 0


def test_nothing_lands_behind_a_fence_and_the_new_session_works(transport: Transport) -> None:
    found = interrupted(transport, "fence")
    assert found["late"] == 0
    assert found["long"]["status"] != 0
    assert found["old session"]["status"] != 0
    assert found["new session"]["status"] == 0
    assert found["small"] == SMALL


def test_a_transfer_under_way_lands_whole_while_another_engine_takes_over(
    transport: Transport,
) -> None:
    """Nobody in flight is ended; then the old session is gone, and the new one works."""
    with processes(transport, "switch", "stock") as (receiver, sender):
        target = receiver.heard()
        assert sender.heard() == {"ready": True}
        sender.tell({**target, "size": SIZE})
        assert receiver.heard() == {"begun": True}
        receiver.tell("switch")
        new = receiver.heard()
        assert new["session"] != target["session"]
        assert sender.heard()["status"] == 0, "the long write"
        sender.tell({**new, "size": SMALL})
        assert sender.heard()["status"] == 0
        receiver.tell("retire")
        assert receiver.heard() == {"long": SIZE}
        assert receiver.heard() == {"retired": True}


def test_one_submission_says_the_same_as_stocks_call(transport: Transport) -> None:
    """What a prefill with RDMA devices uses, so that 0 is never a second try's."""
    found = interrupted(transport, "fence", once="once")
    assert found["long"] == {"status": -1, "failures": 1}
    assert found["old session"]["status"] == -1
    assert found["new session"] == {"status": 0, "failures": 2}
    assert found["small"] == SMALL


@pytest.mark.parametrize("door", ["open", "shut"])
def test_a_fence_sees_everything_closed_that_the_engine_had_opened(
    transport: Transport, door: str
) -> None:
    process = Process(transport, "leave", door)
    try:
        found = process.heard()
    finally:
        process.end()
    assert found["opened"] >= 2  # over TCP: one for handshakes, one for data
    if door == "open":
        assert "not closed whole" in found["error"]
    else:
        assert found["again"] == found["opened"]
