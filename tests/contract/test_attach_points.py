"""Every place the plugin touches exists, as relied on, in every release it is for."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.attach import FIRST_RELEASE, LAST_RELEASE, AttachPoint
from sglang_scaling_fixes.fixes import ATTACH_POINTS
from tests.contract.wheel_ast import Wheel
from tests.contract.wheels import RELEASES, between


def test_the_releases_read_here_are_those_supported() -> None:
    assert (RELEASES[0], RELEASES[-1]) == (FIRST_RELEASE, LAST_RELEASE)


@pytest.mark.parametrize(
    ("release", "point"),
    [
        pytest.param(
            release,
            point,
            id=f"{release}-{point.target.rpartition(':')[2]}",
        )
        for release in RELEASES
        for point in ATTACH_POINTS
        if release in between(point.first, point.last)
    ],
)
def test_attach_point(wheel: Wheel, point: AttachPoint) -> None:
    wheel.require(point.target, point.params, point.uses)
