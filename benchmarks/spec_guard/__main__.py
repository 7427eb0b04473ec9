"""The anomaly guard, measured on thousands of recorded requests.

python -m benchmarks.spec_guard            # record, then report: docs/spec-guard.svg
python -m benchmarks.spec_guard record     # one lab server, real text, clean and corrupt KV
python -m benchmarks.spec_guard report     # replay a recording through the detector
python -m benchmarks.spec_guard text       # how often real text repeats itself
python -m benchmarks.spec_guard honest     # what sound text is called an anomaly, simulated
python -m benchmarks.spec_guard cost       # microseconds per request and decoding step
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.spec_guard import recording
from sglang_scaling_fixes.console import say

RECORDING = Path(__file__).parent / "results" / "recording.jsonl.gz"
FIGURE = ROOT / "docs" / "spec-guard.svg"
CLEAN, CORRUPT, TOKENS = 2000, 15, 160


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(sys.argv[1:] if argv is None else argv)
    args.run(args)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spec_guard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers()
    making = commands.add_parser("record", help="send the requests and record them")
    telling = commands.add_parser("report", help="tables and the picture of a recording")
    for part in (parser, making):
        part.add_argument("--output", type=Path, default=RECORDING, metavar="FILE")
        part.add_argument("--clean", type=int, default=CLEAN, help=f"requests (default {CLEAN})")
        part.add_argument(
            "--corrupt", type=int, default=CORRUPT, help=f"per corruption (default {CORRUPT})"
        )
        part.add_argument(
            "--tokens", type=int, default=TOKENS, help=f"per clean request (default {TOKENS})"
        )
    telling.add_argument("recording", type=Path, nargs="?", default=RECORDING)
    for part in (parser, telling):
        part.add_argument("--figure", type=Path, default=FIGURE, metavar="FILE")
    parser.set_defaults(run=_all)
    making.set_defaults(run=_record)
    telling.set_defaults(run=lambda args: _report(args.recording, args.figure))
    commands.add_parser("text", help="how often real text repeats itself").set_defaults(run=_text)
    commands.add_parser("honest", help="what sound text is ended").set_defaults(run=_honest)
    commands.add_parser("cost", help="what a step costs").set_defaults(run=_cost)
    return parser.parse_args(argv)


def _record(args: argparse.Namespace) -> None:
    from benchmarks.spec_guard import record

    record.record(args.output, args.clean, args.corrupt, args.tokens)
    say(f"{args.output.name} written")


def _report(path: Path, picture: Path) -> None:
    from benchmarks.spec_guard import figure, report

    found = recording.read(path)
    print(report.report(found))
    picture.write_text(figure.figure(found))
    say(f"{picture.name} written")


def _all(args: argparse.Namespace) -> None:
    _record(args)
    _report(args.output, args.figure)


def _text(_args: argparse.Namespace) -> None:
    from benchmarks.spec_guard import repeats, texts

    print(repeats.report(texts.documents()))


def _honest(_args: argparse.Namespace) -> None:
    from benchmarks.spec_guard import honest

    print(honest.report())


def _cost(_args: argparse.Namespace) -> None:
    from benchmarks.spec_guard import cost

    print(cost.report())


if __name__ == "__main__":
    sys.exit(main())
