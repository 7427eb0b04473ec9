"""The tables of README and docs say what the package's records say."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.fixes import ATTACH_POINTS, FIXES, SETTINGS
from sglang_scaling_fixes.retry.metrics import RETRY_PROXY
from tools import reference


@pytest.mark.parametrize(("file", "name"), reference.tables())
def test_a_table_is_what_the_records_say(file: str, name: str) -> None:
    text = (reference.ROOT / file).read_text()
    assert reference.between(text, name) == reference.tables()[file, name], (
        f"the {name} of {file} are not up to date; renew them with `python -m tools.reference`"
    )


def test_every_record_is_in_one_of_them() -> None:
    text = "".join(reference.tables().values())
    families = [*(family for fix in FIXES for family in fix.metrics), RETRY_PROXY]
    for told in (
        *(reference.series(family, m) for family in families for m in family.metrics),
        *(setting.env for setting in SETTINGS),
        *(point.target for point in ATTACH_POINTS),
        *(f"| {said} |" for f in FIXES for said in (f.breaks, f.how, f.upstream, f.remove_when)),
    ):
        assert told in text, told


def test_only_what_is_between_the_markers_is_renewed() -> None:
    text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb old\n"
    assert reference.renewed(text, "x", "new\n") == text.replace("old", "new", 1)
    assert reference.between(reference.renewed(text, "x", ""), "x") == ""


@pytest.mark.parametrize(
    "text",
    ["", "<!-- x: begin -->\n", "<!-- x: end -->\n<!-- x: begin -->\n", "<!-- x: begin -->\n" * 2],
)
def test_markers_that_are_missing_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="x: begin"):
        reference.between(text, "x")
