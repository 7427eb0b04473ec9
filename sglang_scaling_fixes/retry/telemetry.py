"""What the proxy counts and logs. A log line is one JSON object."""

from __future__ import annotations

import json
import logging
import time

from prometheus_client import CollectorRegistry, generate_latest

from sglang_scaling_fixes.retry import metrics
from sglang_scaling_fixes.retry.failure import Failure
from sglang_scaling_fixes.retry.reply import ClientReply
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.workers import Team, Worker, Workers

logger = logging.getLogger("sglang_scaling_fixes.retry")


def log(**fields: object) -> None:
    logger.warning(json.dumps(fields))


class Telemetry:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._metrics = metrics.retry_proxy(self._registry)
        self._shown: set[str] = set()

    def request_ended(self, outcome: str) -> None:
        self._metrics["requests"].labels(outcome=outcome).inc()

    def time_first_byte(self, reply: ClientReply) -> None:
        """Observe how long it takes from now until `reply` starts."""
        began = time.monotonic()
        seconds = self._metrics["first_byte_seconds"]
        reply.on_start = lambda: seconds.observe(time.monotonic() - began)

    def attempt_failed(
        self,
        request: ClientRequest,
        team: Team,
        failure: Failure,
        *,
        attempt: int,
        sent_bytes: int,
        outcome: str,
    ) -> None:
        """`attempt` counts from 1. `outcome`: what followed, `retried` or `told` to the client."""
        self._metrics["retries"].labels(reason=failure.reason.value, outcome=outcome).inc()
        log(
            event="attempt_failed",
            outcome=outcome,
            request=request.name,
            worker=team.name,
            reason=failure.reason.value,
            attempt=attempt,
            sent_bytes=sent_bytes,
            message=(failure.detail or failure.message)[:200],
        )

    def anomaly(self, worker: Worker) -> None:
        self._metrics["anomalies"].labels(worker=worker.name).inc()

    def recovered(self, *, streamed: bool) -> None:
        """A request was answered after a retry."""
        if streamed:
            self._metrics["stream_restarts"].inc()

    def migrated(self, failure: Failure) -> None:
        self._metrics["migrations"].labels(reason=failure.reason.value).inc()

    def false_alarm(self) -> None:
        self._metrics["false_alarms"].inc()

    def retry_refused(self) -> None:
        self._metrics["retries_refused"].inc()

    def exposition(self, workers: Workers, in_flight: int, held_bytes: int) -> bytes:
        """All metrics in Prometheus' text format."""
        self._forget_gone(workers)
        for worker in workers.all:
            self._metrics["worker_up"].labels(worker=worker.name).set(not worker.down)
        self._metrics["inflight"].set(in_flight)
        self._metrics["held_bytes"].set(held_bytes)
        return generate_latest(self._registry)

    def _forget_gone(self, workers: Workers) -> None:
        """A worker that left the list is not down: no alert is to wait for it."""
        here = {worker.name for worker in workers.all}
        for name in self._shown - here:
            self._metrics["worker_up"].remove(name)
        self._shown = here
