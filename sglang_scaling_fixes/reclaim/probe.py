"""Does safe reclaim hold on this release? Asked of the release's own classes, after attaching.

Nothing here reads a version number. The stock receiver sends destinations over a
socket that keeps them, the stock allocators are asked to take slots back too
early, the stock transfer worker is given a chunk of an aborted room. If any of
these goes past us, the fix is not in force and the server must not start.
No thread, port or file is left behind.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from sglang_scaling_fixes import release
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide
from sglang_scaling_fixes.reclaim.prefill.interposers import (
    IN_HAND,
    EngineInterposer,
    ExecutorInterposer,
)
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide
from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.standin_objects import Lenient

_ROOM, _RANK = 7_000_000_007, "192.0.2.1:9"  # a documentation address (RFC 5737)


def fail(what: str) -> NoReturn:
    raise AttachError(f"probe: {what}")


def check(holds: bool, what: str) -> None:
    if not holds:
        fail(what)


def run() -> None:
    """Prove decode and prefill. Raises `AttachError` with what did not hold."""
    with _sides_restored(), _quiet():
        _prove_decode()
        _prove_prefill()


@contextlib.contextmanager
def _sides_restored() -> Iterator[None]:
    saved = DecodeSide.current, PrefillSide.current
    try:
        yield
    finally:
        DecodeSide.current, PrefillSide.current = saved


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A probe's room is nobody's room: keep it out of the log, whichever part writes of it."""
    logger, nowhere = logging.getLogger(__package__), logging.NullHandler()
    saved, logger.propagate = logger.propagate, False
    logger.addHandler(nowhere)
    try:
        yield
    finally:
        logger.removeHandler(nowhere)
        logger.propagate = saved


class _Socket:
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        self.sent: list[list[bytes]] = []

    def send_multipart(self, frames: list[bytes], *_: Any, **__: Any) -> None:
        self.sent.append(list(frames))


def _manager(**attributes: Any) -> Any:
    """A stock KV manager that was never started."""
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

    class ProbeManager(Lenient, MooncakeKVManager):  # type: ignore[misc]
        get_session_id = staticmethod(lambda: "probe:1")

    manager = object.__new__(ProbeManager)
    manager.__dict__.update(
        server_socket=_Socket(),
        local_ip="192.0.2.2",
        rank_port=9,
        request_status={},
        failure_records={},
        failure_lock=threading.Lock(),
        addr_to_rooms_tracker=defaultdict(set),
        required_prefill_response_num_table={},
        prefill_response_tracker=defaultdict(set),
        transfer_infos={},
        decode_kv_args_table={},
        req_to_decode_prefix_len={},
        session_lock=threading.Lock(),
        _staging_outstanding=defaultdict(int),
        attn_tp_rank=0,
        attn_cp_rank=0,
        attn_cp_size=1,
        pp_rank=0,
        pp_size=1,
        waiting_timeout=300.0,
        **attributes,
    )
    return manager


def _prove_decode() -> None:
    import torch
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVReceiver
    from sglang.srt.disaggregation.utils import ReqToMetadataIdxAllocator
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

    manager = _manager(kv_args=SimpleNamespace(state_types=[]))
    side = DecodeSide(manager, Config()).install()
    tokens = TokenToKVPoolAllocator(16, torch.float32, "cpu", None, False)
    aux = ReqToMetadataIdxAllocator(4)
    side.install_gate(
        SimpleNamespace(
            token_to_kv_pool_allocator=tokens,
            req_to_metadata_buffer_idx_allocator=aux,
            gloo_group=None,
            metadata_buffers=None,
            tree_cache=None,
        )
    )
    side.ledger.hello_acked(_RANK, "prefill")
    socket = _Socket()

    class ProbeReceiver(Lenient, MooncakeKVReceiver):  # type: ignore[misc]
        @classmethod
        def _connect(cls, *_: Any, **__: Any) -> Any:
            return socket, threading.Lock()

    def expose(room: int) -> Any:
        """One request's destinations, sent by the stock receiver itself."""
        receiver = object.__new__(ProbeReceiver)
        ip, port = _RANK.split(":")
        receiver.__dict__.update(
            kv_mgr=manager,
            bootstrap_room=room,
            bootstrap_addr="192.0.2.1:8",
            bootstrap_infos=[{"rank_ip": ip, "rank_port": int(port), "is_dummy": False}],
            session_id="probe:1",
            required_dst_info_num=1,
            _lifecycle_lock=threading.RLock(),
            _owns_bootstrap_room=True,
        )
        manager.request_status[room] = 2
        slots = tokens.alloc(4)
        slot = aux.alloc()
        receiver.send_metadata(slots.numpy().astype(np.int32), slot, [])
        return receiver, slots, slot

    receiver, slots, slot = expose(_ROOM)
    frames, bind = messages.strip_trailer(socket.sent[-1])
    check(isinstance(bind, messages.Bind), "destinations left without a lease")
    check(frames[0] == str(_ROOM).encode(), "the metadata message is not stock's any more")
    assert isinstance(bind, messages.Bind)

    before = tokens.available_size(), aux.available_size()
    receiver.clear()  # not a success: the owner gives up
    check(isinstance(messages.decode(socket.sent[-1][0]), messages.Abort), "no ABORT left")
    tokens.free(slots)
    aux.free(slot)
    side.tick()
    held = tokens.available_size(), aux.available_size()
    check(held == before, "slots went back to the free list without proof")
    answer = messages.AbortAck(_RANK, "prefill", bind.lease, "drained")
    check(manager.server_socket.read([messages.encode(answer)]) is None, "stock saw our message")
    side.tick()
    back = tokens.available_size(), aux.available_size()
    check(back == (before[0] + 4, before[1] + 1), "slots did not come back with proof")

    _prove_success(side, manager, expose, tokens, aux)


