"""Words that both ledgers and the messages use."""

from __future__ import annotations

import enum
from typing import Literal

Rank = str
"""A prefill rank as decode addresses it: `"ip:port"` of its ZMQ endpoint."""

Verdict = Literal["drained", "writing", "poisoned", "unknown"]
"""What a prefill process can say of a lease, see `messages.AbortAck`."""

EndVerdict = Literal["drained", "poisoned"]
"""What it can say of one whose destinations it has received."""


def lease_parts(lease: str) -> tuple[str, int]:
    """The decode process and the number in a lease, which grows in the order of exposing.

    As `DecodeLedger.expose` names them (tested). Anything else is a process of its own.
    """
    process, _, number = lease.rpartition("-")
    return (process, int(number)) if number.isascii() and number.isdigit() else (lease, 0)


class Proof(enum.StrEnum):
    """Why a writer can no longer write. See `decode_ledger`."""

    NEVER_SENT = "P1"
    DRAINED = "P2"
    LANDED = "P3"
    FENCED = "P4"


class LedgerError(AssertionError):
    """An event arrived that a table does not allow, or a ledger contradicts itself: a bug."""
