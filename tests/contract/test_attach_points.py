"""Every place the plugin touches exists, as relied on, in every release it is for."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.attach import FIRST_RELEASE, LAST_RELEASE, AttachPoint
from sglang_scaling_fixes.fixes import ATTACH_POINTS
from sglang_scaling_fixes.reclaim.points import ANSWERS
from tests.contract.wheel_ast import Wheel
from tests.contract.wheels import ARMED, RELEASES, between


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


PATCHED = ARMED[0]
FIXES = ("plugin", "safe-reclaim", "hicache-ordering", "resume")
"""What is attached in a release that is patched with `plugin-loader`."""


@pytest.mark.parametrize(
    ("release", "point"),
    [
        pytest.param(PATCHED, point, id=point.target.rpartition(":")[2])
        for point in ATTACH_POINTS
        if point.fix in FIXES and point != ANSWERS[0]
        if point.first == FIRST_RELEASE or PATCHED in between(point.first, point.last)
    ],
)
def test_attach_point_of_a_patched_release(wheel: Wheel, point: AttachPoint) -> None:
    """What a release had from the first with a loader on, the last without one has, too."""
    wheel.require(point.target, point.params, point.uses)
