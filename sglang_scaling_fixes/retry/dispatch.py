"""One request, asked of one worker after another until one of them answers."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field, replace

from sglang_scaling_fixes.retry.attempt import Attempts
from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.opinions import Opinions
from sglang_scaling_fixes.retry.refusal import RETRY_AFTER_S, Refusal, send_failure
from sglang_scaling_fixes.retry.reply import ClientReply
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.retries import LostRequests, RetryBudget, wait_seconds
from sglang_scaling_fixes.retry.routes import Pairs
from sglang_scaling_fixes.retry.servers import Role
from sglang_scaling_fixes.retry.settings import ProxySettings
from sglang_scaling_fixes.retry.telemetry import Telemetry, log
from sglang_scaling_fixes.retry.trail import continuation
from sglang_scaling_fixes.retry.withdrawal import Withdrawals
from sglang_scaling_fixes.retry.workers import Serves, Team, Tried, Worker, Workers

MOST_LOST = 2
"""So many workers may lose their connection over one request, and no third is asked."""


@dataclass
class _Progress:
    """How one request has fared so far."""

    opinions: Opinions
    tried: Tried = field(default_factory=Tried)
    asked: list[Team] = field(default_factory=list)
    """One for each attempt. `tried` forgets them once no worker is at fault."""
    migrations: int = 0
    """Attempts that went on with a stream of which the client has the beginning."""
    failure: Failure | None = None
    broke: list[Worker] = field(default_factory=list)
    """Workers that broke, and are convicted if another one serves the request."""
    lost: int = 0
    """Attempts that a worker had, and no answer came."""
    crashed: int = 0
    """Attempts that ended with 500, which may be the request's own doing."""

    @property
    def attempts(self) -> int:
        return len(self.asked)


