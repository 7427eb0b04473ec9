"""Where LayerSplit touches stock: the pool's class and size, its tables, writers and batches."""

from __future__ import annotations

from functools import partial

from sglang_scaling_fixes.attach import AttachPoint, catalogue

NAME = "layer-split"
FIRST = "0.5.16"
"""First release with `--enable-dsa-cache-layer-split`."""

_prefill = partial(AttachPoint, NAME, "prefill", first=FIRST)

MODULE = "sglang.srt.mem_cache.dsa_cache_layer_split"
_BACKEND = "sglang.srt.layers.attention.dsa_backend:DeepseekSparseAttnBackend"
_INDEXER = "sglang.srt.layers.attention.dsa.dsa_indexer:Indexer"
_SIZES = "sglang.srt.model_executor.pool_configurator:DefaultPoolConfigurator"
_ADDER = "sglang.srt.managers.schedule_policy:PrefillAdder"
_TREE = "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface:UnifiedTreeCoreInterface"
_SPLIT = "sglang.srt.layers.cp.utils"
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator"

# Replaced in its module, from which stock imports it where it builds the pool.
POOL = _prefill(
    f"{MODULE}:LayerSplitDSATokenToKVPool.__init__",
    ("layer_shard_rank", "layer_shard_size"),
    wrapped=False,
)
BUILD = _prefill(f"{_CONFIGURATOR}:KVCacheConfigurator._build_dsa_kv_pool", wrapped=False)
METADATA = _prefill(f"{_BACKEND}.init_forward_metadata", ("forward_batch",))
BACKEND = _prefill(
    f"{_BACKEND}.__init__",
    uses=("token_to_kv_pool", "req_to_token_pool", "forward_metadata"),
    wrapped=False,
)
STORE_INDEX = _prefill(
    f"{_INDEXER}._store_index_k_cache",
    ("forward_batch", "layer_id", "key"),
)
FUSED_STORE_INDEX = _prefill(
    f"{_INDEXER}._fused_k_prepare_and_store",
    ("key_raw", "positions", "forward_batch", "layer_id", "act_quant", "out_cache_loc"),
)
CELL_SIZE = _prefill(f"{_SIZES}.__init__", ("kvc",), uses=("_cell_size",))
POOL_SIZES = _prefill(f"{_SIZES}.calculate_pool_sizes", ("available_bytes", "page_size"))
OWNED_LAYERS = _prefill(
    f"{_SPLIT}:get_glm_dsa_layer_split_effective_num_layers", ("model_runner", "num_layers")
)
SHARD = _prefill(f"{_SPLIT}:get_glm_dsa_cp_layer_shard_info", ("model_runner",), wrapped=False)
KEY_BYTES = _prefill(f"{_CONFIGURATOR}:calculate_mla_kv_cache_dim", wrapped=False)
ADD_REQUEST = _prefill(f"{_ADDER}.add_one_req", ("req", "has_chunked_req", "truncation_align_size"))
ADD_CHUNKED = _prefill(f"{_ADDER}.add_chunked_req", ("req",), uses=("tree_cache",))
PREPARE = _prefill(
    "sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_extend",
    uses=("reqs", "prefix_lens", "tree_cache"),
)
PATHS = _prefill(f"{_TREE}.collect_path_info", ("end_node_ids",), first="0.5.22", wrapped=False)
NODES = _prefill(f"{_TREE}.node_by_id", ("node_id",), first="0.5.17", wrapped=False)

ATTACH_POINTS = catalogue(vars())
