"""The pages of one pass: every slot has a scratch row of its own, on all ranks the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sglang_scaling_fixes.layersplit import plan as plans
from sglang_scaling_fixes.layersplit import scratch
from sglang_scaling_fixes.layersplit.plan import Plan

ROWS = 6
"""Requests that the tables have room for; a batch has fewer."""
MOST = 5
"""Pages of a prefix, and of new tokens, at most."""


@dataclass(frozen=True)
class Batch:
    tables: Tensor
    """int32 `[ROWS, tokens]`: slots, and what earlier requests left behind."""
    requests: Tensor
    prefix: list[int]
    seq: list[int]
    page: int
    pool_pages: int

    def slots(self, request: int) -> Tensor:
        return self.tables[self.requests[request], : self.seq[request]]

    def read(self) -> set[int]:
        """Pages that hold a token of a prefix."""
        return {
            int(slot) // self.page
            for i, before in enumerate(self.prefix)
            for slot in self.slots(i)[:before]
        }

    def used(self) -> set[int]:
        return {int(slot) // self.page for i in range(len(self.seq)) for slot in self.slots(i)}


ROOM = 10**6


def made(batch: Batch, room: int = ROOM) -> Plan:
    return plans.make(
        batch.tables,
        batch.requests,
        batch.prefix,
        batch.seq,
        page_size=batch.page,
        pool_pages=batch.pool_pages,
        room=room,
    )


def laid_out(pages: Sequence[Sequence[int]], prefix: list[int], seq: list[int], page: int) -> Batch:
    """A batch whose requests have these pages; what is left of the tables names used pages, too."""
    width = (2 * MOST + 1) * page
    everything = [p for own in pages for p in own] or [1]
    tables = torch.full((ROWS, width), everything[-1] * page + page - 1, dtype=torch.int32)
    rows = list(range(ROWS))[::-1][: len(pages)]
    for row, own, length in zip(rows, pages, seq, strict=True):
        slots = (torch.tensor(own)[:, None] * page + torch.arange(page)).flatten()
        tables[row, :length] = slots[:length].int()
    return Batch(
        tables, torch.tensor(rows, dtype=torch.int64), prefix, seq, page, max(everything) + 3
    )


@st.composite
def batches(draw: st.DrawFn, page_sizes: Sequence[int] = (1, 4, 64)) -> Batch:
    page: int = draw(st.sampled_from(page_sizes))
    count = draw(st.integers(1, ROWS - 1))
    free = draw(st.permutations(range(1, 2 * MOST * count + 1)))
    pages: list[list[int]] = []
    prefix: list[int] = []
    seq: list[int] = []
    for _ in range(count):
        before = draw(st.integers(0, MOST * page))
        after = before + draw(st.one_of(st.just(1), st.integers(1, (MOST - 1) * page)))
        shared: list[int] = []
        shares = draw(st.booleans())
        if shares and pages:
            other = draw(st.integers(0, len(pages) - 1))
            whole = min(prefix[other], before) // page
            shared = pages[other][: draw(st.integers(0, whole))]
        fresh = -(-after // page) - len(shared)
        pages.append([*shared, *free[:fresh]])
        free = free[fresh:]
        prefix.append(before)
        seq.append(after)
    return laid_out(pages, prefix, seq, page)


def check(plan: Plan, batch: Batch) -> None:
    """All that readers, writers and senders rely on."""
    page = batch.page
    rows: dict[int, int] = {}
    for i, before in enumerate(batch.prefix):
        slots = batch.slots(i)
        places = plan.slot(slots)
        assert places.dtype == slots.dtype and places.shape == slots.shape
        assert torch.equal(plan.slot_back(places), slots)
        assert torch.equal(places % page, slots % page)
        assert torch.equal(plan.page(slots // page), places // page)
        assert (places >= page).all() and (places < len(plan.pages) * page).all()
        assert (places[:before] < (1 + len(plan.prefix)) * page).all()
        first_of_own_page = -(-before // page) * page
        assert (places[first_of_own_page:] >= (1 + len(plan.prefix)) * page).all()
        rows.update(zip(slots.tolist(), places.tolist(), strict=True))
    assert len(set(rows.values())) == len(rows)
    prefix = plan.prefix.tolist()
    assert len(set(prefix)) == len(prefix)
    assert set(prefix) == batch.read()
    assert plan.pages[1 : 1 + len(prefix)].tolist() == prefix
    assert set(plan.pages[1:].tolist()) == batch.used()
    unused = torch.tensor(sorted(set(range(batch.pool_pages)) - batch.used()))
    assert not plan.page(unused).any()
    assert (plan.slot(unused * page + page - 1) == page - 1).all()
    padding = torch.tensor([0, -1, -page])
    assert torch.equal(plan.slot(padding), padding)
    assert torch.equal(plan.slot_back(padding), padding)


@given(batches())
def test_each_slot_has_a_row_of_its_own(batch: Batch) -> None:
    check(made(batch), batch)


@given(batches(), st.integers(0, 2**31 - 1))
def test_a_plan_depends_on_the_requests_alone(batch: Batch, left_behind: int) -> None:
    """Ranks have the same requests; what else is in their tables may differ."""
    tables = torch.full_like(batch.tables, left_behind)
    for i, row in enumerate(batch.requests):
        tables[row, : batch.seq[i]] = batch.slots(i)
    one, other = made(batch), made(replace(batch, tables=tables))
    for name in ("prefix", "pages", "table"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@given(batches(page_sizes=(4, 64)), st.data())
def test_new_pages_fit_the_chunk_of_a_scratch(batch: Batch, data: st.DataObject) -> None:
    new = sum(batch.seq) - sum(batch.prefix)
    chunk = data.draw(st.integers(new, 2 * new), "chunk")
    room = scratch.size(0, chunk, len(batch.seq), batch.page)
    plan = made(batch)
    assert len(plan.pages) - 1 - len(plan.prefix) <= room.chunk


UNALIGNED = laid_out([[3, 1, 7]], [6], [9], 4)
SHARED = laid_out([[3, 1, 7], [3, 1, 5]], [8, 8], [9, 9], 4)


def test_a_page_that_a_prefix_fills_partly_is_sent() -> None:
    plan = made(UNALIGNED)
    assert plan.prefix.tolist() == [3, 1]
    assert plan.slot(UNALIGNED.slots(0)).tolist() == list(range(4, 13))


def test_pages_of_two_requests_are_sent_once() -> None:
    assert made(SHARED).prefix.tolist() == [1, 3]


def test_a_batch_without_a_prefix_sends_nothing() -> None:
    plan = made(laid_out([[3, 1], [2]], [0, 0], [5, 1], 4))
    assert not len(plan.prefix)
    assert plan.pages.tolist() == [0, 3, 1, 2]


def test_a_batch_of_nobody() -> None:
    batch = laid_out([], [], [], 4)
    plan = made(batch)
    assert plan.pages.tolist() == [0] and not plan.table.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_addresses_keep_their_dtype(dtype: torch.dtype) -> None:
    plan = made(SHARED)
    addresses = torch.tensor([[12, -1], [7, 0]], dtype=dtype)
    for moved in (plan.slot(addresses), plan.slot_back(addresses), plan.page(addresses // 4)):
        assert moved.dtype == dtype and moved.shape == addresses.shape


@given(batches())
def test_pages_are_counted_by_what_they_are_where_lengths_say_too_much(batch: Batch) -> None:
    check(made(batch, room=0), batch)


def warm_up(requests: int, prefix: int = 0) -> Batch:
    """As stock's dummy runs: every request in row 0 of a table that nobody has written yet."""
    zeros = torch.zeros((1, 4 * 64), dtype=torch.int32)
    rows = torch.zeros(requests, dtype=torch.int64)
    return Batch(zeros, rows, [prefix] * requests, [prefix + 1] * requests, 64, 9)


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_warm_up_of_any_size_needs_padding_only(prefix: int) -> None:
    batch = warm_up(5000, prefix)
    plan = made(batch, room=20)
    assert len(plan.pages) <= 2 and not plan.pages.any()
    assert torch.equal(plan.slot(batch.tables), batch.tables)  # row 0 stays row 0


