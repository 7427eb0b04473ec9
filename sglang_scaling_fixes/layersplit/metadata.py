"""Attention's tables, in the words of the scratch.

Stock's backend makes the metadata of a forward pass from KV slots; after that every table with
which attention reads KV is translated. No attention kernel changes: all of them take a buffer and
indices into it.

    page_table_1             slots by request and position
    page_table_1_flattened   the same, request after request; only with a prefix
    real_page_table          pages; with these the indexer reads

In a prefill pass the indexer asks the pool for its keys, which translates the pages itself, so
`real_page_table` keeps the pool's. Where the indexer reads pages in place it is translated, too:
in passes of a start-up (FlashInfer's autotune), which decode, or verify drafts up to 0.5.17.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.attach import replace
from sglang_scaling_fixes.layersplit import points
from sglang_scaling_fixes.layersplit.plan import Plan

SLOTS = ("page_table_1", "page_table_1_flattened")
PAGES = "real_page_table"


def attach() -> None:
    replace(points.METADATA, after_metadata)


def after_metadata(stock: Callable[..., None]) -> Callable[..., None]:
    """`init_forward_metadata` of a backend: stock's, and then the tables of a split pool."""
    from sglang_scaling_fixes.layersplit.pool import LayerSplitDSATokenToKVPool

    def init_forward_metadata(backend: Any, forward_batch: Any) -> None:
        stock(backend, forward_batch)
        pool = backend.token_to_kv_pool
        mode = forward_batch.forward_mode
        if not isinstance(pool, LayerSplitDSATokenToKVPool) or mode.is_idle():
            return
        plan = begin(pool, backend.req_to_token_pool.req_to_token, forward_batch)
        backend.forward_metadata = remapped(backend.forward_metadata, plan, _in_place(mode))

    return init_forward_metadata


def begin(pool: Any, req_to_token: Any, batch: Any) -> Plan:
    """Plan the pass of a whole batch, of which the ranks may hold different rows."""
    mode = batch.forward_mode
    seq_lens = batch.seq_lens_cpu.tolist()
    paged_index = _in_place(mode)
    shared = None
    if not paged_index:
        prefix_lens = list(batch.extend_prefix_lens_cpu)
        shared = pool.sharing.take(batch.rids, prefix_lens)
    elif mode.is_decode():
        prefix_lens = [length - 1 for length in seq_lens]
    elif mode.is_target_verify():  # drafts are not in the lengths yet
        prefix_lens = seq_lens
        seq_lens = [length + batch.spec_info.draft_token_num for length in seq_lens]
    else:
        raise RuntimeError(f"layer-split: a prefill server has no forward pass of {mode}")
    plan: Plan = pool.begin(
        req_to_token,
        batch.req_pool_indices,
        prefix_lens,
        seq_lens,
        paged_index=paged_index,
        shared=shared,
    )
    return plan


def _in_place(mode: Any) -> bool:
    """Whether the indexer reads pages where they lie, and not whole requests from the pool."""
    return not mode.is_extend_without_speculative()


def remapped(metadata: Any, plan: Plan, paged_index: bool) -> Any:
    """The same metadata (a dataclass) with translated tables."""
    tables = {name: getattr(metadata, name, None) for name in SLOTS}
    changes = {name: plan.slot(table) for name, table in tables.items() if table is not None}
    if paged_index:
        changes[PAGES] = plan.page(getattr(metadata, PAGES))
    return dataclasses.replace(metadata, **changes)
