"""The models that can be planned for, and the bytes of one token's rows in a layer."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = 64
"""Tokens of a page: stock's DSA pools know no other."""
SCALE_GROUP = 128
"""Values that share a scale (float32) where KV or index-K is quantised with scales."""
FLOAT32, BF16 = 4, 2
"""Bytes."""
KV_DTYPES = {
    "bf16": "latent and rope in bf16",
    "fp8": "packed: latent in fp8 with a scale for each 128 values, rope in bf16",
    "fp8-raw": "latent and rope in fp8, no scales",
}


@dataclass(frozen=True)
class Model:
    """Widths are numbers of values, not bytes. `context` is in tokens."""

    name: str
    source: str
    layers: int
    dense_layers: int
    """The first ones, whose MLP has no experts."""
    context: int
    hidden: int
    heads: int
    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    value: int
    index_heads: int
    index_dim: int
    index_top_k: int
    dense_width: int
    expert_width: int
    experts: int
    experts_per_token: int
    shared_experts: int


GLM_5_1 = Model(
    name="glm-5.1",
    source="transformers, GlmMoeDsaConfig defaults (GLM-5; GLM-5.1 taken to have its shape)",
    layers=78,
    dense_layers=3,
    context=202_752,
    hidden=6144,
    heads=64,
    q_lora=2048,
    kv_lora=512,
    nope=192,
    rope=64,
    value=256,
    index_heads=32,
    index_dim=128,
    index_top_k=2048,
    dense_width=12_288,
    expert_width=2048,
    experts=256,
    experts_per_token=8,
    shared_experts=1,
)
MODELS = {model.name: model for model in (GLM_5_1,)}


def kv_bytes(model: Model, dtype: str) -> int:
    """Bytes of one token's latent KV in one layer. Raises KeyError for no dtype of `KV_DTYPES`."""
    return {
        "bf16": BF16 * (model.kv_lora + model.rope),
        "fp8": model.kv_lora + model.kv_lora // SCALE_GROUP * FLOAT32 + BF16 * model.rope,
        "fp8-raw": model.kv_lora + model.rope,
    }[dtype]


def index_bytes(model: Model) -> int:
    """Bytes of one token's index-K in one layer: fp8 values and their scales, for every dtype."""
    return model.index_dim + model.index_dim // SCALE_GROUP * FLOAT32


def pages(tokens: int) -> int:
    """Pages that hold so many tokens; a page that is partly filled counts whole."""
    return -(-tokens // PAGE)
