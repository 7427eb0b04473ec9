"""The table of all releases: how it is written, and that the fixes' records claim the same."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sglang_scaling_fixes.attach import FIRST_RELEASE
from sglang_scaling_fixes.fix import Fix
from sglang_scaling_fixes.fixes import FIX_NAMES, FIXES
from sglang_scaling_fixes.release import version_tuple
from tools import compatibility

CALLED = {"loaded": True, "reason": "called"}


def answer(plugin: dict[str, Any], state: str, reason: str) -> dict[str, Any]:
    fixes = [{"name": name, "state": state, "reason": reason} for name in FIX_NAMES]
    return {"plugin": plugin, "fixes": fixes}


def committed() -> dict[str, list[str]]:
    """`{what was asked: [the plugin, each fix]}`, without the numbers of reasons."""
    text = compatibility.DOCUMENT.read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 0.")]
    return {row[0]: [re.sub(r" \(\d+\)", "", cell) for cell in row[1:]] for row in rows}


def test_a_reason_is_written_once_and_numbered() -> None:
    rows = [
        ("0.5.9", answer({"loaded": False, "reason": "no loader"}, "unsupported", "no loader")),
        ("0.5.11", answer(CALLED, "unsupported", "it moved")),
        ("0.5.12", answer(CALLED, "armed", "proven")),
    ]
    text = compatibility.document(rows, "2026-01-02")
    assert "Result of 2026-01-02." in text
    dashes = " | ".join("–" for _ in FIX_NAMES)
    assert f"| 0.5.9 | not called (1) | {dashes} |" in text
    assert "| 0.5.11 | called | unsupported (2) | unsupported (2) |" in text
    assert "| 0.5.12 | called | armed | armed |" in text
    assert text.count("it moved") == text.count("no loader") == 1 and "proven" not in text


def test_every_release_was_asked_bare_and_patched() -> None:
    names = [f"{r}, patched" if with_patches else r for r, with_patches in compatibility.trees()]
    assert list(committed()) == names
    assert {"0.5.9, patched", "0.5.10.post1, patched", "0.5.23"} <= set(names)


def claimed(fix: Fix, release: str) -> str:
    """The state that the record of the fix gives for the release."""
    firsts = [first for first, _ in fix.stock if version_tuple(first) <= version_tuple(release)]
    last = firsts[-1]
    return "native" if last in fix.native else "unsupported" if last in fix.unsupported else "armed"


@pytest.mark.parametrize("fix", FIXES, ids=lambda fix: fix.name)
def test_what_was_found_is_what_the_records_claim(fix: Fix) -> None:
    column = FIX_NAMES.index(fix.name) + 1
    found = {
        release: row[column]
        for release, row in committed().items()
        if "patched" not in release and version_tuple(release) >= version_tuple(FIRST_RELEASE)
    }
    assert len(found) == 16
    assert found == {release: claimed(fix, release) for release in found}


def test_releases_without_a_loader_are_called_by_the_patch_only() -> None:
    rows = committed()
    for release in ("0.5.10", "0.5.10.post1"):
        assert rows[release][0] == "not called"
        assert rows[f"{release}, patched"] == [
            *("called", "armed", "native", "native", "unsupported", "unsupported", "armed")
        ]
    assert rows["0.5.9"][0] == rows["0.5.9, patched"][0] == "not called"
