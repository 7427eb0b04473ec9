"""An `sgl_kernel` whose every name exists and, but for speculation.py's, raises when called.

The real package loads CUDA code on import.  On the path the lab runs, SGLang only
imports names from it; a name that is called after all says so.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from sglang_scaling_fixes.lab.standins import speculation

_PACKAGE = "sgl_kernel"


class _Absent:
    """A kernel in name only; its attributes (`op.default`) are as absent as itself."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __call__(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"{self.__name__} has no CPU stand-in in the lab")

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in speculation.FUNCTIONS:
            return speculation.FUNCTIONS[name]
        return _Absent(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _PACKAGE and not name.startswith(_PACKAGE + "."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to execute: names appear when asked for."""


def install() -> None:
    """Answer every import of sgl_kernel and its submodules from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
