"""The manifest is complete, and what is generated from it is up to date with the stock wheels."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.lab.wheels import OLDER_RELEASES
from sglang_scaling_fixes.patches import change, manifest
from sglang_scaling_fixes.patches.anchors import AnchorError, digest, inserted
from sglang_scaling_fixes.patches.manifest import Insertion, Patch
from sglang_scaling_fixes.paths import ROOT
from tests.patched_trees import KNOWN, contents, small
from tools import patches as renewed

RENEW = "renew it with `python -m tools.patches`"
OPERATORS = [patch for patch in KNOWN.patches if patch.kind != "upstream"]


def test_the_digests_are_up_to_date() -> None:
    assert manifest.FILE.read_text() == renewed.manifest_text(), RENEW


def test_the_texts_are_up_to_date() -> None:
    there = {
        path.relative_to(renewed.TEXTS).as_posix(): path.read_text()
        for path in renewed.TEXTS.rglob("*")
        if path.is_file()
    }
    assert there == renewed.texts(), RENEW


def test_every_old_release_has_a_series() -> None:
    assert KNOWN.releases() == OLDER_RELEASES


@pytest.mark.parametrize("patch", KNOWN.patches, ids=lambda patch: patch.name)
def test_a_record_says_all_there_is_to_say(patch: Patch) -> None:
    for said in (
        *(patch.title, patch.problem, patch.reproduce, patch.fix, patch.test, patch.cost),
        *(patch.upstream, patch.retires),
    ):
        assert said.strip()
    tests = [name.strip() for name in patch.test.split(",")]
    assert all((ROOT / name).is_file() for name in tests), tests
    # A figure has the command that measured it; without a figure none is claimed.
    assert bool(patch.cost_command) != patch.cost.startswith("not measured")
    assert patch.insertions


@pytest.mark.parametrize("release", OLDER_RELEASES)
def test_a_text_has_a_header_and_only_inserts(release: str) -> None:
    folder = renewed.TEXTS / release
    for name in (folder / "series").read_text().split():
        header, _, body = (folder / name).read_text().partition("\n\n--- ")
        for field in ("Description", "Origin", "Bug", "Reproduce", "Test", "Cost", "Retires"):
            assert f"\n{field}: " in f"\n{header}", (name, field)
        assert "\nTarget-SHA256:\n " in header
        lines = body.splitlines()[1:]
        assert all(line.startswith(("+", "@@ -", "--- a/")) for line in lines), name
        assert not any(line.startswith("-s") for line in lines)


@pytest.mark.parametrize("release", OLDER_RELEASES)
def test_numstat_shows_no_deletion(release: str, tmp_path: Path) -> None:
    stock, patched = small(release, tmp_path / "a"), small(release, tmp_path / "b")
    change.apply(KNOWN, patched)
    command = ["git", "diff", "--no-index", "--numstat", str(stock), str(patched)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    changed = {
        f for patch in KNOWN.series(release) for f in (*patch.files(release), patch.sentinel)
    }
    named = [row for row in rows if any(row[2].rstrip("}").endswith(f) for f in changed)]
    assert len(named) == len(changed)
    assert {row[1] for row in named} == {"0"} and "0" not in {row[0] for row in named}


def pairs(text: str) -> set[tuple[str, str]]:
    """Each line with the one after it. One line alone may be no more than Python's grammar."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return set(itertools.pairwise(lines))


@pytest.mark.parametrize("patch", KNOWN.patches, ids=lambda patch: patch.name)
def test_no_code_of_stocks_is_among_our_lines(patch: Patch) -> None:
    for release in patch.releases:
        for name, source in renewed.sources(KNOWN, release).items():
            stock = pairs(source)
            ours = [pairs(i.lines) for i in patch.insertions]
            assert not stock & set().union(*ours), name
            few = "\n".join(source.splitlines()[:30])
            assert stock & pairs(few)  # it would be noticed


ANCHOR = Insertion("a.py", "A.f", digest("  one = 1  "), "ours\n")
SOURCE = b"class A:\n    def f(self):\n        one = 1\n    def g(self):\n        one = 1\n"


def test_an_anchor_is_found_in_its_function_only() -> None:
    assert inserted(SOURCE, [ANCHOR]).split(b"\n")[2:4] == [b"        ours", b"        one = 1"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SOURCE.replace(b"one = 1", b"two = 2"), "A.f has 0 lines"),
        (SOURCE.replace(b"one = 1", b"one = 1\n        one = 1"), "A.f has 2 lines"),
        (SOURCE.replace(b"def f", b"def h"), "a.py has 0 of A.f"),
    ],
)
def test_an_anchor_that_is_not_there_as_often_as_expected_is_an_error(
    source: bytes, words: str
) -> None:
    with pytest.raises(AnchorError, match=words):
        inserted(source, [ANCHOR])


def test_a_patch_or_kind_that_is_unknown_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown patch 'x'; there are: plugin-loader, "):
        KNOWN.patch("x")
    record = {"name": "x", "kind": "other", "releases": [], "insert": []}
    with pytest.raises(ConfigError, match=r"x has kind 'other'; choose from loader, "):
        manifest.parsed({"patch": [record]})


def test_what_a_file_is_made_of_decides_its_digest_whatever_the_order(tmp_path: Path) -> None:
    """Two patches change the scheduler of each release: one after the other, in either order."""
    results = []
    for number, names in enumerate((("a", "b"), ("b", "a"))):
        tree = small(OLDER_RELEASES[-1], tmp_path / str(number))
        by_name = {"a": "plugin-loader", "b": "copies-follow-forwards"}
        for name in names:
            change.apply(KNOWN, tree, [by_name[name]])
        results.append({k: v for k, v in contents(tree).items() if "scaling-fixes" not in k})
    assert results[0] == results[1]