def _prove_success(side: DecodeSide, manager: Any, expose: Any, tokens: Any, aux: Any) -> None:
    """A success is a landing only if stock hands the KV to its request."""

    def free() -> tuple[int, int]:
        tokens.free(slots)
        aux.free(slot)
        return available()

    def available() -> tuple[int, int]:
        return tokens.available_size(), aux.available_size()

    before = available()
    receiver, slots, slot = expose(_ROOM + 1)
    manager.request_status[_ROOM + 1] = receiver.conclude_state = 4
    side.commit(lambda *_: receiver.clear(), None, SimpleNamespace(kv_receiver=receiver))
    check(free() == before, "a landed request was held")

    receiver, slots, slot = expose(_ROOM + 2)
    manager.request_status[_ROOM + 2] = 4  # as counted for the attempt before
    check(receiver.poll() != 4, "a success of another attempt was shown to the scheduler")
    mark = messages.encode(messages.SuccessTag(receiver.sglang_scaling_fixes_exposure.lease, _RANK))
    success = manager.server_socket.read([str(_ROOM + 2).encode(), b"4", b"0", mark])
    check(success is not None, "this attempt's own success did not reach stock")
    manager.request_status[_ROOM + 2] = 4
    check(receiver.poll() == 4, "this attempt's own success was not shown to the scheduler")
    receiver.clear()  # success here, and yet ended: another rank may have no proof
    check(free() != before, "a success of one rank was taken for all")
    side.tick()
    check(available() == before, "a proven hold stayed")


class _StopWorker(BaseException):
    """Ends the stock worker's endless loop (it survives every Exception)."""


class _Chunk(Lenient):
    def __init__(self, room: int, *, stops: bool = False) -> None:
        self._room, self._stops = room, stops

    @property
    def room(self) -> int:
        return self._room

    @property
    def prefill_kv_indices(self) -> Any:
        return ()

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


class _Sender:
    def __init__(self, room: int) -> None:
        self.bootstrap_room = room


