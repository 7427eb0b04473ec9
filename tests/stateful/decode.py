"""A decode rank: the real guard and stock's allocators, and in place of stock its calls.

Stock's states and successes are kept by room, and forgotten when a receiver is cleared.
"""

from __future__ import annotations

import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.disaggregation.utils import ReqToMetadataIdxAllocator
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.kv_poll import FAILED, SUCCESS, WAITING
from sglang_scaling_fixes.reclaim.decode import fence
from sglang_scaling_fixes.reclaim.decode.peers import OutgoingSocket
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide
from tests.decode_rank import preallocation_queue

from .wire import Harm, Incoming, Link, Network, Request, Silent, Write

IP, PORT = "192.0.2.2", 9
POOL, METADATA = 12, 4
BOOTSTRAPPING = 1


class Decode:
    """One decode rank, with the prefill ranks it knows."""

    def __init__(self, network: Network, targets: list[Any], config: Config) -> None:
        self.network = network
        self.targets = targets
        """Who serves each prefill rank now."""
        self.session, self._sessions = f"{IP}:1", 1
        self.closed: set[str] = set()
        """Sessions of engines that are no more."""
        self.status: dict[int, int] = {}
        self.reported: dict[int, set[int]] = {}
        self.manager = SimpleNamespace(
            server_args=SimpleNamespace(),
            server_socket=Incoming(),
            local_ip=IP,
            rank_port=PORT,
            kv_args=SimpleNamespace(state_types=[]),
            request_status=self.status,
            prefill_response_tracker=self.reported,
            get_session_id=lambda: self.session,
            record_failure=lambda room, reason: None,
            check_status=self._check_status,
            update_status=lambda room, status: update_status(self.status, room, status),
        )
        self._incoming = self.manager.server_socket
        self.guard = DecodeSide(self.manager, config).install()
        self.tokens = TokenToKVPoolAllocator(POOL, torch.float32, "cpu", None, False)
        self.aux = ReqToMetadataIdxAllocator(METADATA)
        self.waiting: list[SimpleNamespace] = []
        """Stock's queue of transfers: each with its receiver."""
        queue = preallocation_queue(self.tokens, self.aux)
        queue.queue, queue.transfer_queue = [], SimpleNamespace(queue=self.waiting)
        self.guard.install_gate(queue)
        # A look at a rank's port is no part of what is tested here.
        self.guard.relief._liveness = SimpleNamespace(  # type: ignore[assignment]
            look=lambda ranks: None, gone=lambda rank: False, back=lambda instance: False
        )
        self.links: dict[int, Link] = {}
        self.read: deque[list[bytes]] = deque()
        """What the guard let through and stock has not looked at yet."""
        self.owner: dict[int, Request] = {}
        self.aux_owner: dict[int, Request] = {}
        self.memory: dict[tuple[int, int], tuple[Request, int, bool]] = {}
        """(slot, prefill rank) -> what it holds: for whom, which page, is it whole."""
        self.metadata: dict[tuple[int, int], Request] = {}

    # -- sockets ------------------------------------------------------------------------

    def register(self, rank: int, *, anew: bool) -> None:
        """Stock registers its buffers at a rank; `anew`: over another connection."""
        if anew or rank not in self.links:
            self.links[rank] = self.network.connect(self.targets[rank])
        registration = [b"None", IP.encode(), b"%d" % PORT, self.session.encode(), *[b""] * 16]
        self._socket(rank).send_multipart(registration)

    def _socket(self, rank: int) -> OutgoingSocket:
        def route() -> tuple[Link, threading.Lock]:
            return self.links[rank], threading.Lock()

        return OutgoingSocket(self.links[rank], address(rank), route, self.guard.peers)

    def hear(self, frames: list[bytes]) -> None:
        self._incoming.queue.append(frames)
        try:
            while True:
                self.read.append(self.manager.server_socket.recv_multipart())
        except Silent:
            return

    def count(self) -> None:
        """Stock looks at the next message that the guard let through."""
        frames = self.read.popleft()
        if frames[0] == b"ABORT_ACK" or int(frames[0]) not in self.status:
            return
        room, status, rank = map(int, frames[:3])
        if status == SUCCESS:
            self.reported[room].add(rank)
            if len(self.reported[room]) < len(self.targets):
                return
        update_status(self.status, room, status)

    # -- requests -----------------------------------------------------------------------

    def expose(self, request: Request) -> None:
        infos = [
            {"rank_ip": "192.0.2.1", "rank_port": rank, "is_dummy": False}
            for rank in range(len(self.targets))
        ]
        request.slots, request.aux = self.tokens.alloc(request.pages), self.aux.alloc()
        self.owner |= dict.fromkeys(request.slots.tolist(), request)
        self.aux_owner[request.aux] = request
        self.reported.setdefault(request.room, set())
        for status in (BOOTSTRAPPING, WAITING):
            update_status(self.status, request.room, status)
        receiver = request.receiver = SimpleNamespace(
            bootstrap_room=request.room,
            bootstrap_infos=infos,
            conclude_state=None,
            kv_mgr=self.manager,
            sglang_scaling_fixes_tokens=lambda: request.tokens,
        )
        self.guard.rooms.made(receiver)
        self.waiting.append(SimpleNamespace(kv_receiver=receiver))

        def stock(receiver: Any, pages: np.ndarray, aux: int, states: list[Any]) -> None:
            del receiver, states
            for rank in range(len(self.targets)):
                self._socket(rank).send_multipart(
                    [
                        *(str(part).encode() for part in (request.room, IP, PORT, self.session)),
                        *(pages.tobytes(), b"%d" % aux, b"", b"1"),
                        # Where stock says how long decode's prefix is: whose destinations they are.
                        *(b"%d" % request.number, b""),
                    ]
                )

        pages = request.slots.numpy().astype(np.int32)
        self.guard.send_metadata(stock, receiver, pages, request.aux, [])

    def poll(self, request: Request) -> int:
        status = self._stock_poll(request.receiver)
        if status == SUCCESS:
            status = self.guard.rooms.succeeded(self._stock_poll, request.receiver)
        return status

    def ends(self, request: Request) -> bool:
        """Whether the next poll says that its transfer has ended."""
        before = request.receiver.conclude_state
        ended = self.poll(request) in (SUCCESS, FAILED)
        request.receiver.conclude_state = before
        return ended

    def landed(self, request: Request) -> bool:
        """Every prefill rank's success of it has come, and no failure of its room."""
        return (
            self.guard.ledger.complete(request.receiver.sglang_scaling_fixes_exposure)
            and self.status.get(request.room) != FAILED
        )

    def _check_status(self, room: int) -> int:
        if room not in self.status:
            raise Harm(f"stock's scheduler dies: it looks for room {room}, which it has forgotten")
        return self.status[room]

    def _stock_poll(self, receiver: Any) -> int:
        if receiver.conclude_state is None:
            status: int = receiver.kv_mgr.check_status(receiver.bootstrap_room)
            if status not in (SUCCESS, FAILED):
                return status
            receiver.conclude_state = status
        return int(receiver.conclude_state)

    def commit(self, request: Request) -> None:
        """Stock hands the KV to its request."""
        for rank in range(len(self.targets)):
            for n, slot in enumerate(request.slots.tolist()):
                if self.memory.get((slot, rank)) != (request, n, True):
                    raise Harm(f"request {request.number} is used without page {n} of it")
            if self.metadata.get((request.aux, rank)) is not request:
                raise Harm(f"request {request.number} is used without its metadata")
        decode_request = SimpleNamespace(kv_receiver=request.receiver)
        self.guard.commit(
            lambda queue, committed: self._clear(committed.kv_receiver), None, decode_request
        )
        request.state = "used"
        self.aux.free(request.aux)

    def finish(self, request: Request) -> None:
        request.state = "done"
        self.tokens.free(request.slots)

    def give_up(self, request: Request) -> None:
        """An abort, a time-out or a failure: stock frees all the request had."""
        update_status(self.status, request.room, FAILED)
        request.receiver.conclude_state = FAILED
        for rank in range(len(self.targets)):
            self._socket(rank).send_multipart(
                [b"ABORT", b"%d" % request.room, IP.encode(), b"%d" % PORT]
            )
        self._clear(request.receiver)
        request.state = "given up"
        self.tokens.free(request.slots)
        self.aux.free(request.aux)

    def _clear(self, receiver: Any) -> None:
        self.guard.clearing(receiver)
        self.guard.rooms.clear(self._stock_clear, receiver)
        self.waiting[:] = [entry for entry in self.waiting if entry.kv_receiver is not receiver]

    def _stock_clear(self, receiver: Any) -> None:
        self.status.pop(receiver.bootstrap_room, None)
        self.reported.pop(receiver.bootstrap_room, None)

    # -- memory -------------------------------------------------------------------------

    def lands(self, write: Write) -> bool:
        """The bytes arrive. False: an engine that is no more had the memory registered."""
        if write.session in self.closed:
            return False
        self.check(write)
        for slot, n in write.pages:
            self.memory[slot, write.rank] = (write.request, n, write.whole)
        if not write.pages:
            self.metadata[write.request.aux, write.rank] = write.request
        return True

    def check(self, write: Write) -> None:
        """What can be reached belongs to the request that it is written for, and waits for it."""
        if write.session in self.closed:
            return
        request = write.request
        if request.state in ("used", "done"):
            raise Harm(f"request {request.number} is in use and may still be written")
        free = {*self.tokens.free_pages.tolist(), *self.tokens.release_pages.tolist()}
        for slot, _ in write.pages:
            if slot in free or self.owner[slot] is not request:
                raise Harm(f"slot {slot} may still be written for request {request.number}")
        aux = request.aux
        if not write.pages and (aux in self.aux.free_slots or self.aux_owner[aux] is not request):
            raise Harm(f"metadata slot {aux} may still be written for request {request.number}")

    def switch(self, manager: Any) -> fence.Retiring:
        """In place of `fence.switch`: another engine, another session."""
        assert manager is self.manager
        old, self._sessions = self.session, self._sessions + 1
        self.session = f"{IP}:{self._sessions}"
        return fence.Retiring(old, raw=None, opened=set(), knocked_at=-fence.KNOCK_S)

    def retire(self, old: fence.Retiring, of_all_ranks: Any) -> None:
        """In place of `fence.retire`."""
        assert of_all_ranks({1}) == {1}
        self.closed.add(old.session)

    @property
    def free(self) -> tuple[int, int]:
        return self.tokens.available_size(), self.aux.available_size()


def address(rank: int) -> str:
    return f"192.0.2.1:{rank}"


def update_status(states: dict[int, int], room: int, status: int) -> None:
    """As stock since 0.5.13: only an opening state makes a room, and a failure is final."""
    current = states.get(room)
    if current is None:
        if status in (BOOTSTRAPPING, WAITING):
            states[room] = status
    elif status == FAILED:
        states[room] = status
    elif current != FAILED:
        states[room] = max(current, status)
