"""Decode side: from stock SGLang's calls to the ledger's events, and back.

One `DecodeGuard` per scheduler process. It is created with the KV manager, learns
of exposures from `send_metadata`, of endings from `clear`, of prefill's answers
from the manager's own receive socket, and acts once per scheduler tick:

    receive thread   ReceiveTap: Here, Answer -> ledger; a success of another
                     generation never reaches stock
    scheduler        send_metadata -> expose     clear -> landed | give_up
                     tick: Asks out; proven exposures agreed among the TP ranks
                     and given back

The ledger is shared by the two threads, under one lock.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sglang_scaling_fixes.attach import wrap_method
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.gate import Gate
from sglang_scaling_fixes.reclaim.ledger import DecodeLedger, Exposure
from sglang_scaling_fixes.reclaim.taps import Passthrough, ReceiveTap, is_number, is_success
from sglang_scaling_fixes.reclaim.transport import endpoint, new_incarnation, send_now

logger = logging.getLogger(__name__)

SAY_HELD_AFTER = 5.0
"""Seconds an exposure is held before the log says why, then every minute."""
REQUIRE_WAIT = 1.0
"""Seconds to wait for a prefill's first word under `--safe-reclaim-peer require`."""
REQUIRE_RETRY = 30.0
"""Seconds before a silent prefill is waited for again."""

PAGE_STATES = frozenset({"nsa", "dsa", "block_scale", "minimax_index_k", "minimax_dense_kv"})
"""State transfers addressed by the KV pages themselves (index-K, scales)."""
WINDOW_STATES = frozenset({"swa", "block_scale_swa"})
"""State transfers into sliding-window slots, freed together with their full slots."""

_MOONCAKE = "sglang.srt.disaggregation.mooncake.conn"
_SCHEDULER = "sglang.srt.managers.scheduler"
_TRANSFERRING, _SUCCESS = 3, 4
"""KVPoll values in every supported release (contract-tested)."""


