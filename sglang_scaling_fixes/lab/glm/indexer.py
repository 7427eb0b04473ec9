"""The indexer's forward pass in a lab server: stock's projections and cache, our top-k.

Imported inside a server only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sglang_scaling_fixes.lab.glm import reference


def forward(
    self: Any,
    x: Tensor,
    q_lora: Tensor,
    positions: Tensor,
    forward_batch: Any,
    layer_id: int,
    return_indices: bool = True,
) -> Tensor | None:
    """Stands for `Indexer.forward_native`: positions each row attends to, int32 [rows, topk].

    Keys are stored before they are read, as on a GPU, and prefill reads them with the gathering
    accessor while decode reads pages in place: these are the two paths whose waits differ
    between releases.
    """
    from sglang.kernels.ops.quantization import act_quant_triton
    from sglang.srt.model_executor.forward_context import get_attn_backend, get_token_to_kv_pool

    query, key, _ = self._get_q_k_bf16(q_lora, x, positions, False, forward_batch=forward_batch)
    self._store_index_k_cache(
        forward_batch=forward_batch,
        layer_id=layer_id,
        key=key,
        act_quant=act_quant_triton.act_quant,
    )
    if not return_indices:
        return None
    query_fp8, query_scale = reference.quantize(query, self.block_size)
    gates = (x.bfloat16() @ self.weights_proj.weight.bfloat16().T).float()
    gates = gates * query_scale.squeeze(-1) * self.softmax_scale * self.n_heads**-0.5
    pool = get_token_to_kv_pool()
    metadata = get_attn_backend().get_indexer_metadata(layer_id, forward_batch)
    chosen = torch.full((x.shape[0], self.index_topk), -1, dtype=torch.int32)
    gathered = forward_batch.forward_mode.is_extend_without_speculative()
    keys = _gathered if gathered else _in_place
    for span, (k, scale) in zip(metadata.spans, keys(pool, layer_id, metadata), strict=True):
        scores = reference.index_scores(query_fp8[span.rows], gates[span.rows], k, scale)
        chosen[span.rows] = reference.select(scores, span.visible, self.index_topk)
    return chosen


def _in_place(pool: Any, layer_id: int, metadata: Any) -> list[tuple[Tensor, Tensor]]:
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

    buffer = Indexer._get_index_k_read_buffer(pool, layer_id)
    page, width = pool.index_page_size, pool.index_head_dim
    return [
        reference.index_load(buffer, metadata.index_slots(span), width, page)
        for span in metadata.spans
    ]


def _gathered(pool: Any, layer_id: int, metadata: Any) -> list[tuple[Tensor, Tensor]]:
    lengths = [span.length for span in metadata.spans]
    requests = torch.tensor([span.request for span in metadata.spans], dtype=torch.long)
    keys, scales = pool.get_index_k_scale_buffer(
        layer_id,
        torch.tensor(lengths),
        metadata.real_page_table[requests],
        sum(lengths),
        max(lengths),
    )
    keys = keys.view(reference.FP8).split(lengths)
    return list(zip(keys, scales.view(torch.float32).split(lengths), strict=True))
