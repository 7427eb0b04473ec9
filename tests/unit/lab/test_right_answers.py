"""How an answer is compared with what is right."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.lab.races.reference import differing, margin


def test_outputs_differ_where_an_id_does_or_is_missing() -> None:
    assert differing([1, 2, 3], [1, 2, 3]) == 0
    assert differing([1, 9], [1, 2, 3]) == 2
    assert differing([], [1, 2]) == 2


def test_the_margin_is_that_of_the_closest_token() -> None:
    tops = [[[-0.1, 5, None], [-2.0, 6, None]], [[-0.5, 5, None], [-0.7, 6, None]]]
    body = {"meta_info": {"output_top_logprobs": tops}}
    assert margin(body) == pytest.approx(0.2)
    assert margin("no answer") == margin({}) == 0.0
