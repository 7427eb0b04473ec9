"""Which servers LayerSplit can be in force for, said before they start, and checked after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_scaling_fixes.attach import require_in_place, unwrap_other_roles
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.layersplit import points
from sglang_scaling_fixes.resolved_args import resolved

SPLIT = "enable_dsa_cache_layer_split"

_ONE: Mapping[str, str] = {
    "pp_size": "a stage has other layers, which nobody has tried to split",
    "dcp_size": "decode context parallelism lays pages out differently",
}
_OFF: Mapping[str, str] = {
    "enable_hisparse": "HiSparse keeps KV in a pool of its own",
    "enable_two_batch_overlap": "two batches at once have one scratch too few",
    "enable_pdmux": "multiplexed prefills stop between layers, and the broadcasts do not",
    "enable_mixed_chunk": "a mixed batch decodes, and its index keys are read by pool page",
    "enable_return_indexer_topk": "top-k results name places in the scratch",
    "hicache_storage_backend": "every owner would have to store its own layers (L3); "
    "keep L2 (--enable-hierarchical-cache)",
}
"""Field -> why it must be off."""
_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3")
_BACKENDS: Mapping[str, str] = {
    "trtllm": "its raw fp8 layout was never run here",
    "aiter": "ROCm is not supported",
    "intel_xpu": "it reads KV by pool page",
}
"""Attention backends of a prefill that it is not in force for."""
_DEVICES = ("cuda", "cpu")


def check(server_args: Any) -> None:
    """Raise `ConfigError`, naming flag, value and remedy, for a server it is not made for."""
    role = server_args.disaggregation_mode
    if role == "decode":
        return  # it keeps every layer, by its nature; one line for a whole fleet may name the fix
    if not getattr(server_args, SPLIT, False):
        raise ConfigError(
            f"--enable-dsa-cache-layer-split: not given, so this server ({role}) keeps every layer "
            "on every rank and has no split to improve; give it to a prefill server, or start "
            "without layer-split"
        )
    device = str(getattr(server_args, "device", "cuda") or "cuda")
    if device not in _DEVICES or _is_rocm():
        found = "rocm" if _is_rocm() else device
        _refuse("device", found, "only NVIDIA GPUs (and the lab's CPU) are supported", "cuda")
    for field, why in _ONE.items():
        if (getattr(server_args, field, 1) or 1) > 1:
            _refuse(field, getattr(server_args, field), why, "1")
    for field, why in _OFF.items():
        if value := getattr(server_args, field, None):
            _refuse(field, value, why)
    chunk = server_args.chunked_prefill_size
    if chunk is not None and chunk <= 0:  # None: stock is still to choose
        _refuse("chunked_prefill_size", chunk, "a scratch holds one chunk, so it needs an end", "")
    dtype = server_args.kv_cache_dtype
    if dtype not in _DTYPES:
        _refuse("kv_cache_dtype", dtype, "its layout was never run here", "auto or fp8_e4m3")
    if server_args.page_size not in (None, 64):
        _refuse("page_size", server_args.page_size, "index keys lie in pages of 64", "64")
    _check_backend(getattr(server_args, "dsa_prefill_backend", None))
    _check_graphs(getattr(server_args, "cuda_graph_backend_prefill", None))


def check_in_force(scheduler: Any, server_args: Any) -> None:
    """After stock has built its pool: it is ours, nobody took our places since, and what stock
    chose by itself is what it is made for. Raises `ConfigError` or `AttachError`."""
    import torch

    from sglang_scaling_fixes.layersplit import attach
    from sglang_scaling_fixes.layersplit.metrics import PREFILL
    from sglang_scaling_fixes.layersplit.pool import LayerSplitDSATokenToKVPool
    from sglang_scaling_fixes.metrics import of_scheduler

    role = scheduler.disaggregation_mode.value
    if role == "decode":
        unwrap_other_roles(points.NAME, role)
        return
    require_in_place(points.NAME, "prefill")
    pool = scheduler.tp_worker.model_runner.token_to_kv_pool
    if not isinstance(pool, LayerSplitDSATokenToKVPool):
        where = "its own" if attach.in_place() else "another, put in its place by something else"
        raise ConfigError(
            f"--enable-dsa-cache-layer-split: stock built {type(pool).__name__} ({where}); it "
            "splits layers over two or more ranks of prefill context parallelism: add "
            "--enable-prefill-cp with --tp 2 or more"
        )
    # What the operator left open stock has chosen by now: trtllm for fp8 on Blackwell, say.
    _check_backend(resolved(server_args, "dsa_prefill_backend"))
    if torch.device(pool.device).type == "cuda":  # a CPU has defaults for graphs, and no graphs
        graphs = getattr(resolved(server_args, "cuda_graph_config"), "prefill", None)
        _check_graphs(getattr(graphs, "backend", None))
    pool.stats = of_scheduler(PREFILL, scheduler, server_args)
    pool.stats.set("scratch_capacity", pool.size_of_scratch.pages)


def _check_backend(backend: str | None) -> None:
    if backend is not None and backend in _BACKENDS:
        _refuse("dsa_prefill_backend", backend, _BACKENDS[backend], "flashmla_sparse or fa3")


def _check_graphs(backend: str | None) -> None:
    """`backend`: None where nothing was given, or stock has no such graphs."""
    if backend not in (None, "disabled"):
        why = "a graph would replay the pages of the pass that it was captured with"
        _refuse("cuda_graph_backend_prefill", backend, why, "disabled")


def _is_rocm() -> bool:
    import torch

    return torch.version.hip is not None


def _refuse(field: str, value: Any, why: str, instead: str | None = None) -> None:
    flag = "--" + field.replace("_", "-")
    if instead is None:
        remedy = "drop it"
    else:
        remedy = f"set it to {instead}" if instead else "set it to a number of tokens"
    raise ConfigError(f"{flag} {value}: {why}; {remedy}, or start without layer-split")
