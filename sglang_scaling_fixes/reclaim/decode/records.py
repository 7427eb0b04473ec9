"""What the parts of the decode side share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from sglang_scaling_fixes.metrics import Metrics
from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger
from sglang_scaling_fixes.reclaim.rules.stock_aborts import StockAborts


@dataclass(frozen=True)
class Records:
    """The ledger, the lock under which it is changed, and the counters beside it."""

    ledger: DecodeLedger
    metrics: Metrics
    stock_aborts: StockAborts | None
    """None where stock's own acknowledgements are not believed."""
    lock: threading.Lock = field(default_factory=threading.Lock)
