"""What safe reclaim computes per request, alone on one core: no server, no socket.

Ledgers and messages are driven in the order the adapters drive them, with a window
of requests open at a time. The gate wraps stock's own allocators on the CPU.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.decode.gate import Gate
from sglang_scaling_fixes.reclaim.rules.coverage import Extent
from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.prefill_ledger import PrefillLedger
from sglang_scaling_fixes.reclaim.rules.questions import SendAbort

RANK, DECODE, PREFILL = "10.0.0.1:40001", "tcp://10.0.0.2:40002", "prefill-process"
STOCK_FRAMES = [b"1234567"] * 9
"""As many frames as stock's metadata message has, about."""
OPEN = 64
"""Requests between their exposure and their end at any time."""
HELD = 8
"""Given-up requests that wait for their answer at any time."""
SESSION, PAGES = "10.0.0.2:40003", 1000
"""Where a request's KV is written to, and how many pages it has (of one token)."""
TOKENS = 64
BATCH = 64
"""Requests' slots allocated at a time for the gate's figures."""


def measure(requests: int, repeats: int) -> dict[str, Any]:
    """Microseconds of CPU time per request, best of `repeats`."""
    parts: dict[str, Callable[[int], None]] = {
        "decode": decode_landed,
        "prefill": prefill_done,
        "messages": messages_landed,
    }
    aborted: dict[str, Callable[[int], None]] = {
        "decode": decode_given_up,
        "prefill": prefill_asked,
        "messages": messages_given_up,
    }
    normal = {name: per_request(part, requests, repeats) for name, part in parts.items()}
    abort = {name: per_request(part, requests, repeats) for name, part in aborted.items()}
    return {
        "requests": requests,
        "repeats": repeats,
        "unit": "microseconds of CPU time",
        "landed": {**normal, "both roles": round(sum(normal.values()), 3)},
        "aborted": {**abort, "both roles": round(sum(abort.values()), 3)},
        "gate": gate(max(1, requests // BATCH), repeats),
    }


def per_request(part: Callable[[int], None], requests: int, repeats: int) -> float:
    """Best time of `part(requests)` per request, in microseconds."""
    best = min(_timed(part, requests) for _ in range(repeats))
    return round(best / requests / 1e3, 3)


def _timed(part: Callable[[int], None], requests: int) -> int:
    began = time.thread_time_ns()
    part(requests)
    return time.thread_time_ns() - began


# -- requests whose KV lands ------------------------------------------------------------


def decode_landed(requests: int) -> None:
    ledger, window = _decode_ledger(), deque[Exposure]()
    for room in range(requests):
        exposure = ledger.expose(room, [RANK])
        ledger.sent(exposure, RANK)
        window.append(exposure)
        if len(window) > OPEN:
            oldest = window.popleft()
            ledger.successes.tagged(oldest.lease, RANK)
            ledger.successes.admits(oldest.room, oldest.lease)
            ledger.landed(oldest)


def prefill_done(requests: int) -> None:
    """One chunk with one helper task per request, as Mooncake's worker writes it."""
    ledger = PrefillLedger(PREFILL)
    for room in range(requests):
        extent = Extent(SESSION, PAGES, (), PAGES)
        ledger.bind(room, f"e-{room}", f"g-{room}", DECODE, RANK, extent=extent)
        ledger.sender_made(room, room)
        ledger.offer(room, PAGES, (), PAGES)
        attempt = ledger.put(room)
        assert attempt is not None
        ledger.take(attempt, PAGES, True)
        ledger.opened(attempt)
        attempt.coverage.writes.append(SESSION)
        ledger.done(attempt)
        attempt.coverage.writes.append(SESSION)
        assert ledger.success_leaves(attempt, DECODE, bool)
        attempt.bound_at(DECODE)
        ledger.done(attempt)
        ledger.busy(room)
        ledger.retire(room, room)


def messages_landed(requests: int) -> None:
    """Bind rides out and is split off, Mark comes back."""
    for number in range(requests):
        lease = f"d-{number}"
        bind = messages.Bind(
            DECODE, RANK, lease, lease, expects=PREFILL, pages=PAGES, states=(), tokens=PAGES
        )
        messages.strip_trailer(messages.attach_trailer(STOCK_FRAMES, bind))
        messages.strip_trailer(
            [b"7", b"4", b"0", messages.encode(messages.SuccessTag(lease, RANK))]
        )


# -- requests that are aborted ------------------------------------------------------------


def decode_given_up(requests: int) -> None:
    ledger, window = _decode_ledger(), deque[Exposure]()
    for room in range(requests):
        exposure = ledger.expose(room, [RANK])
        ledger.sent(exposure, RANK)
        ledger.give_up(exposure, float(room))
        for _ask in ledger.tick(float(room)):
            pass
        window.append(exposure)
        if len(window) > HELD:
            oldest = window.popleft()
            ledger.ack(RANK, PREFILL, oldest.lease, "drained")
            ledger.returned(oldest)


def prefill_asked(requests: int) -> None:
    """The Abort arrives while the chunk is being written."""
    ledger = PrefillLedger(PREFILL)
    for room in range(requests):
        lease = f"g-{room}"
        extent = Extent(SESSION, PAGES, (), PAGES)
        ledger.bind(room, f"e-{room}", lease, DECODE, RANK, extent=extent)
        ledger.sender_made(room, room)
        ledger.offer(room, PAGES, (), PAGES)
        attempt = ledger.put(room)
        assert attempt is not None
        ledger.take(attempt, PAGES, True)
        ledger.abort(room, lease, DECODE, RANK)
        ledger.done(attempt)
        ledger.busy(room)
        ledger.retire(room, room)


def messages_given_up(requests: int) -> None:
    """Bind as ever, then Abort and AbortAck."""
    for number in range(requests):
        lease = f"d-{number}"
        bind = messages.Bind(
            DECODE, RANK, lease, lease, expects=PREFILL, pages=PAGES, states=(), tokens=PAGES
        )
        messages.strip_trailer(messages.attach_trailer(STOCK_FRAMES, bind))
        ask = SendAbort(RANK, number, lease)
        messages.strip_trailer(
            [messages.encode(messages.Abort(DECODE, ask.rank, ask.room, ask.lease))]
        )
        messages.strip_trailer(
            [messages.encode(messages.AbortAck(RANK, PREFILL, lease, "drained"))]
        )


def _decode_ledger() -> DecodeLedger:
    ledger = DecodeLedger("decode-process")
    ledger.hello_acked(RANK, PREFILL)
    return ledger


# -- the gate ---------------------------------------------------------------------------------


def gate(rounds: int, repeats: int) -> dict[str, float]:
    """Per request of `TOKENS` slots: stock's frees, the same behind the gate, its bookkeeping."""
    plain, gated = Frees(gated=False), Frees(gated=True)
    best: dict[str, int] = {}
    for _ in range(repeats):
        for frees, names in ((plain, ("stock_free",)), (gated, ("gated_free", "bookkeeping"))):
            spent = frees.run(rounds)
            for name, nanoseconds in zip(names, spent, strict=False):
                best[name] = min(best.get(name, nanoseconds), nanoseconds)
    per = {name: nanoseconds / (rounds * BATCH) / 1e3 for name, nanoseconds in best.items()}
    per["free_difference"] = per["gated_free"] - per["stock_free"]
    return {name: round(value, 3) for name, value in per.items()}


class Frees:
    """Stock's token and metadata allocators on the CPU, behind the gate or not."""

    def __init__(self, *, gated: bool) -> None:
        import torch
        from sglang.srt.disaggregation.utils import ReqToMetadataIdxAllocator
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

        size = TOKENS * BATCH
        self._tokens = TokenToKVPoolAllocator(size, torch.float32, "cpu", None, False)
        self._aux = ReqToMetadataIdxAllocator(BATCH)
        self._gate = Gate(self._tokens, self._aux).install() if gated else None
        self._ledger = _decode_ledger()
        self._rooms = 0

    def run(self, rounds: int) -> tuple[int, int]:
        """Nanoseconds in frees, and in the gate's bookkeeping around them."""
        freeing = keeping = 0
        for _ in range(rounds):
            owned = [(self._tokens.alloc(TOKENS), self._aux.alloc()) for _ in range(BATCH)]
            keeping += self._open_and_land(owned)
            began = time.thread_time_ns()
            for slots, aux in owned:
                self._tokens.free(slots)
                self._aux.free(aux)
            freeing += time.thread_time_ns() - began
        return freeing, keeping

    def _open_and_land(self, owned: list[tuple[Any, int]]) -> int:
        if self._gate is None:
            return 0
        opened = []
        for slots, aux in owned:
            exposure = self._ledger.expose(self._rooms, [RANK])
            opened.append((exposure, slots.numpy(), aux))
            self._rooms += 1
        began = time.thread_time_ns()
        for exposure, pages, aux in opened:
            self._gate.exposed(exposure, pages, [], aux)
        for exposure, _, _ in opened:
            self._gate.landed(exposure)
        spent = time.thread_time_ns() - began
        for exposure, _, _ in opened:
            self._ledger.landed(exposure)
        return spent
