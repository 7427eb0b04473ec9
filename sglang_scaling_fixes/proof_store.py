"""What was proven here before, kept so that it need not be proven again for the same files.

A proof attaches the fixes to the release's own classes. For that it imports what a scheduler
imports, which takes ten seconds or more. It is kept for the files, the distributions, the
environment and the RDMA devices that it was made with; any change of one asks for another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_scaling_fixes import machine

_KEPT = 32
"""Proofs kept, the newest. One is about a kilobyte."""

_NO_MATTER = frozenset({"_", "SHLVL", "PWD", "OLDPWD", "TERM", "COLUMNS", "LINES"})
"""Variables that change from one shell to the next and that nobody here reads."""


@dataclass(frozen=True)
class Proof:
    """An answer of `loading_probe.load` in which everything asked for was in force."""

    answer: dict[str, Any]
    at: str
    """When it was given: ISO 8601, UTC."""
    kept: bool
    """Whether it was given earlier and kept, rather than now."""


def folder() -> Path:
    """Where proofs are kept: below XDG_CACHE_HOME, or ~/.cache."""
    named = machine.here.env.get("XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "sglang-scaling-fixes" / "proofs"


def key(state: str, env: Mapping[str, str]) -> str:
    """Of what a proof is one: `state` (see `loading_probe`) in the environment `env`, with the RDMA
    devices that this machine or container shows.
    """
    variables = sorted((name, value) for name, value in env.items() if name not in _NO_MATTER)
    return hashlib.sha256(repr((state, variables, machine.here.rdma())).encode()).hexdigest()


def read(name: str) -> Proof | None:
    """The proof kept under this key, None where there is none that can be read."""
    try:
        found = json.loads((folder() / f"{name}.json").read_text())
        return Proof(found["answer"], found["at"], kept=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(name: str, answer: dict[str, Any]) -> Proof:
    """Keep this answer, if this user can write there, and drop the oldest ones."""
    proof = Proof(answer, datetime.now(UTC).isoformat(timespec="seconds"), kept=False)
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder(), delete=False) as file:
            json.dump({"answer": answer, "at": proof.at}, file)
        os.replace(file.name, folder() / f"{name}.json")
        kept = sorted(folder().iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in kept[:-_KEPT]:
            path.unlink()
    return proof
