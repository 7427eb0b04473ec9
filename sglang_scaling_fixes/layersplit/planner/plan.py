"""A plan: capacity, bytes, exposed time and gain, for one deployment and some contexts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.layersplit.planner import assumptions, labels
from sglang_scaling_fixes.layersplit.planner.capacity import Pool
from sglang_scaling_fixes.layersplit.planner.traffic import Forward, Layer, Sent, Speed, forwards

GIB = 1 << 30


@dataclass(frozen=True)
class Asked:
    """What is planned for. `contexts`: tokens of one request. `hit_rate`: share of them cached."""

    pool: Pool
    contexts: Sequence[int]
    hit_rate: float
    speed: Speed

    def check(self) -> None:
        """Raise ConfigError if it cannot be served at all."""
        model, pool = self.pool.model, self.pool
        longest = max(self.contexts)
        if longest > model.context:
            raise ConfigError(
                f"--context {longest}: {model.name} reads at most {model.context} tokens; leave "
                "it out"
            )
        check_pool(pool, longest)


def check_pool(pool: Pool, longest: int) -> None:
    """Raise ConfigError if ours cannot hold a context of `longest` tokens."""
    if pool.scratch_tokens < pool.least_scratch:
        raise ConfigError(
            f"--scratch-tokens {pool.scratch_tokens} does not hold one context of "
            f"{pool.model.name}, one chunk and a page for each request; write at least "
            f"{pool.least_scratch}"
        )
    if pool.ours() < longest:
        raise ConfigError(
            f"--mem of {pool.memory / GIB:.2f} GiB does not hold two scratches and one context "
            f"of {longest} tokens; write at least {_gib_up(pool.memory_for(longest))}GiB"
        )


def make(asked: Asked) -> dict[str, Any]:
    """The plan as JSON; docs/layersplit.md says what is in it. Raises ConfigError."""
    asked.check()
    pool = asked.pool
    tokens = {"unsplit": pool.unsplit(), "upstream": pool.upstream(), "ours": pool.ours()}
    return {
        "capacity_tokens": tokens,
        "scratch": {"rows": pool.scratch_rows, "bytes": pool.scratch_bytes},
        "rows": [_row(asked, context, tokens) for context in asked.contexts],
        "assumptions": _assumptions(asked),
        "labels": {
            path: {"kind": "modelled", "formula": text} for path, text in labels.FORMULAS.items()
        },
        "symbols": labels.SYMBOLS,
        "published": labels.published(),
        "left_out": list(labels.LEFT_OUT),
    }


def _row(asked: Asked, context: int, tokens: dict[str, int]) -> dict[str, Any]:
    pool = asked.pool
    of_request = forwards(context, asked.hit_rate, pool.chunk)
    first = of_request[0]
    layers = [list(forward.layers(pool, asked.speed)) for forward in of_request]
    every = list(itertools.chain.from_iterable(layers))
    compute = sum(layer.compute for layer in every)
    ours = sum(layer.ours.exposed for layer in every)
    upstream = sum(layer.upstream.exposed for layer in every)
    held = {name: count // context for name, count in tokens.items()}
    return {
        "context": context,
        "prefix_tokens": first.prefix,
        "forwards": len(of_request),
        "bytes_per_forward": _bytes(first, pool),
        "compute_ms": _ms(compute),
        "exposed_ms": {"upstream": _ms(upstream), "ours": _ms(ours)},
        "contexts_held": held,
        "gain": {
            "over_unsplit": {
                "contexts_held": _ratio(held["ours"], held["unsplit"]),
                "request_speed": _ratio(compute, compute + ours),
            },
            "over_upstream": {
                "contexts_held": _ratio(held["ours"], held["upstream"]),
                "request_speed": _ratio(compute + upstream, compute + ours),
            },
        },
        "layers": _runs(layers[0]),
    }


def _bytes(forward: Forward, pool: Pool) -> dict[str, int]:
    return {"upstream": forward.upstream_bytes(pool), "ours": forward.our_bytes(pool)}


def _runs(layers: Iterable[Layer]) -> list[dict[str, Any]]:
    """Layers that follow each other and have the same figures, once."""
    found = []
    for layer, numbers in itertools.groupby(enumerate(layers), key=lambda pair: pair[1]):
        run = [number for number, _ in numbers]
        found.append(
            {
                "first": run[0],
                "last": run[-1],
                "compute_ms": _ms(layer.compute),
                "upstream": _sent(layer.upstream),
                "ours": _sent(layer.ours),
            }
        )
    return found


def _sent(sent: Sent) -> dict[str, float]:
    return {"hidden_ms": _ms(sent.hidden), "exposed_ms": _ms(sent.exposed)}


def _assumptions(asked: Asked) -> dict[str, dict[str, Any]]:
    """What was given, published or assumed: value, unit, and where it comes from."""
    hit_rate = ("assumed", asked.hit_rate, "of a context is in the pool", "--hit-rate")
    return assumptions.as_json(assumptions.of(asked.pool, asked.speed) | {"hit_rate": hit_rate})


def _gib_up(size: int) -> str:
    """Rounded up to hundredths."""
    return f"{-(-100 * size // GIB) / 100:.2f}"


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)


def _ratio(ours: float, other: float) -> float | None:
    """None where the other one is nothing: its pool does not hold one such context."""
    return round(ours / other, 4) if other else None
