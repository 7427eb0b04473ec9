"""What a CPU lacks to run a stock SGLang, supplied inside the server's processes.

`install` runs at interpreter start and therefore only registers import hooks: the
work happens when torch, sgl_kernel or a watched SGLang module is first imported.
Nothing here ever loads on a machine with a GPU.
"""

from __future__ import annotations

import gc
import os

from sglang_scaling_fixes.lab.runtime import OBSERVE
from sglang_scaling_fixes.lab.standins import (
    context_parallel,
    cuda,
    dsa,
    forgetful,
    gpu,
    hidden,
    hooks,
    kernels,
    lossy,
)

_GC_THRESHOLD = (200_000, 20, 20)  # an eighth of a server's start-up is collecting imports


def install() -> None:
    """Register the stand-ins in this process, or end it if it has a GPU."""
    gpu.refuse()
    gc.set_threshold(*_GC_THRESHOLD)
    hidden.install()
    kernels.install()
    hooks.after_import("torch", cuda.patch_torch)
    dsa.install()
    context_parallel.install()
    forgetful.install()
    path = os.environ.get(OBSERVE)
    if path:
        from sglang_scaling_fixes.lab import observer

        hooks.after_import(observer.MODULE, observer.attacher(path))
        if losses := lossy.count():
            hooks.after_import(lossy.MODULE, lossy.attacher(losses, observer.losses(path)))
