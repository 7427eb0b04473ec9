"""Carries the lab's CPU stand-ins and faults into every process of a lab server.

Python imports this module at start-up because the lab puts this folder first on
PYTHONPATH; spawned children inherit both variables.  Without
SGLANG_SCALING_FIXES_LAB=1 nothing happens except that a sitecustomize which this
one shadows still runs.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _run_shadowed() -> None:
    others = [p for p in sys.path if p and Path(p).resolve() != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _install_standins() -> None:
    root = str(_HERE.parents[2])
    if importlib.util.find_spec("sglang_scaling_fixes") is None:
        sys.path.append(root)
    from sglang_scaling_fixes.lab import boot

    boot.install()


if os.environ.get("SGLANG_SCALING_FIXES_LAB") == "1":
    _install_standins()
_run_shadowed()
