"""Renews what follows from the patches' manifest: its digests, and the texts in `patches/`.

    python -m tools.patches

Reads the stock wheels. Run it after every change of the manifest and of the sentinel;
`tests/contract/test_patch_texts.py` fails until then.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator

from sglang_scaling_fixes.lab import wheels
from sglang_scaling_fixes.patches import manifest, series
from sglang_scaling_fixes.patches.anchors import inserted
from sglang_scaling_fixes.patches.manifest import Manifest, Patch
from sglang_scaling_fixes.patches.tree import sha256
from sglang_scaling_fixes.paths import ROOT
from sglang_scaling_fixes.release import version_tuple

MARK = "# digests: written by `python -m tools.patches`\n"
TEXTS = ROOT / "patches"


def manifest_text() -> str:
    """The manifest with the digests of the stock files, bare and with every set of patches."""
    text = manifest.FILE.read_text().partition(MARK)[0]
    known = manifest.parsed(tomllib.loads(text))
    return text + MARK + "".join(_digests(known))


def texts() -> dict[str, str]:
    """`{"RELEASE/FILE": text}`: what `patches/` has to have."""
    known = manifest.load()
    return series.texts(known, {r: sources(known, r) for r in known.releases()})


def sources(known: Manifest, release: str) -> dict[str, str]:
    """The stock files that patches of the release change."""
    names = {file for patch in _of(known, release) for file in patch.files(release)}
    stock = wheels.source(release)
    return {name: (stock / name).read_text() for name in sorted(names)}


def _of(known: Manifest, release: str) -> list[Patch]:
    return [patch for patch in known.patches if release in patch.releases]


def _digests(known: Manifest) -> Iterator[str]:
    for release in sorted({r for p in known.patches for r in p.releases}, key=version_tuple):
        patches = _of(known, release)
        for file, source in sources(known, release).items():
            yield f'\n[[file]]\nreleases = ["{release}"]\npath = "{file}"\n'
            for names in manifest.combinations(patches, release, file):
                chosen = [patch for patch in patches if patch.name in names]
                insertions = [i for patch in chosen for i in patch.of(release, file)]
                digest = sha256(inserted(source.encode(), insertions))
                yield (
                    f'stock = "{digest}"\n[file.with]\n'
                    if not names
                    else (f'"{" ".join(names)}" = "{digest}"\n')
                )


def main() -> None:
    manifest.FILE.write_text(manifest_text())
    manifest.load.cache_clear()
    wanted = texts()
    for old in TEXTS.glob("*/*"):
        if f"{old.parent.name}/{old.name}" not in wanted:
            old.unlink()
    for path, text in wanted.items():
        (TEXTS / path).parent.mkdir(parents=True, exist_ok=True)
        (TEXTS / path).write_text(text)


if __name__ == "__main__":
    main()
