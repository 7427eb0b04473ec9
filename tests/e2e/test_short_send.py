"""A prompt that prefill rejects after decode has made room for it, on real servers.

The stock half is the negative control: it answers 200 from other users' KV.
"""

from __future__ import annotations

from typing import Any

import pytest

from sglang_scaling_fixes.lab.races import run as race
from tests.releases import OLD


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return race.run(OLD, "short-send", rounds=1)


def test_stock_answers_from_kv_that_nobody_wrote(result: dict[str, Any]) -> None:
    assert result["stock"]["corrupted_pages"] > 0
    assert (result["stock"]["wrong_outputs"], result["stock"]["refused"]) == (1, 0)


def test_armed_decode_refuses_with_a_clear_error(result: dict[str, Any]) -> None:
    fixed = result["fixed"]
    assert (fixed["refused"], fixed["corrupted_pages"], fixed["wrong_outputs"]) == (1, 0, 0)


def test_the_slots_come_back(result: dict[str, Any]) -> None:
    for half in ("stock", "fixed"):
        (one,) = result["rounds"][half]
        assert one["slots_shared"] > 0
        assert one["clean_afterwards"]