class _Queue:
    """A transfer queue that ends the worker when it is empty."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def put(self, item: Any) -> None:
        self.items.append(item)

    def get(self) -> Any:
        if not self.items:
            raise _StopWorker
        return self.items.pop(0)


class _Engine:
    """Stock's wrapper and Mooncake's own engine in one: keeps how it was written with, and says
    of each write what it is told to."""

    BATCH = 7

    def __init__(self) -> None:
        self.engine = self
        self.status = 0
        self.calls: list[str] = []

    def batch_transfer_sync(
        self, session: str, sources: list[int], targets: list[int], lengths: list[int]
    ) -> int:
        del session, sources, targets, lengths
        self.calls.append("stock")
        return self.status

    def batch_transfer_async_write(
        self, session: str, sources: list[int], targets: list[int], lengths: list[int]
    ) -> int:
        del session, sources, targets, lengths
        self.calls.append("once")
        return self.BATCH

    def get_batch_transfer_status(self, batches: list[int]) -> int:
        return self.status if batches == [self.BATCH] else -1


def _prove_prefill() -> None:
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

    queue = _Queue()
    engine = _Engine()
    manager = _manager(engine=engine, transfer_queues=[queue])
    side = PrefillSide(manager).install()
    side.tap_socket()
    answers: list[messages.Message | messages.Garbage | None] = []

    def keep_answer(to: str, frame: bytes) -> bool:
        del to
        answers.append(messages.decode(frame))
        return True

    side._replies.send = keep_answer  # type: ignore[method-assign]
    tap = side.tap_queue(queue)
    check(side.protects(manager), "a transfer queue is not tapped")
    read = manager.server_socket.read

    def metadata(room: int, lease: str) -> list[bytes]:
        stock = [str(room).encode(), *[b""] * 6, b"1"]
        return messages.attach_trailer(
            stock, messages.Bind("tcp://192.0.2.2:9", _RANK, lease, lease)
        )

    check(read(metadata(_ROOM, "g1")) == metadata(_ROOM, "g1")[:8], "metadata did not reach stock")
    read(metadata(_ROOM + 1, "g2"))
    senders = {room: _Sender(room) for room in (_ROOM, _ROOM + 1)}
    for sender in senders.values():
        side.sender_made(sender)
        side.send(lambda sender, *_: tap.put(_Chunk(sender.bootstrap_room)), sender, ())
    ask = messages.Abort("tcp://192.0.2.2:9", _RANK, _ROOM, "g1")
    check(read([messages.encode(ask)]) is None, "stock saw our message")
    last = answers[-1]
    check(isinstance(last, messages.AbortAck) and last.verdict == "drained", "no drain answer")
    seen: list[int] = []
    real_take = side.take

    def take(attempt: Attempt, chunk: Any) -> bool:
        taken = real_take(attempt, chunk)
        if taken:
            seen.append(attempt.room)
        return taken

    side.take = take  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        with contextlib.suppress(_StopWorker):
            MooncakeKVManager.transfer_worker(manager, queue, pool)
        check(seen == [_ROOM + 1], "the worker did not skip the aborted room's chunk")
        sender = senders[_ROOM + 1]
        check(not side.busy(sender), "a finished chunk still counts as being written")
        ways = [(manager.engine, engine, release.mooncake_retries())]
        for once in (False, True):
            engine = _Engine()
            ways.append((EngineInterposer(engine, side, once=once), engine, once))
        for number, (tapped, engine, once) in enumerate(ways, start=3):
            manager.engine = tapped
            room = _ROOM + number
            read(metadata(room, f"g{number}"))
            senders[room] = _Sender(room)
            side.sender_made(senders[room])
            attempt: Attempt | None = side.send(lambda *_: side.put(None), senders[room], ())
            assert attempt is not None
            _prove_write(manager, engine, once, attempt, ExecutorInterposer(pool, side))
    _prove_coverage(side, read)


def _prove_coverage(side: PrefillSide, read: Callable[[list[bytes]], Any]) -> None:
    """A success of a prompt that is shorter than decode's must not leave as one."""
    decode, session = "tcp://192.0.2.2:9", "probe:3"
    for room, computed in ((_ROOM + 6, 9), (_ROOM + 7, 1)):
        stock = [str(room).encode(), b"", b"", session.encode(), b"", b"", b"", b"1"]
        bind = messages.Bind(decode, _RANK, str(room), str(room), pages=1, states=(), tokens=9)
        read(messages.attach_trailer(stock, bind))
        sender = _Sender(room)
        side.sender_made(sender)
        side.computes(SimpleNamespace(disagg_kv_sender=sender, origin_input_ids=[0] * computed))
        attempt: Attempt | None = side.send(lambda *_: side.put(None), sender, (0,))
        assert attempt is not None
        covered = side.success_leaves(decode, attempt)
        check(covered or computed != 9, "a success of the whole prompt was held back")
        check(not covered or computed == 9, "a success of a part of the prompt was let through")


def _prove_write(
    manager: Any, engine: _Engine, once: bool, attempt: Attempt, executor: ExecutorInterposer
) -> None:
    """One way to write, called by stock: which one a server takes depends on its machine, and
    what starts on this one must start on all."""
    way = "once" if once else "stock"
    for status in (0, -1):
        engine.status = status
        engine.calls.clear()
        IN_HAND.attempt = attempt
        try:
            said = executor.submit(manager._transfer_data, "probe:2", [(1, 2, 3)]).result()
        finally:
            IN_HAND.attempt = None
        check(engine.calls == [way], f"a write was to be submitted as {way}, was {engine.calls}")
        check(said == status, f"stock was told {said} of a write that ended with {status}")
        noticed = attempt.poisoned != ""
        check(noticed or status == 0, f"a failed write was not noticed (submitted as {way})")
        check(not noticed or status != 0, f"a good write was taken for a failed one ({way})")
