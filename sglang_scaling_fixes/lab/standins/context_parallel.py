"""What several ranks of one server (tensor or context parallel) need on a CPU.

gloo stands in for NCCL: stock's groups have a torch.distributed group beside their NCCL
communicator and use it where there is none, so no collective is replaced. Loaded only for
a model that has DSA.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from sglang_scaling_fixes import import_hooks
from sglang_scaling_fixes.lab.runtime import DSA

_RANKS = 8  # as many as stock's DSA context parallelism allows


def install() -> None:
    if os.environ.get(DSA) != "1":
        return
    # Stock wants a NUMA node per rank, or each rank's cores by name. Without AMX it then
    # binds nothing, so that the ranks share all cores whatever is named here.
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(["0"] * _RANKS))
    import_hooks.after_import("sglang.srt.distributed.parallel_state", _without_nccl)


def _without_nccl(module: Any) -> None:
    """The NCCL library comes with torch, so that stock believes it usable, but wants a GPU."""
    stock = module.init_model_parallel_group

    @functools.wraps(stock)
    def init_model_parallel_group(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **{**kwargs, "use_pynccl": False})

    module.init_model_parallel_group = init_model_parallel_group