class DecodeGuard:
    """Safe reclaim of one decode rank. All but `_read` runs on the scheduler thread."""

    current: DecodeGuard | None = None
    """The guard of this process: SGLang makes one KV manager per scheduler process."""

    def __init__(self, manager: Any, config: Config) -> None:
        self._manager = manager
        self._config = config
        self.ledger = DecodeLedger(new_incarnation(), first_wait=config.resend)
        self._reply_to = endpoint(manager.local_ip, manager.rank_port)
        self._lock = threading.Lock()
        self._routes: dict[str, Callable[[], tuple[Any, Any]]] = {}
        """Rank -> stock's own look-up of its socket and lock (stock may replace them)."""
        self._hello_on: dict[str, Any] = {}
        """Rank -> the socket its last Hello left on."""
        self._sending: Exposure | None = None
        self._stock_success: dict[int, set[bytes]] = {}
        self._next_say: dict[str, float] = {}
        self._silent_until: dict[str, float] = {}
        self._group: Any = None
        self._buffers: Any = None
        self.gate: Gate | None = None
        self.counters = dict.fromkeys(
            (
                "exposures",
                "landed",
                "gave_up",
                "returned",
                "asks",
                "held_tokens_max",
                "garbage",
                "stale",
            ),
            0,
        )
        self.proofs = dict.fromkeys(("P1", "P2", "P3", "P4"), 0)
        manager.server_socket = ReceiveTap(manager.server_socket, self._read)
        check_states(manager.kv_args)
        DecodeGuard.current = self

    # -- wiring ---------------------------------------------------------------

    def install_gate(self, queue: Any) -> None:
        """Wrap the allocators of stock's preallocation queue, once they exist."""
        allocator = queue.token_to_kv_pool_allocator
        check_allocator(allocator)
        radix = getattr(
            getattr(self._manager, "server_args", None),
            "disaggregation_decode_enable_radix_cache",
            False,
        )
        if radix and WINDOW_STATES.intersection(state_kinds(self._manager.kv_args)):
            raise AttachError(
                "--disaggregation-decode-enable-radix-cache with a sliding-window model: "
                "window slots of a shared prefix are not held yet; drop the flag, or start "
                "with --plugin none"
            )
        rebind_captured(queue.tree_cache, allocator)
        self.gate = Gate(
            allocator, queue.req_to_metadata_buffer_idx_allocator, audit=self._config.audit
        )
        self._group = queue.gloo_group
        self.ledger.group = self._common_identity()
        self._buffers = queue.metadata_buffers

    def guards(self, manager: Any) -> bool:
        """True when `manager` and its allocators are behind this guard."""
        return self._manager is manager and self.gate is not None

    def _common_identity(self) -> str:
        """TP rank 0's incarnation, on every TP rank: what their epochs share."""
        if self._alone():
            return self.ledger.group
        import torch.distributed as dist

        identity = [self.ledger.group]
        dist.broadcast_object_list(
            identity, src=dist.get_global_rank(self._group, 0), group=self._group
        )
        return identity[0]

    def _alone(self) -> bool:
        import torch.distributed as dist

        return self._group is None or dist.get_world_size(self._group) == 1

    # -- exposure ---------------------------------------------------------------

    def send_metadata(
        self,
        stock: Callable[..., Any],
        receiver: Any,
        kv_indices: np.ndarray,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Stock sends the destinations of a request; from here on they are exposed."""
        assert self.gate is not None, "send_metadata before the allocators exist"
        ranks = [rank_of(info) for info in receiver.bootstrap_infos or () if not info["is_dummy"]]
        with self._lock:
            exposure = self.ledger.expose(receiver.bootstrap_room, ranks)
        shared = page_states(self._manager.kv_args, state_indices)
        self.gate.exposed(exposure, kv_indices, shared, aux_index)
        self.counters["exposures"] += 1
        receiver.sglang_scaling_fixes_exposure = exposure
        if self._config.peer == "require" and not self._all_speak(ranks):
            self._refuse(receiver, ranks)
            return None
        with self._sends(exposure):
            return stock(receiver, kv_indices, aux_index, state_indices, **kwargs)

    @contextlib.contextmanager
    def _sends(self, exposure: Exposure) -> Iterator[None]:
        self._sending = exposure
        try:
            yield
        finally:
            self._sending = None

    def outgoing(
        self,
        rank: str,
        route: Callable[[], tuple[Any, Any]],
        frames: list[bytes],
        socket: Any = None,
    ) -> list[bytes]:
        """Add our trailer to what stock sends to a prefill rank, under the socket's lock."""
        self._routes[rank] = route
        if frames[0] == b"None":  # stock's registration of this decode's buffers
            self._hello_on[rank] = socket
            with self._lock:
                seq = self.ledger.hello(rank)
            return messages.ride(frames, messages.Hello(self._reply_to, rank, seq=seq))
        exposure = self._sending
        if exposure is None or rank not in exposure.writers:
            return frames
        with self._lock:
            same = self._hello_on.get(rank) is socket
            self.ledger.sent(exposure, rank, after_hello=same)
        bind = messages.Bind(self._reply_to, rank, exposure.gen, exposure.epoch)
        return messages.ride(frames, bind)

    def _all_speak(self, ranks: list[str]) -> bool:
        """Wait a moment for a first word, once in a while per rank: this is the scheduler."""
        now = time.monotonic()
        deadline = now + REQUIRE_WAIT
        while silent := [rank for rank in ranks if rank not in self.ledger.peers]:
            known_silent = all(self._silent_until.get(rank, 0.0) > now for rank in silent)
            if known_silent or time.monotonic() >= deadline:
                self._silent_until.update(dict.fromkeys(silent, now + REQUIRE_RETRY))
                return False
            time.sleep(0.005)
        return True

    def _refuse(self, receiver: Any, ranks: list[str]) -> None:
        silent = [rank for rank in ranks if rank not in self.ledger.peers]
        self._manager.record_failure(
            receiver.bootstrap_room,
            f"prefill {', '.join(silent)} runs without safe-reclaim; start it with --plugin, "
            "or this decode with --safe-reclaim-peer hold",
        )
        self._manager.update_status(receiver.bootstrap_room, 0)

    # -- endings ------------------------------------------------------------------

    def poll(self, stock: Callable[..., Any], receiver: Any) -> Any:
        """Success is not shown before this attempt's own; later polls look again.

        A mark is in the ledger before stock counts the success that carries it, so
        one that stock has counted is never withheld. A failure stock learns of
        meanwhile must not hide behind the success it concluded.
        """
        with getattr(receiver, "_lifecycle_lock", contextlib.nullcontext()):
            status = stock(receiver)
            if status != _SUCCESS or self._complete(receiver):
                return status
            receiver.conclude_state = None
            return type(status)(_TRANSFERRING)

    def _complete(self, receiver: Any) -> bool:
        """False while a success stock has counted for this room may be another attempt's."""
        exposure: Exposure | None = getattr(receiver, "sglang_scaling_fixes_exposure", None)
        if exposure is None:
            return True
        with self._lock:
            return self.ledger.complete(exposure)

    def failing(self, receiver: Any) -> None:
        """Stock is about to end this receiver as failed, on every TP rank alike."""
        receiver.sglang_scaling_fixes_failed = True

    def clearing(self, receiver: Any) -> None:
        """Stock is about to forget the room: the owner takes its KV, or gives it up."""
        exposure: Exposure | None = getattr(receiver, "sglang_scaling_fixes_exposure", None)
        if exposure is None:
            return
        receiver.sglang_scaling_fixes_exposure = None
        assert self.gate is not None
        # What the ranks agreed on when they polled; the room's own status may have
        # been changed since, on this rank alone.
        landed = receiver.conclude_state == _SUCCESS
        if landed and not getattr(receiver, "sglang_scaling_fixes_failed", False):
            with self._lock:
                self.ledger.landed(exposure)
            self.gate.landed(exposure)
            self.counters["landed"] += 1
            return
        room = receiver.bootstrap_room
        success = self._manager.request_status.get(room) == _SUCCESS
        with self._lock:
            self.ledger.give_up(exposure, time.monotonic(), success_seen=success)
            # Ranks without safe-reclaim that reported before the owner gave up.
            self._stock_success[room] = {
                str(rank).encode() for rank in self._manager.prefill_response_tracker.get(room, ())
            }
        self.gate.gave_up(exposure)
        self.counters["gave_up"] += 1
        self._send_asks()

    # -- once per scheduler tick ---------------------------------------------------

    def tick(self) -> None:
        """Ask again, give back what is proven on every TP rank."""
        if not self.ledger.holding:
            return
        assert self.gate is not None
        self.gate.settle()
        self._send_asks()
        with self._lock:
            held = self.ledger.held
            proven = [not exposure.unproven for exposure in held]
        for exposure, agreed in zip(held, self._agree(proven), strict=True):
            if agreed:
                self._give_back(exposure)
        self.counters["held_tokens_max"] = max(
            self.counters["held_tokens_max"], self.gate.held_tokens
        )
        self._say_what_is_held()

    def holding(self) -> bool:
        """True while the scheduler must not call itself idle."""
        return self.ledger.holding

    def _agree(self, proven: list[bool]) -> list[bool]:
        """What every TP rank has proof of. All ranks hold the same list in the same order."""
        if self._alone():
            return proven
        import torch
        import torch.distributed as dist

        flags = torch.tensor(proven, dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MIN, group=self._group)
        return [bool(flag) for flag in flags.tolist()]

    def _give_back(self, exposure: Exposure) -> None:
        assert self.gate is not None
        slots = self.gate.slots(exposure)
        if slots.aux is not None and hasattr(self._buffers, "clear_slot"):
            # Stock clears a metadata slot when it frees it; a write may have
            # landed in it since.
            self._buffers.clear_slot(slots.aux)
        with self._lock:
            self.ledger.returned(exposure)
            self._stock_success.pop(exposure.room, None)
        tokens = self.gate.give_back(exposure)
        self._next_say.pop(exposure.gen, None)
        self.counters["returned"] += 1
        for writer in exposure.writers.values():
            if writer.proof is not None:
                self.proofs[writer.proof.value] += 1
        logger.info(
            "safe-reclaim: room %d: %d token slots back after %.3f s, proof %s",
            exposure.room,
            tokens,
            time.monotonic() - exposure.gave_up_at,
            ",".join(sorted({w.proof or "" for w in exposure.writers.values()})) or "P1",
        )

    def _send_asks(self) -> None:
        with self._lock:
            asks = self.ledger.tick(time.monotonic())
        for ask in asks:
            socket, lock = self._routes[ask.rank]()
            message = messages.Ask(self._reply_to, ask.rank, ask.room, ask.gen)
            with lock:
                send_now(socket, [messages.encode(message)])
            self.counters["asks"] += 1

    def _say_what_is_held(self) -> None:
        now = time.monotonic()
        for exposure in self.ledger.held:
            due = self._next_say.setdefault(exposure.gen, exposure.gave_up_at + SAY_HELD_AFTER)
            if now >= due:
                self._next_say[exposure.gen] = now + 60.0
                logger.warning(
                    "safe-reclaim: room %d held for %.0f s: %s",
                    exposure.room,
                    now - exposure.gave_up_at,
                    self.ledger.why_held(exposure),
                )

    # -- messages from prefill -------------------------------------------------------

    def _read(self, frames: list[bytes]) -> list[bytes] | None:
        """Runs on stock's receive thread: sort out what is ours, leave the rest."""
        stock, message = messages.split(frames)
        if message is messages.GARBAGE or not self._for_decode(stock, message):
            self.counters["garbage"] += 1
            return None
        if is_success(stock):
            mark = message if isinstance(message, messages.Mark) else None
            return stock if self._admits(int(stock[0]), mark, stock[2]) else None
        if isinstance(message, messages.Here | messages.Answer):
            with self._lock:
                self._hear(message)
            return None
        if stock[0] == b"AUX_DATA":
            room, aux = int(stock[1]), int(stock[3])
            if self.gate is not None and not self.gate.owns_aux(aux, room):
                return None  # a late copy into a slot that is no longer this room's
        return stock

    def _for_decode(self, stock: list[bytes], message: messages.Message | None) -> bool:
        """Something a prefill rank says, as far as it is read here."""
        if isinstance(message, messages.Here | messages.Answer):
            return message.rank in self._routes
        if message is not None and not (isinstance(message, messages.Mark) and is_success(stock)):
            return False
        if not stock:
            return False
        if stock[0] == b"AUX_DATA":
            return len(stock) > 3 and is_number(stock[1]) and is_number(stock[3])
        return not stock[0].isdigit() or is_number(stock[0])

    def _hear(self, message: messages.Here | messages.Answer) -> None:
        if isinstance(message, messages.Here):
            self.ledger.here(message.rank, message.incarnation, message.gen, message.seq)
        elif not self.ledger.answer(
            message.rank, message.incarnation, message.gen, message.verdict, message.reason
        ):
            self.counters["stale"] += 1

    def _admits(self, room: int, mark: messages.Mark | None, prefill_rank: bytes) -> bool:
        """A success: stock learns of it only if it is the open generation's."""
        with self._lock:
            if mark is not None:
                self.ledger.marked(mark.gen, mark.rank)
            elif any(e.room == room for e in self.ledger.held):
                reported = self._stock_success.setdefault(room, set())
                reported.add(prefill_rank)
                self.ledger.success(room, len(reported))
            admitted = self.ledger.admits_success(
                room, mark.gen if mark is not None else None, prefill_rank
            )
        self.counters["stale"] += not admitted
        return admitted

    # -- reporting --------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Counters and holds for `/server_info` and the lab."""
        with self._lock:
            held = [
                {"room": e.room, "state": e.state.value, "why": self.ledger.why_held(e)}
                for e in self.ledger.held
            ]
        return {
            **self.counters,
            "frees_by_proof": dict(self.proofs),
            "held_tokens": self.gate.held_tokens if self.gate is not None else 0,
            "held": held,
            "peers": len(self.ledger.peers),
        }


class OutgoingTap(Passthrough):
    """The socket to one prefill rank: stock's messages leave with our trailer."""

    def __init__(
        self, stock: Any, rank: str, route: Callable[[], tuple[Any, Any]], guard: DecodeGuard
    ) -> None:
        super().__init__(stock)
        self._rank = rank
        self._route = route
        self._guard = guard

    def send_multipart(self, frames: list[bytes], *args: Any, **kwargs: Any) -> Any:
        frames = self._guard.outgoing(self._rank, self._route, list(frames), self._stock)
        return self._stock.send_multipart(frames, *args, **kwargs)


def rank_of(bootstrap_info: dict[str, Any]) -> str:
    """How this decode addresses a prefill rank: `"ip:port"`."""
    return f"{bootstrap_info['rank_ip']}:{bootstrap_info['rank_port']}"


def state_kinds(kv_args: Any) -> list[str]:
    """The kinds of state transferred beside KV: a list from 0.5.12 on, one word in 0.5.11."""
    kinds = getattr(kv_args, "state_types", None)
    if kinds is None:
        kind = getattr(kv_args, "state_type", "none")
        kinds = [] if kind in ("none", None) else [kind]
    return [str(getattr(kind, "value", kind)).lower() for kind in kinds]


def check_states(kv_args: Any) -> None:
    """Refuse a model whose state lives in slots the gate does not hold."""
    if unknown := [k for k in state_kinds(kv_args) if k not in PAGE_STATES | WINDOW_STATES]:
        raise AttachError(
            f"this model also transfers {', '.join(unknown)} state, which lives in slots "
            "safe-reclaim does not hold yet; start with --plugin none"
        )


def check_allocator(allocator: Any) -> None:
    """Refuse an allocator whose transfer indices are not its own page numbers."""
    if type(allocator).__name__.startswith(("Unified", "MultiEnded")):
        raise AttachError(
            f"{type(allocator).__name__} hands out virtual slots, which safe-reclaim cannot "
            "match to pages yet; start without the unified pool, or with --plugin none"
        )
    translate = getattr(type(allocator), "translate_kv_indices_for_transfer", None)
    if translate is None:
        return
    base = next(c for c in type(allocator).__mro__[::-1] if "free_group_begin" in vars(c))
    if translate is not vars(base).get("translate_kv_indices_for_transfer"):
        raise AttachError(
            f"{type(allocator).__name__} sends translated KV indices, which safe-reclaim "
            "cannot match to its pages yet; start with --plugin none"
        )


def rebind_captured(tree_cache: Any, allocator: Any) -> None:
    """Make frees that stock captured before the gate look the method up again.

    Releases 0.5.11 to 0.5.16: a component of the unified radix tree keeps
    `allocator.free` from its construction.
    """

    def late(name: str) -> Callable[..., Any]:
        def free(*args: Any, **kwargs: Any) -> Any:
            return getattr(allocator, name)(*args, **kwargs)

        return free

    components = getattr(tree_cache, "components", None) or {}
    for holder in (tree_cache, *(components.values() if isinstance(components, dict) else ())):
        for attribute, value in list(getattr(holder, "__dict__", {}).items()):
            name = getattr(value, "__name__", "")
            if getattr(value, "__self__", None) is allocator and name.startswith("free"):
                setattr(holder, attribute, late(name))


def page_states(kv_args: Any, state_indices: list[Any] | None) -> list[np.ndarray]:
    """Page numbers that state transfers may write, in the allocator's page space."""
    if not state_indices:
        return []
    kinds = state_kinds(kv_args)
    if len(kinds) == 1 and len(state_indices) != 1:
        state_indices = [state_indices]  # 0.5.11: one flat list
    return [
        np.asarray(indices, dtype=np.int64)
        for kind, indices in zip(kinds, state_indices, strict=False)
        if kind in PAGE_STATES and indices is not None
    ]


def attach(config: Config) -> None:
    """Wrap the decode-side attach points. They do nothing until a decode manager starts."""

    def start_decode_thread(stock: Callable[..., Any], manager: Any) -> Any:
        DecodeGuard(manager, config)
        return stock(manager)

    def queue_init(stock: Callable[..., Any], queue: Any, *args: Any, **kwargs: Any) -> Any:
        DecodeGuard.current = None
        stock(queue, *args, **kwargs)
        if DecodeGuard.current is not None:
            DecodeGuard.current.install_gate(queue)

    def connect(stock: Callable[..., Any], cls: Any, bootstrap_info: dict[str, Any]) -> Any:
        route = functools.partial(stock, cls, bootstrap_info)
        socket, lock = route()
        guard = DecodeGuard.current
        if guard is None:
            return socket, lock
        return OutgoingTap(socket, rank_of(bootstrap_info), route, guard), lock

    def send_metadata(stock: Callable[..., Any], receiver: Any, *args: Any, **kwargs: Any) -> Any:
        guard = DecodeGuard.current
        if guard is None:
            return stock(receiver, *args, **kwargs)
        return guard.send_metadata(stock, receiver, *args, **kwargs)

    def poll(stock: Callable[..., Any], receiver: Any) -> Any:
        guard = DecodeGuard.current
        return stock(receiver) if guard is None else guard.poll(stock, receiver)

    def clear(stock: Callable[..., Any], receiver: Any) -> Any:
        if (guard := DecodeGuard.current) is not None:
            guard.clearing(receiver)
        return stock(receiver)

    def failure_exception(stock: Callable[..., Any], receiver: Any) -> Any:
        if (guard := DecodeGuard.current) is not None:
            guard.failing(receiver)
        return stock(receiver)

    def process_input_requests(
        stock: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Every iteration of every loop, on all TP ranks alike, paused or not.
        if (guard := DecodeGuard.current) is not None:
            guard.tick()
        return stock(scheduler, *args, **kwargs)

    def is_fully_idle(
        stock: Callable[..., Any], scheduler: Any, for_health_check: bool = False, **kwargs: Any
    ) -> Any:
        idle = stock(scheduler, for_health_check, **kwargs)
        guard = DecodeGuard.current
        return idle and (for_health_check or guard is None or not guard.holding())

    wrap_method(f"{_MOONCAKE}:MooncakeKVManager.start_decode_thread", start_decode_thread)
    wrap_method("sglang.srt.disaggregation.decode:DecodePreallocQueue.__init__", queue_init)
    wrap_method(f"{_MOONCAKE}:MooncakeKVReceiver._connect_to_bootstrap_server", connect)
    wrap_method(f"{_MOONCAKE}:MooncakeKVReceiver.send_metadata", send_metadata)
    wrap_method(f"{_MOONCAKE}:MooncakeKVReceiver.poll", poll)
    wrap_method(f"{_MOONCAKE}:MooncakeKVReceiver.clear", clear)
    wrap_method(f"{_MOONCAKE}:MooncakeKVReceiver.failure_exception", failure_exception)
    wrap_method(f"{_SCHEDULER}:Scheduler.process_input_requests", process_input_requests)
    wrap_method(f"{_SCHEDULER}:Scheduler.is_fully_idle", is_fully_idle)
