"""An `sglang` on a disk: which release it is, and which patches each of its files has.

Told by the digests of the files alone. A version may be missing (a checkout has none) or wrong
(somebody changed a file).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Literal

from sglang_scaling_fixes.attach import FIRST_RELEASE
from sglang_scaling_fixes.errors import ConfigError, ScalingFixesError
from sglang_scaling_fixes.patches import sentinel
from sglang_scaling_fixes.patches.manifest import Manifest, Names, Patch
from sglang_scaling_fixes.patches.series import file_name

State = Literal["applied", "not applied", "partial", "foreign"]
"""`partial`: some of the patch's files have it and some have not. `foreign`: a file is nobody's."""

LAYOUTS = ("", "python")
"""Where `sglang` lies: in site-packages, an unpacked wheel or sdist; in a checkout."""


class ForeignFile(ScalingFixesError):
    """A file is neither the release's nor one that was patched here. Nothing was changed."""


def sha256(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def read(file: Path) -> bytes | None:
    """None where there is no such file."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def find(path: Path) -> Path:
    """The folder that holds the package `sglang`, at `path` or in its folder `python`.

    Raises `ConfigError` where there is none.
    """
    for layout in LAYOUTS:
        root = path / layout
        if (root / "sglang" / "srt").is_dir():
            return root.resolve()
    raise ConfigError(
        f"--to {path}: neither sglang/srt nor python/sglang/srt is there; give the folder that "
        "holds the sglang package, or the top of a checkout"
    )


def installed() -> Path:
    """The folder that holds the `sglang` that this Python imports. Raises `ConfigError`."""
    spec = util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "--installed: SGLang is not installed in this environment; pip install sglang, or "
            "give a tree with --to PATH"
        )
    return Path(spec.origin).resolve().parents[1]


@dataclass(frozen=True)
class Tree:
    """The package below `root`, taken for that release, and the patches that are looked at."""

    manifest: Manifest
    root: Path
    release: str
    patches: tuple[Patch, ...]

    @functools.cached_property
    def files(self) -> dict[str, Names | None]:
        """`{file: patches that it has}` of every file of these patches; None: nobody's."""
        names = dict.fromkeys(f for p in self.patches for f in p.files(self.release))
        return {
            name: self.manifest.has(self.release, name, sha256(self.content(name)))
            for name in names
        }

    def content(self, file: str) -> bytes | None:
        """None where it is not there."""
        return read(self.root / file)

    def foreign(self) -> list[str]:
        """What is nobody's: files of the patches, and sentinels."""
        sentinels = [p.sentinel for p in self.patches if p.sentinel and self._sentinel(p) is None]
        return [name for name, has in self.files.items() if has is None] + sentinels

    def state(self, patch: Patch) -> State:
        """Of one of these patches."""
        has = [self.files[file] for file in patch.files(self.release)]
        parts = [None if names is None else patch.name in names for names in has]
        if patch.sentinel:
            parts.append(self._sentinel(patch))
        if None in parts:
            return "foreign"
        if len(set(parts)) > 1:
            return "partial"
        return "applied" if parts[0] else "not applied"

    def _sentinel(self, patch: Patch) -> bool | None:
        """Whether the sentinel is there; None where another file is in its place."""
        found = self.content(patch.sentinel)
        if found is None:
            return False
        return True if found == self.sentinel(patch) else None

    def sentinel(self, patch: Patch) -> bytes:
        """The sentinel that the patch brings."""
        name = file_name(self.manifest, patch, self.release)
        return sentinel.text(self.manifest, patch, self.release, name).encode()

    def require_known(self) -> None:
        """Raises `ForeignFile` naming every file that is nobody's."""
        if not (foreign := self.foreign()):
            return
        said = [
            f"{name} (SHA-256 {(sha256(self.content(name)) or 'none')[:16]})" for name in foreign
        ]
        raise ForeignFile(
            f"{self.root} is not SGLang {self.release} as released or patched here: "
            f"{', '.join(said)}; reinstall that release, or take back what was changed"
        )


def recognise(manifest: Manifest, root: Path, names: Iterable[str] = ()) -> Tree:
    """The tree below `root` as the release whose files it has: those of the patches `names`.

    Without names: all of the series. Of releases that fit equally, the last. It may have foreign
    files. Raises `ConfigError` for unknown names, and where not one file is of a release that
    there are patches for.
    """
    wanted = [manifest.patch(name) for name in names]
    for patch in wanted:
        if patch.kind == "upstream":
            raise ConfigError(
                f"patch {patch.name} is for upstream's source; use "
                f"`sglang-scaling-fixes patch export --to CHECKOUT {patch.name}`"
            )
    trees = []
    for release in manifest.releases():
        series = manifest.series(release)
        patches = tuple(p for p in series if not wanted or p in wanted)
        if patches and set(wanted) <= set(patches):
            trees.append(Tree(manifest, root, release, patches))
    if not trees:
        raise ConfigError(f"no release has all of {', '.join(names)}; apply them one by one")
    best = min(reversed(trees), key=_strangeness)
    if not _known(best):
        raise ConfigError(
            f"{root} is none of the releases that there are these patches for "
            f"({', '.join(tree.release for tree in trees)}): {', '.join(best.files)} are of "
            f"another one. Releases from {FIRST_RELEASE} on need none: install the plugin there"
        )
    return best


def _strangeness(tree: Tree) -> tuple[int, int, int]:
    """How little a tree is of its release: by the patches it is seen with, then by the series."""
    series = tree.manifest.series(tree.release)
    whole = Tree(tree.manifest, tree.root, tree.release, series)
    return len(tree.foreign()), len(whole.foreign()), -_known(tree)


def _known(tree: Tree) -> int:
    return sum(has is not None for has in tree.files.values())
