"""What the classes of a release ask of a server that is not there: its groups and its settings."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from sglang_scaling_fixes.standin_objects import Lenient, No

PAGE = 64
CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator"
SIZES = "sglang.srt.model_executor.pool_configurator"

_GROUPS = ("get_memory", "get_disagg", "get_exec", "get_schedule", "get_spec", "get_model")
"""Functions of stock's `runtime_context`, each of which returns some of a server's arguments."""


@contextlib.contextmanager
def parallel(rank: int, ranks: int) -> Iterator[None]:
    """This process is rank `rank` of a group of `ranks` ranks of context parallelism."""
    from sglang.srt.runtime_context import get_parallel

    group = SimpleNamespace(
        ranks=list(range(ranks)),
        world_size=ranks,
        rank_in_group=rank,
        pynccl_comm=None,
        cpu_group=None,
        device="cpu",
    )
    values = {
        "attn_cp_group": group,
        "attn_cp_size": ranks,
        "attn_cp_rank": rank,
        "attn_tp_size": 1,
        "attn_tp_rank": 0,
        "attn_dp_rank": 0,
        "attn_dp_size": 1,
        "attn_dcp_size": 1,
        "attn_dcp_rank": 0,
        "pp_size": 1,
        "tp_size": ranks,
        "enable_dsa_cache_layer_split": ranks > 1,
        "enable_kv_cache_sharding": False,
        "cp_strategy": "interleave",
    }
    unknown = {}
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            try:
                stack.enter_context(get_parallel().override(**{name: value}))
            except ValueError:
                unknown[name] = value
        # In some releases `override` knows no settings, and they are asked for all the same.
        stack.enter_context(mock.patch.dict(get_parallel()._overrides, unknown))
        yield


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """The settings of a prefill server that has nothing special."""
    kernel = Lenient(dsa_prefill_backend="flashmla_sparse", dsa_decode_backend="flashmla_kv")
    group = Lenient(
        disaggregation_mode="prefill",
        page_size=PAGE,
        features=Lenient(),
        kernel=kernel,
    )
    with contextlib.ExitStack() as stack:
        for name in (CONFIGURATOR, SIZES, "sglang.srt.mem_cache.page_interleave"):
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError:
                continue
            for getter in _GROUPS:
                if hasattr(module, getter):
                    stack.enter_context(mock.patch.object(module, getter, lambda: group))
            if hasattr(module, "max_speculative_num_draft_tokens"):
                patch = mock.patch.object(module, "max_speculative_num_draft_tokens", lambda: 0)
                stack.enter_context(patch)
        yield


class _Server(Lenient):
    """A configurator's `self`. It has the release's methods only where they are called on it."""


def server(
    *,
    layers: int,
    dtype: str,
    draft: bool = False,
    eagle_layers: int = 0,
    split: bool = True,
    context: int = 4096,
    shares: int = 1,
    **arguments: Any,
) -> Any:
    """A server of a model with the widths of GLM-5.1, `dtype` "bf16" or "packed".

    `shares`: layers that share the top-k of the first of them. `arguments`: more of its own.

    `draft`: the worker of its draft. `eagle_layers`: layers of the draft that it has, 0 for none.
    """
    import torch
    from transformers import PretrainedConfig

    hf_config = PretrainedConfig(
        architectures=["GlmMoeDsaForCausalLM"],
        index_topk=2048,
        index_head_dim=128,
        index_n_heads=32,
        num_hidden_layers=layers,
        index_topk_freq=shares,
    )
    eagle = bool(eagle_layers)
    algorithm = Lenient(
        is_eagle=lambda: eagle,
        is_none=lambda: not eagle,
        is_standalone=No(),
        is_dflash_family=No(),
        is_dflash=No(),
    )
    return _Server(
        model_config=Lenient(
            hf_config=hf_config,
            hf_text_config=hf_config,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            context_len=context,
        ),
        server_args=Lenient(
            enable_dsa_cache_layer_split=split,
            page_size=PAGE,
            disaggregation_mode="prefill",
            dsa_prefill_backend="flashmla_sparse",
            dsa_decode_backend="flashmla_kv",
            kv_cache_dtype="auto" if dtype == "bf16" else "fp8_e4m3",
            **arguments,
        ),
        layer_info=SimpleNamespace(start_layer=0, end_layer=layers, num_effective_layers=layers),
        kv_cache_dtype=torch.bfloat16 if dtype == "bf16" else torch.float8_e4m3fn,
        kv_cache_dtype_str="auto" if dtype == "bf16" else "fp8_e4m3",
        spec_algorithm=algorithm,
        spec_aux_config=Lenient(eagle_draft_num_layers=eagle_layers or None),
        is_draft_worker=draft,
        use_mla_backend=True,
        page_size=PAGE,
        pool_page_size=PAGE,
        device="cpu",
        loc_space_scale=1,
        pp_size=1,
        ps=Lenient(pp_size=1),
        fused_entry_bytes=lambda _name: None,
    )


def known(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that this release's function has."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}
