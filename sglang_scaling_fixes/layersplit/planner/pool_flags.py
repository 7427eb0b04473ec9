"""The flags that say which deployment a command is about, and how fast it is assumed to be."""

from __future__ import annotations

import argparse

from sglang_scaling_fixes.layersplit.planner import flags
from sglang_scaling_fixes.layersplit.planner.capacity import MTP, Pool
from sglang_scaling_fixes.layersplit.planner.models import KV_DTYPES, MODELS
from sglang_scaling_fixes.layersplit.planner.traffic import Speed
from sglang_scaling_fixes.layersplit.scratch import CONTEXTS

LEAST_RANKS = 2
"""One rank has nothing to split."""


def add_pool(parser: argparse.ArgumentParser) -> None:
    """The flags that `pool` reads."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help=", ".join(MODELS))
    add("--cp", required=True, metavar="N", help="ranks of the prefill's context parallelism")
    add("--kv-dtype", default="fp8", metavar="DTYPE", help=f"{_listed(KV_DTYPES)} (%(default)s)")
    add("--mem", required=True, metavar="SIZE", help="for KV and index-K on each rank: 26.22GiB")
    add("--mtp", default="none", metavar="HOW", help=f"{_listed(MTP)} (%(default)s)")
    add(
        "--scratch-tokens",
        metavar="TOKENS",
        help="of each scratch: prefixes and chunk of a batch; at least one context and one chunk "
        "(two contexts)",
    )
    add(
        "--chunked-prefill-size",
        default="8192",
        metavar="TOKENS",
        help="most new tokens of a forward (%(default)s)",
    )


def add_speed(parser: argparse.ArgumentParser) -> None:
    """The flags that `speed` reads."""
    add = parser.add_argument
    add(
        "--bandwidth-gb-s",
        default="300",
        metavar="GB/S",
        help="assumed: of a broadcast, 10^9 bytes/s (%(default)s)",
    )
    add(
        "--tflops",
        default="600",
        metavar="TFLOP/S",
        help="assumed: of each GPU, at the work done (%(default)s)",
    )
    add(
        "--upstream-hides",
        metavar="SHARE",
        help="assumed: share of a layer's compute that hides upstream's KV broadcast (by FLOPs)",
    )


def pool(args: argparse.Namespace) -> Pool:
    """Raises ConfigError, which names flag, value and remedy."""
    model = MODELS[flags.one_of("--model", args.model, MODELS)]
    scratch = CONTEXTS * model.context
    if args.scratch_tokens is not None:
        scratch = flags.tokens("--scratch-tokens", args.scratch_tokens)
    return Pool(
        model,
        flags.whole("--cp", args.cp, LEAST_RANKS, model.layers, f"ranks for {model.name}"),
        flags.one_of("--kv-dtype", args.kv_dtype, KV_DTYPES),
        flags.size("--mem", args.mem),
        flags.one_of("--mtp", args.mtp, MTP),
        scratch,
        flags.tokens("--chunked-prefill-size", args.chunked_prefill_size),
    )


def speed(args: argparse.Namespace) -> Speed:
    """Raises ConfigError, which names flag, value and remedy."""
    hides = args.upstream_hides
    return Speed(
        1e9 * flags.speed("--bandwidth-gb-s", args.bandwidth_gb_s),
        1e12 * flags.speed("--tflops", args.tflops),
        None if hides is None else flags.share("--upstream-hides", hides),
    )


def _listed(known: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in known.items())
