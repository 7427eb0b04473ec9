"""The "dsa" attention backend of a lab server: reference.py over SGLang's real KV pools.

Imported inside a server only. It reads and writes through the pool's own accessors, so
that whatever stock does there (wait for a HiCache layer, fetch a layer that another rank
owns) happens here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.cp.utils import get_cp_strategy, is_cp_active
from torch import Tensor

from sglang_scaling_fixes.lab.faults import corrupt
from sglang_scaling_fixes.lab.glm import reference


@dataclass(frozen=True)
class Span:
    """One request's part of a forward pass."""

    rows: slice | Tensor  # its queries among the ones this rank computes
    slots: Tensor  # int64 [tokens], the KV slots of its context, in order
    visible: Tensor  # bool [rows, tokens]: causal, or the draft tree's mask


class ReferenceDSABackend(AttentionBackend):  # type: ignore[misc]  # sglang has no types
    """Sparse MLA for every forward mode: decode, (chunked) prefill, draft and verify."""

    use_mha = False  # always the absorbed form, whatever the length

    def __init__(self, runner: Any, draft_step: int = 0) -> None:
        super().__init__()
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.data_type = self.kv_cache_dtype = runner.kv_cache_dtype
        self._draft_step = draft_step
        self._corruptor = None if runner.is_draft_worker else corrupt.corruptor()
        self.spans: list[Span] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.spans = self._spans(forward_batch)
        mode = forward_batch.forward_mode
        if self._corruptor is not None and (mode.is_decode() or mode.is_target_verify()):
            for rid, span in zip(forward_batch.rids, self.spans, strict=True):
                # Not the rows being written now.
                context = len(span.slots) - (span.rows.stop - span.rows.start)
                self._corruptor.visit(rid, span.slots[:context], self.token_to_kv_pool)
        self.forward_metadata = self.spans

    def _spans(self, batch: Any) -> list[Span]:
        mode = batch.forward_mode
        if mode.is_idle():
            return []
        requests = batch.req_pool_indices.tolist()
        lengths = batch.seq_lens.tolist()
        if mode.is_target_verify():
            return self._verify_spans(batch, requests, lengths)
        if mode.is_decode():
            lengths = [length + self._draft_step for length in lengths]
            return [
                self._span(slice(i, i + 1), request, length, torch.tensor([length - 1]))
                for i, (request, length) in enumerate(zip(requests, lengths, strict=True))
            ]
        extends = batch.extend_seq_lens.tolist()
        local = self._local_rows(batch, sum(extends))
        spans, first = [], 0
        for request, length, rows in zip(requests, lengths, extends, strict=True):
            if local is None:
                own, last = slice(first, first + rows), torch.arange(length - rows, length)
            else:  # this rank's rows of the request, and which of the request's they are
                counted = local - first
                own = ((counted >= 0) & (counted < rows)).nonzero().flatten()
                last = length - rows + counted[own]
            spans.append(self._span(own, request, length, last))
            first += rows
        return spans

    def _local_rows(self, batch: Any, rows: int) -> Tensor | None:
        """Under prefill context parallelism, which of the batch's rows this rank computes.

        In the order in which the rank holds them; rows that stock adds to make the ranks
        alike come after and belong to no span. None where the rank holds all rows.
        """
        if batch.attn_cp_metadata is None or not is_cp_active(batch):
            return None
        indices: Tensor = get_cp_strategy().local_q_indices(rows, batch)
        return indices

    def _verify_spans(self, batch: Any, requests: list[int], lengths: list[int]) -> list[Span]:
        """A draft's rows: all of the context, and of the draft what the tree's mask shows."""
        draft = batch.spec_info.draft_token_num
        trees = batch.spec_info.custom_mask.view(len(requests), draft, draft).bool()
        spans = []
        for i, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            context = torch.ones(draft, length, dtype=torch.bool)
            visible = torch.cat((context, trees[i]), dim=1)
            rows = slice(i * draft, (i + 1) * draft)
            spans.append(Span(rows, self._slots(request, length + draft), visible))
        return spans

    def _span(self, rows: slice | Tensor, request: int, length: int, last: Tensor) -> Span:
        """Causal rows: each sees the tokens up to its own position, `last`."""
        visible = torch.arange(length)[None, :] <= last[:, None]
        return Span(rows, self._slots(request, length), visible)

    def _slots(self, request: int, length: int) -> Tensor:
        slots: Tensor = self.req_to_token[request, :length].long()
        return slots

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: Tensor | None = None,
        k_rope: Tensor | None = None,
        topk_indices: Tensor | None = None,
        **_unused: Any,
    ) -> Tensor:
        """q [rows, heads, latent], q_rope [rows, heads, rope]; returns [rows, heads * latent]."""
        heads, value = layer.tp_q_head_num, layer.v_head_dim
        if forward_batch.forward_mode.is_idle():
            return q.new_empty(q.shape[0], heads * value)
        assert q_rope is not None, "the reference backend takes absorbed MLA with its rope apart"
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_mla_kv_buffer(layer, forward_batch.out_cache_loc, k, k_rope)
        query = torch.cat(
            (q.reshape(-1, heads, value), q_rope.reshape(q.shape[0], heads, -1)), dim=-1
        ).float()
        cache = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        out = query.new_zeros(query.shape[0], heads, value)
        for span in self.spans:
            mask = span.visible
            if topk_indices is not None:
                mask = mask & reference.allowed(topk_indices[span.rows], len(span.slots))
            own = cache[span.slots].view(len(span.slots), -1).float()
            out[span.rows] = reference.sparse_mla(query[span.rows], own, mask, layer.scaling, value)
        return out.to(q.dtype).reshape(-1, heads * value)

    def get_indexer_metadata(self, _layer_id: int, _forward_batch: Any) -> list[Span]:
        return self.spans


class ReferenceDSADraftBackends:
    """One backend per further draft step: step i decodes one token behind i drafted ones."""

    def __init__(self, runner: Any, steps: int) -> None:
        self.attn_backends = [
            ReferenceDSABackend(runner, draft_step=i + 1) for i in range(steps - 1)
        ]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)
