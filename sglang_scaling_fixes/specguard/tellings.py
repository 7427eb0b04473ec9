"""What servers tell each other and their own schedulers of an accusation: numbers, and a signature.

    accused      the request of this room was anomalous. `name`: under which it is withdrawn
    withdrawn    the accusation of this name was a false alarm

Between servers a telling is JSON, and with a secret a signed word stands in a header. To the
schedulers it goes as fields of stock's set_internal_state, which takes numbers only. With a secret
those are signed too, because every client that reaches a server's port may send that message. A
telling that is repeated changes nothing, so signatures among the schedulers need no end.

No I/O.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_scaling_fixes.vouch import FALSE_ALARM, vouch, vouched

FIELD = "sglang_scaling_fixes_kv_anomaly_"
"""The beginning of our fields' names in set_internal_state."""
ACCUSED = "kv_anomaly"
"""The kind of the word that signs an accusation."""
LIFE_S = 300
"""Seconds for which a word between servers is valid: more than their clocks differ by."""
_LARGEST_BODY = 4096
_BITS = 63


@dataclass(frozen=True)
class Telling:
    """`room` None: the accusation is withdrawn."""

    name: int
    room: int | None = None

    def body(self) -> bytes:
        return json.dumps(self._numbers()).encode()

    def word(self, secret: bytes, now: float) -> str:
        return vouch(secret, self._kind(), self._subject(), int(now) + LIFE_S)

    def is_signed(self, secret: bytes, word: str, now: float) -> bool:
        said = vouched(secret, word, now)
        return said is not None and (said.kind, said.subject) == (self._kind(), self._subject())

    def fields(self, secret: bytes | None) -> dict[str, int]:
        """For set_internal_state."""
        numbers = self._numbers()
        if secret is not None:
            numbers |= _signature(secret, self)
        return {FIELD + name: number for name, number in numbers.items()}

    def _kind(self) -> str:
        return FALSE_ALARM if self.room is None else ACCUSED

    def _subject(self) -> str:
        return f"{self.name}" if self.room is None else f"{self.name}-{self.room}"

    def _numbers(self) -> dict[str, int]:
        room = {} if self.room is None else {"room": self.room}
        return {"name": self.name, **room}


def number(name: str) -> int:
    """An accusation's name, as the number that it is among servers and schedulers."""
    raw = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "big") >> (64 - _BITS)


def read(body: bytes) -> Telling:
    """ValueError if it is none."""
    if len(body) > _LARGEST_BODY:
        raise ValueError(f"the body is longer than {_LARGEST_BODY} bytes")
    found = json.loads(body)
    if not isinstance(found, dict):
        raise ValueError("the body is not an object")
    return _telling(found)


def from_fields(fields: Mapping[str, Any], secret: bytes | None) -> Telling | None:
    """The telling in a set_internal_state request; None if that is another one.

    ValueError for one that is not ours although it says so, or is not signed.
    """
    found = {k.removeprefix(FIELD): v for k, v in fields.items() if k.startswith(FIELD)}
    if not found:
        return None
    telling = _telling(found)
    if secret is not None:
        signed = _signature(secret, telling)
        if not all(hmac.compare_digest(f"{found.get(k)}", f"{v}") for k, v in signed.items()):
            raise ValueError("the signature is missing or wrong")
    return telling


def _telling(found: Mapping[str, Any]) -> Telling:
    room = found.get("room")
    return Telling(_number(found.get("name")), None if room is None else _number(room))


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**_BITS:
        raise ValueError(f"{value!r} is not a whole number of {_BITS} bits")
    return value


def _signature(secret: bytes, telling: Telling) -> dict[str, int]:
    said = b"set_internal_state " + telling.body()
    raw = hmac.new(secret, said, hashlib.sha256).digest()
    return {f"mac_{n}": part >> 1 for n, part in enumerate(struct.unpack(">4Q", raw))}
