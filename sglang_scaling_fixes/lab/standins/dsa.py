"""What DeepSeek Sparse Attention needs beyond `cuda`: its kernels in plain PyTorch.

Each stand-in replaces a kernel where it is defined, before anything imports it, and
computes the same over the same buffers. The attention backend comes through SGLang's own
registry. Loaded only for a model that has DSA (SGLANG_SCALING_FIXES_LAB_DSA=1).
"""

from __future__ import annotations

import os
from typing import Any

from sglang_scaling_fixes import import_hooks
from sglang_scaling_fixes.lab.runtime import DSA
from sglang_scaling_fixes.lab.standins import streams

_TRANSLATED = "tables_are_translated"


def install() -> None:
    if os.environ.get(DSA) != "1":
        return
    ops = "sglang.kernels.ops."
    import_hooks.after_import("torch", _capability)
    import_hooks.after_import("torch", streams.patch_torch)
    import_hooks.after_import("sglang.srt.layers.attention.attention_registry", _backend)
    import_hooks.after_import("sglang.srt.layers.attention.dsa.dsa_indexer", _indexer)
    import_hooks.after_import(ops + "kvcache.dsa_index_k_cache", _index_k_cache)
    import_hooks.after_import(ops + "kvcache.mla_buffer", _mla_buffer)
    import_hooks.after_import(ops + "quantization.act_quant_triton", _act_quant)
    import_hooks.after_import(ops + "quantization.dsa_quant_k_cache", _packed)
    import_hooks.after_import("sglang.srt.mem_cache.kv_cache_configurator", _packed_on_a_cpu)
    import_hooks.after_import(ops + "quantization.hadamard", _hadamard)
    for name in ("mla", "dsa"):
        import_hooks.after_import(f"sglang.srt.mem_cache.pool_host.{name}", streams.patch_host_pool)
    import_hooks.after_import("sglang.srt.mem_cache.pool_host.common", streams.patch_host_memory)
    import_hooks.after_import("sglang.srt.layers.rotary_embedding.factory", _rope)
    import_hooks.after_import("sglang.srt.speculative.draft_utils", _draft_backends)


def _capability(torch: Any) -> None:
    """Asked for to choose between CUDA kernels, of which none is called here."""
    torch.cuda.get_device_capability = lambda *_args: (9, 0)


def _backend(registry: Any) -> None:
    def create(runner: Any) -> Any:
        from sglang_scaling_fixes.lab.glm.backend import ReferenceDSABackend

        _translate_tables(ReferenceDSABackend)
        return ReferenceDSABackend(runner)

    registry.register_attention_backend("dsa")(create)


def _translate_tables(backend: Any) -> None:
    """LayerSplit translates the tables that stock's backend makes; then it does those of ours."""
    from sglang_scaling_fixes.attach import is_wrapped
    from sglang_scaling_fixes.layersplit import metadata, points

    if is_wrapped(points.METADATA.target) and not hasattr(backend, _TRANSLATED):
        stock = backend.init_forward_metadata
        backend.init_forward_metadata = metadata.after_metadata(stock)
        setattr(backend, _TRANSLATED, True)


def _draft_backends(module: Any) -> None:
    """Draft backends come from a table inside a factory, not from the registry."""

    def decode(factory: Any) -> tuple[str, Any]:
        from sglang_scaling_fixes.lab.glm.backend import ReferenceDSADraftBackends

        if factory.topk != 1:
            raise NotImplementedError("the reference backend drafts chains: --spec topk 1")
        steps = factory.speculative_num_steps
        return "dsa", ReferenceDSADraftBackends(factory.draft_model_runner, steps)

    def extend(factory: Any) -> tuple[str, Any]:
        from sglang_scaling_fixes.lab.glm.backend import ReferenceDSABackend

        return "dsa", ReferenceDSABackend(factory.draft_model_runner)

    module.DraftBackendFactory._create_dsa_decode_backend = decode
    module.DraftBackendFactory._create_dsa_prefill_backend = extend


def _indexer(module: Any) -> None:
    from sglang_scaling_fixes.lab.glm import indexer

    module.Indexer.forward_native = indexer.forward


