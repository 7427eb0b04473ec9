"""Two requests in this release's own tree: which nodes our admission finds on their way."""

from __future__ import annotations

import dataclasses
from array import array
from types import SimpleNamespace
from typing import Any

PAGE, PREFIX, COMMON = 64, 6, 4
"""Pages of a request's prefix, and those that the other request has as well."""
CORES = ("python", "rust")


def all_of() -> dict[str, Any]:
    """`{core: what is found with it}` of the tree that this release builds by default."""
    return {core: found for core in CORES if (found := _found(core)) is not None}


def _found(core: str) -> dict[str, Any] | None:
    try:
        tree = _tree(core)
    except (FileNotFoundError, RuntimeError):
        if core != "rust":
            raise
        tree = None  # an unpacked wheel may lack what is compiled, or have it for another PyTorch
    if tree is None:
        return None
    import torch
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    from sglang_scaling_fixes.layersplit.admission import Admission
    from sglang_scaling_fixes.layersplit.scratch import Size
    from sglang_scaling_fixes.layersplit.tree import path

    asked = [
        array("q", [*range(COMMON * PAGE), *[9 + own] * ((PREFIX - COMMON) * PAGE)])
        for own in range(2)
    ]
    for number, tokens in enumerate(asked):
        slots = torch.arange(len(tokens)) + (1 + number * PREFIX) * PAGE
        tree.insert(InsertParams(key=RadixKey(tokens), value=slots))
    last = [
        tree.match_prefix(MatchPrefixParams(key=RadixKey(tokens))).last_device_node
        for tokens in asked
    ]
    paths = [path(tree, node) for node in last]
    exactly = Admission(Size(2 * PREFIX - COMMON, 8, 4), PAGE)
    exactly.take(PREFIX * PAGE, paths[0])
    unseen = path(None, last[1])  # without the tree, a number says nothing
    return {
        "core": type(tree.tree_core).__name__,
        "last": type(last[0]).__name__,
        "ends": [[end for _, end in one] for one in paths],
        "shared": len({node for node, _ in paths[0]} & {node for node, _ in paths[1]}),
        "both fit": exactly.fits(PREFIX * PAGE, paths[1]),
        "both fit unseen": exactly.fits(PREFIX * PAGE, unseen),
    }


def _tree(core: str) -> Any:
    """Stock's tree over no memory; None if this release has no such core."""
    from sglang.srt.environ import envs
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    try:
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_cache.tree_core_registry import (
            registered_tree_core_backends,
        )
    except ImportError:
        return None
    if core not in registered_tree_core_backends():
        return None
    import torch

    given: dict[str, Any] = {
        "disable": False,
        "req_to_token_pool": None,
        "token_to_kv_pool_allocator": SimpleNamespace(
            device=torch.device("cpu"),
            page_size=PAGE,
            get_kvcache=lambda: None,
            free=lambda *_args, **_kwargs: None,
            free_segment=lambda *_args, **_kwargs: None,
        ),
        "page_size": PAGE,
        "tree_components": (ComponentType.FULL,),
    }
    fields = {field.name for field in dataclasses.fields(CacheInitParams)}
    with envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND.override(core):
        return UnifiedRadixCache(CacheInitParams(**{k: v for k, v in given.items() if k in fields}))
