"""What a plan and the translation of its tables cost, beside the forward pass that they are for.

    python -m benchmarks.layersplit.plan_cost

A lab server (two ranks, eight layers, packed KV) answers one request again and again from its
cached prefix; its batch is planned as often in this process, in turns with the requests. Both are
CPUs here: on a GPU the plan is some thirty small launches, of which none waits for the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.reports import machine
from sglang_scaling_fixes.lab.install import install
from sglang_scaling_fixes.lab.servers.serve import RELEASE, Options, prompt, serving
from sglang_scaling_fixes.layersplit import metadata, plan

RESULTS = Path(__file__).parent / "results"
PAGE, TOKENS = 64, 4096
PROMPT = 240
SPLIT = Options(
    pd=True,
    cp=2,
    layer_split=True,
    layers=8,
    packed=True,
    prefill_flags=("--plugin", "layer-split"),
)


@dataclass(frozen=True)
class Tables:
    """Those of a prefill pass that stock's backend makes."""

    page_table_1: torch.Tensor
    page_table_1_flattened: torch.Tensor
    real_page_table: torch.Tensor


def plan_seconds(prefix: int, new: int, pool_tokens: int) -> float:
    """Of one plan, its two tables, and the slots that 8 layers write twice."""
    length = prefix + new
    pages = pool_tokens // PAGE + 1
    row = torch.arange(PAGE, PAGE + length, dtype=torch.int32)[None]
    tables = Tables(row, row[0], row[:, ::PAGE] // PAGE)
    written = row[0, prefix:].long()
    began = time.perf_counter()
    made = plan.make(
        row,
        torch.tensor([0]),
        [prefix],
        [length],
        page_size=PAGE,
        pool_pages=pages,
        room=pages,
    )
    metadata.remapped(tables, made, paged_index=False)
    for _ in range(2 * SPLIT.layers):
        made.slot(written)
    return time.perf_counter() - began


def run(rounds: int) -> dict[str, object]:
    ratios, plans, passes = [], [], []
    asked = prompt(PROMPT)
    prefix = PROMPT // PAGE * PAGE
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(SPLIT, install(RELEASE), Path(folder)) as served,
    ):
        for _ in range(3):
            served.ask(asked, 1)
        for _ in range(rounds):
            made = plan_seconds(prefix, PROMPT - prefix, TOKENS)
            reply = served.ask(asked, 1)
            assert reply.prefill["cached_tokens"] == prefix
            whole = float(reply.prefill["e2e_latency"])
            ratios.append(made / whole)
            plans.append(made)
            passes.append(whole)
    return {
        "rounds": rounds,
        "plan_ms": round(1e3 * statistics.median(plans), 3),
        "prefill_ms": round(1e3 * statistics.median(passes), 1),
        "plan_over_prefill": round(statistics.median(ratios), 5),
        "plan_ms_of_120k_tokens": round(
            1e3 * statistics.median(plan_seconds(108_000, 8192, 3_520_320) for _ in range(20)), 3
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layersplit.plan_cost")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_cost.json")
    args = parser.parse_args()
    result = {**machine(), **run(args.rounds)}
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
