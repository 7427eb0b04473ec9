"""Real text of this machine: prose, code and JSON of Python's library and its packages.

Nothing is downloaded. The text of another machine differs where its packages do, so a report
states how many documents of each class it drew from.
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

CLASSES = ("prose", "code", "json")
FIRST_ID, VOCAB = 3, 4096
"""Ids below `FIRST_ID` mean padding, begin and end to the lab's model."""
MOST = 1500
"""Documents of a class at most."""
LEAST, LARGEST = 4_000, 200_000
"""Characters of a document that is of use: a prompt must fit in, and a dump of data is no text."""

_WORD = re.compile(r"\w+|[^\w\s]")
_PROSE = ("*.rst", "*.md", "METADATA", "*LICENSE*", "*LICENCE*", "*COPYING*", "*NOTICE*")


def words(text: str) -> list[str]:
    """Words and single punctuation marks; white space is dropped."""
    return _WORD.findall(text)


def token(word: str) -> int:
    """A word's id in the lab's vocabulary: a stable hash, so that rare words share ids."""
    return FIRST_ID + zlib.crc32(word.encode()) % (VOCAB - FIRST_ID)


def documents() -> dict[str, list[str]]:
    """Distinct documents by class, in an order that depends on the files alone."""
    found = {
        "prose": [*_files(_PROSE), *_docstrings()],
        "code": _files(("*.py",)),
        "json": [*_files(("*.json",)), *_metadata()],
    }
    return {name: _distinct(texts) for name, texts in found.items()}


def _roots() -> list[Path]:
    """The standard library and the packages beside it (which may lie below it)."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


def _files(patterns: Sequence[str]) -> list[str]:
    texts = []
    for root in _roots():
        paths = sorted({path for pattern in patterns for path in root.rglob(pattern)})
        # A few packages have most of the files: every n-th of them, not the first ones.
        for path in paths[:: max(len(paths) // (2 * MOST), 1)]:
            if path.suffix in {".py", ".json"} and not any(
                p.endswith(path.suffix) for p in patterns
            ):
                continue
            try:
                if LEAST <= path.stat().st_size <= LARGEST:
                    texts.append(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError):
                continue
    return texts


def _docstrings() -> Iterator[str]:
    """Long docstrings of the same Python files: prose that every machine has."""
    for text in _files(("*.py",)):
        for doc in re.findall(r'"""(.*?)"""', text, re.DOTALL):
            if len(doc) >= LEAST // 2:
                yield doc


def _metadata() -> Iterator[str]:
    """Each installed package's metadata as JSON, for machines with few JSON files."""
    for package in sorted(metadata.distributions(), key=lambda d: d.metadata["Name"] or ""):
        files = [
            {"path": str(f), "size": f.size, "hash": f.hash.value if f.hash else None}
            for f in (package.files or [])[:150]
        ]
        yield json.dumps({**package.metadata.json, "files": files}, indent=1)


def _distinct(texts: Sequence[str]) -> list[str]:
    kept = list(dict.fromkeys(texts))
    random.Random(1).shuffle(kept)
    return kept[:MOST]


def excerpt(draw: random.Random, document: Sequence[int], length: int) -> Sequence[int]:
    """`length` tokens in a row from anywhere in the document; all of it if it is shorter."""
    start = draw.randrange(max(len(document) - length, 0) + 1)
    return document[start : start + length]
