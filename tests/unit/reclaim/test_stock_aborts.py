"""Stock's ABORT and its answers, as `--safe-reclaim-peer stock-ack` reads them."""

from __future__ import annotations

from sglang_scaling_fixes.reclaim.rules.stock_aborts import StockAborts

ABORT = [b"ABORT", b"7", b"10.0.0.1", b"5000"]


def aborts() -> StockAborts:
    found = StockAborts(first_wait=0.1)
    found.sent(7, "p0", ABORT)
    found.sent(7, "p1", ABORT)
    found.watch(7, expected=2)
    return found


def test_a_room_is_drained_once_every_rank_has_said_so() -> None:
    found = aborts()
    assert found.acked([b"ABORT_ACK", b"7", b"0"]) is None
    assert found.acked([b"ABORT_ACK", b"7", b"0"]) is None  # the same rank again
    assert found.acked([b"ABORT_ACK", b"7", b"1"]) == (7, 2)


def test_received_is_not_drained() -> None:
    found = aborts()
    assert found.acked([b"ABORT_ACK", b"7"]) is None
    assert found.acked([b"ABORT_ACK", b"7"]) is None


def test_answers_for_other_rooms_and_nonsense_change_nothing() -> None:
    found = aborts()
    assert found.acked([b"ABORT_ACK", b"8", b"0"]) is None
    assert found.acked([b"ABORT_ACK", b"seven", b"0"]) is None
    assert found.acked([b"ABORT_ACK", b"7" * 5000, b"0"]) is None
    found.forget(7)
    assert found.acked([b"ABORT_ACK", b"7", b"0"]) is None
    assert found.acked([b"ABORT_ACK", b"7", b"1"]) is None


def test_an_abort_is_repeated_with_backoff_until_its_slots_are_back() -> None:
    found = aborts()
    assert found.due(0.5) == []  # stock has just sent it
    assert [rank for rank, _ in found.due(0.6)] == ["p0", "p1"]
    assert found.due(0.7) == []
    assert found.due(0.81) == [("p0", ABORT), ("p1", ABORT)]
    found.forget(7)
    assert found.due(100.0) == []


def test_an_abort_of_a_room_that_holds_nothing_is_not_repeated() -> None:
    found = StockAborts(first_wait=0.1)
    found.sent(7, "p0", ABORT)
    assert found.due(1.0) == [] and found.due(10.0) == []


def test_a_room_aborted_without_slots_is_never_believed() -> None:
    """Its answer may be on its way while the room is used again, and names no attempt."""
    found = StockAborts(first_wait=0.1)
    found.unexposed(7)
    found.sent(7, "p0", ABORT)
    found.watch(7, expected=1)
    assert found.acked([b"ABORT_ACK", b"7", b"0"]) is None
    found.sent(8, "p0", ABORT)
    found.watch(8, expected=1)
    assert found.acked([b"ABORT_ACK", b"8", b"0"]) == (8, 1)