def test_control_by_their_lengths_it_would_need_a_page_for_each() -> None:
    assert len(made(warm_up(5000)).pages) > 5000


# Controls: the same check finds each of these.


def test_control_a_partly_filled_page_that_is_not_sent() -> None:
    whole_pages = [before // UNALIGNED.page * UNALIGNED.page for before in UNALIGNED.prefix]
    wrong = made(replace(UNALIGNED, prefix=whole_pages))
    check(made(UNALIGNED), UNALIGNED)
    with pytest.raises(AssertionError):
        check(wrong, UNALIGNED)


def test_control_shared_pages_that_are_sent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    check(made(SHARED), SHARED)
    monkeypatch.setattr(torch, "unique", lambda pages: pages)
    with pytest.raises(AssertionError):
        check(made(SHARED), SHARED)


def test_control_no_page_for_padding() -> None:
    plan = made(UNALIGNED)
    wrong = replace(plan, pages=plan.pages[1:], table=plan.table - 1)
    with pytest.raises(AssertionError):
        check(wrong, UNALIGNED)


def test_control_a_plan_from_what_one_rank_holds() -> None:
    """Interleaved context parallelism drops a request of which a rank has no row."""
    of_one_rank = replace(SHARED, requests=SHARED.requests[:1], prefix=[8], seq=[9])
    with pytest.raises(AssertionError):
        check(made(of_one_rank), SHARED)
