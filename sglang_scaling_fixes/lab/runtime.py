"""The environment variables that make a stock SGLang process run on this CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

STANDINS = "SGLANG_SCALING_FIXES_LAB"
OBSERVE = "SGLANG_SCALING_FIXES_LAB_OBSERVE"
LOSE = "SGLANG_SCALING_FIXES_LAB_LOSE"
DSA = "SGLANG_SCALING_FIXES_LAB_DSA"
FORGET = "SGLANG_SCALING_FIXES_LAB_FORGET"
CORRUPT = "SGLANG_SCALING_FIXES_LAB_CORRUPT"
FAIL = "SGLANG_SCALING_FIXES_LAB_FAIL"
SLOW = "SGLANG_SCALING_FIXES_LAB_SLOW_BROADCAST"

_SITE = Path(__file__).parent / "site"
# Proxies: lab servers only talk to each other.  Bytecode: without it each of a
# server's three processes compiles all of SGLang's imports again (10 s each).
_DROPPED = ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")


def cpu_env(additions: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a lab server, with the stand-ins first on its path."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _DROPPED and not name.lower().endswith("_proxy")
    }
    path = [str(_SITE), *filter(None, [inherited.get("PYTHONPATH")])]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(path),
        STANDINS: "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "MC_FORCE_TCP": "1",
        "MOONCAKE_PROTOCOL": "tcp",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Not compiled: for a CPU torch compiles with GCC, some 20 s for one function's first call.
        "TORCHDYNAMO_DISABLE": "1",
        **additions,
    }
