"""`sglang-scaling-fixes layersplit plan`: its flags, and the plan it prints."""

from __future__ import annotations

import argparse
import json

from sglang_scaling_fixes.layersplit.planner import flags, plan, report
from sglang_scaling_fixes.layersplit.planner.capacity import MTP, Pool
from sglang_scaling_fixes.layersplit.planner.models import KV_DTYPES, MODELS
from sglang_scaling_fixes.layersplit.planner.traffic import Speed
from sglang_scaling_fixes.layersplit.scratch import CONTEXTS

LEAST_RANKS = 2
"""One rank has nothing to split."""

DESCRIPTION = (
    "What LayerSplit would hold, send and leave exposed: without a split, with upstream's, with "
    "ours. Nothing is run or measured; the plan says what each figure is and by which formula. "
    "Tokens: 40000, or 40K for 40,000. Sizes: GiB and MiB (powers of 2), GB and MB (powers of 10)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help=", ".join(MODELS))
    add("--cp", required=True, metavar="N", help="ranks of the prefill's context parallelism")
    add("--kv-dtype", default="fp8", metavar="DTYPE", help=f"{_listed(KV_DTYPES)} (%(default)s)")
    add("--mem", required=True, metavar="SIZE", help="for KV and index-K on each rank: 26.22GiB")
    add("--context", required=True, metavar="TOKENS,...", help="lengths of a request: 40K,80K")
    add("--hit-rate", default="0.9", metavar="SHARE", help="share of it in the pool (%(default)s)")
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
    add("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    """Print the plan. Raises ConfigError."""
    found = plan.make(asked(args))
    print(json.dumps(found, indent=2) if args.json else report.text(found))
    return 0


def asked(args: argparse.Namespace) -> plan.Asked:
    """The flags as numbers. Raises ConfigError, which names flag, value and remedy."""
    model = MODELS[flags.one_of("--model", args.model, MODELS)]
    scratch = CONTEXTS * model.context
    if args.scratch_tokens is not None:
        scratch = flags.tokens("--scratch-tokens", args.scratch_tokens)
    pool = Pool(
        model,
        flags.whole("--cp", args.cp, LEAST_RANKS, model.layers, f"ranks for {model.name}"),
        flags.one_of("--kv-dtype", args.kv_dtype, KV_DTYPES),
        flags.size("--mem", args.mem),
        flags.one_of("--mtp", args.mtp, MTP),
        scratch,
        flags.tokens("--chunked-prefill-size", args.chunked_prefill_size),
    )
    hides = args.upstream_hides
    speed = Speed(
        1e9 * flags.speed("--bandwidth-gb-s", args.bandwidth_gb_s),
        1e12 * flags.speed("--tflops", args.tflops),
        None if hides is None else flags.share("--upstream-hides", hides),
    )
    contexts = flags.token_list("--context", args.context)
    return plan.Asked(pool, contexts, flags.share("--hit-rate", args.hit_rate), speed)


def _listed(known: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in known.items())
