"""One release, one process: stock first, then ours attached; one line of JSON at the end."""

from __future__ import annotations

import json
from typing import Any

MARK = "layer split:"


def main() -> None:
    import sglang

    from tests.layersplit.stock import orders, pools, sizes, stores, tables, trees

    found: dict[str, Any] = {"file": sglang.__file__}
    found["stock"] = {"pools": pools.stock(), "sizes": sizes.all_of()}
    # In a process of its own, since only one order can be had in each.
    found["other order"] = orders.apart()
    found["order"] = orders.arm(orders.ORDERS[0], sizes.SCRATCH_TOKENS)
    found["pools"] = pools.attached()
    found["sizes"] = sizes.attached()
    found["tables"] = tables.attached()
    found["stores"] = stores.attached()
    found["trees"] = trees.all_of()
    print(MARK + json.dumps(found), flush=True)
