"""Waits that are forgotten: the negative controls of what claims to order.

    index-k-wait       a HiCache whose index-K is read without waiting for its load, as up to SGLang
                       0.5.9; the latent KV keeps its wait, as it had then
    layer-split-wait   a split pool whose layers are read without waiting for their broadcast

Loaded only where SGLANG_SCALING_FIXES_LAB_FORGET says so.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from sglang_scaling_fixes import import_hooks
from sglang_scaling_fixes.lab.runtime import FORGET

INDEX_WAIT = "index-k-wait"
SPLIT_WAIT = "layer-split-wait"


def install() -> None:
    asked = os.environ.get(FORGET)
    if asked and asked not in _FORGETS:
        known = " or ".join(map(repr, _FORGETS))
        raise SystemExit(f"{FORGET}={asked!r}: the lab can forget {known} only")
    if asked:
        import_hooks.after_import(*_FORGETS[asked])


def _read_at_once(module: ModuleType) -> None:
    def get_local_buffer(cache: Any, layer_id: int) -> Any:
        return cache._kernel_view(cache.buffer[layer_id - cache.pool.start_layer])

    module.IndexKeyCache.get_local_buffer = get_local_buffer


def _read_before_it_is_sent(module: ModuleType) -> None:
    module._Done.wait = lambda _sent: None


_FORGETS = {
    INDEX_WAIT: ("sglang.srt.mem_cache.index_key_cache", _read_at_once),
    SPLIT_WAIT: ("sglang_scaling_fixes.layersplit.lane", _read_before_it_is_sent),
}
"""What can be forgotten: the module in which, and how."""
