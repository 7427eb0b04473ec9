"""The patches as text, generated: for quilt, git and GNU patch, where the command is not at hand.

A hunk has no context, since context would be SGLang's lines. It is therefore placed by number,
and the patch brings a sentinel that tells a file it was not made for (`sentinel.py`).

    0002-index-k-wait.patch    a DEP-3 header, the sentinel, one hunk for each insertion
    series                     their names, in the order to apply them; quilt reads it
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from sglang_scaling_fixes.patches import sentinel
from sglang_scaling_fixes.patches.anchors import places
from sglang_scaling_fixes.patches.manifest import Manifest, Patch

Sources = Mapping[str, str]
"""`{file relative to the folder that holds sglang: stock's source}` of one release."""

SERIES = "series"


def file_name(manifest: Manifest, patch: Patch, release: str) -> str:
    """What a patch is called as a text: its number in the series, and its name."""
    return f"{manifest.series(release).index(patch) + 1:04d}-{patch.name}.patch"


def texts(manifest: Manifest, sources: Mapping[str, Sources]) -> dict[str, str]:
    """`{"RELEASE/FILE": text}` of every series. `sources`: of every release that has one.

    A patch that is the same for a later release lies there, and the series refers to it.
    """
    found: dict[str, str] = {}
    for release in reversed(manifest.releases()):
        names = []
        for patch in manifest.series(release):
            name, text = (
                file_name(manifest, patch, release),
                _text(manifest, patch, release, sources),
            )
            later = [path for path, known in found.items() if known == text]
            if not later:
                found[f"{release}/{name}"] = text
            names.append(f"../{later[0]}" if later else name)
        found[f"{release}/{SERIES}"] = "".join(f"{name}\n" for name in names)
    return dict(sorted(found.items()))


def _text(manifest: Manifest, patch: Patch, release: str, sources: Mapping[str, Sources]) -> str:
    parts = [_header(manifest, patch, release)]
    if patch.sentinel:
        name = file_name(manifest, patch, release)
        parts.append(_new_file(patch.sentinel, sentinel.text(manifest, patch, release, name)))
    series = manifest.series(release)
    before = series[: series.index(patch)]
    for file in patch.files(release):
        source = sources[release][file]
        own = places(source, patch.of(release, file))
        theirs = [i for other in before for i in other.of(release, file)]
        parts.append(f"--- a/{file}\n+++ b/{file}\n" + _hunks(own, places(source, theirs)))
    return "".join(parts)


def _hunks(own: list[tuple[int, str]], earlier: list[tuple[int, str]]) -> str:
    """`earlier`: what patches before this one in the series have put into the file by then."""
    text, grown = "", 0
    for number, lines in own:
        here = number + sum(other.count("\n") for at, other in earlier if at <= number)
        text += _hunk(here, here + grown, lines)
        grown += lines.count("\n")
    return text


def _hunk(old: int, new: int, lines: str) -> str:
    count = lines.count("\n")
    size = "" if count == 1 else f",{count}"
    return f"@@ -{old},0 +{new + 1}{size} @@\n" + _added(lines)


def _added(lines: str) -> str:
    return "".join(f"+{line}" for line in lines.splitlines(keepends=True))


def _new_file(name: str, text: str) -> str:
    first = text.replace(sentinel.OWN_HUNK, "", 1)
    count = first.count("\n")
    at = sentinel.OWN_HUNK_AT
    return (
        f"--- /dev/null\n+++ b/{name}\n@@ -0,0 +1,{count} @@\n{_added(first)}"
        f"--- a/{name}\n+++ b/{name}\n{_hunk(at, at, sentinel.OWN_HUNK)}"
    )


def _header(manifest: Manifest, patch: Patch, release: str) -> str:
    """In DEP-3's form, with fields of ours for what it has none for."""
    releases = manifest.alike(patch, release)
    targets = [f"{manifest.stock(release, file)} {file}" for file in patch.files(release)]
    cost = patch.cost + (f" ({patch.cost_command})" if patch.cost_command else "")
    return (
        f"Description: {patch.title}\n"
        + _folded(f"{patch.problem}\n\n{patch.fix}")
        + "Origin: vendor, sglang-scaling-fixes\n"
        + _field("Bug", patch.upstream)
        + "Forwarded: not-needed\n"
        + _field("Applies-To", ", ".join(releases))
        + _field("Reproduce", patch.reproduce)
        + _field("Test", patch.test)
        + _field("Cost", cost)
        + _field("Retires", patch.retires)
        + "Target-SHA256:\n"
        + "".join(f" {target}\n" for target in targets)
        + "\n"
    )


def _field(name: str, text: str) -> str:
    first, *rest = textwrap.wrap(f"{name}: {text}", 98, break_on_hyphens=False)
    return "".join(f"{line}\n" for line in (first, *(f" {line}" for line in rest)))


def _folded(text: str) -> str:
    """Continuation lines: a space before each, a dot for an empty one."""
    lines = []
    for paragraph in text.split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), 98, break_on_hyphens=False), "."]
    return "".join(f" {line}\n" for line in lines[:-1])
