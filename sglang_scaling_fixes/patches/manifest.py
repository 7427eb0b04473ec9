"""The manifest: what each patch is, and what the files of each release look like with it.

Data and not prose, so that the texts, the command and the tests read the same; TOML and not
Python, so that other tools can read it, too. `python -m tools.patches` renews its digests.
"""

from __future__ import annotations

import functools
import itertools
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.release import version_tuple

FILE = Path(__file__).with_name("manifest.toml")
KINDS = ("loader", "backport", "upstream")

Kind = Literal["loader", "backport", "upstream"]
Names = frozenset[str]
"""Names of patches; what a file has of them."""
NONE: Names = frozenset()


@dataclass(frozen=True)
class Insertion:
    """Lines of ours beside one line of stock's."""

    file: str
    """Relative to the folder that holds `sglang`."""
    within: str
    """The class or function that holds the anchor, as `Class.method`; empty: the whole file."""
    line: str
    """The anchor: the first 16 hex digits of the SHA-256 of one line of stock's, without the
    white space around it. `count` lines within `within` have it."""
    lines: str
    """Ours, ending in a newline; indented as the anchor is when they are inserted."""
    below: bool = False
    """Whether they go below the anchor; else above it."""
    count: int = 1
    releases: tuple[str, ...] = ()
    """The releases it is for; empty: all of the patch's."""


@dataclass(frozen=True)
class Patch:
    """One record of the manifest. `series.py` says what becomes of the words."""

    name: str
    kind: Kind
    releases: tuple[str, ...]
    title: str
    problem: str
    reproduce: str
    fix: str
    test: str
    cost: str
    """What was measured, or `not measured`."""
    upstream: str
    retires: str
    insertions: tuple[Insertion, ...]
    cost_command: str = ""
    sentinel: str = ""
    """The file that checks the patch at import, relative to the folder that holds `sglang`. No
    release has it. Empty for what goes upstream."""
    unit_test: str = ""
    """For what goes upstream: where its test lies in a checkout. Ours has the same name, in
    `upstream/`."""
    needs_plugin: bool = False
    """Whether its lines import this package, so that SGLang cannot start without it."""

    def of(self, release: str, file: str | None = None) -> tuple[Insertion, ...]:
        """Its insertions into that release, or into one file of it."""
        return tuple(
            i
            for i in self.insertions
            if (not i.releases or release in i.releases) and file in (None, i.file)
        )

    def files(self, release: str) -> tuple[str, ...]:
        """The files of stock's that it changes there, in the order of the manifest."""
        return tuple(dict.fromkeys(insertion.file for insertion in self.of(release)))


@dataclass(frozen=True)
class Manifest:
    """All patches, in the order in which a series applies them."""

    patches: tuple[Patch, ...]
    digests: Mapping[tuple[str, str], Mapping[Names, str]] = field(default_factory=dict)
    """`{(release, file): {patches that it has: SHA-256}}`; with no patch it is stock's."""

    def patch(self, name: str) -> Patch:
        """Raises `ConfigError` naming the patches there are."""
        for patch in self.patches:
            if patch.name == name:
                return patch
        known = ", ".join(patch.name for patch in self.patches)
        raise ConfigError(f"unknown patch {name!r}; there are: {known}")

    def series(self, release: str) -> tuple[Patch, ...]:
        """What an operator applies to that release, in this order."""
        return tuple(p for p in self.patches if p.kind != "upstream" and release in p.releases)

    def files(self, release: str) -> frozenset[str]:
        """The files of stock's that the series of that release changes."""
        return frozenset(file for patch in self.series(release) for file in patch.files(release))

    def upstream(self) -> tuple[Patch, ...]:
        """What goes upstream; each is of its own."""
        return tuple(p for p in self.patches if p.kind == "upstream")

    def releases(self) -> tuple[str, ...]:
        """The releases with a series, oldest first."""
        found = {r for p in self.patches if p.kind != "upstream" for r in p.releases}
        return tuple(sorted(found, key=version_tuple))

    def stock(self, release: str, file: str) -> str:
        """The SHA-256 of the file as released."""
        return self.digests[release, file][NONE]

    def has(self, release: str, file: str, digest: str | None) -> Names | None:
        """The patches that a file with this SHA-256 has; None where it is of nobody we know."""
        for names, known in self.digests[release, file].items():
            if known == digest:
                return names
        return None

    def alike(self, patch: Patch, release: str) -> tuple[str, ...]:
        """The releases whose files, those that the patch changes, are the same as that one's."""
        files = patch.files(release)
        return tuple(
            other
            for other in patch.releases
            if patch.files(other) == files
            and all(self.digests[other, f] == self.digests[release, f] for f in files)
        )


def combinations(patches: Iterable[Patch], release: str, file: str) -> list[tuple[str, ...]]:
    """Every set of patches, in their order, that the file may have: of those that change it."""
    names = [patch.name for patch in patches if file in patch.files(release)]
    return [chosen for n in range(len(names) + 1) for chosen in itertools.combinations(names, n)]


@functools.cache
def load(file: Path = FILE) -> Manifest:
    """The manifest of this package, or that in `file`."""
    return parsed(tomllib.loads(file.read_text()))


def parsed(data: Mapping[str, Any]) -> Manifest:
    """Raises `ConfigError` for a record that is incomplete, or of an unknown kind."""
    patches = tuple(_patch(record) for record in data["patch"])
    digests = {
        (release, record["path"]): {
            frozenset(names.split()): digest
            for names, digest in {"": record["stock"], **record["with"]}.items()
        }
        for record in data.get("file", ())
        for release in record["releases"]
    }
    return Manifest(patches, digests)


def _patch(record: Mapping[str, Any]) -> Patch:
    fields = {name: value for name, value in record.items() if name not in ("insert", "releases")}
    if fields["kind"] not in KINDS:
        raise ConfigError(
            f"{FILE.name}: {fields['name']} has kind {fields['kind']!r}; choose from "
            f"{', '.join(KINDS)}"
        )
    insertions = tuple(_insertion(insert) for insert in record["insert"])
    return Patch(**fields, releases=tuple(record["releases"]), insertions=insertions)


def _insertion(record: Mapping[str, Any]) -> Insertion:
    """`above` or `below` of a record is the anchor."""
    below = "below" in record
    return Insertion(
        file=record["file"],
        within=record.get("within", ""),
        line=record["below" if below else "above"],
        lines=record["lines"],
        below=below,
        count=record.get("count", 1),
        releases=tuple(record.get("releases", ())),
    )
