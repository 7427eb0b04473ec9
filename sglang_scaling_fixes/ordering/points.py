"""Where HiCache ordering touches stock: copies behind the forward stream, reads behind the loads.

A point is wrapped only where a probe finds that the release does not wait there by itself.
"""

from __future__ import annotations

from functools import partial

from sglang_scaling_fixes.attach import AttachPoint, catalogue

NAME = "hicache-ordering"

_both = partial(AttachPoint, NAME, "both")
_prefill = partial(AttachPoint, NAME, "prefill")

CONTROLLER = "sglang.srt.managers.cache_controller:HiCacheController"
HYBRID = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller:HybridCacheController"

START_LOADING = _both(f"{CONTROLLER}.start_loading", uses=("load_queue",))
START_WRITING = _both(f"{CONTROLLER}.start_writing", uses=("write_queue",))
HYBRID_START_LOADING = _both(f"{HYBRID}.start_loading")
HYBRID_START_WRITING = _both(f"{HYBRID}.start_writing")
CONTROLLER_STREAMS = _both(
    f"{CONTROLLER}.__init__", uses=("load_stream", "write_stream"), last="0.5.17", wrapped=False
)
ENGINE_STREAMS = _both(
    "sglang.srt.mem_cache.l2_transfer:L2TransferEngine.__init__",
    uses=("host_to_device_stream", "device_to_host_stream"),
    first="0.5.18",
    wrapped=False,
)
PREFETCH = _prefill(
    "sglang.srt.mem_cache.dsa_cache_layer_split:LayerSplitDSATokenToKVPool.prefetch_kv_buffer",
    ("layer_id", "layer_transfer_counter", "layer_transfer_idx"),
    uses=("layer_transfer_counter", "start_layer", "layer_broadcast_comm"),
    first="0.5.16",
)
_POOL = "sglang.srt.mem_cache.memory_pool:NSATokenToKVPool"
# What the probe asks: they wait since 0.5.11, before that with the patch index-k-wait.
INDEX_K = tuple(
    _both(
        f"{_POOL}.{reader}",
        ("layer_id",),
        uses=("index_k_with_scale_buffer", "layer_transfer_counter", "start_layer"),
        first="0.5.10",
        last="0.5.12.post1",
        wrapped=False,
    )
    for reader in (
        "get_index_k_continuous",
        "get_index_k_scale_continuous",
        "get_index_k_scale_buffer",
    )
)

ATTACH_POINTS = (*catalogue(vars()), *INDEX_K)
