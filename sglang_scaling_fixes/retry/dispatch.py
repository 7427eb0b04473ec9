"""One request, asked of one worker after another until one of them answers."""

from __future__ import annotations

import time

from sglang_scaling_fixes.retry.attempt import Attempts
from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.refusal import RETRY_AFTER_S, Refusal, send_failure
from sglang_scaling_fixes.retry.reply import ClientReply
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.routes import Pairs
from sglang_scaling_fixes.retry.settings import ProxySettings
from sglang_scaling_fixes.retry.telemetry import Telemetry, log
from sglang_scaling_fixes.retry.workers import Worker, Workers


class Dispatcher:
    def __init__(
        self,
        settings: ProxySettings,
        workers: Workers,
        attempts: Attempts,
        telemetry: Telemetry,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._attempts = attempts
        self._telemetry = telemetry

    async def run(self, request: ClientRequest, reply: ClientReply) -> str:
        """The outcome, once the client has all it will get. Raises Refusal.

        `ok`, `recovered` (after a retry), `failed` (503) or `broken` (after the first byte).
        """
        self._telemetry.time_first_byte(reply)
        no_pairs = self._only_single_workers(request)
        tried: list[Worker] = []
        failure: Failure | None = None
        while len(tried) < self._settings.attempts:
            worker = self._workers.pick(tried, time.monotonic(), no_pairs=no_pairs)
            if worker is None:
                break
            if failure is not None:
                self._report(request, tried, failure, reply, "retried")
            tried.append(worker)
            newest = await self._try(request, worker, reply)
            if newest is None:
                if failure is None:
                    return "ok"
                if reply.stream is not None:
                    self._telemetry.stream_restarted()
                return "recovered"
            failure = newest
            if reply.started or not failure.elsewhere:
                break
        if failure is not None:
            self._report(request, tried, failure, reply, "told")
        else:
            log(event="no_worker", request=request.name)
        broken = reply.started
        await send_failure(reply, request.route.family, failure)
        return "broken" if broken else "failed"

    async def _try(
        self, request: ClientRequest, worker: Worker, reply: ClientReply
    ) -> Failure | None:
        """One attempt, and what it says about the worker. None: the client has its answer."""
        worker.in_flight += 1
        try:
            await self._attempts.run(request, worker.target, reply)
        except Failure as failure:
            self._blame(worker, failure)
            return failure
        finally:
            worker.in_flight -= 1
        self._workers.answered(worker)
        return None

    def _blame(self, worker: Worker, failure: Failure) -> None:
        now = time.monotonic()
        longest = self._settings.avoid_seconds
        if failure.reason is Reason.ANOMALY:
            self._telemetry.anomaly(worker)
            self._workers.avoid(worker, now + longest)
        elif failure.reason is Reason.UNAVAILABLE:
            # A worker that refuses everything has the fewest requests in flight. Without this
            # it would always be picked next.
            asked = failure.retry_after or RETRY_AFTER_S
            self._workers.avoid(worker, now + min(longest, asked))
        elif failure.broke and self._workers.broke(worker, now):
            log(event="down", worker=worker.target.name, reason=failure.reason.value)

    def _only_single_workers(self, request: ClientRequest) -> bool:
        """Whether no pair can serve it. Raises Refusal if there are only pairs."""
        pairs = [worker for worker in self._workers.all if worker.target.pair]
        if not pairs:
            return False
        refusal = _refusal_by_pairs(request)
        if refusal is not None and len(pairs) == len(self._workers.all):
            raise refusal
        return refusal is not None

    def _report(
        self,
        request: ClientRequest,
        tried: list[Worker],
        failure: Failure,
        reply: ClientReply,
        outcome: str,
    ) -> None:
        """Count and log that the worker tried last has failed."""
        self._telemetry.attempt_failed(
            request,
            tried[-1],
            failure,
            attempt=len(tried),
            sent_bytes=reply.sent,
            outcome=outcome,
        )


def _refusal_by_pairs(request: ClientRequest) -> Refusal | None:
    """Why a prefill/decode pair cannot serve this request; None if it can."""
    if request.route.pairs is Pairs.DECODE:
        return None
    if request.route.pairs is Pairs.NONE:
        text = f"{request.path} needs a worker that is not half of a pair"
        return Refusal(501, "not_proxied", text)
    if request.headers.get("content-encoding", "identity") != "identity":
        text = "a pair's room cannot be added to an encoded body"
        return Refusal(415, "unsupported_encoding", text)
    if request.facts is None:
        return Refusal(400, "invalid_request_error", "the body is not a JSON object")
    return None
