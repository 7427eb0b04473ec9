"""What one forward broadcasts, and how much of that time no compute hides.

Ours travels a layer ahead into the other scratch: KV and index-K of a layer have all of the
layer before to hide behind. Only layer 0 has nothing before it.

Upstream has one scratch. KV of a layer cannot start before the attention of the layer before
has read the scratch, and must be there for the layer's own attention. Index-K goes on the
compute stream, so nothing hides it. Left out, in upstream's favour: the owner's copy of its
layer into the scratch, before each broadcast.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sglang_scaling_fixes.layersplit.planner.capacity import Pool
from sglang_scaling_fixes.layersplit.planner.flops import LayerFlops, layer_flops
from sglang_scaling_fixes.layersplit.planner.models import PAGE, pages


@dataclass(frozen=True)
class Speed:
    """Assumed speeds. `bandwidth`: bytes/s of a broadcast. `flops`: FLOP/s of one GPU.

    `upstream_hides`: the share of a layer's compute that hides upstream's KV. None: by the
    FLOPs, the MLP of the layer before and what stands before the layer's own attention.
    """

    bandwidth: float
    flops: float
    upstream_hides: float | None = None


@dataclass(frozen=True)
class Sent:
    """Seconds of one layer's broadcast."""

    transfer: float
    exposed: float

    @property
    def hidden(self) -> float:
        return self.transfer - self.exposed


@dataclass(frozen=True)
class Layer:
    """One layer of a forward: seconds of its compute on each rank, and both broadcasts."""

    compute: float
    ours: Sent
    upstream: Sent


@dataclass(frozen=True)
class Forward:
    """`new` tokens of one request are computed behind `prefix` tokens that are in the pool."""

    prefix: int
    new: int

    def our_bytes(self, pool: Pool) -> int:
        """Bytes of all our broadcasts: the prefix's pages, for every layer with one owner."""
        return PAGE * pages(self.prefix) * pool.row * pool.sent_layers

    def upstream_bytes(self, pool: Pool) -> int:
        """Bytes of all upstream's broadcasts: its whole pool, for every layer of the model."""
        return pool.upstream() * pool.row * pool.model.layers

    def layers(self, pool: Pool, speed: Speed) -> Iterator[Layer]:
        """From the first to the last, each by itself."""
        for count, layer in layer_runs([self], pool, speed):
            yield from itertools.repeat(layer, count)


def layer_runs(batch: Sequence[Forward], pool: Pool, speed: Speed) -> Iterator[tuple[int, Layer]]:
    """The layers of a batch from the first to the last: how many follow each other with the same
    figures, and these. A draft layer counts as one with experts.

    The batch's new tokens are computed together, and its prefixes travel together. Prefixes that
    requests share count for each of them. Upstream's pool travels once for the batch.
    """
    model, rate = pool.model, speed.flops * pool.ranks
    ours = PAGE * sum(pages(part.prefix) for part in batch) * pool.row / speed.bandwidth
    whole = pool.upstream() / speed.bandwidth
    kinds = [_together(batch, pool, dense) for dense in (False, True)]
    bounds = {0, 1, model.dense_layers, model.dense_layers + 1}
    bounds |= {model.layers, pool.sent_layers, pool.unsplit_layers}
    last: LayerFlops | None = None
    for first, end in itertools.pairwise(sorted(n for n in bounds if n <= pool.unsplit_layers)):
        flops = kinds[first < model.dense_layers]
        before = last.total / rate if last is not None else 0.0
        upstream_before = _upstream_hides(last, flops, speed.upstream_hides) / rate
        yield (
            end - first,
            Layer(
                flops.total / rate,
                _sent(ours, before) if first < pool.sent_layers else Sent(0.0, 0.0),
                _sent(whole * pool.kv, upstream_before, whole * pool.index)
                if first < model.layers
                else Sent(0.0, 0.0),
            ),
        )
        last = flops


def forwards(context: int, hit_rate: float, chunk: int) -> list[Forward]:
    """Those of one request. Of a prompt that is cached whole, the last token is computed."""
    prefix = min(round(context * hit_rate), context - 1)
    starts = range(prefix, context, chunk)
    return [Forward(start, min(chunk, context - start)) for start in starts]


def _together(batch: Sequence[Forward], pool: Pool, dense: bool) -> LayerFlops:
    parts = [
        layer_flops(pool.model, dense=dense, prefix=part.prefix, new=part.new) for part in batch
    ]
    return LayerFlops(
        sum(part.before for part in parts),
        sum(part.attention for part in parts),
        sum(part.mlp for part in parts),
    )


def _sent(hideable: float, compute: float, bare: float = 0.0) -> Sent:
    """`hideable` s beside `compute` s of compute, and `bare` s that nothing hides."""
    return Sent(hideable + bare, max(hideable - compute, 0.0) + bare)


def _upstream_hides(last: LayerFlops | None, now: LayerFlops, share: float | None) -> float:
    """FLOPs that hide upstream's KV of a layer: none for the first layer."""
    if last is None:
        return 0.0
    return last.mlp + now.before if share is None else share * last.total
