"""Packages that only a GPU can use, made invisible, as SGLang's own CPU installs lack them.

Besides being of no use they take seconds of every process's start-up.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PACKAGES = frozenset({"cuda", "cutlass", "deep_gemm", "flash_mla", "flashinfer", "quack"})


class _Filtered:
    """A meta path finder that does not find `PACKAGES`; otherwise the one it wraps."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in PACKAGES:
            return None
        found: importlib.machinery.ModuleSpec | None = self._inner.find_spec(name, path, target)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def install() -> None:
    """Hide the packages from every finder that is in place now."""
    for index, finder in enumerate(sys.meta_path):
        if finder is importlib.machinery.PathFinder:
            sys.meta_path[index] = _Filtered(finder)
