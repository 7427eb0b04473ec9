"""How many tokens a release gives a pool of GLM-5.1, and what a token takes in the pool it builds.

The deployment is the one whose capacities were published: 8 ranks, packed fp8, 26.22 GiB for KV.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

from tests.layersplit.stock import fakes, pools

Building = Callable[[], AbstractContextManager[Any]]

LAYERS, RANKS, CONTEXT = 78, 8, 202_752
AVAILABLE = int(26.22 * 2**30)
SCRATCH_TOKENS = 262_144
SHARES = 4
"""Layers with one top-k, in a model that has such: index keys of one of them are enough."""


def server(**more: Any) -> Any:
    return fakes.server(
        layers=LAYERS,
        dtype="packed",
        context=CONTEXT,
        chunked_prefill_size=8192,
        **more,
    )


def counted(ranks: int, eagle_layers: int, **more: Any) -> dict[str, int]:
    """Tokens, and bytes of one, as the release's configurator counts them on each rank."""
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

    with fakes.parallel(0, ranks), fakes.settings():
        sizes = DefaultPoolConfigurator(server(eagle_layers=eagle_layers, split=ranks > 1, **more))
        found = sizes.calculate_pool_sizes(AVAILABLE, fakes.PAGE)
    return {"tokens": int(found.max_total_num_tokens), "bytes": int(sizes._cell_size)}


def allocated(
    ranks: int, eagle_layers: int, rank: int = 0, *, building: Building = nullcontext, **more: Any
) -> int:
    """Bytes that one token more takes in the pools of a rank, the draft's among them.

    `building`: entered around each pool that is built.
    """
    small, large = (2 * fakes.PAGE, 4 * fakes.PAGE)
    made = [(server(split=ranks > 1, **more), ranks)]
    if eagle_layers:
        made.append((fakes.server(layers=eagle_layers, dtype="packed", draft=True), ranks))
    with building():
        return sum(
            (
                pools.held(pools.build(of, rank, n, large))
                - pools.held(pools.build(of, rank, n, small))
            )
            // (large - small)
            for of, n in made
        )


def all_of(building: Building = nullcontext) -> dict[str, Any]:
    """`{"unsplit": ..., "split": ..., "unsplit draft": ..., "split draft": ...}`"""
    found = {}
    for name, ranks in (("unsplit", 1), ("split", RANKS)):
        for eagle_layers in (0, 1):
            found[name + " draft" * eagle_layers] = {
                **counted(ranks, eagle_layers),
                "allocated": allocated(ranks, eagle_layers, building=building),
            }
    return found


def attached() -> dict[str, Any]:
    from sglang_scaling_fixes.layersplit import scratch
    from sglang_scaling_fixes.layersplit.pool import LayerSplitDSATokenToKVPool as Split

    def least_scratch() -> AbstractContextManager[Any]:
        """Those of the size that is counted would take 400 MB for each pool that is built."""
        return mock.patch.object(Split, "scratch_size", scratch.Size(prefix=1, chunk=1))

    with (
        least_scratch(),
        mock.patch("sglang_scaling_fixes.layersplit.pool.Channel", pools.Channel),
    ):
        found = all_of(least_scratch)
        found["shared"] = {
            **counted(RANKS, 0, shares=SHARES),
            "allocated": [
                allocated(RANKS, 0, rank, building=least_scratch, shares=SHARES)
                for rank in range(RANKS)
            ],
        }
        sized = Split.scratch_size
        found["scratch"] = sized.pages if sized is not None else None
    return found


def refused() -> dict[str, Any]:
    """What a configurator says whose scratch is too small, and what becomes of the number in it."""
    from sglang_scaling_fixes.errors import ConfigError
    from sglang_scaling_fixes.layersplit.sizing import of_server

    def said(ask: Callable[[], Any]) -> str | None:
        try:
            ask()
        except ConfigError as error:
            return str(error)
        return None

    first = said(lambda: counted(RANKS, 0))
    number = int(re.findall(r"set it to (\d+)", first or "")[0])
    return {
        "said": first,
        "number": number,
        "with it": said(lambda: of_server(server(), number)),
        "with one less": said(lambda: of_server(server(), number - 1)),
    }
