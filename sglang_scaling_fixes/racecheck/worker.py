"""Runs the hazards in a process of its own and prints one JSON line.

    python -m sglang_scaling_fixes.racecheck.worker {on|off} [HAZARD ...]

The release is whatever `import sglang` finds. Exit status 0 whatever the verdicts are: they
are in the output.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
import traceback
from typing import Any

from sglang_scaling_fixes.racecheck import MARK, kv_stack, recorder, recording_cuda
from sglang_scaling_fixes.racecheck.lookup import Moved, NotThere

_MODULES = (
    "sglang.srt.mem_cache.memory_pool",
    "sglang.srt.mem_cache.memory_pool_host",
    "sglang.srt.managers.cache_controller",
    "sglang.srt.managers.scheduler",
    "sglang.srt.mem_cache.dsa_cache_layer_split",
    "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler",
)


def main(arguments: list[str]) -> int:
    recording_cuda.install()
    for module in _MODULES:
        # A hazard that needs what is missing says so itself.
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    recording_cuda.replace_kernels()
    try:
        fixes = _arm() if arguments[0] == "on" else "not asked for"
    except Exception as error:
        return _say({"error": f"the fixes cannot be attached: {error}"})
    from sglang_scaling_fixes.racecheck.hazards import HAZARDS

    named = arguments[1:]
    played = [play(hazard) for hazard in HAZARDS if not named or hazard.name in named]
    return _say({"sglang": _origin(), "proof": fixes, "hazards": played})


def _arm() -> str:
    """Attach the fixes where there is a plugin loader; older releases come patched."""
    from sglang_scaling_fixes.config import Config
    from sglang_scaling_fixes.early_send_ordering import FIX as EARLY_SEND_ORDERING
    from sglang_scaling_fixes.layersplit import points
    from sglang_scaling_fixes.ordering import FIX as HICACHE_ORDERING
    from sglang_scaling_fixes.racecheck import split_pool

    if importlib.util.find_spec("sglang.srt.plugins") is None:
        return "patch set"
    kv_stack.settings()
    both = (HICACHE_ORDERING, EARLY_SEND_ORDERING)
    proofs = {fix.name: fix.arm(Config()).proof for fix in both}
    proofs[points.NAME] = split_pool.arm()  # last: the others attach to stock's own split
    return "; ".join(f"{name}: {proof}" for name, proof in proofs.items())


def _origin() -> str:
    spec = importlib.util.find_spec("sglang")
    return (spec.origin if spec is not None else None) or ""


def _say(report: dict[str, Any]) -> int:
    print(MARK + json.dumps(report), flush=True)
    return 0


def play(hazard: Any) -> dict[str, Any]:
    """One hazard's verdict. A class that moved fails this hazard only."""
    races: dict[str, Any] = {}
    accesses = 0
    try:
        for scenario in hazard.plays():
            with recorder.recording() as history:
                kv_stack.settings()
                scenario(history)
            accesses += history.accesses
            for race in history.races:
                races.setdefault(race.region, race.as_dict())
        if not accesses:
            raise Moved("nothing that was watched was touched")
    except NotThere as error:
        return {"name": hazard.name, "verdict": "n/a", "races": 0, "reason": str(error)}
    except Moved as error:
        return {"name": hazard.name, "verdict": "n/a", "races": 0, "broken": str(error)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        return {"name": hazard.name, "verdict": "n/a", "races": 0, "broken": text}
    return {
        "name": hazard.name,
        "verdict": "race" if races else "ordered",
        "races": len(races),
        "found": list(races.values()),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
