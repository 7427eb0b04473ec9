"""DeepSeek Sparse Attention in plain PyTorch: what the CUDA kernels compute, over real buffers.

Shapes: `rows` are the queries of one request, `tokens` its context, both in order.
The index-K buffer is SGLang's own: uint8, a row per page; a page holds the fp8 keys of its
tokens one after the other, then their float32 scales
(sglang.srt.mem_cache.index_key_cache, 0.5.23; layout unchanged since 0.5.8).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE_BYTES = 4
PACKED_GROUP = 128  # values of a packed latent that share a scale


@functools.lru_cache
def _hadamard_matrix(width: int) -> Tensor:
    if width & (width - 1):
        raise ValueError(f"a Hadamard transform needs a power of two, got width {width}")
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < width:
        matrix = torch.kron(signs, matrix)
    return matrix


def hadamard(x: Tensor, scale: float = 1.0) -> Tensor:
    """The Walsh-Hadamard transform of the last dimension, times `scale`."""
    return (x.float() @ _hadamard_matrix(x.shape[-1]) * scale).to(x.dtype)


def quantize(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Blocks of the last dimension as fp8, each with a power-of-two scale: [..., d], [..., d/b]."""
    blocks = x.float().unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    scale = torch.exp2((largest / FP8_MAX).log2().ceil())
    return (blocks / scale).to(FP8).flatten(-2), scale.squeeze(-1)


def index_store(buffer: Tensor, slots: Tensor, key: Tensor, scale: Tensor, page: int) -> None:
    """Write keys ([n, d] fp8) and scales ([n, 1] float32) of `slots` into the paged buffer."""
    keys, scales = _index_views(buffer, key.shape[-1], page)
    at, offset = slots // page, slots % page
    keys[at, offset] = key.view(torch.uint8)
    scales[at, offset] = scale.contiguous().view(torch.uint8)


def index_load(buffer: Tensor, slots: Tensor, width: int, page: int) -> tuple[Tensor, Tensor]:
    """Keys ([n, width] fp8) and scales ([n, 1] float32) of `slots`."""
    keys, scales = _index_views(buffer, width, page)
    at, offset = slots // page, slots % page
    return keys[at, offset].view(FP8), scales[at, offset].view(torch.float32)


def _index_views(buffer: Tensor, width: int, page: int) -> tuple[Tensor, Tensor]:
    keys = buffer[:, : page * width].view(-1, page, width)
    scales = buffer[:, page * width :].view(-1, page, SCALE_BYTES)
    return keys, scales


def pack(latent: Tensor, rope: Tensor) -> Tensor:
    """uint8 [n, bytes]: rows of a packed fp8 pool, from float latents and ropes [n, d].

    The latent as fp8, a float32 scale for each 128 of its values, then the rope as bf16.
    """
    groups = latent.float().unflatten(-1, (-1, PACKED_GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-4) / FP8_MAX
    values = (groups / scale).to(FP8).flatten(-2)
    parts = (values, scale.squeeze(-1), rope.bfloat16())
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack(rows: Tensor, latent: int) -> Tensor:
    """float32 [n, latent + rope] of a packed fp8 pool's rows [n, bytes]."""
    rows = rows.contiguous().view(torch.uint8)
    scaled = latent + latent // PACKED_GROUP * 4
    values = rows[:, :latent].contiguous().view(FP8).float().unflatten(-1, (-1, PACKED_GROUP))
    scale = rows[:, latent:scaled].contiguous().view(torch.float32)
    rope = rows[:, scaled:].contiguous().view(torch.bfloat16).float()
    return torch.cat(((values * scale[..., None]).flatten(-2), rope), dim=-1)


def index_scores(query: Tensor, gates: Tensor, key: Tensor, scale: Tensor) -> Tensor:
    """[rows, tokens] float32: sum over heads of gate x relu(query . key), times the key's scale.

    query [rows, heads, d] fp8; gates [rows, heads] float32, the query's scales and both
    normalisations folded in, as SGLang's kernels take them; key [tokens, d] fp8.
    """
    dots = torch.einsum("rhd,td->rht", query.float(), key.float()).relu()
    return torch.einsum("rht,rh->rt", dots, gates) * scale.view(1, -1)


def select(scores: Tensor, visible: Tensor, topk: int) -> Tensor:
    """The `topk` best visible tokens of each row: int32 [rows, topk], -1 where there are fewer."""
    rows, tokens = scores.shape
    best = scores.masked_fill(~visible, -math.inf).topk(min(topk, tokens), dim=1)
    chosen = torch.full((rows, topk), -1, dtype=torch.int32)
    chosen[:, : best.indices.shape[1]] = best.indices.masked_fill(best.values == -math.inf, -1)
    return chosen


def allowed(chosen: Tensor, tokens: int) -> Tensor:
    """The inverse of `select`: bool [rows, tokens]."""
    mask = torch.zeros(len(chosen), tokens + 1, dtype=torch.bool)
    mask.scatter_(1, chosen.long().masked_fill(chosen < 0, tokens), True)
    return mask[:, :tokens]


def sparse_mla(query: Tensor, cache: Tensor, mask: Tensor, scale: float, value: int) -> Tensor:
    """Absorbed MLA attention: [rows, heads, value].

    query [rows, heads, value + rope]; cache [tokens, value + rope], the latent then the rope
    part, each token's own; mask bool [rows, tokens].
    """
    scores = torch.einsum("rhd,td->hrt", query, cache) * scale
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("hrt,td->rhd", weights, cache[:, :value])
