"""One attempt: one request to one worker, or to both halves of a pair.

Every way in which an attempt can fail is a `Failure`; any other answer of a worker is the
client's. Another attempt may follow while the client has no byte (`ClientReply.started`).
"""

from __future__ import annotations

from typing import Any

from sglang_scaling_fixes.retry.budget import Budget
from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.pair import PairAttempt
from sglang_scaling_fixes.retry.relay import Relay
from sglang_scaling_fixes.retry.rendezvous import rendezvous
from sglang_scaling_fixes.retry.reply import ClientReply
from sglang_scaling_fixes.retry.request import ClientRequest, with_fields, without_routing
from sglang_scaling_fixes.retry.settings import ProxySettings
from sglang_scaling_fixes.retry.trail import NotResumable
from sglang_scaling_fixes.retry.worker_client import Sessions, WorkerCall, WorkerClient
from sglang_scaling_fixes.retry.workers import Team


class Attempts:
    """Makes attempts. All of them share `budget`."""

    def __init__(self, sessions: Sessions, settings: ProxySettings, budget: Budget) -> None:
        client = WorkerClient(sessions, settings)
        self._relay = Relay(client, settings)
        self._pairs = PairAttempt(client, self._relay, settings)
        self._settings = settings
        self._budget = budget

    async def run(
        self, request: ClientRequest, team: Team, reply: ClientReply, fields: dict[str, Any]
    ) -> None:
        """Returns when the client has its whole answer. Raises Failure.

        `fields` are added to the body, if it is a JSON object.
        """
        while True:
            more = reply.so_far.fields() if reply.so_far is not None else {}
            try:
                await self._once(request, team, reply, {**fields, **more})
                return
            except NotResumable:
                pass  # once: then it is off

    async def _once(
        self, request: ClientRequest, team: Team, reply: ClientReply, fields: dict[str, Any]
    ) -> None:
        body, facts = request.body, request.facts
        if facts is not None:
            added = {**without_routing(facts), **fields}
            if team.prefill is not None:
                added.update(rendezvous(facts, team.prefill.server))
            body = with_fields(body, facts, added)

        def call(url: str) -> WorkerCall:
            return WorkerCall(url, body, self._settings.retry_status)

        lease = self._budget.lease()
        if reply.so_far is not None and not lease.resize(reply.so_far.size):
            raise Failure(Reason.NO_MEMORY, "the proxy has no memory left to hold more back")
        try:
            answering = call(team.answering.server.url)
            if team.prefill is None:
                await self._relay.answer(request, answering, reply, lease)
            else:
                prefill = call(team.prefill.server.url)
                await self._pairs.run(request, prefill, answering, reply, lease)
        finally:
            lease.resize(0)