def _index_k_cache(module: Any) -> None:
    import torch

    from sglang_scaling_fixes.lab.glm import reference

    def store(*, pool: Any, buf: Any, loc: Any, index_k: Any, index_k_scale: Any) -> None:
        reference.index_store(buf, loc.long(), index_k, index_k_scale, pool.index_page_size)

    def load(
        pool: Any,
        buf: Any,
        *,
        page_indices: Any,
        seq_len_tensor: Any,
        seq_len_sum: int,
        max_seq_len: int,
    ) -> tuple[Any, Any]:
        page = pool.index_page_size
        slots = (page_indices.long()[:, :, None] * page + torch.arange(page)).flatten(1)
        used = torch.cat([row[:n] for row, n in zip(slots, seq_len_tensor.tolist(), strict=True)])
        assert len(used) == seq_len_sum
        keys, scales = reference.index_load(buf, used, pool.index_head_dim, page)
        return keys.view(torch.uint8), scales.view(torch.uint8)

    module.SetKAndS.execute = staticmethod(store)
    module.GetKAndS.execute = staticmethod(load)


def _mla_buffer(module: Any) -> None:
    import torch

    def write(kv_buffer: Any, loc: Any, nope: Any, rope: Any, **_skip: Any) -> None:
        rows = torch.cat((nope.flatten(1), rope.flatten(1)), dim=1)
        kv_buffer[loc.long()] = rows.view(len(rows), *kv_buffer.shape[1:]).to(kv_buffer.dtype)

    def read(kv_buffer: Any, loc: Any, nope: Any, rope: Any) -> None:
        rows = kv_buffer[loc.long()].flatten(1)
        nope.copy_(rows[:, : nope.shape[-1]].view_as(nope))
        rope.copy_(rows[:, nope.shape[-1] :].view_as(rope))

    module.set_mla_kv_buffer_triton = write
    module.get_mla_kv_buffer_triton = read


def _packed(module: Any) -> None:
    """KV in packed fp8: what stock writes to a pool, in the two parts that its writer takes."""
    from sglang_scaling_fixes.lab.glm import reference

    def quantize(nope: Any, rope: Any, tile_size: int = reference.PACKED_GROUP) -> tuple[Any, Any]:
        assert tile_size == reference.PACKED_GROUP
        rows = reference.pack(nope.flatten(1), rope.flatten(1))[:, None]
        ropes = 2 * rope.shape[-1]
        return rows[..., :-ropes], rows[..., -ropes:]

    module.quantize_k_cache_separate = quantize


def _packed_on_a_cpu(module: Any) -> None:
    """Stock allows fp8 on a CPU for other pools only. It asks this module's platform, and asks
    nothing else of it that depends on being a CPU."""
    stock = module.current_platform

    class Platform:
        def __getattr__(self, name: str) -> Any:
            return getattr(stock, name)

        def is_cpu(self) -> bool:
            return False

    module.current_platform = Platform()


def _act_quant(module: Any) -> None:
    from sglang_scaling_fixes.lab.glm import reference

    def act_quant(x: Any, block_size: int = 128, scale_fmt: str | None = None) -> tuple[Any, Any]:
        assert scale_fmt == "ue8m0", f"the reference rounds scales to powers of two: {scale_fmt}"
        return reference.quantize(x, block_size)

    module.act_quant = act_quant


def _hadamard(module: Any) -> None:
    from sglang_scaling_fixes.lab.glm import reference

    module.hadamard_transform = reference.hadamard


def _rope(module: Any) -> None:
    """Stock's choice for a CPU knows scaled RoPE only; GLM's is not, so it gets the general one."""
    stock = module.get_rope_wrapper

    def get_rope_wrapper(
        *args: Any, rope_scaling: Any = None, device: Any = None, **kwargs: Any
    ) -> Any:
        if rope_scaling is None:
            return module.get_rope(*args, **kwargs)
        return stock(*args, rope_scaling=rope_scaling, device=device, **kwargs)

    module.get_rope_wrapper = get_rope_wrapper
