"""PrefillSide over a stand-in manager: senders that come, go and are forgotten."""

from __future__ import annotations

import gc
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide

REPLY, RANK = "tcp://127.0.0.1:1", "127.0.0.1:2"
FAILED, SUCCESS = 0, 4


class Sender:
    def __init__(self, room: int) -> None:
        self.bootstrap_room = room


class Prefill:
    """What a guard needs of stock's manager, and what it says to decode."""

    def __init__(self) -> None:
        self.status: dict[int, int] = {}
        self.infos: dict[int, Any] = {}
        self.manager = SimpleNamespace(
            engine=SimpleNamespace(),
            kv_args=SimpleNamespace(state_types=[], kv_data_ptrs=[1]),
            transfer_queues=[],
            request_status=self.status,
            transfer_infos=self.infos,
            decode_kv_args_table={},
            record_failure=lambda room, reason: None,
            update_status=self.status.__setitem__,
        )
        self.guard = PrefillSide(self.manager).install()
        self.said: list[Any] = []
        self.guard._replies = SimpleNamespace(  # type: ignore[assignment]
            send=lambda to, frame: self.said.append(messages.decode(frame))
        )

    def bind(self, room: int, lease: str, expects: str | None = None) -> list[bytes] | None:
        stock = [str(room).encode(), b"127.0.0.1", b"1", b"s:1", b"\0" * 4, b"0", b"", b"1"]
        bind = messages.Bind(REPLY, RANK, lease, f"e-{lease}", expects=expects)
        return self.guard.read(messages.attach_trailer(stock, bind))

    def ask(self, room: int, lease: str) -> str:
        ask = messages.Abort(REPLY, RANK, room, lease)
        assert self.guard.read([messages.encode(ask)]) is None
        return str(self.said[-1].verdict)

    def sender(self, room: int) -> Sender:
        sender = Sender(room)
        self.status[room] = 1
        self.guard.sender_made(sender)
        return sender


@pytest.fixture
def prefill() -> Any:
    saved = PrefillSide.current
    yield Prefill()
    PrefillSide.current = saved


def test_destinations_meant_for_this_process_cost_no_message(prefill: Prefill) -> None:
    own = prefill.guard._ledger.incarnation
    assert prefill.bind(7, "g1", own) is not None
    first = prefill.sender(7)
    assert prefill.bind(7, "g2", own) is None, "its room is in use"
    prefill.guard.retire(first)
    assert prefill.guard._next_deferred() is not None
    assert prefill.said == []
    for room, expects in enumerate((None, "its predecessor"), 8):
        assert prefill.bind(room, f"g{room}", expects) is not None
        assert prefill.said.pop() == messages.HelloAck(RANK, own, f"g{room}")


def test_an_abort_before_the_request_arrives_ends_it_when_it_does(prefill: Prefill) -> None:
    prefill.bind(7, "g1")
    assert prefill.ask(7, "g1") == "drained"
    sender = prefill.sender(7)
    assert prefill.status[7] == FAILED
    assert not prefill.guard.busy(sender)


def test_a_room_that_succeeded_is_not_failed_by_a_late_abort(prefill: Prefill) -> None:
    prefill.bind(7, "g1")
    sender = prefill.sender(7)
    prefill.status[7] = SUCCESS
    assert prefill.ask(7, "g1") == "drained"
    assert prefill.status[7] == SUCCESS
    assert not prefill.guard.busy(sender)


def test_a_reused_room_waits_for_the_sender_before_it(prefill: Prefill) -> None:
    prefill.bind(7, "g1")
    first = prefill.sender(7)
    prefill.infos[7] = "destinations of g1"
    assert prefill.bind(7, "g2") is None
    assert prefill.guard._next_deferred() is None
    prefill.guard.retire(first)
    assert prefill.guard._next_deferred() is not None
    assert 7 not in prefill.infos


def test_a_sender_stock_drops_without_clearing_does_not_pin_its_room(prefill: Prefill) -> None:
    """Several abort paths of stock never clear the sender."""
    prefill.bind(7, "g1")
    sender = prefill.sender(7)
    assert prefill.ask(7, "g1") == "drained"
    assert prefill.bind(7, "g2") is None
    del sender
    gc.collect()
    assert prefill.guard._next_deferred() is not None


def test_a_rank_without_destinations_is_no_stranger(
    prefill: Prefill, caplog: pytest.LogCaptureFixture
) -> None:
    """MLA: ranks that write nothing get an empty message, and stock still counts on them."""
    stock = [b"7", b"127.0.0.1", b"1", b"s:1", b"", b"", b"", b"1"]
    assert prefill.guard.read(stock) == stock
    assert "runs without safe-reclaim" not in caplog.text
    sender = prefill.sender(7)
    assert prefill.guard.send(lambda *_: prefill.guard.put(None), sender, []) is not None
    stranger = [b"8", b"127.0.0.1", b"1", b"s:1", b"\0" * 4, b"0", b"", b"1"]
    assert prefill.guard.read(stranger) == stranger
    assert "runs without safe-reclaim" in caplog.text


def test_a_worker_that_dies_holds_the_answer_no_longer(prefill: Prefill) -> None:
    """Stock's worker ends at any exception: no `get` of it will end the chunk in hand."""
    prefill.bind(7, "g1")
    sender = prefill.sender(7)
    waiting: Queue[Any] = Queue()
    tap = prefill.guard.tap_queue(waiting)
    chunk = SimpleNamespace(room=7, prefill_kv_indices=[3], is_last_chunk=True)
    prefill.guard.send(lambda *_: tap.put(chunk), sender, [3])

    def worker(manager: Any, queue: Any, executor: Any) -> None:
        del manager, executor
        queue.get()
        assert prefill.guard.busy(sender)
        raise RuntimeError("as stock's does")

    with pytest.raises(RuntimeError):
        prefill.guard.work(worker, prefill.manager, waiting, None)
    assert not prefill.guard.busy(sender)
    assert prefill.ask(7, "g1") == "drained"
