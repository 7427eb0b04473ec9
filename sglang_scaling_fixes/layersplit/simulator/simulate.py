"""Three pools over one trace, as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_scaling_fixes.layersplit.planner import assumptions
from sglang_scaling_fixes.layersplit.planner.capacity import Pool
from sglang_scaling_fixes.layersplit.planner.plan import check_pool
from sglang_scaling_fixes.layersplit.simulator import cost, deployment, labels, records
from sglang_scaling_fixes.layersplit.simulator.deployment import Deployment
from sglang_scaling_fixes.layersplit.simulator.engine import Outcome, Replay

Progress = Callable[[str, int, int], None]
"""Takes the pool's name, how many requests are done, and of how many."""


@dataclass(frozen=True)
class Asked:
    """`file`: the trace's name, as it is shown. `host_bytes`: HiCache's memory of each rank.

    `faster`: 2 brings the trace twice as fast. `ttft_limit`: seconds after which an answer is
    late; None: never.
    """

    file: str
    format: str
    trace: records.Trace
    pool: Pool
    rates: cost.Rates
    host_bytes: int
    faster: float
    ttft_limit: float | None


def run(asked: Asked, progress: Progress = lambda name, done, of: None) -> dict[str, Any]:
    """docs/layersplit.md says what is in it. Raises ConfigError if ours cannot start."""
    check_pool(asked.pool, longest=1)
    pools = []
    for one in deployment.of(asked.pool, asked.host_bytes):
        # No server of the model reads a longer prompt.
        within = one.but(longest=asked.pool.model.context)
        replay = Replay(asked.trace, asked.pool, within, asked.rates, asked.faster)

        def told(done: int, of: int, name: str = one.name) -> None:
            progress(name, done, of)

        pools.append(_pool(asked, one, replay.run(told)))
    by_name = {pool["name"]: pool for pool in pools}
    return {
        "trace": _trace(asked),
        "pools": pools,
        "gain": {
            f"over_{name}": _gain(by_name["ours"], by_name[name])
            for name in ("unsplit", "upstream")
        },
        "assumptions": _assumptions(asked),
        "labels": {
            path: {"kind": "modelled", "formula": text} for path, text in labels.FORMULAS.items()
        },
        "symbols": labels.SYMBOLS,
        "rules": list(labels.RULES),
        "left_out": list(labels.LEFT_OUT),
    }


def _trace(asked: Asked) -> dict[str, Any]:
    prompts = [request.prompt for request in asked.trace]
    return {
        "file": asked.file,
        "format": asked.format,
        "requests": len(prompts),
        "sessions": len({request.session for request in asked.trace}),
        "prompt_tokens": sum(prompts),
        "mean_prompt_tokens": round(sum(prompts) / len(prompts), 1),
        "longest_prompt_tokens": max(prompts),
        "reuse": round(records.reuse(asked.trace), 4),
    }


def _pool(asked: Asked, one: Deployment, outcome: Outcome) -> dict[str, Any]:
    waits = sorted(answer.ended - answer.arrived for answer in outcome.answers)
    limit = math.inf if asked.ttft_limit is None else asked.ttft_limit
    prompts = sum(answer.request.prompt for answer in outcome.answers)
    in_time = sum(
        answer.request.prompt
        for answer in outcome.answers
        if answer.ended - answer.arrived <= limit
    )
    span = max(outcome.ended - outcome.began, 0.0)
    busy = outcome.compute + outcome.broadcast + outcome.load
    mean = sum(request.prompt for request in asked.trace) / len(asked.trace)
    return {
        "name": one.name,
        "capacity_tokens": one.cached,
        "contexts_held": int(one.cached // mean),
        "host_tokens": one.host,
        "requests": {
            "answered": len(waits),
            "late": sum(wait > limit for wait in waits),
            "refused": outcome.refused,
        },
        "hit_rate": _share(sum(answer.hit for answer in outcome.answers), prompts),
        "loaded_rate": _share(sum(answer.loaded for answer in outcome.answers), prompts),
        "goodput_tokens_s": _per(in_time, span),
        "busy_tokens_s": _per(prompts, busy),
        "ttft_s": {
            "mean": round(sum(waits) / len(waits), 4) if waits else None,
            "p50": _percentile(waits, 0.5),
            "p99": _percentile(waits, 0.99),
            "max": _percentile(waits, 1.0),
        },
        "gpu_s": {
            "compute": round(outcome.compute, 3),
            "exposed_broadcast": round(outcome.broadcast, 3),
            "exposed_load": round(outcome.load, 3),
            "idle": round(max(span - busy, 0.0), 3),
        },
        "passes": outcome.passes,
        "most_held": outcome.most_held,
        "span_s": round(span, 3),
    }


def _gain(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, float | None]:
    """None where the other one has nothing to compare with."""
    names = ("capacity_tokens", "goodput_tokens_s", "busy_tokens_s")
    return {name: round(ours[name] / other[name], 4) if other[name] else None for name in names}


def _assumptions(asked: Asked) -> dict[str, dict[str, Any]]:
    rates, assumed = asked.rates, "assumed"
    host, decode = "GB/s from each rank's host", "GB/s to decode, all ranks together"
    hold, late = "us for each prompt token, after KV was sent", "s, after which an answer is late"
    found = assumptions.of(asked.pool, rates.speed)
    found |= {
        "host_memory": ("given", asked.host_bytes, "bytes of each rank, for HiCache", "--host-mem"),
        "load_gb_s": (assumed, rates.load / 1e9, host, "--load-gb-s"),
        "transfer_gb_s": (assumed, rates.transfer / 1e9, decode, "--transfer-gb-s"),
        "hold_us": (assumed, round(rates.hold * 1e6, 6), hold, "--hold-us"),
        "output_ms": (
            assumed,
            round(rates.output_token * 1e3, 6),
            "ms of a token at decode",
            "--output-ms",
        ),
        "faster": ("given", asked.faster, "times as fast as the trace", "--faster"),
        "ttft_limit_s": ("given", asked.ttft_limit, late, "--ttft-limit"),
    }
    return assumptions.as_json(found)


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    """The nearest rank; None of nothing."""
    if not ordered:
        return None
    return round(ordered[max(math.ceil(share * len(ordered)), 1) - 1], 4)


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _per(tokens: int, seconds: float) -> float:
    return round(tokens / seconds, 1) if seconds else 0.0
