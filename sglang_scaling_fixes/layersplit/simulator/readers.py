"""The formats of traces that say which requests share a prefix."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.layersplit.simulator import aiperf, lines, lmcache, mooncake
from sglang_scaling_fixes.layersplit.simulator.records import Request

Reader = Callable[[Iterable[lines.Line], int], Iterator[Request]]
FORMATS: dict[str, Reader] = {
    "mooncake": mooncake.read,
    "aiperf": aiperf.read,
    "lmcache": lmcache.read,
}
AUTO = "auto"
LMCACHE_BLOCK = 64
"""Tokens. The blocks are our own there, so they are as small as a page of the pool."""


def read(path: Path, name: str, block: int | None) -> tuple[str, Sequence[Request]]:
    """The format's name and the requests, at least one. `name` may be `AUTO`, then the first line
    decides. `block`: tokens of a block, None for the format's own. Raises ConfigError."""
    found = lines.read(path)
    first = next(found, None)
    if first is None:
        raise ConfigError(f"TRACE {path}: no request in it; name a file of JSON lines")
    if name == AUTO:
        name = _looks_like(first)
    if block is None:
        block = LMCACHE_BLOCK if name == "lmcache" else mooncake.BLOCK
    return name, list(FORMATS[name](itertools.chain([first], found), block))


def _looks_like(line: lines.Line) -> str:
    fields = line.fields
    if "hash_ids" in fields:
        return "aiperf" if "session_id" in fields else "mooncake"
    if "input" in fields and "session_id" in fields:
        return "lmcache"
    raise ConfigError(
        f"TRACE {line.file}, line {line.number}: of no known format (no hash_ids, no input with "
        f"session_id); write --format {' or '.join(FORMATS)} to hear what it lacks"
    )
