"""`sglang-scaling-fixes lab serve`: its flags, and the servers it starts."""

from __future__ import annotations

import argparse
import json

from sglang_scaling_fixes.console import say
from sglang_scaling_fixes.lab.glm import weights
from sglang_scaling_fixes.lab.servers import serve

MODELS = ("tiny-glm-5.1",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--pd", action="store_true", help="a prefill and a decode server")
    parser.add_argument("--hicache", action="store_true", help="a host tier for prefixes")
    parser.add_argument("--spec", action="store_true", help="speculative decoding, its MTP layer")
    parser.add_argument(
        "--cp", type=int, choices=(1, 2, 4), default=1, help="ranks that share a prefill (1)"
    )
    parser.add_argument(
        "--layer-split", action="store_true", help="each rank keeps some layers (--pd --cp)"
    )
    parser.add_argument(
        "--layers",
        type=int,
        choices=range(2, 17),
        default=weights.LAYERS,
        metavar="N",
        help="layers of the model beside its MTP layer, 2 to 16 (%(default)s)",
    )
    parser.add_argument("--packed", action="store_true", help="KV in packed fp8; else in bf16")
    parser.add_argument(
        "--once", action="store_true", help="ask one request, print it as JSON, end"
    )
    parser.add_argument(
        "flags", nargs="*", metavar="-- FLAG", help="for SGLang, for example -- --plugin"
    )


def run(args: argparse.Namespace) -> int:
    """Until Ctrl-C, or with --once until the answer. Raises LabError."""
    options = serve.Options(
        pd=args.pd,
        hicache=args.hicache,
        spec=args.spec,
        cp=args.cp,
        layer_split=args.layer_split,
        layers=args.layers,
        packed=args.packed,
        flags=tuple(args.flags),
    )
    try:
        answer = serve.run(options, progress=say, once=args.once)
    except KeyboardInterrupt:
        say("lab: servers ended")
        return 0
    print(json.dumps(answer, indent=2))
    return 0
