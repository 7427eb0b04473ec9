"""`sglang-scaling-fixes layersplit simulate`: its flags, and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.layersplit.planner import flags, pool_flags
from sglang_scaling_fixes.layersplit.simulator import cost, picture, readers, report, simulate
from sglang_scaling_fixes.layersplit.simulator.progress import Bar

DESCRIPTION = (
    "A trace of requests through a model of a prefill: capacity, hit rate and goodput without a "
    "split, with upstream's, with ours. A real LRU over the trace's prefix blocks decides what is "
    "found; capacities, bytes and exposed times are those of `layersplit plan`. No model runs and "
    "nothing is measured."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("trace", metavar="TRACE", help="JSON lines; docs/layersplit.md says which formats")
    known = ", ".join([readers.AUTO, *readers.FORMATS])
    add("--format", default=readers.AUTO, metavar="NAME", help=f"{known} (%(default)s)")
    add("--block-size", metavar="TOKENS", help="of the trace's blocks (512; lmcache 64)")
    pool_flags.add_pool(parser)
    add("--faster", default="1", metavar="TIMES", help="bring the trace so much faster (1)")
    add("--ttft-limit", metavar="SECONDS", help="an answer that begins later is late (none)")
    add("--host-mem", metavar="SIZE", help="HiCache's memory of each rank: 200GiB (none)")
    pool_flags.add_speed(parser)
    add(
        "--load-gb-s",
        default="25",
        metavar="GB/S",
        help="assumed: from each rank's host, all ranks at once (%(default)s)",
    )
    add(
        "--transfer-gb-s",
        default="50",
        metavar="GB/S",
        help="assumed: to decode, all ranks together (%(default)s)",
    )
    add(
        "--hold-us",
        default="0",
        metavar="US",
        help="assumed: KV stays after it was sent, for each prompt token (%(default)s)",
    )
    add(
        "--output-ms",
        default="20",
        metavar="MS",
        help="assumed: of a token at decode (%(default)s)",
    )
    add("--json", action="store_true", help="machine-readable output")
    add("--svg", metavar="FILE", help="also draw a picture")


def run(args: argparse.Namespace) -> int:
    """Print the replay. Raises ConfigError."""
    asked_for = asked(args)
    if args.svg is not None:
        _write(args.svg, "", "a")  # can it be written? asked before a replay of minutes
    bar = Bar()
    try:
        found = simulate.run(asked_for, bar)
    finally:
        bar.close()
    if args.svg is not None:
        _write(args.svg, picture.svg(found), "w")
    print(json.dumps(found, indent=2) if args.json else report.text(found))
    return 0


def asked(args: argparse.Namespace) -> simulate.Asked:
    """Flags as numbers, and the trace. Raises ConfigError: flag or line, value, remedy."""
    pool = pool_flags.pool(args)
    rates = cost.Rates(
        pool_flags.speed(args),
        load=1e9 * flags.speed("--load-gb-s", args.load_gb_s),
        transfer=1e9 * flags.speed("--transfer-gb-s", args.transfer_gb_s),
        output_token=flags.time("--output-ms", args.output_ms) / 1e3,
        hold=flags.time("--hold-us", args.hold_us) / 1e6,
    )
    limit, host, block = args.ttft_limit, args.host_mem, args.block_size
    faster = flags.speed("--faster", args.faster)
    ttft_limit = None if limit is None else flags.time("--ttft-limit", limit)
    host_bytes = 0 if host is None else flags.size("--host-mem", host)
    if block is not None:
        block = flags.whole("--block-size", block, 1, 1 << 20, "tokens of a block")
    name = flags.one_of("--format", args.format, [readers.AUTO, *readers.FORMATS])
    path = Path(args.trace)
    name, trace = readers.read(path, name, block)
    return simulate.Asked(path.name, name, trace, pool, rates, host_bytes, faster, ttft_limit)


def _write(name: str, text: str, mode: str) -> None:
    try:
        with Path(name).open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(
            f"--svg {name!r}: {error.strerror}; name a file that can be written"
        ) from error
