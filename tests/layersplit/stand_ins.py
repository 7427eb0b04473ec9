"""Modules of stock that LayerSplit imports late, as far as its decisions need them."""

from __future__ import annotations

import sys
import weakref
from types import ModuleType
from typing import Any

import pytest

from sglang_scaling_fixes.layersplit.metrics import PREFILL
from sglang_scaling_fixes.layersplit.scratch import Size
from sglang_scaling_fixes.layersplit.sharing import Sharing
from sglang_scaling_fixes.metrics import Metrics

PAGE = 64


class Pool:
    """Under the name of the split pool, so that it is taken for one."""

    current: Any = None
    page_size = PAGE
    device = "cpu"

    def __init__(self, size: Size) -> None:
        self.size_of_scratch = size
        self.stats = Metrics(PREFILL, None)
        self.sharing = Sharing()
        type(self).current = weakref.ref(self)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def pool_module(monkeypatch: pytest.MonkeyPatch, kind: type[Pool] = Pool) -> None:
    monkeypatch.setattr(Pool, "current", None)
    name = "sglang_scaling_fixes.layersplit.pool"
    module(monkeypatch, name, LayerSplitDSATokenToKVPool=kind)
