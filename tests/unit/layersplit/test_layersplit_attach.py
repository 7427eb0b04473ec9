"""Our pool in the place of stock's, beside the fix that orders stock's."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_scaling_fixes import attach as places
from sglang_scaling_fixes.attach import require_in_place
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.layersplit import (
    admission,
    attach,
    index_writes,
    metadata,
    points,
    sizing,
)
from sglang_scaling_fixes.ordering import loads
from tests.layersplit.stand_ins import Pool, module, pool_module


class Stocks:
    def prefetch_kv_buffer(self, layer_id: int, *counter: Any) -> None:
        """Broadcasts a layer."""


class Ours(Pool):
    def prefetch_kv_buffer(self, layer_id: int, *counter: Any) -> None:
        """Sends what is due."""


def test_the_ordering_of_stocks_broadcasts_ends_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor would say that something else had taken its place."""
    monkeypatch.setattr(places, "_replaced", {})
    kind: Any = type("Stocks", (), dict(vars(Stocks)))
    stock = module(monkeypatch, points.MODULE, LayerSplitDSATokenToKVPool=kind)
    pool_module(monkeypatch, Ours)
    for part in (sizing, index_writes, admission, metadata):
        monkeypatch.setattr(part, "attach", lambda *_: None)
    loads.attach_prefetch()
    require_in_place("hicache-ordering", "prefill")
    assert not attach.in_place()
    attach.attach(Config())
    assert attach.in_place() and stock.LayerSplitDSATokenToKVPool is Ours
    require_in_place("hicache-ordering", "prefill")
    assert kind.prefetch_kv_buffer is Stocks.prefetch_kv_buffer
