"""The kinds of events that a decode server's observer writes, one JSON line each."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """The value of an event's `event`."""

    EXPOSED = "exposed"  # the request's destinations have been sent to a prefill server
    ADMITTED = "admitted"  # stock has accepted the transfer and will decode from these slots
    FINAL = "final"  # the request gives its memory up; contents are still those it owned
    POOL = "pool"  # free token and metadata slots, when they have changed
    LOST = "lost"  # a message of decode that the lab has dropped
