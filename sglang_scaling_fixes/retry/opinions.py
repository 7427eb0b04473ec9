"""A second opinion on an anomaly: an anomaly of the text comes back on another worker.

A guard sees only how the drafts of a generation fare. A prompt that asks for a repetition looks
like a corrupted KV cache. The two differ in one thing: a corrupted cache is one worker's.

    first anomaly     the next worker computes the prompt afresh: what it shares with the first,
                      such as a storage tier, is not read
    the second agrees it is the text. With a secret that the workers know, the next one is told
                      not to judge it, the client gets its answer, and both suspicions are
                      withdrawn. Without one the client is told not to ask again

No I/O and no clock.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from sglang_scaling_fixes import vouch
from sglang_scaling_fixes.retry.failure import Failure
from sglang_scaling_fixes.retry.workers import Team

LIFE_S = 600
"""How long a word holds: longer than a request waits for its prefill."""
AGREED = 2
WITH_NAMESPACE = frozenset(
    {"/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/invocations"}
)
"""The paths whose requests have an `extra_key`. On the others there is no second opinion."""


@dataclass
class Opinions:
    """Those on one request. `secret` is b"" if none is shared with the workers."""

    secret: bytes
    path: str
    anomalies: list[tuple[Team, Failure]] = field(default_factory=list)

    def note(self, team: Team, anomaly: Failure) -> None:
        self.anomalies.append((team, anomaly))

    @property
    def agreed(self) -> bool:
        """Whether two workers say the same of the text."""
        rules = [f.suspicion.rule if f.suspicion else "" for _, f in self.anomalies]
        return any(rules.count(rule) >= AGREED for rule in rules)

    @property
    def settled(self) -> bool:
        """Whether to ask nobody else: they agree, and no worker would take our word for it."""
        known = self.path in WITH_NAMESPACE
        return self.agreed and not (known and self.secret)

    def fields(self, now: float) -> dict[str, Any]:
        """What to add to the body of the next attempt. `now`: seconds since the epoch."""
        if not self.anomalies or self.path not in WITH_NAMESPACE:
            return {}
        kind = vouch.UNGUARDED if self.agreed and self.secret else vouch.FRESH
        # Without a secret nobody can check the word. Its nonce makes a namespace all the same.
        secret = self.secret or secrets.token_bytes(vouch.MIN_SECRET_BYTES)
        return {"extra_key": vouch.vouch(secret, kind, secrets.token_hex(8), int(now) + LIFE_S)}

    def to_withdraw(self, now: float) -> list[tuple[str, str]]:
        """Servers that accused a sound request, each with the word that takes it back."""
        if not self.agreed or not self.secret:
            return []
        return [
            (
                team.answering.server.url,
                vouch.vouch(self.secret, vouch.FALSE_ALARM, said.name, int(now) + LIFE_S),
            )
            for team, failure in self.anomalies
            if (said := failure.suspicion) is not None
        ]
