"""A success leaves prefill only if it covers what was exposed, through the real prefill side.

Each case is one way in which stock reports success of a transfer. With the rule off
(`covers` says yes) every short one would leave as a success: see the control.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_scaling_fixes.reclaim import layout, messages
from sglang_scaling_fixes.reclaim.prefill.interposers import IN_HAND, StatusInterposer
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide
from sglang_scaling_fixes.reclaim.rules.coverage import Coverage, Extent
from sglang_scaling_fixes.reclaim.stock_wire import AUX_DATA

DECODE, RANK, SESSION = "tcp://192.0.2.2:9", "192.0.2.1:9", "192.0.2.2:77"
ROOM = 7
SUCCESS, FAILED = b"4", b"0"


@dataclass(frozen=True)
class Case:
    """What decode exposes, what prefill's scheduler sends, and what its worker does with it."""

    pages: int = 4
    tokens: int | None = 200
    states: tuple[int, ...] | None = ()
    computed: int = 200
    chunks: tuple[int, ...] = (2, 2)
    """Pages that the scheduler hands over with each chunk."""
    share: int | None = None
    """Pages of each chunk that this rank sends itself, None for all."""
    rows: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    """Chunks the worker passes over."""
    unqueued: tuple[int, ...] = ()
    """Chunks that stock does not queue."""
    aux_by_message: bool = False
    sends_kv: bool = True
    armed_decode: bool = True
    hisparse: bool = False
    """Decode's registration says so, as up to 0.5.12."""


WHOLE = {
    "whole": Case(),
    "one chunk": Case(chunks=(4,)),
    "last chunk without pages": Case(chunks=(4, 0)),
    "state rows": Case(states=(4, 0), rows=(4, 0)),
    "kinds of state that only one side names": Case(states=(4,), rows=(4, 0)),
    "metadata by message": Case(aux_by_message=True),
    "a share of the pages": Case(share=1),
    "no page of this rank's": Case(share=0),
    "a rank whose equal sends the KV": Case(sends_kv=False, skipped=(0,)),
    "nothing but the prefix decode has": Case(pages=0, chunks=(0,)),
    "a decode that does not say how long its prompt is": Case(tokens=None),
    "a decode without the plugin": Case(armed_decode=False),
    "a decode without the plugin that counts fewer pages": Case(armed_decode=False, pages=3),
    "a decode without the plugin, no token of the last chunk is this rank's": Case(
        armed_decode=False, pages=2, skipped=(1,)
    ),
    "a decode without the plugin that rejected the prompt": Case(
        armed_decode=False, pages=1, skipped=(1,)
    ),
    "a decode without the plugin that counts tokens for pages": Case(
        armed_decode=False, pages=200, hisparse=True
    ),
    "a decode that rejected the prompt": Case(pages=0, states=None, tokens=None),
}
SHORT = {
    "a placeholder for a rejected prompt": Case(computed=1, chunks=(1,)),
    "a placeholder within the only page": Case(pages=1, computed=1, chunks=(1,), tokens=60),
    "a prompt cut within its last page": Case(computed=199),
    "a prompt that is longer at prefill": Case(computed=300, chunks=(2, 4)),
    "fewer pages": Case(tokens=None, chunks=(2, 1)),
    "another prefix left out": Case(tokens=None, chunks=(2, 3)),
    "state rows missing": Case(states=(4,), rows=(3,)),
    "no state rows": Case(states=(4,), rows=()),
    "state rows of another prefix": Case(states=(4,), rows=(6,)),
    "a kind of state decode does not have": Case(states=(4,), rows=(4, 1)),
    "a chunk passed over": Case(skipped=(0,)),
    "a chunk that was not queued": Case(unqueued=(0,)),
    "the last chunk's pages passed over": Case(skipped=(1,)),
    "the same, with the metadata by message": Case(skipped=(1,), aux_by_message=True),
    "a decode without the plugin, a placeholder": Case(armed_decode=False, computed=1, chunks=(1,)),
}


