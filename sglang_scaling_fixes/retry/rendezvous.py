"""Where the two halves of a prefill/decode pair meet: the fields added to a request's body."""

from __future__ import annotations

import random
from typing import Any

import orjson

from sglang_scaling_fixes.retry.request import BodyFacts
from sglang_scaling_fixes.retry.settings import Pair

_ROOMS = random.SystemRandom()
LAST_ROOM = 2**63 - 2**16
"""SGLang adds a sample's number to a room, and rooms are signed 64-bit."""


def with_rendezvous(body: bytes, facts: BodyFacts, pair: Pair) -> bytes:
    """`body` with the pair's bootstrap address and a fresh random room for each prompt.

    `facts` are those of `body`. The fields are appended; the client's own bytes before them
    stay as they are. If the client sent the same fields, ours count: JSON readers take the
    last value of a name.
    """
    count = facts.batch_size
    fields: dict[str, Any] = {
        "bootstrap_host": pair.host,
        "bootstrap_port": pair.port,
        "bootstrap_room": _room(),
    }
    if count is not None:
        fields = {
            "bootstrap_host": [pair.host] * count,
            "bootstrap_port": [pair.port] * count,
            "bootstrap_room": [_room() for _ in range(count)],
        }
    head = body.rstrip()[:-1]
    return head + (b"" if facts.empty else b",") + orjson.dumps(fields)[1:]


def _room() -> int:
    return _ROOMS.randrange(LAST_ROOM)
