"""The "dsa" attention backend of a lab server: reference.py over SGLang's real KV pools.

Imported inside a server only. It reads and writes through the pool's own accessors, so
that whatever stock does there (wait for a HiCache layer, fetch a layer that another rank
owns) happens here too. As stock's backend does, it reads by the tables in `forward_metadata`
only, by their names there: what translates stock's tables translates these.
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
    request: int  # its row of the tables
    visible: Tensor  # bool [rows, tokens]: causal, or the draft tree's mask

    @property
    def length(self) -> int:
        """Tokens of its context."""
        return int(self.visible.shape[1])


@dataclass(frozen=True)
class Metadata:
    """Of one forward pass: the tables by which KV and index keys are read."""

    page_table_1: Tensor  # int32 [requests, tokens], KV slots by position
    real_page_table: Tensor  # int32 [requests, pages], pages by position
    spans: list[Span]
    page_size: int

    def slots(self, span: Span) -> Tensor:
        """int64 [tokens]: where the KV of its context lies, in order."""
        return self.page_table_1[span.request, : span.length].long()

    def index_slots(self, span: Span) -> Tensor:
        """int64 [tokens]: the same of its index keys."""
        place = torch.arange(span.length)
        pages = self.real_page_table[span.request].long()
        return pages[place // self.page_size] * self.page_size + place % self.page_size


class ReferenceDSABackend(AttentionBackend):  # type: ignore[misc]  # sglang has no types
    """Sparse MLA for every forward mode: decode, (chunked) prefill, draft and verify."""

    use_mha = False  # always the absorbed form, whatever the length

    def __init__(self, runner: Any, draft_step: int = 0) -> None:
        super().__init__()
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.data_type = self.kv_cache_dtype = runner.kv_cache_dtype
        self._draft_step = draft_step
        self._corruptor = None if runner.is_draft_worker else corrupt.corruptor()

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.forward_metadata = self._metadata(forward_batch, self._spans(forward_batch))
        mode = forward_batch.forward_mode
        if self._corruptor is not None and (mode.is_decode() or mode.is_target_verify()):
            metadata = self.forward_metadata
            for rid, span in zip(forward_batch.rids, metadata.spans, strict=True):
                # Not the rows being written now.
                context = span.length - (span.rows.stop - span.rows.start)
                slots = metadata.slots(span)[:context]
                self._corruptor.visit(rid, slots, self.token_to_kv_pool)

    def _metadata(self, batch: Any, spans: list[Span]) -> Metadata:
        page = self.token_to_kv_pool.page_size
        longest = max((span.length for span in spans), default=0)
        table = self.req_to_token_pool.req_to_token[batch.req_pool_indices, :longest]
        return Metadata(table, table[:, ::page] // page, spans, page)

    def _spans(self, batch: Any) -> list[Span]:
        mode = batch.forward_mode
        if mode.is_idle():
            return []
        lengths = batch.seq_lens.tolist()
        if mode.is_target_verify():
            return self._verify_spans(batch, lengths)
        if mode.is_decode():
            lengths = [length + self._draft_step for length in lengths]
            return [
                self._span(slice(i, i + 1), i, length, torch.tensor([length - 1]))
                for i, length in enumerate(lengths)
            ]
        extends = batch.extend_seq_lens.tolist()
        local = self._local_rows(batch, sum(extends))
        spans, first = [], 0
        for request, (length, rows) in enumerate(zip(lengths, extends, strict=True)):
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

    @staticmethod
    def _verify_spans(batch: Any, lengths: list[int]) -> list[Span]:
        """A draft's rows: all of the context, and of the draft what the tree's mask shows."""
        draft = batch.spec_info.draft_token_num
        trees = batch.spec_info.custom_mask.view(len(lengths), draft, draft).bool()
        spans = []
        for i, length in enumerate(lengths):
            context = torch.ones(draft, length, dtype=torch.bool)
            visible = torch.cat((context, trees[i]), dim=1)
            rows = slice(i * draft, (i + 1) * draft)
            spans.append(Span(rows, i, visible))
        return spans

    @staticmethod
    def _span(rows: slice | Tensor, request: int, length: int, last: Tensor) -> Span:
        """Causal rows: each sees the tokens up to its own position, `last`."""
        return Span(rows, request, torch.arange(length)[None, :] <= last[:, None])

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
        for span in self.forward_metadata.spans:
            mask = span.visible
            if topk_indices is not None:
                mask = mask & reference.allowed(topk_indices[span.rows], span.length)
            own = self._values(cache[self.forward_metadata.slots(span)].view(span.length, -1))
            out[span.rows] = reference.sparse_mla(query[span.rows], own, mask, layer.scaling, value)
        return out.to(q.dtype).reshape(-1, heads * value)

    def _values(self, rows: Tensor) -> Tensor:
        """float32 [tokens, latent + rope] of a pool's rows."""
        if self.token_to_kv_pool.dsa_kv_cache_store_fp8:
            return reference.unpack(rows, self.token_to_kv_pool.kv_lora_rank)
        return rows.float()

    def get_indexer_metadata(self, _layer_id: int, _forward_batch: Any) -> Metadata:
        return self.forward_metadata


class ReferenceDSADraftBackends:
    """One backend per further draft step: step i decodes one token behind i drafted ones."""

    def __init__(self, runner: Any, steps: int) -> None:
        self.attn_backends = [
            ReferenceDSABackend(runner, draft_step=i + 1) for i in range(steps - 1)
        ]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)
