"""`hicache-ordering` and `layer-split` in one process, whichever comes first."""

from __future__ import annotations

import json
import os
import traceback
from typing import Any

from tests.layersplit.stock import sizes

HICACHE, SPLIT = "hicache-ordering", "layer-split"
ORDERS = ((HICACHE, SPLIT), (SPLIT, HICACHE))
TOO_FEW_TOKENS = sizes.CONTEXT
"""Of a scratch: one context, and nothing for its chunk."""


def arm(order: tuple[str, ...], scratch_tokens: int) -> dict[str, Any]:
    """Arm both one after the other, then both again as a server does, and look at both."""
    from sglang_scaling_fixes import fixes, loading_probe
    from sglang_scaling_fixes.config import Config
    from sglang_scaling_fixes.layersplit import attach, probe
    from sglang_scaling_fixes.ordering import _parts

    config = Config(fixes=order, layer_split_scratch=scratch_tokens)
    named = {fix.name: fix for fix in fixes.FIXES}
    proofs = {name: named[name].arm(config).proof for name in order}
    states = {status.name: status.as_dict() for status in fixes.arm_all(config)}
    # As `doctor` asks whether anybody has hooked our places since.
    loading_probe._hooked_again(list(states.values()))
    probe.run()
    return {
        "proofs": proofs,
        "states": {name: states[name] for name in order},
        "ours is built": attach.in_place(),
        "waits": {part.name: part.holds() for part in _parts() if part.there()},
    }


def apart() -> dict[str, Any]:
    """The other order, in a copy of this process; and a scratch that is too small there."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            found = arm(ORDERS[1], TOO_FEW_TOKENS)
            found["refused"] = sizes.refused()
        except BaseException:
            found = {"error": traceback.format_exc()}
        with os.fdopen(writes, "w") as pipe:
            pipe.write(json.dumps(found))
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    found = json.loads(said)
    if "error" in found:
        raise RuntimeError(found["error"])
    return dict(found)
