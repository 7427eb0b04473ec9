"""What a request shares with the radix tree is locked there while it may be written, and so is
not looked for in every free of every other request."""

from __future__ import annotations

from array import array
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_scaling_fixes.reclaim.decode.gate import Lock, no_lock
from sglang_scaling_fixes.reclaim.layout import lock_prefix
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from tests.unit.reclaim.test_gate import RANK, Decode

prefix_cache = pytest.importorskip("sglang.srt.mem_cache.base_prefix_cache")
radix_cache = pytest.importorskip("sglang.srt.mem_cache.radix_cache")

PREFIX, OWN = 8, 4


class WithTree(Decode):
    """A decode rank with stock's radix tree, in which a prefix is cached."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = radix_cache.RadixCache.create_simulated(mock_allocator=self.tokens)
        key = radix_cache.RadixKey(array("q", range(PREFIX)))
        self.prefix = self.tokens.alloc(PREFIX)
        self.tree.insert(prefix_cache.InsertParams(key=key, value=self.prefix))
        self.node = self.tree.match_prefix(prefix_cache.MatchPrefixParams(key)).last_device_node
        self.lock: Lock = partial(
            lock_prefix, SimpleNamespace(tree_cache=self.tree), self.request()
        )

    def request(self, **other: Any) -> SimpleNamespace:
        """Stock's record of a request that found the prefix."""
        match = SimpleNamespace(
            prefix_indices=self.prefix, last_device_node=self.node, needs_local_restore=False
        )
        return SimpleNamespace(**{"prefix_match": match, "req": SimpleNamespace(), **other})

    def held(self, room: int, lock: Lock) -> Exposure:
        """A request whose state goes to all its pages, those it shares as well, and is aborted.

        Stock locks what it shares from its admission to its release.
        """
        receipt = self.tree.inc_lock_ref(self.node).to_dec_params()
        slots, aux = self.tokens.alloc(OWN), self.aux.alloc()
        row = torch.cat([self.prefix, slots]).numpy()
        exposure = self.ledger.expose(room, [RANK])
        self.ledger.sent(exposure, RANK)
        self.gate.exposed(exposure, slots.numpy().astype(np.int32), [row], aux)
        self.ledger.give_up(exposure, 0.0)
        self.gate.gave_up(exposure, lock)
        self.tokens.free(slots)
        self.tree.dec_lock_ref(self.node, receipt)
        self.aux.free(aux)
        self.gate.settle()
        return exposure

    def evict(self) -> None:
        self.tree.evict(prefix_cache.EvictParams(num_tokens=1000))

    def is_free(self, slots: torch.Tensor) -> bool:
        taken = self.tokens.alloc(self.tokens.available_size())
        self.tokens.free(taken)
        return bool(torch.isin(slots, taken).all())


@pytest.fixture
def host_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each copy of a tensor to the host: on a GPU each waits for the device."""
    reads: list[int] = []
    stock = torch.Tensor.cpu

    def cpu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        reads.append(tensor.numel())
        return stock(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    return reads


@pytest.mark.parametrize("locked", [True, False])
def test_a_hold_does_not_make_other_frees_wait_for_the_device(
    locked: bool, host_reads: list[int]
) -> None:
    """The control: a prefix that nobody locks is looked for until it is evicted."""
    decode = WithTree()
    decode.held(1, decode.lock if locked else no_lock)
    del host_reads[:]
    for _ in range(100):
        decode.tokens.free(decode.tokens.alloc(2))
    assert len(host_reads) == (0 if locked else 100)


def test_what_may_be_written_is_not_evicted_before_there_is_proof() -> None:
    decode = WithTree()
    everything = decode.free
    first, second = decode.held(1, decode.lock), decode.held(2, decode.lock)
    assert decode.tree.evictable_size() == 0, "stock does not count on what it cannot have"
    decode.evict()
    decode.prove(first)
    decode.evict()
    assert not decode.is_free(decode.prefix)
    decode.prove(second)
    assert decode.free == everything
    assert (decode.tree.evictable_size(), decode.tree.protected_size()) == (PREFIX, 0)
    decode.evict()
    assert decode.is_free(decode.prefix)


def test_stocks_own_lock_ends_with_the_release() -> None:
    """The control: without ours, and without the gate, an evicted prefix is anybody's."""
    decode = WithTree()
    decode.held(1, lambda: (PREFIX, lambda: None))  # says that it has locked it
    decode.evict()
    assert decode.is_free(decode.prefix)


def test_what_cannot_be_locked_is_kept_when_it_is_evicted() -> None:
    decode = WithTree()
    exposure = decode.held(1, no_lock)
    decode.evict()
    decode.gate.settle()
    assert not decode.is_free(decode.prefix)
    decode.prove(exposure)
    assert decode.is_free(decode.prefix)


def test_a_prefix_that_is_longer_than_what_is_locked_is_looked_for() -> None:
    decode = WithTree()
    unlocked: list[int] = []
    exposure = decode.held(1, lambda: (PREFIX - 1, partial(unlocked.append, 1)))
    assert unlocked == [1]
    decode.evict()
    assert not decode.is_free(decode.prefix)
    decode.prove(exposure)
    assert decode.is_free(decode.prefix) and unlocked == [1]


def test_no_lock_where_it_would_not_cover_what_is_shared() -> None:
    decode = WithTree()
    queue = SimpleNamespace(tree_cache=decode.tree)
    to_load = SimpleNamespace(
        **{**vars(decode.request().prefix_match), "needs_local_restore": True}
    )
    for request in (
        decode.request(prefix_match=None),
        decode.request(prefix_match=to_load),
        decode.request(req=SimpleNamespace(session=object())),
        SimpleNamespace(req=SimpleNamespace()),  # before 0.5.13
    ):
        assert lock_prefix(queue, request) is None
    assert decode.tree.protected_size() == 0


def test_two_that_share_pages_nobody_locked_are_both_waited_for() -> None:
    decode = WithTree()
    first, second = decode.held(1, no_lock), decode.held(2, no_lock)
    decode.evict()
    decode.prove(first)
    assert not decode.is_free(decode.prefix)
    decode.prove(second)
    assert decode.is_free(decode.prefix)
