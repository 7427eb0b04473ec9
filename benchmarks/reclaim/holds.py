"""Hold time after an abort, beside the time the link still needed for the write.

A 1000-token request goes through the prefill across the shaped link and is aborted
at a drawn point of its transfer. The link's byte counter says how much went over it
after the abort; decode's log says for how long the slots were withheld.
"""

from __future__ import annotations

import random
import re
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import figures
from benchmarks.reclaim.pair import FLAGS, UNOBSERVED, Bench, folder_for_logs
from sglang_scaling_fixes.console import Progress
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.races.reference import random_prompt
from sglang_scaling_fixes.lab.servers import checkpoints
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import Link, link

PROMPT_TOKENS = 1000
TRANSFER_BYTES = PROMPT_TOKENS * checkpoints.KV_BYTES_PER_TOKEN
SHARES = 0.05, 0.75
"""The abort comes once this share of the transfer is over, drawn between the two."""
_STEP_S = 0.002
_END_S = 120.0
_NOISE_BYTES = 20_000
"""Heartbeats and messages after the last byte of KV."""
_QUIET_S = 1.0
_BACK = re.compile(r"(?:token slots back|proven) after ([0-9.]+) s, proof ([^\s;]+)")


@dataclass(frozen=True)
class Hold:
    """One abort. `remaining_s`: bytes that crossed the link after it, at the link's rate."""

    sent_share: float
    hold_s: float
    remaining_s: float
    hold_minus_remaining_ms: float
    back_after_last_byte_ms: float
    """From the last KV byte on the link to the slots being back, as sampled."""
    proof: str


def measure(
    release: str, rounds: int, seed: int, rate_mbit: float, progress: Progress
) -> dict[str, Any]:
    """Abort `rounds` transfers on an armed pair; needs root for the shaped link."""
    draw = random.Random(f"holds-{seed}")
    with folder_for_logs(progress) as folder, link(rate_mbit, folder) as way:
        if way.mode != "shaped":
            raise LabError(f"hold times need a shaped link, and there is none: {way.reason}")
        bench = Bench(release, folder, progress)
        spec = ClusterSpec(flags=FLAGS["fixed"], env=UNOBSERVED)
        with Cluster(bench.environment, bench.checkpoint, way, folder, spec) as cluster:
            _warm(cluster, draw)
            rtt_ms = _network_round_trip(cluster)
            done = []
            for number in range(1, rounds + 1):
                done.append(_abort(cluster, way, draw, f"hold-{number}"))
                progress(f"abort {number} of {rounds}: {asdict(done[-1])}")
    return {
        "rate_mbit": rate_mbit,
        "network_round_trip_ms": rtt_ms,
        "hold_minus_remaining_ms": figures.spread([h.hold_minus_remaining_ms for h in done], 1),
        "back_after_last_byte_ms": figures.spread([h.back_after_last_byte_ms for h in done], 1),
        "rounds": [asdict(hold) for hold in done],
    }


def _warm(cluster: Cluster, draw: random.Random) -> None:
    outcome = cluster.send(
        cluster.slow, random_prompt(draw, PROMPT_TOKENS), "warm", max_new_tokens=8
    ).wait()
    if outcome.ids is None:
        raise LabError(f"the warm-up request failed: {outcome.decode.body!s:.200}")


def _network_round_trip(cluster: Cluster) -> float:
    """Median time to connect across the idle link, in milliseconds."""
    slow, taken = cluster.slow, []
    for _ in range(20):
        with slow.client.entered():
            began = time.perf_counter()
            socket.create_connection((slow.place.address, slow.port)).close()
            taken.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(taken), 3)


def _abort(cluster: Cluster, way: Link, draw: random.Random, rid: str) -> Hold:
    log = _Tail(cluster.decode.process.log)
    share, base = draw.uniform(*SHARES), way.sent_bytes()
    pending = cluster.send(cluster.slow, random_prompt(draw, PROMPT_TOKENS), rid, max_new_tokens=8)
    deadline = time.monotonic() + _END_S
    while way.sent_bytes() - base < share * TRANSFER_BYTES:
        _still_going(deadline, "the transfer did not begin")
        time.sleep(_STEP_S)
    samples = [(time.monotonic(), way.sent_bytes())]
    cluster.abort(rid)
    back = None
    while back is None:
        _still_going(deadline, "the slots did not come back")
        time.sleep(_STEP_S)
        samples.append((time.monotonic(), way.sent_bytes()))
        back = _BACK.search(log.read())
    came_back = time.monotonic()
    pending.wait()
    while _moved(samples, within_s=_QUIET_S) > _NOISE_BYTES:
        time.sleep(_STEP_S)
        samples.append((time.monotonic(), way.sent_bytes()))
    first, last = samples[0][1], samples[-1][1]
    over = next(moment for moment, sent in samples if last - sent <= _NOISE_BYTES)
    remaining = (last - first) * 8 / (way.rate_mbit or 1) / 1e6
    held = float(back[1])
    return Hold(
        sent_share=round((first - base) / TRANSFER_BYTES, 3),
        hold_s=held,
        remaining_s=round(remaining, 3),
        hold_minus_remaining_ms=round(1e3 * (held - remaining), 1),
        back_after_last_byte_ms=round(1e3 * (came_back - over), 1),
        proof=back[2],
    )


def _still_going(deadline: float, otherwise: str) -> None:
    if time.monotonic() > deadline:
        raise LabError(f"{otherwise} within {_END_S:.0f} s")


def _moved(samples: list[tuple[float, int]], within_s: float) -> int:
    """Bytes sent in the last `within_s` seconds; everything if the samples are younger."""
    now, total = samples[-1]
    before = [sent for moment, sent in samples if moment <= now - within_s]
    return total - (before[-1] if before else 0)


class _Tail:
    """What is written to a log from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = path.stat().st_size

    def read(self) -> str:
        with self._path.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")
