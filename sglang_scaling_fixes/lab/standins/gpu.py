"""Refuses to go on beside a GPU: stand-ins there would silently fake a real device."""

from __future__ import annotations

import ctypes
import glob
import os
import sys


def present() -> str | None:
    """What shows that this machine has a GPU (a device file or a working driver), or None."""
    devices = sorted(glob.glob("/dev/nvidia[0-9]*"))
    if devices:
        return devices[0]
    # Loading the driver costs milliseconds, and a parent of this process already did it.
    if os.environ.get("SGLANG_SCALING_FIXES_LAB_NO_GPU") == "1":
        return None
    try:
        status = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except (OSError, AttributeError):
        return None
    return "libcuda.so.1 (cuInit succeeds)" if status == 0 else None


def refuse() -> None:
    """End this process with status 2 and one line if a GPU is present."""
    found = present()
    if found is None:
        os.environ["SGLANG_SCALING_FIXES_LAB_NO_GPU"] = "1"
        return
    sys.stderr.write(
        f"sglang-scaling-fixes lab: a GPU is present ({found}); the CPU stand-ins never load"
        " beside one. Unset SGLANG_SCALING_FIXES_LAB to start SGLang normally.\n"
    )
    sys.stderr.flush()
    os._exit(2)
