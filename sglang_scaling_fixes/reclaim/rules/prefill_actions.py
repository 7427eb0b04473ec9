"""What the prefill side decides, for its adapter to do."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_scaling_fixes.reclaim.rules.types import EndVerdict, Rank, Verdict


@dataclass(frozen=True)
class SendAck:
    """Action: send `AbortAck` to `reply_to`."""

    reply_to: str
    rank: Rank
    lease: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class SendEnded:
    """Action: tell `reply_to`, unasked, that prefill ended this lease's request without success."""

    reply_to: str
    rank: Rank
    lease: str
    verdict: EndVerdict
    reason: str


@dataclass(frozen=True)
class FailRoom:
    """Action: mark the room failed in stock (unless it succeeded), so that its request ends."""

    room: int
    reason: str


@dataclass(frozen=True)
class ForgetRoom:
    """Action: drop the destinations stock still has for this room, before new ones arrive."""

    room: int


Action = SendAck | SendEnded | FailRoom | ForgetRoom


def ends_room(*, known: bool, succeeded: bool) -> bool:
    """Is a `FailRoom` carried out?

    Only on a room stock knows: a failure recorded for no request would be found by the next one
    that uses the room. And not on one that has succeeded.
    """
    return known and not succeeded
