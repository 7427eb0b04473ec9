"""The scripts in tests/races: what happens is what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model import scripts


@pytest.mark.parametrize("path", scripts.races(), ids=lambda path: path.stem)
def test_race(path: Path, request: pytest.FixtureRequest) -> None:
    said = path.read_text()
    happens = scripts.run(said)
    if request.config.getoption("--rewrite-races", default=False):
        path.write_text(happens)
    else:
        assert happens == said
    assert "!!!" not in happens
    assert "overdue" not in happens
