"""A HiCache whose index-K is read without waiting for its load, as up to SGLang 0.5.9.

The latent KV keeps its wait, as it had then: the indexer is what runs ahead. Loaded only
where SGLANG_SCALING_FIXES_LAB_FORGET says so; the negative control of everything that
claims to order loads before reads.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from sglang_scaling_fixes import import_hooks
from sglang_scaling_fixes.lab.runtime import FORGET

INDEX_WAIT = "index-k-wait"


def install() -> None:
    asked = os.environ.get(FORGET)
    if asked and asked != INDEX_WAIT:
        raise SystemExit(f"{FORGET}={asked!r}: the lab can forget {INDEX_WAIT!r} only")
    if asked:
        import_hooks.after_import("sglang.srt.mem_cache.index_key_cache", _read_at_once)


def _read_at_once(module: ModuleType) -> None:
    def get_local_buffer(cache: Any, layer_id: int) -> Any:
        return cache._kernel_view(cache.buffer[layer_id - cache.pool.start_layer])

    module.IndexKeyCache.get_local_buffer = get_local_buffer
