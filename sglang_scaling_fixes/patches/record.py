"""What a patched tree keeps for the way back: the originals, and what was about to be done.

    sglang/.scaling-fixes/state.json       the release, and the digest that each file is to have
    sglang/.scaling-fixes/originals/SHA    the files as they were released

It is there from before the first file changes until the last one is stock's again, so that a
process that is killed leaves a tree that can be told and healed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.patches.tree import read, sha256

FOLDER = Path("sglang", ".scaling-fixes")
_STATE = "state.json"
_ORIGINALS = "originals"


@dataclass(frozen=True)
class Record:
    """What is in `state.json`."""

    release: str
    patches: list[str]
    """Those that the tree is to have."""
    stock: dict[str, str | None]
    """`{file: SHA-256}` as released, of every original that is kept; None: there is none."""
    goal: dict[str, str | None]
    """The same of what is changed, with the patches that it is to have; None: it is to go."""
    was: dict[str, str | None]
    """The same, before that."""
    finished: bool = False
    """Whether the last rename was done when this was written."""

    def interrupted(self, root: Path) -> bool:
        """Whether a change was not finished: a file is not yet what it was to become."""
        return not self.finished and any(
            sha256(read(root / name)) != digest for name, digest in self.goal.items()
        )


def load(root: Path) -> Record | None:
    """None in a tree that was never patched here. Raises `ConfigError` if it cannot be read."""
    try:
        return Record(**json.loads((root / FOLDER / _STATE).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{root / FOLDER / _STATE} cannot be read ({error}); reinstall SGLang and delete "
            f"{root / FOLDER}"
        ) from error


def save(root: Path, record: Record, originals: Mapping[str, bytes | None] | None = None) -> None:
    """Keep originals, then the record; both are on the disk when this returns."""
    folder = root / FOLDER
    (folder / _ORIGINALS).mkdir(parents=True, exist_ok=True)
    for content in (originals or {}).values():
        if content is not None:
            _put(folder / _ORIGINALS / str(sha256(content)), content)
    _put(folder / _STATE, json.dumps(asdict(record), indent=1).encode())
    sync(folder.parent)


def original(root: Path, record: Record, file: str) -> bytes | None:
    """A file as it was released. Raises `ConfigError` where it is not kept as it was."""
    digest = record.stock[file]
    if digest is None:
        return None
    kept = read(root / FOLDER / _ORIGINALS / digest)
    if sha256(kept) != digest:
        raise ConfigError(
            f"the original of {file} is not kept in {root / FOLDER} as it was; reinstall SGLang "
            "and delete that folder"
        )
    return kept


def drop(root: Path) -> None:
    """The tree is stock's again: nothing is kept. The record goes first: without it, what is left
    means nothing."""
    (root / FOLDER / _STATE).unlink(missing_ok=True)
    if (root / FOLDER).exists():
        shutil.rmtree(root / FOLDER)
        sync((root / FOLDER).parent)


def write(file: Path, content: bytes) -> None:
    """The file has this content, and the disk has it, when this returns."""
    with file.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def sync(folder: Path) -> None:
    """The disk has the names of the folder when this returns."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(file: Path, content: bytes) -> None:
    """Whole or not at all, whatever is there."""
    beside = file.with_name(f"{file.name}.new")
    write(beside, content)
    beside.replace(file)
    sync(file.parent)
