"""The LRU over prefix blocks against a model that looks at every block every time."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.layersplit.planner.models import PAGE
from sglang_scaling_fixes.layersplit.simulator.cache import PrefixCache
from sglang_scaling_fixes.layersplit.simulator.records import Request, reuse

BLOCK = 2 * PAGE


def request(path: tuple[int, ...], tail: int = BLOCK) -> Request:
    """A prompt down a tree: an id is the whole path to it, as prefix hashes are. `tail`: tokens in
    its last block."""
    blocks = tuple(path[: depth + 1] for depth in range(len(path)))
    prompt = (len(path) - 1) * BLOCK + tail
    return Request(0, "s", 0.0, 0.0, prompt, 0, blocks, BLOCK)


@dataclass
class Block:
    size: int
    computed: int
    used: int
    """When it was last let go of; 0: never."""
    depth: int
    holders: int = 0


@dataclass
class Plain:
    """The same rules, each written out: no running totals, no order that is kept up to date."""

    tokens: int
    blocks: dict[Hashable, Block] = field(default_factory=dict)
    clock: int = 0

    def total(self) -> int:
        return sum(block.size for block in self.blocks.values())

    def held(self) -> int:
        return sum(block.size for block in self.blocks.values() if block.holders)

    def evict(self) -> None:
        while self.total() > self.tokens:
            idle = [name for name, block in self.blocks.items() if not block.holders]
            if not idle:
                return
            oldest = min(idle, key=lambda n: (self.blocks[n].used, -self.blocks[n].depth))
            del self.blocks[oldest]

    def hold(self, one: Request) -> None:
        for depth, name in enumerate(one.blocks):
            block = self.blocks.setdefault(name, Block(0, 0, 0, depth))
            block.size = max(block.size, one.room(depth))
            block.holders += 1
        self.evict()

    def computed(self, one: Request, tokens: int) -> None:
        for depth, name in enumerate(one.blocks):
            done = min(max(tokens - depth * BLOCK, 0), one.fill(depth))
            self.blocks[name].computed = max(self.blocks[name].computed, done)

    def release(self, one: Request) -> None:
        self.clock += 1
        for name in one.blocks:
            self.blocks[name].holders -= 1
            self.blocks[name].used = self.clock
        self.evict()

    def found(self, one: Request) -> int:
        tokens = 0
        for depth, name in enumerate(one.blocks):
            had = self.blocks[name].computed if name in self.blocks else 0
            tokens += min(had, one.fill(depth))
            if had < one.fill(depth):
                return tokens
        return tokens


PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple)
REQUESTS = st.builds(request, PATHS, st.integers(1, BLOCK))
STEPS = st.lists(
    st.tuples(REQUESTS, st.integers(0, 5 * BLOCK), st.booleans()), min_size=1, max_size=25
)
"""A request comes, so many of its tokens are computed, and the oldest one leaves or stays."""


def agree(cache: PrefixCache, steps: list[tuple[Request, int, bool]]) -> None:
    """Fail if it ever holds other blocks, or finds other tokens, than the plain model."""
    plain = Plain(cache.tokens)
    running: list[Request] = []
    for one, computed, leaves in steps:
        assert cache.found(one) == plain.found(one)
        before = plain.held()
        needed = cache.needed(one)
        for side in (cache, plain):
            side.hold(one)
        assert plain.held() == before + needed
        running.append(one)
        done = min(computed, one.prompt)
        plain.computed(one, done)
        cache.computed(one, done // 2)
        cache.computed(one, done, done // 2)
        if leaves:
            gone = running.pop(0)
            for side in (cache, plain):
                side.release(gone)
        assert cache.blocks() == set(plain.blocks)
        assert cache.held == plain.held()
    for one in running:
        for side in (cache, plain):
            side.release(one)
    assert cache.blocks() == set(plain.blocks)
    assert cache.held == 0 and plain.total() <= cache.tokens


@given(st.integers(0, 12).map(lambda blocks: blocks * BLOCK), STEPS)
def test_the_same_blocks_as_a_plain_model(
    tokens: int, steps: list[tuple[Request, int, bool]]
) -> None:
    agree(PrefixCache(tokens), steps)


class BeginningFirst(PrefixCache):
    """Of one use the beginning goes first."""

    def release(self, request: Request) -> None:
        super().release(replace(request, blocks=request.blocks[::-1]))


class FirstIn(PrefixCache):
    """What was used again stays as old as it was."""

    def release(self, request: Request) -> None:
        before = list(self._seen)
        self._seen |= dict.fromkeys(request.blocks)
        super().release(request)
        for block in reversed([one for one in before if one in self._order]):
            self._order.move_to_end(block, last=False)

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self._seen: dict[Hashable, None] = {}


@pytest.mark.parametrize("wrong", [BeginningFirst, FirstIn])
def test_control_another_order_is_found(wrong: type[PrefixCache]) -> None:
    """A conversation that is used again, then something else: there is room for two blocks."""
    long, other, third = request((0, 0)), request((1,)), request((2,))
    steps = {
        BeginningFirst: [(long, 2 * BLOCK, True), (other, BLOCK, True)],
        FirstIn: [(one, BLOCK, True) for one in (request((0,)), other, request((0,)), third)],
    }[wrong]
    agree(PrefixCache(2 * BLOCK), steps)
    with pytest.raises(AssertionError):
        agree(wrong(2 * BLOCK), steps)


def used(cache: PrefixCache, one: Request) -> None:
    cache.hold(one)
    cache.computed(one, one.prompt)
    cache.release(one)


def test_the_end_of_a_prefix_goes_first_and_a_beginning_is_still_found() -> None:
    cache = PrefixCache(3 * BLOCK)
    long = request((0, 0, 0))
    used(cache, long)
    assert cache.found(long) == 3 * BLOCK
    used(cache, request((1,)))
    assert cache.found(long) == 2 * BLOCK


def test_what_runs_is_kept_beyond_the_limit_and_goes_when_it_is_over() -> None:
    cache = PrefixCache(BLOCK)
    one = request((0, 0))
    cache.hold(one)
    assert cache.held == 2 * BLOCK
    assert cache.found(one) == 0  # not computed yet
    cache.computed(one, BLOCK + 1)
    assert cache.found(one) == BLOCK + 1
    cache.release(one)
    assert (cache.held, cache.found(one)) == (0, BLOCK)


def test_a_partly_filled_block_is_found_as_far_as_it_is_filled() -> None:
    """The next turn of a conversation goes on in the middle of a block."""
    cache = PrefixCache(10 * BLOCK)
    used(cache, request((0, 0), tail=5))
    longer = request((0, 0, 0))
    assert cache.found(longer) == BLOCK + 5
    used(cache, longer)
    assert cache.found(longer) == 3 * BLOCK


@pytest.mark.parametrize(("paths", "share"), [([(0,), (1,)], 0.0), ([(0, 0), (0, 1)], 0.25)])
def test_reuse_is_what_came_before(paths: list[tuple[int, ...]], share: float) -> None:
    assert reuse([request(path) for path in paths]) == share


def test_reuse_of_the_same_prompt_leaves_one_token_to_compute() -> None:
    assert reuse([request((0,)), request((0,))]) == (BLOCK - 1) / (2 * BLOCK)
