"""What a lab server's processes are given when Python starts in them: stand-ins, faults, eyes.

`site/sitecustomize.py` calls `install` at interpreter start, so that it only registers import
hooks: the work happens when torch, sgl_kernel or a watched SGLang module is first imported.
The environment says what is wanted (`runtime`). Nothing here ever loads on a machine with a GPU.
"""

from __future__ import annotations

import gc
import os

from sglang_scaling_fixes import import_hooks
from sglang_scaling_fixes.lab.faults import failing, forgetful, lossy, slow
from sglang_scaling_fixes.lab.runtime import OBSERVE
from sglang_scaling_fixes.lab.standins import (
    context_parallel,
    cuda,
    dsa,
    gpu,
    hidden,
    idle,
    kernels,
)

_GC_THRESHOLD = (200_000, 20, 20)  # an eighth of a server's start-up is collecting imports


def install() -> None:
    """Register what this process is to have, or end it if it has a GPU."""
    gpu.refuse()
    gc.set_threshold(*_GC_THRESHOLD)
    hidden.install()
    kernels.install()
    import_hooks.after_import("torch", cuda.patch_torch)
    dsa.install()
    context_parallel.install()
    idle.install()
    forgetful.install()
    failing.install()
    slow.install()
    path = os.environ.get(OBSERVE)
    if path:
        from sglang_scaling_fixes.lab.observing import observer

        import_hooks.after_import(observer.MODULE, observer.attacher(path))
        if losses := lossy.count():
            import_hooks.after_import(lossy.MODULE, lossy.attacher(losses, observer.losses(path)))
