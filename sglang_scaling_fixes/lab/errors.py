"""The one exception of the lab."""

from __future__ import annotations


class LabError(Exception):
    """Something a user caused or can fix; the message is one line naming the remedy."""
