"""Wheels as fixtures. `for_releases` keeps one release's tests in one xdist worker."""

from __future__ import annotations

import functools

import pytest
from wheel_ast import Wheel
from wheels import WheelUnavailable, source


@functools.lru_cache(maxsize=2)  # a parsed release is some 100 MB
def read(release: str) -> Wheel:
    return Wheel(release, source(release))


@pytest.fixture
def wheel(release: str) -> Wheel:
    """The wheel of the test's `release` parameter; never skips."""
    try:
        return read(release)
    except WheelUnavailable as error:
        pytest.fail(str(error), pytrace=False)
