"""What the retry proxy may tell a server, and no client can: words signed with a shared secret.

A word is a `kind`, a `subject` and an end:

    ssf.<kind>.<subject>.<expires>.<mac>     mac = HMAC-SHA256(secret, what stands before it)

It travels where stock lets a text through, such as a request's `extra_key`. So it holds only
letters, digits, `_`, `-` and dots. A client does not see the words of others: they go from the
proxy to a server. A word that is repeated says the same thing again until it expires, so its
subject must be one of which that is true.

No I/O apart from `read_secret`, and no clock: times are seconds since the epoch.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from sglang_scaling_fixes.errors import ConfigError

PREFIX = "ssf"
FRESH = "fresh"
"""Compute this request's prompt anew: read no KV that was there before. Subject: a nonce."""
UNGUARDED = "unguarded"
"""As FRESH, and do not end the request for its text: two servers have called it an anomaly."""
FALSE_ALARM = "false_alarm"
"""Withdraw a suspicion. Subject: its name, which the error that it ended with states."""

HEADER = "x-sglang-scaling-fixes-word"
"""Where a word stands in a request between servers."""
FALSE_ALARM_PATH = "/sglang_scaling_fixes/false_alarm"
"""On a server's own port: a POST with a word of that kind."""

MIN_SECRET_BYTES = 16
_MAC_CHARS = 32
_SUBJECT = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Word:
    kind: str
    subject: str


def read_secret(flag: str, path: str) -> bytes:
    """The secret in a file, without the line end. Raises ConfigError, which names `flag`."""
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"{flag} {path}: cannot be read ({error.strerror or error}); give a readable file"
        ) from None
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{flag} {path}: {len(secret)} bytes are too short for a secret; write at least "
            f"{MIN_SECRET_BYTES}, such as the output of: openssl rand -hex 32"
        )
    return secret


def vouch(secret: bytes, kind: str, subject: str, expires: int) -> str:
    """The signed word. Raises ValueError for a subject that cannot stand in one."""
    if not _SUBJECT.fullmatch(subject):
        raise ValueError(f"{subject!r} cannot be the subject of a word")
    said = f"{PREFIX}.{kind}.{subject}.{expires}"
    return f"{said}.{_mac(secret, said)}"


def vouched(secret: bytes, text: str, now: float) -> Word | None:
    """The word, if it is signed with this secret and has not expired."""
    said, _, mac = text.rpartition(".")
    parts = said.split(".")
    if len(parts) != 4 or parts[0] != PREFIX or not parts[3].isdecimal():
        return None
    if not hmac.compare_digest(mac.encode(), _mac(secret, said).encode()):
        return None
    return Word(parts[1], parts[2]) if now <= int(parts[3]) else None


def _mac(secret: bytes, said: str) -> str:
    return hmac.new(secret, said.encode(), hashlib.sha256).hexdigest()[:_MAC_CHARS]
