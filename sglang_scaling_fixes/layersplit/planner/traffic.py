"""What one forward broadcasts, and how much of that time no compute hides.

Ours travels a layer ahead into the other scratch: KV and index-K of a layer have all of the
layer before to hide behind. Only layer 0 has nothing before it.

Upstream has one scratch. KV of a layer cannot start before the attention of the layer before
has read the scratch, and must be there for the layer's own attention. Index-K goes on the
compute stream, so nothing hides it. Left out, in upstream's favour: the owner's copy of its
layer into the scratch, before each broadcast.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        """From the first to the last. A draft layer counts as one with experts."""
        model, rate = pool.model, speed.flops * pool.ranks
        ours = self.our_bytes(pool) / pool.sent_layers / speed.bandwidth
        whole = pool.upstream() / speed.bandwidth
        last: LayerFlops | None = None
        for number in range(pool.unsplit_layers):
            flops = layer_flops(
                model, dense=number < model.dense_layers, prefix=self.prefix, new=self.new
            )
            before = last.total / rate if last is not None else 0.0
            upstream_before = _upstream_hides(last, flops, speed.upstream_hides) / rate
            yield Layer(
                flops.total / rate,
                _sent(ours, before) if number < pool.sent_layers else Sent(0.0, 0.0),
                _sent(whole * pool.kv, upstream_before, whole * pool.index)
                if number < model.layers
                else Sent(0.0, 0.0),
            )
            last = flops


def forwards(context: int, hit_rate: float, chunk: int) -> list[Forward]:
    """Those of one request. Of a prompt that is cached whole, the last token is computed."""
    prefix = min(round(context * hit_rate), context - 1)
    starts = range(prefix, context, chunk)
    return [Forward(start, min(chunk, context - start)) for start in starts]


def _sent(hideable: float, compute: float, bare: float = 0.0) -> Sent:
    """`hideable` s beside `compute` s of compute, and `bare` s that nothing hides."""
    return Sent(hideable + bare, max(hideable - compute, 0.0) + bare)


def _upstream_hides(last: LayerFlops | None, now: LayerFlops, share: float | None) -> float:
    """FLOPs that hide upstream's KV of a layer: none for the first layer."""
    if last is None:
        return 0.0
    return last.mlp + now.before if share is None else share * last.total
