"""A release's own device pool, host pool and HiCache controller, built as small as they go.

Releases differ in names, in constructor arguments and in who assembles the host side
(`lookup` knows the first two). What is not there raises `Moved`, naming what was expected where.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sglang_scaling_fixes.racecheck import recording_cuda
from sglang_scaling_fixes.racecheck.lookup import call, find
from sglang_scaling_fixes.racecheck.recorder import Recorder, Stream
from sglang_scaling_fixes.standin_objects import Lenient

LAYERS = 4
PAGE = 64
DEVICE_PAGES = 8
_LORA, _ROPE, _INDEX_DIM = 512, 64, 128
"""Sizes of the latent KV and of index-K that the kernels' layouts assume."""


@dataclass
class KvStack:
    """What one scheduler keeps KV in: a device pool, its host pool, the controller between them."""

    recorder: Recorder
    pool: Any
    controller: Any
    allocator: Allocator
    sidecars: list[Any]
    schedule: Any
    forward: Any

    @property
    def counter(self) -> Any:
        return self.pool.layer_transfer_counter

    def load(self, pages: int = 2) -> tuple[Any, int]:
        """Load `pages` host pages as the scheduler does: the device slots, the consumer index."""
        import torch

        host = torch.arange(PAGE, (1 + pages) * PAGE)
        slots = self.controller.load(host_indices=host, **self._extra_pools())
        return slots, self.controller.start_loading()

    def write_back(self, slots: Any) -> None:
        """Back these device slots up to the host."""
        assert self.controller.write(device_indices=slots, **self._extra_pools()) is not None

    def forward_batch(self, consumer: int) -> Any:
        """What the scheduler does before a forward: name the load, wait, switch streams."""
        self.counter.set_consumer(consumer)
        self.forward.wait_stream(self.schedule)
        return self.forward

    def kv_pages(self, slots: Any) -> set[int]:
        """The watched pages behind these slots, in every layer and every KV buffer."""
        buffers = [b for name in _KV for b in getattr(self.pool, name, None) or ()]
        return set().union(*(recording_cuda.touched(buffer, slots) for buffer in buffers))

    def _extra_pools(self) -> dict[str, Any]:
        return {"extra_pools": [make() for make in self.sidecars]} if self.sidecars else {}


_MEMORY = "sglang.srt.mem_cache.memory_pool"
_ASSEMBLER = "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler"
_SETTINGS = {
    "hicache_ratio": 2.0,
    "hicache_size": 0,
    "hicache_mem_layout": "layer_first",
    "hicache_io_backend": "kernel",
    "hicache_write_policy": "write_through",
    "hicache_storage_backend": None,
    "hicache_host_memory_mode": "cache",
    "served_model_name": "racecheck",
}


def dsa_pool_class() -> Any:
    return find(f"{_MEMORY}:DSATokenToKVPool", f"{_MEMORY}:NSATokenToKVPool")


def dsa_pool(cls: Any = None, **more: Any) -> Any:
    import torch

    return call_pool(
        cls or dsa_pool_class(),
        kv_lora_rank=_LORA,
        qk_rope_head_dim=_ROPE,
        index_head_dim=_INDEX_DIM,
        kv_cache_dim=_LORA + _ROPE,
        skip_topk_layers=[False] * LAYERS,
        dtype=torch.bfloat16,
        **more,
    )


def mha_pool() -> Any:
    import torch

    return call_pool(
        find(f"{_MEMORY}:MHATokenToKVPool"), head_num=1, head_dim=64, dtype=torch.bfloat16
    )


def call_pool(cls: Any, **more: Any) -> Any:
    given = {"device": "cpu", **more}
    return call(
        cls,
        size=DEVICE_PAGES * PAGE,
        page_size=PAGE,
        layer_num=LAYERS,
        enable_memory_saver=False,
        **given,
    )


def settings(**parallel: Any) -> None:
    """What a server's arguments and process groups would say, for code that asks for them."""
    import torch

    memory = Lenient(**_SETTINGS)
    one = Lenient(
        **{f"{group}_{what}": value for group in _GROUPS for what, value in _ALONE},
        dcp_enabled=False,
        nnodes=1,
    )
    vars(one).update(parallel)
    answers = {
        "get_memory": memory,
        "get_serving": memory,
        "get_global_server_args": memory,
        "get_server_args": memory,
        "get_parallel": one,
    }
    for names in _namespaces(len(sys.modules)):
        for getter in answers.keys() & names.keys():
            names[getter] = lambda answer=answers[getter]: answer
        if "device_module" in names:
            names["device_module"] = torch.cuda  # a release may have chosen torch.cpu


@functools.lru_cache(maxsize=1)
def _namespaces(_modules: int) -> list[dict[str, Any]]:
    """The modules of the release that are loaded; looked for again when there are more."""
    return [vars(sys.modules[name]) for name in list(sys.modules) if name.startswith("sglang.srt.")]


_KV = ("kv_buffer", "k_buffer", "v_buffer")
_GROUPS = ("tp", "pp", "dp", "attn_tp", "attn_cp", "attn_dp", "attn_dcp", "launch_world")
_ALONE = (("size", 1), ("rank", 0))


# -- the host side ------------------------------------------------------------------------


