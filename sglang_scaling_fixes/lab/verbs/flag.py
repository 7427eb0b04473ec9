"""The flag of commands that can write KV with either transport."""

from __future__ import annotations

import argparse
from typing import get_args

from sglang_scaling_fixes.lab.verbs import Transport


def add_transport_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--transport",
        choices=get_args(Transport),
        default="tcp",
        help="what Mooncake writes KV with: tcp (default), or rdma over verbs in software",
    )
