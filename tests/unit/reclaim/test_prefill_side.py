"""PrefillSide over a stand-in manager: senders that come, go and are forgotten."""

from __future__ import annotations

import gc
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.prefill import ends, side
from sglang_scaling_fixes.reclaim.prefill.ends import ABORTED
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide
from sglang_scaling_fixes.reclaim.rules.attempts import KEPT_BACK
from sglang_scaling_fixes.reclaim.rules.prefill_ledger import PrefillLedger

REPLY, RANK = "tcp://127.0.0.1:1", "127.0.0.1:2"
FAILED, SUCCESS = 0, 4


class Sender:
    conclude_state: int | None = None

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

    def bind(
        self, room: int, lease: str, expects: str | None = None, waited: float | None = None
    ) -> list[bytes] | None:
        stock = [str(room).encode(), b"127.0.0.1", b"1", b"s:1", b"\0" * 4, b"0", b"", b"1"]
        bind = messages.Bind(REPLY, RANK, lease, f"e-{lease}", expects=expects, waited=waited)
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


def test_messages_cost_nothing_for_those_that_wait(
    prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were tried one by one at each message: with 5,000 of one room 17 ms of a core."""
    held = [prefill.sender(room) for room in range(500) if prefill.bind(room, f"d-{room}")]
    assert len(held) == 500
    for room in range(500):
        assert prefill.bind(room, f"d-{500 + room}") is None
    assert len(prefill.guard._deferred) == 500
    tried: list[str] = []
    stock = PrefillLedger.bind

    def counted(ledger: Any, room: int, attempt_id: str, lease: str, *args: Any, **kw: Any) -> Any:
        tried.append(lease)
        return stock(ledger, room, attempt_id, lease, *args, **kw)

    monkeypatch.setattr(PrefillLedger, "bind", counted)
    for _ in range(100):
        assert prefill.guard._next_deferred() is None
    assert tried == []
    prefill.guard.retire(held[7])
    assert prefill.guard._next_deferred() is not None
    assert prefill.guard._next_deferred() is None
    assert tried == ["d-507"]


def test_destinations_whose_owner_gives_up_wait_no_longer(prefill: Prefill) -> None:
    """A client that retries at a room in use would fill the memory with messages."""
    prefill.bind(7, "d-1")
    first = prefill.sender(7)
    for n in range(2, 3000):
        assert prefill.bind(7, f"d-{n}") is None
        prefill.said.clear()
        abort = messages.Abort(REPLY, RANK, 7, f"d-{n}")
        assert prefill.guard.read([messages.encode(abort)]) is None
        acked, greeted = prefill.said
        assert (acked.verdict, greeted.lease) == ("unknown", f"d-{n}")
        assert not prefill.guard._deferred
    prefill.guard.retire(first)
    assert prefill.guard._next_deferred() is None


def test_too_many_that_wait_are_refused_and_counted(
    prefill: Prefill, caplog: pytest.LogCaptureFixture
) -> None:
    prefill.bind(7, "d-1")
    prefill.sender(7)
    for n in range(2, KEPT_BACK + 12):
        assert prefill.bind(7, f"d-{n}") is None
    stranger = [b"7", b"127.0.0.1", b"1", b"s:1", b"\0" * 4, b"0", b"", b"1"]
    assert prefill.guard.read(stranger) is None
    assert len(prefill.guard._deferred) == KEPT_BACK
    assert prefill.guard.report()["refused"] == 11
    assert caplog.text.count("room 7 is in use") == 1


def test_destinations_that_are_replaced_while_they_wait_leave_nothing(prefill: Prefill) -> None:
    prefill.bind(7, "d-1")
    first = prefill.sender(7)
    stranger = [b"7", b"127.0.0.1", b"1", b"s:1", b"\0" * 4, b"0", b"", b"1"]
    for _ in range(3):
        assert prefill.guard.read(stranger) is None
        assert prefill.bind(7, "d-2") is None
    assert len(prefill.guard._deferred) == 2
    prefill.guard.retire(first)
    assert prefill.guard._next_deferred() is not None
    prefill.guard._next_deferred()
    assert not prefill.guard._deferred


def test_one_whose_request_never_comes_is_closed_in_stock_too(prefill: Prefill) -> None:
    limit = prefill.guard._ledger._unserved_limit
    prefill.bind(1, "d-1")
    prefill.infos[1], prefill.status[1] = "destinations of d-1", 2
    for n in range(2, limit + 2):
        prefill.bind(n, f"d-{n}")
    assert 1 not in prefill.infos and prefill.status[1] == FAILED
    assert prefill.ask(1, "d-1") == "drained"
    prefill.sender(1)
    assert prefill.status[1] == FAILED, "it came after all, and ends at once"


def told(prefill: Prefill) -> list[tuple[str, str, str]]:
    ends = (m for m in prefill.said if isinstance(m, messages.AttemptEnded))
    return [(m.lease, m.verdict, m.reason) for m in ends]


def test_an_end_says_who_it_is_of_and_why(prefill: Prefill) -> None:
    own = prefill.guard._ledger.incarnation
    prefill.bind(7, "g1", waited=0.0)
    prefill.guard.ends.stopped(prefill.sender(7))
    assert [type(m) for m in prefill.said] == [messages.HelloAck, messages.AttemptEnded]
    assert prefill.said[1] == messages.AttemptEnded(RANK, own, "g1", "drained", ABORTED)
    assert prefill.guard.metrics.report()["endings_told"] == {"drained": 1}


def test_a_failure_is_told_with_stocks_words_and_a_success_is_not(prefill: Prefill) -> None:
    prefill.manager.failure_records = {7: "lost its session"}
    for room, status in ((7, FAILED), (8, SUCCESS)):
        prefill.bind(room, f"g{room}", waited=0.0)
        sender = prefill.sender(room)
        prefill.status[room] = status
        prefill.guard.ends.clearing(sender)
        if status == SUCCESS:  # its worker says so before
            attempt = prefill.guard._ledger.attempt_of("g8")
            assert attempt is not None
            attempt.reports(REPLY)
        prefill.guard.retire(sender)
    assert told(prefill) == [("g7", "drained", "lost its session")]


def test_it_is_told_when_the_worker_is_through_with_its_chunk(prefill: Prefill) -> None:
    prefill.bind(7, "g1", waited=0.0)
    sender = prefill.sender(7)
    waiting: Queue[Any] = Queue()
    tap = prefill.guard.tap_queue(waiting)
    chunk = SimpleNamespace(room=7, prefill_kv_indices=[3], is_last_chunk=False)
    prefill.guard.send(lambda *_: tap.put(chunk), sender, [3])
    assert tap.get() is chunk
    prefill.guard.ends.stopped(sender)
    assert told(prefill) == []
    tap.end()
    assert told(prefill) == [("g1", "drained", ABORTED)]


def test_a_room_that_decode_gave_up_is_forgotten(prefill: Prefill) -> None:
    """Stock says so to prefill. The next destinations of the room are another request's."""
    for gave_up in (False, True):
        prefill.said.clear()
        prefill.guard.ends.stopped(prefill.sender(7))
        if gave_up:
            assert prefill.guard.read([b"ABORT", b"7", b"127.0.0.1", b"1"]) is not None
        prefill.bind(7, f"g-{gave_up}", waited=1.0)
        assert bool(told(prefill)) is not gave_up


def test_destinations_kept_back_are_as_old_as_when_they_came(
    prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their request came while its room was in use, and ended before that was over."""
    now = 100.0
    clock = SimpleNamespace(monotonic=lambda: now)
    for module in (side, ends):
        monkeypatch.setattr(module, "time", clock)
    prefill.bind(7, "g1", waited=0.0)
    first, second = prefill.sender(7), prefill.sender(7)
    assert prefill.bind(7, "g2", waited=5.0) is None
    now = 200.0
    prefill.guard.ends.stopped(second)
    prefill.guard.retire(first)
    assert prefill.guard._next_deferred() is None
    assert ("g2", "drained", ABORTED) in told(prefill)
