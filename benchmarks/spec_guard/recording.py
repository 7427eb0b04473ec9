"""What is kept of each request: enough to replay the detector over it, token by token.

One JSON object per line, gzipped; the first line describes the run.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 1
DRAFTS = 3
"""Drafted tokens in one verification of the lab's server."""


@dataclass(frozen=True)
class Corruption:
    """As `lab/faults/corrupt.py` takes it; `after` in generated tokens."""

    kind: str
    share: float
    after: int

    @property
    def label(self) -> str:
        return f"{self.kind}, {self.share:.0%}, at {self.after}"


@dataclass(frozen=True)
class Record:
    """One request. Generated: one token by prefill, then 1 + a per digit `a` of `accepted`."""

    name: str
    group: str  # prose, code, json, copy
    prompt: int  # tokens
    accepted: str  # one digit per verification: the drafts it accepted
    ids: tuple[int, ...]
    cached: int  # tokens of the prompt that were cached: none, or the request is not alone
    merged: int  # verifications that came in one chunk with the next: known together only
    role: str  # "clean", "long"; "twin", clean for comparison; "again", a twin's repetition
    corruption: Corruption | None = None  # then the role is "corrupt"
    twin: str | None = None  # the clean request with the same prompt

    @property
    def verifications(self) -> int:
        return len(self.accepted)

    @property
    def drafts_accepted(self) -> int:
        return sum(map(int, self.accepted))

    @property
    def accept_length(self) -> float:
        return 1 + self.drafts_accepted / max(self.verifications, 1)

    @property
    def accept_rate(self) -> float:
        return self.drafts_accepted / max(self.verifications * DRAFTS, 1)


@dataclass(frozen=True)
class Recording:
    """A run: where and how it was made, and its requests."""

    about: dict[str, Any]
    records: tuple[Record, ...]


def write(path: Path, about: dict[str, Any], records: Iterable[Record]) -> None:
    # Without a name or a time in its header: the same recording is the same file.
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
    ):
        for line in ({"format": FORMAT, **about}, *map(asdict, records)):
            packed.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def read(path: Path) -> Recording:
    """ValueError for a file that is none of ours."""
    with gzip.open(path, "rt") as lines:
        about = json.loads(next(lines))
        if about.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a recording of format {FORMAT}")
        return Recording(about, tuple(_record(json.loads(line)) for line in lines))


def _record(values: dict[str, Any]) -> Record:
    known = {field.name for field in fields(Record)}
    if set(values) != known:
        raise ValueError(f"a record has {sorted(values)}, not {sorted(known)}")
    values["ids"] = tuple(values["ids"])
    if values["corruption"] is not None:
        values["corruption"] = Corruption(**values["corruption"])
    return Record(**values)
