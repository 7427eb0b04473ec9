"""The gate over stock's own allocators: nothing a writer may reach enters a free list."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.reclaim.decode.gate import Gate
from sglang_scaling_fixes.reclaim.layout import rebind_captured
from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure

allocators = pytest.importorskip("sglang.srt.mem_cache.allocator")
utils = pytest.importorskip("sglang.srt.disaggregation.utils")

RANK = "127.0.0.1:1"


class Decode:
    """A decode rank in miniature: stock allocators, our gate and ledger."""

    def __init__(self, page_size: int = 1, *, audit: bool = False) -> None:
        if page_size == 1:
            self.tokens = allocators.TokenToKVPoolAllocator(64, torch.float32, "cpu", None, False)
        else:
            self.tokens = allocators.PagedTokenToKVPoolAllocator(
                64, page_size, torch.float32, "cpu", None, False
            )
        self.page_size = page_size
        self.aux = utils.ReqToMetadataIdxAllocator(4)
        self.gate = Gate(self.tokens, self.aux, audit=audit).install()
        self.ledger = DecodeLedger("d")
        self.ledger.hello_acked(RANK, "p")

    def expose(self, room: int, tokens: int = 8) -> tuple[Exposure, torch.Tensor, int]:
        slots, slot = self.tokens.alloc(tokens), self.aux.alloc()
        exposure = self.ledger.expose(room, [RANK])
        self.ledger.sent(exposure, RANK)
        self.gate.exposed(exposure, np.unique(slots.numpy() // self.page_size), [], slot)
        return exposure, slots, slot

    def give_up(self, exposure: Exposure) -> None:
        self.ledger.give_up(exposure, 0.0)
        self.gate.gave_up(exposure)

    def prove(self, exposure: Exposure) -> None:
        self.ledger.ack(RANK, "p", exposure.lease, "drained")
        self.ledger.returned(exposure)
        self.gate.give_back(exposure)

    @property
    def free(self) -> tuple[int, int]:
        return self.tokens.available_size(), self.aux.available_size()


@pytest.mark.parametrize("page_size", [1, 4])
def test_given_up_slots_stay_out_until_proven(page_size: int) -> None:
    decode = Decode(page_size)
    everything = decode.free
    exposure, slots, slot = decode.expose(1)
    other = decode.tokens.alloc(8)
    decode.give_up(exposure)
    decode.tokens.free(slots)
    decode.aux.free(slot)
    decode.tokens.free(other)  # an ordinary free in the same tick is not held up
    decode.gate.settle()
    assert decode.free == (everything[0] - 8, everything[1] - 1)
    assert decode.gate.held_tokens == 8
    taken = decode.tokens.alloc(everything[0] - 8)
    assert not set(taken.tolist()) & set(slots.tolist())
    decode.tokens.free(taken)
    decode.prove(exposure)
    assert decode.free == everything
    assert decode.gate.held_tokens == 0


def test_without_the_gate_the_same_frees_hand_the_slots_out() -> None:
    """Negative control: what the test above asserts is not true of stock."""
    decode = Decode()
    exposure, slots, _ = decode.expose(1)
    decode.give_up(exposure)
    stock = type(decode.tokens).free
    stock(decode.tokens, slots)
    taken = decode.tokens.alloc(decode.tokens.available_size())
    assert set(taken.tolist()) & set(slots.tolist())


def test_every_way_of_freeing_is_gated() -> None:
    decode = Decode(4)
    ways = [
        name
        for name in ("free_segment", "free_full", "free_full_segment", "free_page_ids")
        if hasattr(decode.tokens, name)
    ]
    for name in ways:
        before = decode.free
        exposure, slots, slot = decode.expose(hash(name) & 0xFFFF)
        decode.give_up(exposure)
        if name == "free_page_ids":
            decode.tokens.free_page_ids(torch.unique(slots // 4))
        elif name.endswith("segment"):
            getattr(decode.tokens, name)(slots, start_pos=0)
        else:
            getattr(decode.tokens, name)(slots)
        decode.aux.free(slot)
        assert decode.free == (before[0] - 8, before[1] - 1), name
        decode.prove(exposure)
        assert decode.free == before, name


def test_kept_indices_are_a_copy() -> None:
    """Stock passes a view of the request's row, which the next owner of the row overwrites."""
    decode = Decode()
    everything = decode.free
    exposure, slots, slot = decode.expose(1)
    row = slots.clone()
    decode.give_up(exposure)
    decode.tokens.free(row[:])
    decode.aux.free(slot)
    row.zero_()
    decode.prove(exposure)
    assert decode.free == everything
    assert 0 not in decode.tokens.alloc(everything[0]).tolist()