class Dispatcher:
    def __init__(
        self,
        settings: ProxySettings,
        workers: Workers,
        attempts: Attempts,
        telemetry: Telemetry,
        withdrawals: Withdrawals,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._attempts = attempts
        self._telemetry = telemetry
        self._withdrawals = withdrawals
        self._lost = LostRequests(settings.refuse_seconds)
        self._budget = RetryBudget()
        self._chance = random.Random()

    async def run(self, request: ClientRequest, reply: ClientReply, requests: int) -> str:
        """The outcome, once the client has all it will get. Raises Refusal.

        `requests`: how many are in flight. The outcome is `ok`, `recovered` (after a retry),
        `rejected` (the worker says that the request is wrong), `failed` (an error before the
        first byte) or `broken` (after it).
        """
        self._telemetry.time_first_byte(reply)
        self._refuse_if_lost(request)
        serves = self._who_serves(request)
        progress = _Progress(Opinions(self._settings.secret, request.path))
        if self._settings.migrations:
            trail, hold = self._settings.trail_tokens, self._settings.hold_tokens
            reply.so_far = continuation(request, trail, hold)
        while progress.attempts - progress.migrations < self._settings.attempts:
            team = self._workers.pick(
                progress.tried, time.monotonic(), serves=serves, key=request.key
            )
            if team is None:
                break
            if progress.failure is None:
                ended = await self._try(request, team, reply, progress)
            else:
                ended = await self._retry(request, team, reply, progress, requests)
            if ended:
                break
        if progress.failure is None and progress.attempts:
            outcome = _outcome(reply)
            return "recovered" if outcome == "ok" and progress.attempts > 1 else outcome
        return await self._give_up(request, reply, progress)

    async def _retry(
        self,
        request: ClientRequest,
        team: Team,
        reply: ClientReply,
        progress: _Progress,
        requests: int,
    ) -> bool:
        """Whether to ask nobody else. What a worker refuses is asked again within the budget."""
        assert progress.failure is not None
        refused = progress.failure.reason is Reason.UNAVAILABLE
        if refused and not self._budget.take(requests):
            self._telemetry.retry_refused()
            return True
        self._report(request, reply, progress, "retried")
        if not refused:
            return await self._try(request, team, reply, progress)
        try:
            await asyncio.sleep(wait_seconds(progress.attempts, self._chance))
            return await self._try(request, team, reply, progress)
        finally:
            self._budget.give_back()

    async def _try(
        self, request: ClientRequest, team: Team, reply: ClientReply, progress: _Progress
    ) -> bool:
        """One attempt, and what it says about its workers. Whether to ask nobody else."""
        progress.asked.append(team)
        progress.tried.teams.append(team)
        for worker in team.members:
            worker.in_flight += 1
        fields = progress.opinions.fields(time.time())
        try:
            await self._attempts.run(request, team, reply, fields)
        except Exception as error:
            failure = error if isinstance(error, Failure) else _unexpected(error)
            self._blame(team, failure, progress)
            progress.failure = failure
            return self._is_over(request, reply, progress)
        finally:
            for worker in team.members:
                worker.in_flight -= 1
        self._praise(team, reply, progress)
        return True

    def _praise(self, team: Team, reply: ClientReply, progress: _Progress) -> None:
        for worker in team.members:
            self._workers.served(worker)
        if progress.failure is not None:
            self._telemetry.recovered(streamed=reply.stream is not None)
            # Now it is known that the request does not break whoever gets it.
            for worker in progress.broke:
                if self._workers.convicted(worker, time.monotonic()):
                    log(event="down", worker=worker.name, reason="broke what others served")
            if words := progress.opinions.to_withdraw(time.time()):
                self._telemetry.false_alarm()
                self._withdrawals.send(words)
        progress.failure = None

    def _blame(self, team: Team, failure: Failure, progress: _Progress) -> None:
        now = time.monotonic()
        longest = self._settings.avoid_seconds
        culprits = _culprits(team, failure)
        progress.tried.blamed.update(culprits)
        progress.lost += failure.lost
        progress.crashed += failure.status == 500
        if failure.reason is Reason.ANOMALY:
            self._telemetry.anomaly(team.answering)
            progress.opinions.note(team, failure)
            if progress.opinions.agreed:
                progress.tried = Tried()  # no worker is at fault: each may be asked again
        for worker in culprits or team.members:
            if failure.reason is Reason.ANOMALY:
                self._workers.avoid(worker, now + longest)
            elif failure.reason is Reason.UNAVAILABLE:
                # A worker that refuses everything has the fewest requests in flight. Without
                # this it would always be picked next.
                asked = failure.retry_after or RETRY_AFTER_S
                self._workers.avoid(worker, now + min(longest, asked))
            elif failure.broke:
                self._workers.broke(worker, now)
                progress.broke.append(worker)
        if progress.opinions.agreed or progress.crashed >= MOST_LOST:
            for worker in {w for t in progress.asked for w in t.members}:
                self._workers.acquitted(worker)

    def _is_over(self, request: ClientRequest, reply: ClientReply, progress: _Progress) -> bool:
        """Whether to ask nobody else. If not, the answer so far is one to go on with."""
        failure, so_far = progress.failure, reply.so_far
        assert failure is not None
        if not failure.elsewhere or self._hopeless(request, progress):
            return True
        sound = so_far is not None and so_far.go_back(failure)
        if not reply.started:
            if so_far is not None and not sound:
                so_far.forget()
            return False
        # Two guards that agree have spoiled nothing: the answer goes on unguarded.
        most = self._settings.migrations + progress.opinions.agreed
        if not sound or progress.migrations >= most:
            return True
        progress.migrations += 1
        self._telemetry.migrated(failure)
        return False

    def _hopeless(self, request: ClientRequest, progress: _Progress) -> bool:
        """Whether the request itself is what fails."""
        failure = progress.failure
        assert failure is not None
        if progress.opinions.settled:
            progress.failure = replace(failure, final=True)
            return True
        if progress.lost < MOST_LOST and progress.crashed < MOST_LOST:
            return False
        if failure.lost:
            self._lost.add(request.path, request.body, time.monotonic())
            after = round(self._settings.refuse_seconds)
            progress.failure = replace(failure, final=True, retry_after=after)
        return True

    def _refuse_if_lost(self, request: ClientRequest) -> None:
        left = self._lost.refused_for(request.path, request.body, time.monotonic())
        if left:
            text = f"this request broke {MOST_LOST} workers a moment ago; it is not tried again yet"
            after = max(RETRY_AFTER_S, round(left))
            raise Refusal(503, "worker_lost", text, after, retryable=True, final=True)

    def _who_serves(self, request: ClientRequest) -> Serves:
        """Raises Refusal if nobody in the list can."""
        if request.route.pairs is Pairs.DECODE:
            return Serves.ALONE
        refusal = _refusal_by_pairs(request)
        if refusal is None:
            return Serves.ALL
        if all(worker.server.role is not Role.WORKER for worker in self._workers.all):
            raise refusal
        return Serves.WORKERS

    async def _give_up(
        self, request: ClientRequest, reply: ClientReply, progress: _Progress
    ) -> str:
        if progress.failure is not None:
            self._report(request, reply, progress, "told")
        else:
            log(event="no_worker", request=request.name)
        broken = reply.started
        failure, so_far = progress.failure, reply.so_far
        if failure is not None and broken and so_far is not None and so_far.off:
            failure = replace(failure, message=f"{failure.message} (not resumed: {so_far.off})")
        await send_failure(reply, request.route.family, failure)
        return "broken" if broken else "failed"

    def _report(
        self, request: ClientRequest, reply: ClientReply, progress: _Progress, outcome: str
    ) -> None:
        """Count and log that the team tried last has failed."""
        assert progress.failure is not None
        self._telemetry.attempt_failed(
            request,
            progress.asked[-1],
            progress.failure,
            attempt=progress.attempts,
            sent_bytes=reply.sent,
            outcome=outcome,
        )


def _unexpected(error: Exception) -> Failure:
    log(event="unexpected", message=repr(error)[:200])
    return Failure(Reason.UNREADABLE, "the worker's answer makes no sense", detail=repr(error))


def _culprits(team: Team, failure: Failure) -> tuple[Worker, ...]:
    """Who failed for certain. Of a pair either half may have been it."""
    if team.prefill is None:
        return (team.answering,)
    if failure.half is Role.PREFILL:
        return (team.prefill,)
    return (team.answering,) if failure.half is Role.DECODE else ()


def _outcome(reply: ClientReply) -> str:
    """Of an answer that was passed on whole. An error is never `ok`, whoever it comes from."""
    told = reply.stream.told if reply.stream is not None else reply.told
    status = told or reply.status
    if status >= 500:
        return "broken" if told and reply.stream is not None else "failed"
    if status >= 400:
        return "rejected"
    return "ok"


def _refusal_by_pairs(request: ClientRequest) -> Refusal | None:
    """Why a prefill/decode pair cannot serve this request; None if it can."""
    if request.route.pairs is Pairs.NONE:
        text = f"{request.path} needs a worker that is not half of a pair"
        return Refusal(501, "not_proxied", text)
    if request.facts is None:  # an empty body
        return Refusal(400, "invalid_request_error", "the body is not a JSON object")
    return None
