"""The wheel of a release as a fixture, and tests in the order of the releases."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.contract.wheel_ast import Wheel
from tests.contract.wheels import ALL, WheelUnavailable, source


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Release by release, so that each is parsed once and then forgotten.

    With xdist, `--dist=worksteal` hands out contiguous runs of this order.
    """

    def order(item: pytest.Item) -> int:
        params = getattr(getattr(item, "callspec", None), "params", {})
        ours = Path(__file__).parent in item.path.parents
        return ALL.index(params["release"]) if ours and "release" in params else -1

    items.sort(key=order)


@functools.lru_cache(maxsize=1)  # a parsed release is some 100 MB
def read(release: str) -> Wheel:
    return Wheel(release, source(release))


@pytest.fixture
def wheel(release: str) -> Wheel:
    """The wheel of the test's `release` parameter; never skips."""
    try:
        return read(release)
    except WheelUnavailable as error:
        pytest.fail(str(error), pytrace=False)
