"""A minute of load with aborts, a kill and stalls: everything right, and every slot back."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.lab.races import soak
from tests.releases import NEW


@pytest.mark.long
def test_a_minute() -> None:
    result = soak.run(NEW, 1.0)
    assert soak.passed(result), result
    assert result["right"] > 0
    assert result["digested"] > 0
    assert result["aborts"] > 0 and result["kills"] > 0 and result["stalls"] > 0
    assert result["requests"] == sum(
        result[end] for end in ("right", "aborted", "refused", "hung_up")
    )