def build(recorder: Recorder, pool: Any) -> KvStack:
    """Host pool and controller for `pool` on recording streams, every buffer watched."""
    stack = assemble(recorder, pool, Stream(name="schedule"), Stream(name="forward"))
    recording_cuda.replace_kernels()  # of what the assembly imported
    recorder.entered[:] = [stack.schedule]
    _name_streams(recorder, stack.controller)
    watch(recorder, pool)
    return stack


def assemble(recorder: Any, pool: Any, schedule: Any, forward: Any) -> KvStack:
    """Host pool and controller for `pool`, as this release's own code puts them together."""
    importlib.import_module("sglang.srt.managers.cache_controller")
    allocator = Allocator(pool)
    params = Lenient(
        token_to_kv_pool_allocator=allocator,
        page_size=PAGE,
        mtp_draft_device_pools=(),
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
    )
    sidecars: list[Any] = []
    tree = Lenient(
        kv_cache=pool,
        page_size=PAGE,
        pp_rank=0,
        pp_size=1,
        components={},
        register_sidecar_pool=lambda spec: sidecars.append(lambda: _sidecar(spec)),
    )
    controller = _assemble(pool, tree, params, Lenient(**_SETTINGS))
    return KvStack(recorder, pool, controller, allocator, sidecars, schedule, forward)


class Allocator(SimpleNamespace):
    """Hands out whole pages, the first one never (slot 0 is for padding)."""

    def __init__(self, pool: Any) -> None:
        super().__init__(free=list(range(1, DEVICE_PAGES)), device=pool.device, page_size=PAGE)
        self._pool = pool

    def get_kvcache(self) -> Any:
        return self._pool

    def alloc(self, tokens: int) -> Any:
        import torch

        pages = [self.free.pop(0) for _ in range(tokens // PAGE)]
        slots = torch.cat([torch.arange(p * PAGE, (p + 1) * PAGE) for p in pages])
        return slots.to(self.device)

    def set_hicache_transfer_done_event(self, *_args: Any) -> None:
        """Used by allocators that move pages; this one does not."""


def _assemble(pool: Any, tree: Any, params: Any, server_args: Any) -> Any:
    event = threading.Event()
    try:
        assembler = importlib.import_module(_ASSEMBLER)
    except ImportError:
        return _plain(pool, params, event)
    settings()
    if hasattr(assembler, "attach_hybrid_pool_to_unified_cache"):
        kind = find(
            "sglang.srt.mem_cache.unified_cache.component_type:ComponentType",
            "sglang.srt.mem_cache.unified_cache_components:ComponentType",
        )
        tree.components = {kind.FULL: Lenient()}
        call(
            assembler.attach_hybrid_pool_to_unified_cache,
            cache=tree,
            params=params,
            server_args=server_args,
            load_cache_event=event,
        )
        return tree.cache_controller
    if not hasattr(pool, "index_k_with_scale_buffer"):
        return _plain(pool, params, event)
    call(
        find(f"{_ASSEMBLER}:attach_hybrid_nsa_pool_to_hiradix_cache"),
        radix_cache=tree,
        params=params,
        server_args=server_args,
        extra_config={},
        prefetch_threshold=256,
        enable_storage_metrics=False,
        load_cache_event=event,
    )
    pool_name = find("sglang.srt.mem_cache.hicache_storage:PoolName")
    tree.register_sidecar_pool(Lenient(pool_name=pool_name.INDEXER))
    return tree.cache_controller


def _sidecar(spec: Any) -> Any:
    """The transfer of a pool that shares the KV pool's indices (index-K)."""
    transfer = find("sglang.srt.mem_cache.hicache_storage:PoolTransfer")
    return call(transfer, name=spec.pool_name, indices_from_pool=spec.indices_from_pool)


def _plain(pool: Any, params: Any, event: Any) -> Any:
    """Up to 0.5.10: one host pool class per device pool, one controller for all."""
    host = "sglang.srt.mem_cache.memory_pool_host"
    name = type(pool).__name__ + "Host"
    pool_host = call(
        find(f"{host}:{name}"),
        device_pool=pool,
        host_to_device_ratio=_SETTINGS["hicache_ratio"],
        host_size=0,
        page_size=PAGE,
        layout="layer_first",
    )
    return call(
        find("sglang.srt.managers.cache_controller:HiCacheController"),
        token_to_kv_pool_allocator=params.token_to_kv_pool_allocator,
        mem_pool_host=pool_host,
        page_size=PAGE,
        tp_group=None,
        load_cache_event=event,
        write_policy="write_through",
        io_backend="kernel",
    )


def _name_streams(recorder: Recorder, controller: Any) -> None:
    for owner in (controller, getattr(controller, "l2_transfer_engine", None)):
        for name, value in vars(owner).items() if owner is not None else ():
            if isinstance(value, Stream):
                recorder.rename(value, name.removesuffix("_stream"))


def watch(recorder: Recorder, pool: Any) -> None:
    """Watch every buffer of the pool; a page's bytes differ per buffer."""
    for name in _KV:
        for layer, buffer in enumerate(getattr(pool, name, None) or ()):
            row = buffer.stride(0) * buffer.element_size()
            recorder.watch(f"{name}[{layer}]", buffer, page_bytes=PAGE * row)
    for layer, buffer in enumerate(getattr(pool, "index_k_with_scale_buffer", ())):
        page = buffer.stride(0) * buffer.element_size()
        recorder.watch(f"index_k[{layer}]", buffer, page_bytes=page)
