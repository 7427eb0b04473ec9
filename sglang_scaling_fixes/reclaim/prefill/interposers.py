"""What stands between stock prefill and its queue, thread pool, engine and sockets to decode.

The ledger sees every chunk and every write. Some things are changed on the way: chunks of a
closed attempt are dropped, a success that is none leaves as a failure, and where Mooncake would
submit a failed batch again by itself a write is submitted once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Protocol

from sglang_scaling_fixes.passthrough import Passthrough
from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.reclaim.stock_wire import AUX_DATA, FAILED_FRAME, is_success


class SuccessLedger(Protocol):
    """What is known of an attempt whose success is about to leave (see `reclaim.prefill`).

    `to`: the decode rank's endpoint, as stock connects to it.
    """

    def mark(self, to: str, attempt: Attempt) -> bytes | None: ...
    def success_leaves(self, to: str, attempt: Attempt) -> bool: ...
    def wrote_aux(self, to: str, attempt: Attempt) -> None: ...


class StatusInterposer(Passthrough):
    """Prefill's socket to one decode rank: a success leaves with its lease, and so does a
    metadata slot's content that goes by message.

    Stock's messages name only the room. Sent by the worker that wrote the last
    chunk, so the attempt is the one in hand; if a write of it failed on the way
    (stock ignores some), or what was written is not all that this rank exposed
    (see `coverage`), the success is not one and leaves as a failure.

    Stock has one socket to each decode rank, and sends on it from its workers, its receive thread
    and its scheduler. ZMQ's sockets are not for several threads: up to 0.5.16 frames of one
    message got into another, or the process ended. So every use of the socket, and stock's
    `connect`, which may close it and make another, is under the `lock` of that decode rank.
    """

    def __init__(
        self, connect: Callable[[], Any], to: str, ledger: SuccessLedger, lock: threading.Lock
    ) -> None:
        with lock:
            super().__init__(connect())
        self._connect = connect
        self._to = to
        self._ledger = ledger
        self._lock = lock

    def send_multipart(self, frames: list[bytes], *args: Any, **kwargs: Any) -> Any:
        attempt = IN_HAND.attempt
        if attempt is not None and (frames[0] == AUX_DATA or is_success(frames)):
            if frames[0] == AUX_DATA:
                self._ledger.wrote_aux(self._to, attempt)
            elif not self._ledger.success_leaves(self._to, attempt):
                frames = [frames[0], FAILED_FRAME, *frames[2:]]
                return self._send(frames, *args, **kwargs)
            if (trailer := self._ledger.mark(self._to, attempt)) is not None:
                frames = [*frames, trailer]
        return self._send(frames, *args, **kwargs)

    def _send(self, frames: list[bytes], *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            if getattr(self._stock, "closed", False):  # by another thread's `connect`
                self._stock = self._connect()
            return self._stock.send_multipart(frames, *args, **kwargs)


class ChunkLedger(Protocol):
    """What the queue, executor and engine interposers tell (see `reclaim.prefill`)."""

    def put(self, chunk: Any) -> Attempt | None: ...
    def take(self, attempt: Attempt, chunk: Any) -> bool: ...
    def opened(self, attempt: Attempt) -> None: ...
    def wrote(self, attempt: Attempt, session: str) -> None: ...
    def done(self, attempt: Attempt) -> None: ...
    def failed(self, attempt: Attempt, reason: str) -> None: ...


class InHand(threading.local):
    """The attempt the current thread is writing for, None outside a transfer."""

    attempt: Attempt | None = None


IN_HAND = InHand()


class QueueInterposer(Passthrough):
    """A transfer queue: a chunk is counted from `get` until the same worker's next `get`.

    That holds in every release because a worker handles one chunk at a time. Chunks
    of a closed attempt are dropped here, before the worker can write them.
    """

    def __init__(self, stock: Any, ledger: ChunkLedger) -> None:
        super().__init__(stock)
        self._ledger = ledger

    def put(self, chunk: Any) -> None:
        if chunk is None:  # stock's request to the worker to end
            self._stock.put(None)
        elif (attempt := self._ledger.put(chunk)) is not None:
            self._stock.put((attempt, chunk))

    def end(self) -> None:
        """This thread's chunk is no longer being processed."""
        previous, IN_HAND.attempt = IN_HAND.attempt, None
        if previous is not None:
            self._ledger.done(previous)

    def get(self) -> Any:
        self.end()
        while True:
            item = self._stock.get()
            if item is None:
                return None
            attempt, chunk = item
            if self._ledger.take(attempt, chunk):
                IN_HAND.attempt = attempt
                return chunk


class ExecutorInterposer(Passthrough):
    """The worker's thread pool: a task may outlive the chunk that submitted it.

    Releases up to 0.5.18 return at the first failed task while its siblings run.
    """

    def __init__(self, stock: Executor, ledger: ChunkLedger) -> None:
        super().__init__(stock)
        self._ledger = ledger

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        attempt = IN_HAND.attempt
        if attempt is None:
            return self._stock.submit(fn, *args, **kwargs)  # type: ignore[no-any-return]

        def task() -> Any:
            IN_HAND.attempt = attempt
            try:
                return fn(*args, **kwargs)
            finally:
                IN_HAND.attempt = None

        self._ledger.opened(attempt)
        try:
            future: Future[Any] = self._stock.submit(task)
        except BaseException:
            self._ledger.done(attempt)
            raise
        future.add_done_callback(lambda _: self._ledger.done(attempt))
        return future


class EngineInterposer(Passthrough):
    """Mooncake's transfer engine: what its results prove, and what they leave open.

    A status other than 0 means a write may still run: its time-out and its failure
    path both return with tasks possibly alive, so either poisons the attempt ("still
    open", until a fence). With `once` (Mooncake would retry on its own, see
    `release.mooncake_retries`) a write is submitted exactly once and waited for: with
    stock's call, 0 may be the second try's, while tasks of the first are on the wire.
    """

    WRITES = ("batch_transfer_sync", "transfer_sync")

    def __init__(self, stock: Any, ledger: ChunkLedger, *, once: bool = False) -> None:
        super().__init__(stock)
        self._ledger = ledger
        submitted: dict[str, Callable[..., int]] = {}
        if once:
            submitted = {"batch_transfer_sync": self._once, "transfer_sync": self._once_one}
        for name in self.WRITES:
            if hasattr(stock, name):
                setattr(self, name, self._watched(submitted.get(name, getattr(stock, name)), name))

    def _once(
        self, session: str, sources: list[int], targets: list[int], lengths: list[int]
    ) -> int:
        """Stock's batch write in one submission: 0 all of it landed, -1 it may still land."""
        raw = self._stock.engine
        try:
            batch = raw.batch_transfer_async_write(session, sources, targets, lengths)
            return int(raw.get_batch_transfer_status([batch])) if batch else -1
        except Exception:  # as stock's own call: a failed write, not the end of its worker
            return -1

    def _once_one(self, session: str, source: int, target: int, length: int) -> int:
        return self._once(session, [source], [target], [length])

    def _watched(self, write: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(session: str, *args: Any, **kwargs: Any) -> Any:
            attempt = IN_HAND.attempt
            try:
                status = write(session, *args, **kwargs)
            except BaseException as error:
                if attempt is not None:
                    self._ledger.failed(attempt, f"{name} raised {type(error).__name__}")
                raise
            if attempt is not None:
                if status == 0:
                    self._ledger.wrote(attempt, session)
                else:
                    self._ledger.failed(attempt, f"{name} returned {status}")
            return status

        return watched
