"""One attempt: one request to one worker, or to both halves of a pair.

Every way in which an attempt can fail is a `Failure`; any other answer of a worker is the
client's. Another attempt may follow while the client has no byte (`ClientReply.started`).
"""

from __future__ import annotations

import aiohttp

from sglang_scaling_fixes.retry.budget import Budget
from sglang_scaling_fixes.retry.pair import PairAttempt
from sglang_scaling_fixes.retry.relay import Relay
from sglang_scaling_fixes.retry.reply import ClientReply
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.routes import Pairs
from sglang_scaling_fixes.retry.settings import ProxySettings, Target
from sglang_scaling_fixes.retry.verdict import RETRYABLE
from sglang_scaling_fixes.retry.worker_client import WorkerCall, WorkerClient


class Attempts:
    """Makes attempts. All of them share `budget`."""

    def __init__(
        self, session: aiohttp.ClientSession, settings: ProxySettings, budget: Budget
    ) -> None:
        client = WorkerClient(session, settings)
        self._relay = Relay(client, settings)
        self._pairs = PairAttempt(client, self._relay, settings)
        self._budget = budget

    async def run(self, request: ClientRequest, target: Target, reply: ClientReply) -> None:
        """Returns when the client has its whole answer. Raises Failure."""
        lease = self._budget.lease()
        try:
            if target.pair is not None and request.route.pairs is Pairs.BOTH:
                await self._pairs.run(request, target.url, target.pair, reply, lease)
            else:
                call = WorkerCall(target.url, request.body, RETRYABLE)
                await self._relay.answer(request, call, reply, lease)
        finally:
            lease.resize(0)
