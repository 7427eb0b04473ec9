"""Stock's states of a KV transfer (`KVPoll`), as numbers: they are the same in every release.

A contract test reads them in every supported wheel. They stand here as numbers because a process
may need them before SGLang is imported, and because stock sends them as numbers.
"""

from __future__ import annotations

FAILED = 0
WAITING = 2
"""`KVPoll.WaitingForInput`."""
TRANSFERRING = 3
SUCCESS = 4
