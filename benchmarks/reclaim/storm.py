"""Decode's scheduler thread when a prefill falls silent and all its transfers are given up.

No server: the real decode side and gate over stock's allocators on the CPU. In place of stock
stand its calls, and sockets that swallow what is sent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.decode.peers import OutgoingSocket
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide
from sglang_scaling_fixes.reclaim.rules.quarantine import GRACE_S

TRANSFERS, WRITERS = (64, 512, 2000), (1, 8)
TOKENS = 16
"""Token slots of each transfer, one to a page."""
STEP_S = 0.5
TURNS, TURN_S = 200, 0.02
"""Scheduler turns measured while everything is held, and seconds from one to the next."""


def measure(transfers: Sequence[int], repeats: int) -> dict[str, Any]:
    """CPU time of the scheduler thread, best of `repeats`, for each size of storm."""
    sizes = [(count, writers) for count in transfers for writers in WRITERS]
    return {
        "repeats": repeats,
        "turns": TURNS,
        "storms": [best(count, writers, repeats) for count, writers in sizes],
    }


def best(count: int, writers: int, repeats: int) -> dict[str, Any]:
    """Every time at its best; what is counted is the same each time."""
    runs = [once(count, writers) for _ in range(repeats)]
    return {name: min(run[name] for run in runs) for name in runs[0]}


def once(count: int, writers: int) -> dict[str, Any]:
    """One storm of `count` transfers, each from `writers` ranks of one prefill."""
    with prefill(writers) as ports, collected() as lines, clock() as now:
        rank = DecodeRank(count, ports)
        transfers = [rank.expose(room) for room in range(count)]
        began = time.thread_time_ns()
        for transfer in transfers:
            rank.give_up(*transfer)
        rank.side.tick()
        storm, aborts = time.thread_time_ns() - began, rank.aborts
        lines.clear()
        for _ in range(round((GRACE_S + 1) / STEP_S)):  # a longer one would be decode's own pause
            now.ahead += STEP_S
            rank.turn()
        turns = []
        for _ in range(TURNS):
            now.ahead += TURN_S
            turns.append(rank.turn())
        report = json.dumps(rank.side.report())
        return {
            "transfers": count,
            "writers": writers,
            "storm_ms": round(storm / 1e6, 2),
            "turn_ms": round(statistics.mean(turns) / 1e6, 3),
            "longest_turn_ms": round(max(turns) / 1e6, 3),
            "aborts": aborts,
            "log_lines_per_minute": len(lines),
            "log_kb_per_minute": round(sum(map(len, lines)) / 1e3, 1),
            "server_info_kb": round(len(report) / 1e3, 1),
        }


class DecodeRank:
    """A decode rank registered at every rank of one prefill, which answers nothing more."""

    def __init__(self, count: int, ports: list[int]) -> None:
        import torch
        from sglang.srt.disaggregation.utils import ReqToMetadataIdxAllocator
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

        self._tokens = TokenToKVPoolAllocator(count * TOKENS, torch.float32, "cpu", None, False)
        self._aux = ReqToMetadataIdxAllocator(count)
        self._status: dict[int, int] = {}
        self.side = DecodeSide(self._manager(), Config()).install()
        self.side.install_gate(
            SimpleNamespace(
                token_to_kv_pool_allocator=self._tokens,
                req_to_metadata_buffer_idx_allocator=self._aux,
                gloo_group=None,
                metadata_buffers=None,
                tree_cache=None,
            )
        )
        self._infos = [
            {"rank_ip": "127.0.0.1", "rank_port": port, "is_dummy": False} for port in ports
        ]
        self.aborts = 0
        """That have left."""
        self._sockets = [self._connect(f"127.0.0.1:{port}") for port in ports]

    def _manager(self) -> SimpleNamespace:
        return SimpleNamespace(
            server_args=SimpleNamespace(),
            server_socket=SimpleNamespace(),
            local_ip="127.0.0.1",
            rank_port=1,
            kv_args=SimpleNamespace(state_types=[]),
            request_status=self._status,
            prefill_response_tracker={},
            get_session_id=lambda: "127.0.0.1:1",
        )

    def _connect(self, rank: str) -> OutgoingSocket:
        lock, stock = threading.Lock(), SimpleNamespace(send_multipart=self._swallow)
        tap = OutgoingSocket(stock, rank, lambda: (stock, lock), self.side.peers)
        tap.send_multipart([b"None", b"127.0.0.1", b"1", b"127.0.0.1:1"])
        self.side.inbox.read([messages.encode(messages.HelloAck(rank, "prefill", seq=1))])
        return tap

    def _swallow(self, frames: list[bytes], *_: Any, **__: Any) -> None:
        self.aborts += len(frames) == 1

    def expose(self, room: int) -> tuple[Any, Any, int]:
        slots, aux = self._tokens.alloc(TOKENS), self._aux.alloc()
        receiver = SimpleNamespace(bootstrap_room=room, bootstrap_infos=self._infos)
        self._status[room] = 2

        def stock(*_: Any) -> None:
            for tap in self._sockets:
                tap.send_multipart([b"%d" % room, b"", b"1", b"127.0.0.1:1", b"", b"", b"", b"1"])

        self.side.send_metadata(stock, receiver, slots.numpy().astype(np.int32), aux, [])
        return receiver, slots, aux

    def give_up(self, receiver: Any, slots: Any, aux: int) -> None:
        """As stock ends a request whose transfer failed."""
        self.side.clearing(receiver)
        self._tokens.free(slots)
        self._aux.free(aux)

    def turn(self) -> int:
        """Nanoseconds of CPU time in the plugin's part of one scheduler turn."""
        began = time.thread_time_ns()
        self.side.tick()
        return time.thread_time_ns() - began


@contextlib.contextmanager
def prefill(ranks: int) -> Iterator[list[int]]:
    """The ports of a prefill whose processes live and say nothing."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(ranks)
        ]
        yield [server.getsockname()[1] for server in servers]


@dataclass
class Clock:
    """Stands still but for whoever puts it ahead, by seconds."""

    ahead: float = 0.0


@contextlib.contextmanager
def clock() -> Iterator[Clock]:
    """A clock in place of `time.monotonic`, so that nobody waits for holds to grow old."""
    now, began = Clock(), time.monotonic()
    with mock.patch("time.monotonic", lambda: began + now.ahead):
        yield now


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """What the plugin logs at WARNING and above, in place of standard error."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sglang_scaling_fixes")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
