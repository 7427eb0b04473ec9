"""How many tokens a pool holds: unsplit, upstream's LayerSplit, and ours."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_scaling_fixes.layersplit import scratch
from sglang_scaling_fixes.layersplit.planner.models import PAGE, Model, index_bytes, kv_bytes, pages
from sglang_scaling_fixes.layersplit.schedule import SCRATCHES

MTP = {
    "none": "no draft layer",
    "whole": "every rank keeps the draft layer",
    "split": "the draft layer has one owner, like any other layer; upstream and unsplit: whole",
}
UPSTREAM_SCRATCHES = 1
"""As large as a layer of the pool."""


def owned_layers(layers: int, ranks: int) -> tuple[int, ...]:
    """Layers that each rank owns. Blocks are contiguous; the first ranks have one layer more.

    Contiguous, because stock pairs the layers of a prefill and a decode by position.
    """
    each, more = divmod(layers, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


@dataclass(frozen=True)
class Pool:
    """One deployment. `memory`: bytes for KV and index-K on each rank, scratches included.

    `scratch_tokens`: rows of one scratch. `chunk`: most new tokens of a forward.
    """

    model: Model
    ranks: int
    dtype: str
    memory: int
    mtp: str
    scratch_tokens: int
    chunk: int

    @property
    def kv(self) -> int:
        """Bytes of one token's KV in one layer."""
        return kv_bytes(self.model, self.dtype)

    @property
    def index(self) -> int:
        """Bytes of one token's index-K in one layer."""
        return index_bytes(self.model)

    @property
    def row(self) -> int:
        """Bytes of one token in one layer."""
        return self.kv + self.index

    @property
    def draft_layers(self) -> int:
        return int(self.mtp != "none")

    @property
    def unsplit_layers(self) -> int:
        """Layers that a rank keeps where nothing is split."""
        return self.model.layers + self.draft_layers

    @property
    def upstream_layers(self) -> int:
        """Layers that upstream's fullest rank keeps: its own, a scratch, the draft layer whole."""
        owned = max(owned_layers(self.model.layers, self.ranks))
        return owned + UPSTREAM_SCRATCHES + self.draft_layers

    @property
    def our_layers(self) -> int:
        """Layers that our fullest rank keeps. A split draft layer is one more layer to own."""
        if self.mtp == "split":
            return max(owned_layers(self.model.layers + 1, self.ranks))
        return max(owned_layers(self.model.layers, self.ranks)) + self.draft_layers

    @property
    def sent_layers(self) -> int:
        """Layers that ours broadcasts: those with one owner."""
        return self.model.layers + (self.mtp == "split")

    @property
    def scratch_rows(self) -> int:
        """Tokens of one of our scratches, in whole pages: page 0, which stays reserved (stock's
        writers skip row 0), then the pages of the batch's prefixes, then those of its new tokens.
        """
        return PAGE * pages(self.scratch_tokens)

    @property
    def least_scratch(self) -> int:
        """Tokens of a scratch with which a server starts, whatever its limit of requests."""
        return scratch.least(self.model.context, self.chunk, scratch.REQUESTS, PAGE)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of our scratches together, on each rank."""
        return SCRATCHES * self.scratch_rows * self.row

    def unsplit(self) -> int:
        """Tokens, in whole pages, of a pool that keeps every layer on every rank."""
        return _whole_pages(self.memory, self.unsplit_layers * self.row)

    def upstream(self) -> int:
        """Tokens, in whole pages, of upstream's pool."""
        return _whole_pages(self.memory, self.upstream_layers * self.row)

    def ours(self) -> int:
        """Tokens, in whole pages, of our pool; 0 where the scratches leave nothing."""
        return _whole_pages(self.memory - self.scratch_bytes, self.our_layers * self.row)

    def memory_for(self, tokens: int) -> int:
        """The least `memory` with which `ours` is at least `tokens`."""
        return self.scratch_bytes + PAGE * pages(tokens) * self.our_layers * self.row


def _whole_pages(memory: int, token_bytes: int) -> int:
    return max(memory, 0) // (PAGE * token_bytes) * PAGE
