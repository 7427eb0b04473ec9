"""The proxy's benchmark: its aims are judged by the worst of its runs, and said in its table."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.retry_proxy.__main__ import STOPPED_SIZE, aims, text
from benchmarks.retry_proxy.worker import EVENT, LAST


def result(difference: float, slowest: int, each: float) -> dict[str, Any]:
    latency = {
        "direct_median": 0.1,
        "through_median": 0.1 + difference,
        "direct_p99": 0.2,
        "through_p99": 0.9,
        "median_difference": difference,
    }
    paced = [
        {"streams": n, "events_per_cpu_s": e} for n, e in ((1, 100), (16, slowest), (64, 20_000))
    ]
    found = {"latency": latency, "paced": paced, "unpaced": [{"streams": 1, "ratio": 0.9}]}
    found["stopped"] = {
        "readers": 200,
        "event_bytes": STOPPED_SIZE,
        "rss_before_mib": 50.0,
        "rss_after_mib": 50.0 + 200 * each,
        "mib_each": each,
    }
    return {**found, "aims": aims(found)}


@pytest.mark.parametrize(
    ("difference", "slowest", "each", "met"),
    [
        (0.4, 5000, 0.4, [True, True, True]),
        (1.0, 5000, 0.4, [False, True, True]),
        (0.4, 5000, 0.8, [True, False, True]),
        (0.4, 4999, 0.4, [True, True, False]),
    ],
)
def test_aims(difference: float, slowest: int, each: float, met: list[bool]) -> None:
    found = result(difference, slowest, each)
    assert list(found["aims"].values()) == met
    assert text(found).count("MISSED: ") == met.count(False)


def test_the_workers_bytes_are_well_formed_chunks() -> None:
    for data in (EVENT, LAST.removesuffix(b"0\r\n\r\n")):
        size, _, rest = data.partition(b"\r\n")
        assert rest[int(size, 16) :] == b"\r\n" and rest.startswith(b"data: ")
