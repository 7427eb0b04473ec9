"""A prefill process: the real guard, and in place of stock its threads, one step at a time.

    receive thread   `hear`, `listen`
    scheduler        `arrive`, `send`, `end`, `drop`
    worker           `run`: up to the next write it waits for, or the end of its chunk

A write is on the wire before the guard's engine is called, and that returns at once: it does
nothing before the write.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np

from sglang_scaling_fixes.kv_poll import FAILED, SUCCESS, TRANSFERRING, WAITING
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.prefill.interposers import IN_HAND, StatusInterposer
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide

from .decode import BOOTSTRAPPING, update_status
from .wire import Harm, Incoming, Network, Request, Silent, Write


class Sender:
    """Stock's sender: what the guard knows it by."""

    conclude_state: int | None = None

    def __init__(self, room: int) -> None:
        self.bootstrap_room = room


@dataclass(eq=False)
class Served:
    """A request at prefill."""

    request: Request
    sender: Sender
    sent: int = 0
    """Pages handed over."""
    whole: bool = True
    """False once its prompt was rejected: a placeholder of one token takes its place."""

    @property
    def pages(self) -> int:
        return self.request.pages if self.whole else 1


@dataclass(eq=False)
class Destinations:
    """What stock's receive thread keeps of a message with destinations."""

    session: str
    to: str
    pages: list[int]
    request: Request


