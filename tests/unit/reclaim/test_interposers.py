"""The interposers: stock's objects behave as before, and the ledger sees every chunk and write."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes.reclaim.interposers import ReceivingSocket
from sglang_scaling_fixes.reclaim.prefill.interposers import (
    IN_HAND,
    EngineInterposer,
    ExecutorInterposer,
    QueueInterposer,
    StatusInterposer,
)
from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.reclaim.rules.coverage import Extent
from sglang_scaling_fixes.reclaim.rules.prefill_ledger import PrefillLedger

REPLY, RANK = "tcp://127.0.0.1:1", "127.0.0.1:2"


class Books:
    """A prefill ledger as the interposers see it."""

    def __init__(self) -> None:
        self.ledger = PrefillLedger("p")
        self.answers: list[Any] = []
        for room in (1, 2):
            extent = Extent("s:1", 1, ())
            self.ledger.bind(room, f"e{room}", f"g{room}", REPLY, RANK, extent=extent)
            self.ledger.sender_made(f"sender {room}", room)

    def put(self, chunk: Any) -> Attempt | None:
        return self.ledger.put(f"sender {chunk.room}")

    def busy(self, room: int) -> bool:
        return self.ledger.busy(f"sender {room}")

    def take(self, attempt: Attempt, chunk: Any) -> bool:
        return self.ledger.take(attempt, chunk.pages, last=True)

    def opened(self, attempt: Attempt) -> None:
        self.ledger.opened(attempt)

    def wrote(self, attempt: Attempt, session: str) -> None:
        attempt.coverage.writes.append(session)

    def mark(self, to: str, attempt: Attempt) -> bytes:
        assert to == REPLY
        return attempt.attempt_id.encode()

    def success_leaves(self, to: str, attempt: Attempt) -> bool:
        return not attempt.poisoned

    def wrote_aux(self, to: str, attempt: Attempt) -> None:
        pass

    def done(self, attempt: Attempt) -> None:
        self.answers += self.ledger.done(attempt)

    def failed(self, attempt: Attempt, reason: str) -> None:
        self.answers += self.ledger.failed(attempt, reason)

    def ask(self, room: int, lease: str) -> None:
        self.answers += self.ledger.abort(room, lease, REPLY, RANK)


class Queue(deque):
    put = deque.append

    def get(self) -> Any:
        return self.popleft()


@pytest.fixture
def books() -> Iterator[Books]:
    IN_HAND.attempt = None
    yield Books()
    IN_HAND.attempt = None  # this thread's, in which the next test may work


def chunk(room: int) -> Any:
    return SimpleNamespace(room=room, pages=1)


def verdicts(books: Books) -> list[str]:
    """The last words: "writing" comes before them."""
    said = [a.verdict for a in books.answers if hasattr(a, "verdict")]
    return [verdict for verdict in said if verdict != "writing"]


def test_a_chunk_in_hand_holds_the_answer_until_the_next_get(books: Books) -> None:
    queue = QueueInterposer(Queue(), books)
    queue.put(chunk(1))
    queue.put(chunk(2))
    assert queue.get().room == 1
    books.ask(1, "g1")
    assert verdicts(books) == []
    assert queue.get().room == 2
    assert verdicts(books) == ["drained"]


def test_queued_chunks_of_an_aborted_room_never_reach_the_worker(books: Books) -> None:
    queue = QueueInterposer(Queue(), books)
    queue.put(chunk(1))
    queue.put(chunk(2))
    books.ask(1, "g1")
    assert verdicts(books) == ["drained"]
    assert queue.get().room == 2
    queue.put(chunk(1))
    assert not queue._stock


def test_stocks_request_to_end_passes(books: Books) -> None:
    queue = QueueInterposer(Queue(), books)
    queue.put(chunk(1))
    queue.put(None)
    assert queue.get().room == 1
    assert queue.get() is None
    assert not books.busy(1)


def test_a_task_that_outlives_its_chunk_holds_the_answer(books: Books) -> None:
    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        queue, executor = QueueInterposer(Queue(), books), ExecutorInterposer(pool, books)
        queue.put(chunk(1))
        queue.put(chunk(2))
        queue.get()
        future = executor.submit(release.wait)
        queue.get()  # the worker moved on, as stock does after a first failure
        books.ask(1, "g1")
        assert verdicts(books) == []
        release.set()
        future.result()
    assert verdicts(books) == ["drained"]


def test_a_cancelled_task_is_counted_as_ended(books: Books) -> None:
    block = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(block.wait)
        queue, executor = QueueInterposer(Queue(), books), ExecutorInterposer(pool, books)
        queue.put(chunk(1))
        queue.put(chunk(2))
        queue.get()
        assert executor.submit(print).cancel()
        queue.get()
        block.set()
    assert not books.busy(1)


@pytest.mark.parametrize("status", [-1, 1])
def test_a_failed_write_poisons_the_room_in_hand(books: Books, status: int) -> None:
    engine = EngineInterposer(
        SimpleNamespace(batch_transfer_sync=lambda *_: status, get_session_id=lambda: "s"), books
    )
    queue = QueueInterposer(Queue(), books)
    queue.put(chunk(1))
    queue.put(chunk(2))
    queue.get()
    assert engine.batch_transfer_sync("s", [], [], []) == status
    assert engine.get_session_id() == "s"
    queue.get()
    books.ask(1, "g1")
    assert verdicts(books) == ["poisoned"]


def test_a_write_in_a_pool_thread_is_charged_to_its_room(books: Books) -> None:
    engine = EngineInterposer(SimpleNamespace(batch_transfer_sync=lambda *_: -1), books)
    with ThreadPoolExecutor(1) as pool:
        queue, executor = QueueInterposer(Queue(), books), ExecutorInterposer(pool, books)
        queue.put(chunk(1))
        queue.put(chunk(2))
        queue.get()
        executor.submit(engine.batch_transfer_sync, "s", [], [], []).result()
        queue.get()
    books.ask(1, "g1")
    assert verdicts(books) == ["poisoned"]


def test_a_write_that_raises_poisons_and_raises(books: Books) -> None:
    def broken(*_: Any) -> int:
        raise OSError("gone")

    engine = EngineInterposer(SimpleNamespace(batch_transfer_sync=broken), books)
    queue = QueueInterposer(Queue(), books)
    queue.put(chunk(1))
    attempt_chunk = queue.get()
    assert attempt_chunk.room == 1
    with pytest.raises(OSError, match="gone"):
        engine.batch_transfer_sync("s", [], [], [])
    assert IN_HAND.attempt is not None
    assert IN_HAND.attempt.poisoned == "batch_transfer_sync raised OSError"


class Once:
    """Mooncake's own engine, as it is where there are RDMA devices; stock's calls are not used."""

    def __init__(self, batch: int = 7, status: int = 0, *, broken: bool = False) -> None:
        self.engine = self
        self.batch, self.status, self.broken = batch, status, broken
        self.submitted: list[tuple[Any, ...]] = []

    def batch_transfer_async_write(self, *write: Any) -> int:
        self.submitted.append(write)
        return self.batch

    def get_batch_transfer_status(self, batches: list[int]) -> int:
        assert batches == [self.batch]
        if self.broken:
            raise RuntimeError("gone")
        return self.status

    def transfer_sync(self, *_: Any) -> int:
        raise AssertionError("Mooncake would submit it again by itself")

    batch_transfer_sync = transfer_sync


@pytest.mark.parametrize(
    ("stock", "status"),
    [(Once(), 0), (Once(status=-1), -1), (Once(batch=0), -1), (Once(broken=True), -1)],
    ids=["landed", "failed", "not submitted", "status raises"],
)
def test_one_submission_and_what_comes_of_it(books: Books, stock: Once, status: int) -> None:
    engine = EngineInterposer(stock, books, once=True)
    attempt = IN_HAND.attempt = books.put(chunk(1))
    assert attempt is not None
    assert engine.batch_transfer_sync("s", [1, 2], [3, 4], [5, 6]) == status
    assert engine.transfer_sync("s", 1, 3, 5) == status
    assert stock.submitted == [("s", [1, 2], [3, 4], [5, 6]), ("s", [1], [3], [5])]
    assert attempt.poisoned == ("" if status == 0 else f"batch_transfer_sync returned {status}")


class Outgoing:
    def __init__(self) -> None:
        self.sent: list[list[bytes]] = []

    def send_multipart(self, frames: list[bytes]) -> None:
        self.sent.append(frames)


def status_socket(stock: Any, books: Books) -> StatusInterposer:
    return StatusInterposer(lambda: stock, REPLY, books, threading.Lock())


SUCCESS, FAILURE = [b"1", b"4", b"0"], [b"1", b"0", b"0"]


def test_a_success_leaves_with_the_generation_of_the_attempt_in_hand(books: Books) -> None:
    stock = Outgoing()
    socket = status_socket(stock, books)
    socket.send_multipart(SUCCESS)
    IN_HAND.attempt = books.put(chunk(1))
    for frames in (SUCCESS, FAILURE, [b"CHUNK_READY", b"4", b"0"]):
        socket.send_multipart(frames)
    assert stock.sent == [SUCCESS, [*SUCCESS, b"e1"], FAILURE, [b"CHUNK_READY", b"4", b"0"]]


def test_a_metadata_message_leaves_with_the_generation_too(books: Books) -> None:
    """Poisoned or not: it is no success, and only a late one is to be told apart."""
    stock = Outgoing()
    attempt = IN_HAND.attempt = books.put(chunk(1))
    assert attempt is not None
    aux = [b"AUX_DATA", b"1", b"0", b"3", b"\0\0\0\1", b"x"]
    status_socket(stock, books).send_multipart(aux)
    books.failed(attempt, "returned -1")
    status_socket(stock, books).send_multipart(aux)
    assert stock.sent == [[*aux, b"e1"]] * 2


def test_a_success_after_a_failed_write_leaves_as_a_failure(books: Books) -> None:
    """0.5.12 sends success although a state transfer of the room failed."""
    stock = Outgoing()
    attempt = IN_HAND.attempt = books.put(chunk(1))
    assert attempt is not None
    books.failed(attempt, "returned -1")
    status_socket(stock, books).send_multipart(SUCCESS)
    assert stock.sent == [FAILURE]


class Socket:
    def __init__(self, *incoming: list[bytes]) -> None:
        self.incoming = deque(incoming)

    def recv_multipart(self) -> list[bytes]:
        return self.incoming.popleft()

    def poll(self, timeout: int) -> int:
        return len(self.incoming)


def test_ours_is_swallowed_and_stocks_is_returned() -> None:
    tap = ReceivingSocket(
        Socket([b"ours"], [b"stock"]), lambda frames: None if frames == [b"ours"] else frames
    )
    assert tap.recv_multipart() == [b"stock"]


def test_a_deferred_message_is_delivered_while_the_socket_is_silent() -> None:
    waiting: list[list[bytes]] = [[b"later"]]
    polls = 0

    def deferred() -> list[bytes] | None:
        nonlocal polls
        polls += 1
        return waiting.pop() if polls == 3 else None

    tap = ReceivingSocket(Socket(), lambda frames: frames, deferred, lambda: bool(waiting))
    assert tap.recv_multipart() == [b"later"]
