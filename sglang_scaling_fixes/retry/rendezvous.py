"""Where the two halves of a prefill/decode pair meet: the fields added to a request's body."""

from __future__ import annotations

import random
from typing import Any

from sglang_scaling_fixes.retry.request import BodyFacts
from sglang_scaling_fixes.retry.servers import Server

_ROOMS = random.SystemRandom()
LAST_ROOM = 2**63 - 2**16
"""SGLang adds a sample's number to a room, and rooms are signed 64-bit."""


def rendezvous(facts: BodyFacts, prefill: Server) -> dict[str, Any]:
    """The prefill's bootstrap address, and a fresh random room for each prompt."""
    count = facts.batch_size
    if count is None:
        return {
            "bootstrap_host": prefill.host,
            "bootstrap_port": prefill.bootstrap_port,
            "bootstrap_room": _room(),
        }
    return {
        "bootstrap_host": [prefill.host] * count,
        "bootstrap_port": [prefill.bootstrap_port] * count,
        "bootstrap_room": [_room() for _ in range(count)],
    }


def _room() -> int:
    return _ROOMS.randrange(LAST_ROOM)