class Prefill:
    """One process at one prefill rank."""

    def __init__(
        self, network: Network, rank: int, decode: Any, requests: list[Request], *, looks: bool
    ) -> None:
        self.network, self.rank, self.requests, self.looks = network, rank, requests, looks
        """`looks`: its worker looks at a room's state before it writes, as since 0.5.13; without
        it takes no notice of a failed write either."""
        self.status: dict[int, int] = {}
        self.infos: dict[int, dict[str, Destinations]] = {}
        self.registered: set[str] = set()
        self.dead: set[str] = set()
        """Sessions given up after a failed write."""
        self.served: list[Served] = []
        self.chunks: deque[Any] = deque()
        self._incoming = Incoming()
        self._result = 0
        queue = SimpleNamespace(put=self.chunks.append, get=self._next)
        self.manager = SimpleNamespace(
            engine=SimpleNamespace(batch_transfer_sync=lambda *_: self._result),
            server_socket=self._incoming,
            kv_args=SimpleNamespace(state_types=[], kv_data_ptrs=[1]),
            transfer_queues=[queue],
            request_status=self.status,
            transfer_infos=self.infos,
            decode_kv_args_table={},
            record_failure=lambda room, reason: None,
            update_status=lambda room, status: update_status(self.status, room, status),
        )
        self.guard = PrefillSide(self.manager).install()
        self.guard.tap_socket()
        self.queue = self.guard.tap_queue(queue)
        assert self.guard.protects(self.manager)
        self._replies, self._statuses = network.connect(decode), network.connect(decode)
        self.guard._replies = SimpleNamespace(send=self._reply)  # type: ignore[assignment]
        self.reported: set[str] = set()
        """Leases that a success has left for."""
        self.hand: Any = None
        """Of the worker's thread."""
        self.worker = self._work()
        self.waits: Write | None = None
        """The write that the worker waits for."""
        self.run()

    def _reply(self, to: str, frame: bytes) -> None:
        del to
        message = messages.decode(frame)
        if isinstance(message, messages.AttemptEnded) and message.lease in self.reported:
            raise Harm(f"{message.lease} is told to have ended, after its success")
        self._replies.send_multipart([frame])

    def _next(self) -> Any:
        if not self.chunks:
            raise Silent
        return self.chunks.popleft()

    # -- receive thread -------------------------------------------------------------------

    def hear(self, frames: list[bytes]) -> None:
        self._incoming.queue.append(frames)
        self.listen()

    def listen(self) -> None:
        """The receive thread reads until it would block."""
        try:
            while True:
                self._received(self.manager.server_socket.recv_multipart())
        except Silent:
            return

    def _received(self, frames: list[bytes]) -> None:
        if frames[0] == b"ABORT":
            room = int(frames[1])
            if self.status.get(room) not in (None, SUCCESS):
                update_status(self.status, room, FAILED)
            self._statuses.send_multipart([b"ABORT_ACK", frames[1]])
            return
        session = frames[3].decode()
        if frames[0] == b"None":
            self.registered.add(session)
            self.dead.discard(session)
            return
        pages = np.frombuffer(frames[4], np.int32).tolist()
        to = f"tcp://{frames[1].decode()}:{frames[2].decode()}"
        found = Destinations(session, to, pages, self.requests[int(frames[8])])
        self.infos.setdefault(int(frames[0]), {})[session] = found
        update_status(self.status, int(frames[0]), WAITING)

    # -- scheduler --------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        sender = Sender(request.room)
        update_status(self.status, request.room, BOOTSTRAPPING)
        self.guard.sender_made(sender)
        self.served.append(Served(request, sender))

    def may_send(self, served: Served) -> bool:
        status = self.status.get(served.request.room)
        return served.sent < served.pages and status in (WAITING, TRANSFERRING)

    def send(self, served: Served, pages: int) -> None:
        """The next chunk, of `pages` or what is left."""
        first, room = served.sent, served.request.room
        served.sent = min(served.pages, first + pages)
        last = served.sent == served.pages

        def stock(sender: Sender, indices: list[int], states: Any) -> None:
            del sender, states
            if self.status.get(room) in (None, FAILED) or room not in self.infos:
                return
            self.manager.transfer_queues[0].put(
                SimpleNamespace(
                    room=room,
                    prefill_kv_indices=indices,
                    is_last_chunk=last,
                    first=first,
                    whole=served.whole,
                )
            )

        tokens = served.request.tokens if served.whole else 1
        self.guard.computes(
            SimpleNamespace(disagg_kv_sender=served.sender, origin_input_ids=[0] * tokens)
        )
        indices = list(range(first, served.sent))
        self.guard.send(stock, served.sender, indices, [] if last else None)

    def over(self, served: Served) -> bool:
        """Stock's poll, as the guard shows it, says that the request has ended."""
        status = self.status.get(served.request.room, FAILED)
        return status == SUCCESS or (status == FAILED and not self.guard.busy(served.sender))

    def reject(self, request: Request) -> None:
        """It is longer than the pool, say: stock makes no sender."""
        rejected = SimpleNamespace(
            bootstrap_room=request.room, finished_reason=None, to_finish=None
        )
        self.guard.ends.admitted(rejected)

    def end(self, served: Served) -> None:
        self.guard.ends.clearing(served.sender)
        self.status.pop(served.request.room, None)
        self.infos.pop(served.request.room, None)
        self.guard.retire(served.sender)
        self.served.remove(served)

    def fail(self, room: int) -> None:
        """A time-out, say."""
        update_status(self.status, room, FAILED)

    def abort(self, served: Served) -> None:
        """A client's abort."""
        self.fail(served.request.room)
        self.guard.ends.stopped(served.sender)

    def drop(self, served: Served) -> None:
        """The same, where some of stock's paths clear no sender."""
        self.abort(served)
        self.served.remove(served)

    # -- worker -----------------------------------------------------------------------------

    def run(self, status: int | None = None) -> None:
        """The worker goes on, with the `status` of the write it waits for."""
        here, IN_HAND.attempt = IN_HAND.attempt, self.hand
        try:
            self.waits = self.worker.send(status)  # type: ignore[arg-type]
        finally:
            self.hand, IN_HAND.attempt = IN_HAND.attempt, here

    def _work(self) -> Generator[Write | None, int, None]:
        """Stock's worker. It yields None where another thread may come in between."""
        while True:
            try:
                chunk = self.queue.get()
            except Silent:
                yield None
                continue
            room = chunk.room
            if not self.looks or self.status.get(room) not in (None, FAILED):
                for info in list(self.infos.get(room, {}).values()):
                    if not (yield from self._send_to(info, chunk)):
                        self._conclude(info, room, FAILED)
                        break
                yield None
            ended = (SUCCESS, FAILED) if chunk.is_last_chunk else (SUCCESS,)
            if self.status.get(room, SUCCESS) in ended:
                self.infos.pop(room, None)

    def _send_to(self, info: Destinations, chunk: Any) -> Generator[Write, int, bool]:
        if info.session in self.dead or info.session not in self.registered:
            return False
        slots = info.pages[chunk.first : chunk.first + len(chunk.prefill_kv_indices)]
        pages = list(zip(slots, chunk.prefill_kv_indices, strict=False))
        if pages and (yield from self._write(info, pages, chunk.whole)):
            self.dead.add(info.session)
            return False
        if chunk.is_last_chunk:
            status = yield from self._write(info, [], chunk.whole)
            self._conclude(info, chunk.room, FAILED if status else SUCCESS)
        return True

    def _write(
        self, info: Destinations, pages: list[tuple[int, int]], whole: bool
    ) -> Generator[Write, int, int]:
        write = Write(self.rank, info.session, info.request, pages, whole)
        self.network.writes.append(write)
        self._result = yield write
        status = int(self.manager.engine.batch_transfer_sync(info.session, [], [], []))
        return status if self.looks else 0

    def _conclude(self, info: Destinations, room: int, status: int) -> None:
        if self.looks:
            if room not in self.status:
                return
            if self.status[room] == FAILED:
                status = FAILED
        update_status(self.status, room, status)
        link = self._statuses
        lock = self.guard.sends.setdefault(info.to, Lock())
        socket = StatusInterposer(lambda: link, info.to, self.guard, lock)
        socket.send_multipart([b"%d" % room, b"%d" % status, b"%d" % self.rank])
        _, mark = messages.strip_trailer(link.queue[-1])
        if isinstance(mark, messages.SuccessTag):
            self.reported.add(mark.lease)
