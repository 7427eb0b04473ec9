"""Every Prometheus metric of this package, in one place.

Each is also in `/server_info`. With stock's `--enable-metrics` they appear at stock's
own `/metrics`, which collects all processes of a server; names follow Prometheus'
conventions (base units, `_total` on counters). Labels on all: `role` (prefill,
decode, null), `rank` (of this scheduler within its group) and `dp_rank`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["counter", "gauge", "histogram"]

PREFIX = "sglang_scaling_fixes_"
_RECLAIM = PREFIX + "reclaim_"
_SPEC_GUARD = PREFIX + "spec_guard_"
_RETRY_PROXY = PREFIX + "retry_proxy_"


@dataclass(frozen=True)
class Metric:
    """`labels` beyond the common ones; `buckets` of a histogram in the unit its name says.

    `series`: values of the labels whose series are there from the start, at 0. Prometheus sees no
    increase in a counter that appears with its first count.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    series: tuple[tuple[str, ...], ...] = ()


_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

DECODE = (
    Metric("exposures", "counter", "Transfers whose destinations were sent."),
    Metric("landed", "counter", "Transfers that ended well."),
    Metric("gave_up", "counter", "Transfers whose owner gave up: slots withheld."),
    Metric("returned", "counter", "Holds that ended with proof."),
    Metric("frees", "counter", "Writers proven harmless, by kind of proof.", ("proof",)),
    Metric("held_tokens", "gauge", "KV token slots withheld now."),
    Metric("holds", "gauge", "Holds now, by what they wait for.", ("reason",)),
    Metric("hold_seconds", "histogram", "From giving up to the return.", buckets=_SECONDS),
    Metric(
        "ack_seconds",
        "histogram",
        "From giving up to a prefill rank's proof.",
        buckets=_SECONDS,
    ),
    Metric("asks", "counter", "ABORTs sent to prefill ranks."),
    Metric("asks_resent", "counter", "Of them, repetitions."),
    Metric("refusals", "counter", "Requests refused, by reason.", ("reason",)),
    Metric("fences", "counter", "Fences: receiving engines replaced."),
    Metric("stale", "counter", "Answers that came late, twice, or for nobody."),
    Metric("garbage", "counter", "Unreadable control messages, dropped."),
)

PREFILL = (
    Metric("bound", "counter", "Destinations received with a generation."),
    Metric("asked", "counter", "ABORTs received."),
    Metric("answers", "counter", "Answers to ABORTs, by verdict.", ("verdict",)),
    Metric("poisoned_rooms", "counter", "Attempts with a write of unknown end."),
    Metric("short_sends", "counter", "Successes that did not cover all that decode exposed."),
    Metric("failed_writes", "counter", "Writes that reported failure."),
    Metric("chunks_dropped", "counter", "Chunks of ended attempts, not written."),
    Metric("garbage", "counter", "Unreadable control messages, dropped."),
)

