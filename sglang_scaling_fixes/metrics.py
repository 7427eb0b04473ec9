"""How a metric is declared, counted and exported. The metrics themselves are in `*/metrics.py`.

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


@dataclass(frozen=True)
class Family:
    """The metrics of one fix and role, and the beginning of all their names."""

    prefix: str
    where: str
    """Who counts them, in words."""
    metrics: tuple[Metric, ...]


SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Buckets of a histogram of waits."""

FIX_STATE = Metric(
    "fix_state", "gauge", "1 for the state that a fix is in.", labels=("fix", "state")
)
"""Its only labels are these two."""
PLUGIN = Family(PREFIX, "the scheduler", (FIX_STATE,))


class Metrics:
    """The metrics of one fix and role in this process.

    `labels` is None where stock exports no metrics: then they are counted for
    `/server_info` only, and prometheus_client is not imported.
    """

    def __init__(self, family: Family, labels: Mapping[str, str] | None) -> None:
        known = family.metrics
        self._known = {metric.name: metric for metric in known}
        self._labels = dict(labels or {})
        self._exported = {} if labels is None else exported(family, self._labels)
        self._children: dict[tuple[str, ...], Any] = {}
        """By the metric's name and its own labels' values: the client looks a series up slowly."""
        self._counts = {m.name: 0 for m in known if m.kind == "counter" and not m.labels}
        self._by_label: dict[str, Counter[str]] = {
            m.name: Counter() for m in known if m.kind == "counter" and m.labels
        }

    def inc(self, name: str, *values: str, by: int = 1) -> None:
        """Count `by`; `values` are those of the metric's own labels, in their order."""
        if values:
            self._by_label[name]["/".join(values)] += by
        else:
            self._counts[name] += by
        if self._exported:
            self._series(name, values).inc(by)

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


def of_process(family: Family, manager: Any) -> Metrics:
    """The metrics of the role whose stock KV manager this is."""
    server_args = getattr(manager, "server_args", None)
    if not getattr(server_args, "enable_metrics", False):
        return Metrics(family, None)
    return Metrics(
        family,
        {
            "role": manager.disaggregation_mode.value,
            "rank": str(manager.kv_args.engine_rank),
            "dp_rank": str(getattr(manager, "system_dp_rank", 0)),
        },
    )


DECIDING_GROUPS = ("attn_tp_cpu_group", "attn_cp_cpu_group")
"""Of a stock scheduler: the ranks that see the same requests and must decide alike."""


def is_reporting_rank(scheduler: Any) -> bool:
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


def of_scheduler(family: Family, scheduler: Any, server_args: Any) -> Metrics:
    """The metrics of this scheduler process."""
    if not getattr(server_args, "enable_metrics", False):
        return Metrics(family, None)
    labels = {
        "role": str(getattr(server_args, "disaggregation_mode", "null")),
        "rank": str(_rank(getattr(scheduler, "tp_cpu_group", None))),
        "dp_rank": str(_dp_rank(scheduler)),
    }
    return Metrics(family, labels)


def export_states(states: Iterable[tuple[str, str]]) -> None:
    """One gauge with the state of every fix: `(name, state)`."""
    gauge = exported(PLUGIN)[FIX_STATE.name]
    for name, state in states:
        gauge.labels(fix=name, state=state).set(1)


def exported(
    family: Family, common: Mapping[str, str] | None = None, registry: Any = None
) -> dict[str, Any]:
    """The client's own objects by name, with their first series; `common`: labels on all of them.

    `registry` is that of the process unless one is given.
    """
    return {m.name: _make(m, common or {}, family.prefix, registry) for m in family.metrics}


def _make(metric: Metric, common: Mapping[str, str], prefix: str, registry: Any) -> Any:
    # Stock sets PROMETHEUS_MULTIPROC_DIR first; the client looks at it once, on import.
    import prometheus_client

    name = prefix + metric.name
    labels = (*common, *metric.labels)
    registry = registry or prometheus_client.REGISTRY
    if metric.kind == "counter":
        counter = prometheus_client.Counter(name, metric.help, labels, registry=registry)
        # Without labels of its own it has one series; without any, the client makes that itself.
        only_common: tuple[tuple[str, ...], ...] = ((),) if common and not metric.labels else ()
        for values in metric.series or only_common:
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
