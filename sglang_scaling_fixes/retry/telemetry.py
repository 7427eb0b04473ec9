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
from sglang_scaling_fixes.retry.workers import Worker, Workers, WorkerState

logger = logging.getLogger("sglang_scaling_fixes.retry")


def log(**fields: object) -> None:
    logger.warning(json.dumps(fields))


class Telemetry:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._metrics = metrics.retry_proxy(self._registry)

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
        worker: Worker,
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
            worker=worker.target.name,
            reason=failure.reason.value,
            attempt=attempt,
            sent_bytes=sent_bytes,
            message=(failure.detail or failure.message)[:200],
        )

    def anomaly(self, worker: Worker) -> None:
        self._metrics["anomalies"].labels(worker=worker.target.name).inc()

    def stream_restarted(self) -> None:
        self._metrics["stream_restarts"].inc()

    def exposition(self, workers: Workers, in_flight: int, held_bytes: int) -> bytes:
        """All metrics in Prometheus' text format."""
        now = time.monotonic()
        for worker in workers.all:
            up = worker.state(now) is not WorkerState.DOWN
            self._metrics["worker_up"].labels(worker=worker.target.name).set(up)
        self._metrics["inflight"].set(in_flight)
        self._metrics["held_bytes"].set(held_bytes)
        return generate_latest(self._registry)