def test_frees_inside_a_group_are_held_too() -> None:
    decode = Decode()
    exposure, slots, slot = decode.expose(1)
    other = decode.tokens.alloc(4)
    before = decode.free
    decode.give_up(exposure)
    decode.tokens.free_group_begin()
    decode.tokens.free(slots)
    decode.tokens.free(other)
    decode.tokens.free_group_end()
    decode.aux.free(slot)
    assert decode.free == (before[0] + 4, before[1])
    decode.prove(exposure)
    assert decode.free == (before[0] + 12, before[1] + 1)


def test_one_free_of_two_aborted_requests_waits_for_both() -> None:
    decode = Decode()
    everything = decode.free
    first, slots_a, slot_a = decode.expose(1)
    second, slots_b, slot_b = decode.expose(2)
    decode.give_up(first)
    decode.give_up(second)
    decode.tokens.free(torch.cat([slots_a, slots_b]))
    decode.aux.free(slot_a)
    decode.aux.free(slot_b)
    decode.prove(first)
    assert decode.free == (everything[0] - 16, everything[1] - 1)
    decode.prove(second)
    assert decode.free == everything


def test_landed_slots_are_ordinary() -> None:
    decode = Decode()
    everything = decode.free
    exposure, slots, slot = decode.expose(1)
    decode.ledger.landed(exposure)
    decode.gate.landed(exposure)
    decode.tokens.free(slots)
    decode.aux.free(slot)
    assert decode.free == everything


def test_normal_frees_look_at_no_index() -> None:
    """The price of the normal path: no index is read (no device sync) while nothing is given up."""

    class Untouchable(torch.Tensor):
        def detach(self) -> torch.Tensor:
            raise AssertionError("an ordinary free read its indices")

    decode = Decode()
    decode.expose(1)
    plain = decode.tokens.alloc(4)
    decode.tokens.free(plain.as_subclass(Untouchable))


def test_audit_keeps_slots_freed_while_their_transfer_is_open() -> None:
    decode = Decode(audit=True)
    exposure, slots, _ = decode.expose(1)
    before = decode.free
    decode.tokens.free(slots)
    assert decode.free == before
    decode.give_up(exposure)
    decode.prove(exposure)
    assert decode.free[0] == before[0] + 8


def test_kv_that_went_past_the_gate_is_noticed() -> None:
    decode = Decode()
    exposure, _, slot = decode.expose(1)
    decode.give_up(exposure)
    decode.aux.free(slot)  # the release is over, and its KV never came by
    with pytest.raises(SystemExit, match="past the gate"):
        decode.gate.settle()


def test_clearing_the_pool_under_an_open_transfer_is_refused() -> None:
    decode = Decode()
    decode.expose(1)
    with pytest.raises(RuntimeError, match="may still write"):
        decode.tokens.clear()


def test_a_free_captured_before_the_gate_finds_it() -> None:
    """0.5.11 to 0.5.16: a component of the unified radix tree keeps `allocator.free`."""
    tokens = allocators.TokenToKVPoolAllocator(16, torch.float32, "cpu", None, False)
    component = SimpleNamespace(_free_full=tokens.free, other=print)
    rebind_captured(SimpleNamespace(components={"full": component}), tokens)
    tokens.free = lambda index: "gated"
    assert component._free_full(torch.tensor([1])) == "gated"
    assert component.other is print


def test_an_allocator_with_unknown_ways_to_free_is_refused() -> None:
    class Novel(allocators.TokenToKVPoolAllocator):  # type: ignore[name-defined]
        def free_by_magic(self, index: object) -> None: ...

    with pytest.raises(AttachError, match="free_by_magic"):
        Gate(
            Novel(8, torch.float32, "cpu", None, False), utils.ReqToMetadataIdxAllocator(1)
        ).install()