_TOKENS = (128, 160, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

SPEC_GUARD = (
    Metric("requests", "counter", "Requests watched: those that verified drafts."),
    Metric(
        "anomalies",
        "counter",
        "Requests whose acceptance betrays a corrupted KV cache.",
        ("kind", "action"),
        series=tuple(
            (kind, action)
            for kind in ("low_accept_length", "high_accept_rate")
            for action in ("observed", "aborted")
        ),
    ),
    Metric("detection_tokens", "histogram", "Tokens generated until an anomaly.", buckets=_TOKENS),
    Metric("moved_requests", "counter", "Requests kept from reading suspect cached KV."),
    Metric("notifications_received", "counter", "Notifications of anomalies from decode servers."),
    Metric(
        "notifications",
        "counter",
        "Notifications of anomalies that decode sent to prefill servers.",
        ("outcome",),
        series=(("delivered",), ("failed",), ("lost",)),
    ),
)

RETRY_PROXY = (
    Metric(
        "requests",
        "counter",
        "Requests, by what became of them.",
        ("outcome",),
        series=(
            ("ok",),
            ("recovered",),
            ("failed",),
            ("broken",),
            ("disconnected",),
            ("refused",),
        ),
    ),
    Metric("retries", "counter", "Attempts that failed, and what followed.", ("reason", "outcome")),
    Metric("anomalies", "counter", "Generations a worker's guard aborted.", ("worker",)),
    Metric("worker_up", "gauge", "1 unless the worker is down.", ("worker",)),
    Metric("inflight", "gauge", "Requests in flight now."),
    Metric("held_bytes", "gauge", "Bytes of requests and responses held now."),
    Metric("stream_restarts", "counter", "Streams begun anew before their client had a byte."),
    Metric(
        "first_byte_seconds",
        "histogram",
        "From a request's last byte to the first of its answer, all attempts included.",
        buckets=_SECONDS,
    ),
)

FAMILIES = (
    (_RECLAIM, DECODE),
    (_RECLAIM, PREFILL),
    (_SPEC_GUARD, SPEC_GUARD),
    (_RETRY_PROXY, RETRY_PROXY),
)
"""Everything there is, with the beginning of its names."""


class Metrics:
    """The metrics of one fix and role in this process.

    `labels` is None where stock exports no metrics: then they are counted for
    `/server_info` only, and prometheus_client is not imported.
    """

    def __init__(
        self,
        known: tuple[Metric, ...],
        labels: Mapping[str, str] | None,
        prefix: str = _RECLAIM,
    ) -> None:
        self._known = {metric.name: metric for metric in known}
        self._labels = dict(labels or {})
        self._exported = (
            {} if labels is None else {m.name: _make(m, self._labels, prefix) for m in known}
        )
        self._children: dict[tuple[str, ...], Any] = {}
        """By the metric's name and its own labels' values: the client looks a series up slowly."""
        self._counts = {m.name: 0 for m in known if m.kind == "counter" and not m.labels}
        self._by_label: dict[str, Counter[str]] = {
            m.name: Counter() for m in known if m.kind == "counter" and m.labels
        }

    def inc(self, name: str, *values: str) -> None:
        """Count one; `values` are those of the metric's own labels, in their order."""
        if values:
            self._by_label[name]["/".join(values)] += 1
        else:
            self._counts[name] += 1
        if self._exported:
            self._series(name, values).inc()

    def set(self, name: str, value: float, *values: str) -> None:
        if (series := self._series(name, values)) is not None:
            series.set(value)

    def observe(self, name: str, value: float) -> None:
        if (series := self._series(name, ())) is not None:
            series.observe(value)

    def report(self) -> dict[str, Any]:
        """The counters by name; of those with labels, a dictionary by their values."""
        return {**self._counts, **{name: dict(by) for name, by in self._by_label.items()}}

    def _series(self, name: str, own: tuple[str, ...]) -> Any:
        """The exported series, None when nothing is exported. KeyError: no such metric."""
        metric = self._known[name]
        if not self._exported:
            return None
        key = (name, *own)
        if (series := self._children.get(key)) is None:
            labels = {**self._labels, **dict(zip(metric.labels, own, strict=True))}
            series = self._children[key] = self._exported[name].labels(**labels)
        return series


def of_process(known: tuple[Metric, ...], manager: Any) -> Metrics:
    """The metrics of the role whose stock KV manager this is."""
    server_args = getattr(manager, "server_args", None)
    if not getattr(server_args, "enable_metrics", False):
        return Metrics(known, None)
    return Metrics(
        known,
        {
            "role": manager.disaggregation_mode.value,
            "rank": str(manager.kv_args.engine_rank),
            "dp_rank": str(getattr(manager, "system_dp_rank", 0)),
        },
    )


DECIDING_GROUPS = ("attn_tp_cpu_group", "attn_cp_cpu_group")
"""Of a stock scheduler: the ranks that see the same requests and must decide alike."""


def speaks(scheduler: Any) -> bool:
    """Whether this rank logs and counts for its group: the first of attention TP (and CP)."""
    return all(_rank(getattr(scheduler, name, None)) == 0 for name in DECIDING_GROUPS)


def _rank(group: Any) -> int:
    import torch

    if group is None or not torch.distributed.is_initialized():
        return 0
    return int(torch.distributed.get_rank(group))


def _dp_rank(scheduler: Any) -> int:
    """Kept by the scheduler up to 0.5.13, in its `ps` up to 0.5.20, and by the process since."""
    for owner in (scheduler, getattr(scheduler, "ps", None)):
        if (rank := getattr(owner, "dp_rank", None)) is not None:
            return int(rank)
    with contextlib.suppress(Exception):  # a label: not worth a start
        from sglang.srt.runtime_context import get_parallel

        return int(get_parallel().dp_rank or 0)
    return 0


def of_scheduler(scheduler: Any, server_args: Any) -> Metrics:
    """The guard's metrics of this scheduler process."""
    if not getattr(server_args, "enable_metrics", False):
        return Metrics(SPEC_GUARD, None)
    labels = {
        "role": str(getattr(server_args, "disaggregation_mode", "null")),
        "rank": str(_rank(getattr(scheduler, "tp_cpu_group", None))),
        "dp_rank": str(_dp_rank(scheduler)),
    }
    return Metrics(SPEC_GUARD, labels, _SPEC_GUARD)


def export_states(states: Iterable[tuple[str, str]]) -> None:
    """One gauge with the state of every fix: `(name, state)`."""
    import prometheus_client

    gauge = prometheus_client.Gauge(
        PREFIX + "fix_state",
        "1 for the state a fix is in.",
        ("fix", "state"),
        multiprocess_mode="mostrecent",
    )
    for name, state in states:
        gauge.labels(fix=name, state=state).set(1)


def retry_proxy(registry: Any) -> dict[str, Any]:
    """The proxy's own, by name, in a registry of its own: it is a process without SGLang."""
    return {metric.name: _make(metric, {}, _RETRY_PROXY, registry) for metric in RETRY_PROXY}


def _make(metric: Metric, common: Mapping[str, str], prefix: str, registry: Any = None) -> Any:
    # Stock sets PROMETHEUS_MULTIPROC_DIR first; the client looks at it once, on import.
    import prometheus_client

    name = prefix + metric.name
    labels = (*common, *metric.labels)
    registry = registry or prometheus_client.REGISTRY
    if metric.kind == "counter":
        counter = prometheus_client.Counter(name, metric.help, labels, registry=registry)
        for values in metric.series or ((),) * (not metric.labels and bool(common)):
            counter.labels(**common, **dict(zip(metric.labels, values, strict=True)))
        return counter
    if metric.kind == "gauge":
        mode: Literal["mostrecent"] = "mostrecent"
        return prometheus_client.Gauge(
            name, metric.help, labels, registry=registry, multiprocess_mode=mode
        )
    return prometheus_client.Histogram(
        name, metric.help, labels, registry=registry, buckets=metric.buckets
    )