class Stock:
    """A prefill with the guard on: its queue, engine and socket to decode."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.queue: deque[Any] = deque()
        self.sent: list[list[bytes]] = []
        self.tickets: list[Any] = []
        kinds = [f"dsa{n}" for n in range(max(len(case.rows), len(case.states or ())))]
        self.manager = SimpleNamespace(
            engine=SimpleNamespace(batch_transfer_sync=lambda *_: 0),
            kv_args=SimpleNamespace(state_types=kinds, kv_data_ptrs=[1] * case.sends_kv),
            transfer_queues=[],
            request_status={ROOM: 2},
            transfer_infos={},
            decode_kv_args_table={SESSION: SimpleNamespace(enable_hisparse=case.hisparse)},
            failures=[],
            record_failure=lambda *_: None,
            update_status=lambda *_: None,
        )
        self.guard = PrefillSide(self.manager).install()
        self.guard._replies = SimpleNamespace(send=lambda *_: True)  # type: ignore[assignment]
        stock_queue = SimpleNamespace(put=self.queue.append, get=self.queue.popleft)
        self.tap = self.guard.tap_queue(stock_queue)
        to_decode = SimpleNamespace(send_multipart=self.sent.append)
        self.socket = StatusInterposer(lambda: to_decode, DECODE, self.guard, Lock())

    def run(self) -> bytes:
        """The status that decode is told."""
        case = self.case
        self.guard.read(self.destinations())
        sender = SimpleNamespace(bootstrap_room=ROOM)
        self.guard.sender_made(sender)
        self.tickets.append(sender.sglang_scaling_fixes_ticket)
        request = SimpleNamespace(disagg_kv_sender=sender, origin_input_ids=[1] * case.computed)
        for n, pages in enumerate(case.chunks):
            last = n == len(case.chunks) - 1
            self.guard.computes(request)
            queues = self.drop if n in case.unqueued else self.split_off
            self.guard.send(queues, sender, [0] * pages, self.rows() if last else None)
        for n in range(len(case.chunks) - len(case.unqueued)):
            self.write(self.tap.get(), skipped=n in case.skipped)
        self.tap.end()
        return self.sent[-1][1]

    def destinations(self) -> list[bytes]:
        case = self.case
        pages = b"\0" * 4 * case.pages
        stock = [b"7", b"192.0.2.2", b"9", SESSION.encode(), pages, b"0", b"", b"1"]
        if not case.armed_decode:
            return stock
        bind = messages.Bind(
            DECODE, RANK, "g", "e", pages=case.pages, states=case.states, tokens=case.tokens
        )
        return messages.attach_trailer(stock, bind)

    def rows(self) -> list[list[int]]:
        return [[0] * count for count in self.case.rows]

    def drop(self, *_: Any) -> None:
        """Stock finds the room failed just then, and something revives it later."""

    def split_off(self, sender: Any, kv_indices: list[int], state_indices: Any) -> None:
        del sender
        own = kv_indices if self.case.share is None else kv_indices[: self.case.share]
        last = state_indices is not None
        self.tap.put(SimpleNamespace(prefill_kv_indices=own, is_last_chunk=last))

    def write(self, chunk: Any, *, skipped: bool) -> None:
        if chunk.prefill_kv_indices and not skipped:
            self.manager.engine.batch_transfer_sync(SESSION, [0], [0], [0])
        if not chunk.is_last_chunk:
            return
        if self.case.aux_by_message:
            self.socket.send_multipart([AUX_DATA, b"7", b"0", b"0"])
        else:
            self.manager.engine.batch_transfer_sync(SESSION, [0], [0], [0])
        self.socket.send_multipart([b"7", SUCCESS, b"0"])


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    saved = PrefillSide.current
    IN_HAND.attempt = None
    yield
    PrefillSide.current, IN_HAND.attempt = saved, None


@pytest.mark.parametrize("name", WHOLE)
def test_a_success_that_covers_leaves_as_one(name: str) -> None:
    stock = Stock(WHOLE[name])
    assert stock.run() == SUCCESS
    assert stock.guard.report()["short_sends"] == 0


@pytest.mark.parametrize("name", SHORT)
def test_a_short_success_leaves_as_a_failure(name: str, caplog: pytest.LogCaptureFixture) -> None:
    stock = Stock(SHORT[name])
    assert stock.run() == FAILED
    assert stock.guard.report()["short_sends"] == 1
    assert any(why in caplog.text for why in ("decode waits for", "skipped", "not queued"))
    ask = messages.Abort(DECODE, RANK, ROOM, "g")
    answers: list[Any] = []
    stock.guard._replies.send = lambda _, frame: answers.append(messages.decode(frame))  # type: ignore
    stock.guard.read([messages.encode(ask)])
    if SHORT[name].armed_decode:
        assert [answer.verdict for answer in answers] == ["drained"], "its slots must come back"


@pytest.mark.parametrize("name", SHORT)
def test_without_the_rule_it_would_be_a_success(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coverage, "missing", lambda *_: "")
    assert Stock(SHORT[name]).run() == SUCCESS


@pytest.mark.parametrize(("skip_kv", "status"), [(True, SUCCESS), (False, FAILED)])
def test_a_rank_whose_equal_sends_the_kv_is_known_by_stocks_flags(
    skip_kv: bool, status: bytes
) -> None:
    stock = Stock(Case(skipped=(0,)))
    stock.manager._get_dsa_cache_transfer_skip_flags = lambda info: (skip_kv, False)
    assert stock.run() == status


def test_an_attempt_that_is_over_keeps_no_list_of_its_writes() -> None:
    stock = Stock(Case())
    assert stock.run() == SUCCESS
    (attempt,) = stock.guard._ledger._by_lease.values()
    assert attempt.coverage.writes
    sender = SimpleNamespace(sglang_scaling_fixes_ticket=None)
    (sender.sglang_scaling_fixes_ticket,) = stock.tickets
    stock.guard.retire(sender)
    assert (attempt.coverage.writes, attempt.exposed) == ([], {})


def test_each_decode_rank_is_judged_by_what_it_exposed() -> None:
    coverage = Coverage()
    coverage.offer(4, (), 200)
    extent = Extent(SESSION, 4, (), 200)
    assert coverage.missing(extent, bool) == ""
    assert "5" in coverage.missing(extent._replace(pages=5), bool)


def test_a_session_without_writes_is_short_and_the_other_is_not() -> None:
    coverage = Coverage()
    a, b = Extent("a", 2, (), 90), Extent("b", 2, (), 90)
    coverage.offer(2, (), 90)
    coverage.begin(2, True, (a, b))
    coverage.writes += ["a", "a", "b"]  # b: pages or metadata, not both
    coverage.settle((a, b))
    assert coverage.missing(a, bool) == ""
    assert coverage.missing(b, bool)


@pytest.mark.parametrize(
    ("kinds", "indices", "rows"),
    [
        ([], None, ()),
        (["dsa"], [[1, 2, 3]], (3,)),
        (["dsa"], [[1]], (1,)),
        (["dsa"], [5, 6], (2,)),  # 0.5.11: one flat list
        (["dsa"], [5], (1,)),
        (["dsa"], [], (0,)),
        (["dsa"], np.array([5, 6]), (2,)),  # as 0.5.11 passes it
        (["dsa"], np.array([5]), (1,)),
        (["dsa"], np.array([], dtype=np.int32), (0,)),
        (["dsa", "swa"], [[1, 2], None], (2, 0)),
    ],
)
def test_state_rows_are_counted_as_each_release_lists_them(
    kinds: list[str], indices: Any, rows: tuple[int, ...]
) -> None:
    assert layout.state_rows(SimpleNamespace(state_types=kinds), indices) == rows


@pytest.mark.parametrize(
    ("kinds", "indices", "pages"),
    [
        ([], None, []),
        (["dsa"], None, []),
        (["dsa"], [[1, 2, 3]], [[1, 2, 3]]),
        (["dsa"], [np.array([1])], [[1]]),
        (["dsa"], [5], [[5]]),  # 0.5.11: flat
        (["dsa"], np.array([5, 6]), [[5, 6]]),  # as 0.5.11 passes it
        (["dsa"], np.array([5]), [[5]]),
        (["dsa"], np.array([0]), [[0]]),
        (["dsa"], np.array([], dtype=np.int32), [[]]),
        (["swa"], np.array([5, 6]), []),  # not pages of the KV
        (["dsa", "swa"], [[1, 2], None], [[1, 2]]),
    ],
)
def test_state_pages_are_read_as_each_release_lists_them(
    kinds: list[str], indices: Any, pages: list[list[int]]
) -> None:
    found = layout.page_states(SimpleNamespace(state_types=kinds), indices)
    assert [part.tolist() for part in found] == pages
