"""The compute of a layer's forward: multiply-adds of its matrices and of its attention, twice.

Left out: norms, rope, activations, routing's top-k, embedding and output head, communication.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_scaling_fixes.layersplit.planner.models import Model


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one layer for all new tokens of a forward, over all ranks together."""

    before: int
    """Up to the attention: query, latent, indexer."""
    attention: int
    """Attention over the chosen tokens, and the output projection."""
    mlp: int

    @property
    def total(self) -> int:
        return self.before + self.attention + self.mlp


def layer_flops(model: Model, *, dense: bool, prefix: int, new: int) -> LayerFlops:
    """Of `new` tokens behind a prefix of `prefix` tokens; `dense`: a layer without experts.

    The indexer scores every earlier token; attention reads the best `index_top_k` of them, in
    the latent space (absorbed), as stock's sparse kernels do.
    """
    before = new * (_query_weights(model) + _indexer_weights(model))
    before += model.index_heads * model.index_dim * _seen(prefix, new)
    attention = new * model.heads * model.value * (model.kv_lora + model.hidden)
    per_pair = model.heads * (2 * model.kv_lora + model.rope)
    attention += per_pair * _seen(prefix, new, model.index_top_k)
    mlp = new * (_dense_weights(model) if dense else _expert_weights(model))
    return LayerFlops(2 * before, 2 * attention, 2 * mlp)


def _query_weights(model: Model) -> int:
    query = model.q_lora * (model.hidden + model.heads * (model.nope + model.rope))
    latent = model.hidden * (model.kv_lora + model.rope)
    return query + latent + model.heads * model.nope * model.kv_lora


def _indexer_weights(model: Model) -> int:
    query = model.q_lora * model.index_heads * model.index_dim
    return query + model.hidden * (model.index_dim + model.index_heads)


def _dense_weights(model: Model) -> int:
    return 3 * model.hidden * model.dense_width


def _expert_weights(model: Model) -> int:
    used = model.experts_per_token + model.shared_experts
    return model.hidden * (3 * model.expert_width * used + model.experts)


def _seen(prefix: int, new: int, most: int | None = None) -> int:
    """Tokens that the new ones look at, themselves included, summed; each at `most` so many."""
    if most is None:
        return new * prefix + new * (new + 1) // 2
    short = min(max(most - prefix, 0), new)
    return _seen(prefix, short) + (new - short) * most
