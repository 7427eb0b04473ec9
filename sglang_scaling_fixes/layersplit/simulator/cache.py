"""The prefix cache of a pool: blocks that running requests hold, and an LRU over the others.

As in stock's radix tree, a block is found only behind all blocks before it, a used prefix becomes
newest as a whole, and of one use the end goes first. So no block outlives the ones before it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable

from sglang_scaling_fixes.layersplit.simulator.records import Request


class PrefixCache:
    """`tokens`: what it keeps. What requests hold is kept beyond that."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.held = 0
        """Tokens of the blocks that running requests hold."""
        self._idle = 0
        self._size: dict[Hashable, int] = {}
        self._computed: dict[Hashable, int] = {}
        self._holders: Counter[Hashable] = Counter()
        self._order: OrderedDict[Hashable, None] = OrderedDict()
        """Blocks that nobody holds, the next to go first."""

    def found(self, request: Request) -> int:
        """Tokens of the request's prefix that are here and computed."""
        tokens = 0
        for number, block in enumerate(request.blocks):
            own = request.fill(number)
            had = min(self._computed.get(block, 0), own)
            tokens += had
            if had < own:
                break
        return tokens

    def needed(self, request: Request) -> int:
        """Tokens that `held` would grow by."""
        return sum(
            self._room(request, number) - (self._size[block] if block in self._holders else 0)
            for number, block in enumerate(request.blocks)
        )

    def hold(self, request: Request) -> None:
        """Keep its blocks, whether they are here or are to be computed; others make room."""
        for number, block in enumerate(request.blocks):
            room = self._room(request, number)
            if block in self._order:
                del self._order[block]
                self._idle -= self._size[block]
                self.held += room
            else:
                self.held += room - self._size.get(block, 0)
            self._size[block] = room
            self._holders[block] += 1
        self._make_room()

    def computed(self, request: Request, tokens: int, already: int = 0) -> None:
        """The first `tokens` of the prompt are computed, of a request that holds its blocks; of
        these, it was said of the first `already` before."""
        first, end = already // request.block, -(-tokens // request.block)
        for number, block in enumerate(request.blocks[first:end], first):
            done = min(request.fill(number), tokens - number * request.block)
            self._computed[block] = max(self._computed.get(block, 0), done)

    def release(self, request: Request) -> None:
        """What nobody else holds is in the LRU now, as its newest."""
        for block in reversed(request.blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                self.held -= self._size[block]
                self._idle += self._size[block]
                self._order[block] = None
        self._make_room()

    def blocks(self) -> set[Hashable]:
        """Those that are here."""
        return set(self._size)

    def _room(self, request: Request, number: int) -> int:
        return max(request.room(number), self._size.get(request.blocks[number], 0))

    def _make_room(self) -> None:
        while self._order and self.held + self._idle > self.tokens:
            block, _ = self._order.popitem(last=False)
            self._idle -= self._size.pop(block)
            self._computed.pop(block, None)
