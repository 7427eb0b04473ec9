"""Compute, bytes and exposed time of a forward."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.layersplit.planner import flops
from sglang_scaling_fixes.layersplit.planner.capacity import Pool
from sglang_scaling_fixes.layersplit.planner.flops import layer_flops
from sglang_scaling_fixes.layersplit.planner.models import GLM_5_1, PAGE
from sglang_scaling_fixes.layersplit.planner.traffic import Forward, Speed, forwards, layer_runs

POOL = Pool(GLM_5_1, 8, "fp8", 28 * 10**9, "none", 2 * GLM_5_1.context, 8192)
SPEED = Speed(300e9, 600e12)
SLOW = replace(SPEED, bandwidth=1e9)
VOCABULARY = 154_880
"""Of GLM-5: embedding and output head are no part of a layer."""
FORWARDS = st.builds(Forward, st.integers(0, 150_000), st.integers(1, 8192))
CLOSE = 1e-9
"""Seconds: rounding of sums."""


def weights(experts: int) -> int:
    """Parameters of all layers, with so many routed experts in each; by what a token computes."""
    model = replace(GLM_5_1, experts_per_token=experts)
    return sum(
        flops._query_weights(model)
        + flops._indexer_weights(model)
        + model.heads * model.value * (model.kv_lora + model.hidden)
        + (flops._dense_weights if n < model.dense_layers else flops._expert_weights)(model)
        for n in range(model.layers)
    )


def test_the_widths_add_up_to_the_published_parameters() -> None:
    assert weights(GLM_5_1.experts) + 2 * VOCABULARY * GLM_5_1.hidden == pytest.approx(
        744e9, rel=0.005
    )
    assert weights(GLM_5_1.experts_per_token) == pytest.approx(40e9, rel=0.005)


@pytest.mark.parametrize(
    ("context", "seconds"), [(40_000, 0.105), (80_000, 0.251), (120_000, 0.438)]
)
def test_compute_of_a_request(context: int, seconds: float) -> None:
    """At 600 TFLOP/s on 8 GPUs and a hit rate of 0.9; estimated apart from this code."""
    of_request = forwards(context, 0.9, POOL.chunk)
    found = sum(layer.compute for one in of_request for layer in one.layers(POOL, SPEED))
    assert found == pytest.approx(seconds, rel=0.005)


@given(st.integers(0, 5000), st.integers(0, 5000), st.none() | st.integers(1, 4000))
def test_tokens_seen_are_counted_one_by_one(prefix: int, new: int, most: int | None) -> None:
    each = (prefix + n + 1 for n in range(new))
    assert flops._seen(prefix, new, most) == sum(
        seen if most is None else min(seen, most) for seen in each
    )


@given(FORWARDS, st.integers(1, 8191))
def test_compute_of_a_forward_is_that_of_its_chunks(forward: Forward, first: int) -> None:
    first = min(first, forward.new)
    parts = [(forward.prefix, first), (forward.prefix + first, forward.new - first)]
    for dense in (True, False):
        one = layer_flops(GLM_5_1, dense=dense, prefix=forward.prefix, new=forward.new)
        two = [layer_flops(GLM_5_1, dense=dense, prefix=p, new=n) for p, n in parts]
        assert one.total == sum(part.total for part in two)


@pytest.mark.parametrize(
    ("context", "hit_rate", "expected"),
    [
        (40_000, 0.9, [(36_000, 4000)]),
        (120_000, 0.9, [(108_000, 8192), (116_192, 3808)]),
        (10_000, 0.0, [(0, 8192), (8192, 1808)]),
        (10_000, 1.0, [(9999, 1)]),
        (1, 1.0, [(0, 1)]),
        (100_000, 0.29, [(29_000, 8192)]),
    ],
)
def test_forwards_of_a_request(
    context: int, hit_rate: float, expected: list[tuple[int, int]]
) -> None:
    found = [(one.prefix, one.new) for one in forwards(context, hit_rate, POOL.chunk)]
    assert found[: len(expected)] == expected
    assert sum(new for _, new in found) == context - found[0][0]


def test_bytes_are_whole_pages_of_the_prefix_for_every_layer() -> None:
    one = Forward(PAGE + 1, 10)
    assert one.our_bytes(POOL) == 2 * PAGE * (656 + 132) * 78
    assert one.our_bytes(replace(POOL, mtp="whole")) == one.our_bytes(POOL)
    assert one.our_bytes(replace(POOL, mtp="split")) == 2 * PAGE * (656 + 132) * 79
    assert one.upstream_bytes(POOL) == POOL.upstream() * (656 + 132) * 78
    assert Forward(0, 10).our_bytes(POOL) == 0 < Forward(0, 10).upstream_bytes(POOL)


@given(FORWARDS)
def test_the_layers_transfers_are_the_forwards_bytes(forward: Forward) -> None:
    for mtp in ("none", "whole", "split"):
        pool = replace(POOL, mtp=mtp)
        layers = list(forward.layers(pool, SPEED))
        for sent, expected in (
            ([layer.ours for layer in layers], forward.our_bytes(pool)),
            ([layer.upstream for layer in layers], forward.upstream_bytes(pool)),
        ):
            assert sum(one.transfer for one in sent) * SPEED.bandwidth == pytest.approx(expected)
            assert all(-CLOSE <= one.exposed <= one.transfer + CLOSE for one in sent)


def test_ours_is_exposed_in_layer_0_only() -> None:
    layers = list(Forward(108_000, 8192).layers(POOL, SPEED))
    assert layers[0].ours.hidden == 0 < layers[0].ours.exposed
    assert [layer.ours.exposed for layer in layers[1:]] == [0] * 77
    assert all(layer.ours.hidden > 0 for layer in layers[1:])


def test_control_a_slow_link_is_exposed_in_every_layer() -> None:
    layers = list(Forward(108_000, 8192).layers(POOL, SLOW))
    for before, layer in itertools.pairwise(layers):
        assert layer.ours.exposed == pytest.approx(layer.ours.transfer - before.compute)
        assert layer.ours.hidden == pytest.approx(before.compute)


@given(FORWARDS)
def test_upstream_always_exposes_its_index(forward: Forward) -> None:
    fast = Speed(1e15, 600e12, upstream_hides=1.0)
    index = POOL.upstream() * POOL.index / fast.bandwidth
    for layer in list(forward.layers(POOL, fast))[1:]:
        assert layer.upstream.exposed >= index * (1 - CLOSE)


def test_the_share_that_hides_upstreams_kv() -> None:
    forward = Forward(108_000, 8192)
    exposed = [
        sum(
            layer.upstream.exposed
            for layer in forward.layers(POOL, replace(SPEED, upstream_hides=s))
        )
        for s in (0.0, None, 1.0)
    ]
    assert exposed[0] == pytest.approx(forward.upstream_bytes(POOL) / SPEED.bandwidth)
    assert exposed[0] > exposed[1] > exposed[2]


def test_by_default_all_but_the_attention_of_a_layer_hides_upstreams_kv() -> None:
    """Between two layers of one kind: the MLP of one, the projections and indexer of the next."""
    forward = Forward(36_000, 4000)
    one = layer_flops(GLM_5_1, dense=False, prefix=forward.prefix, new=forward.new)
    layers = list(forward.layers(POOL, SPEED))
    assert layers[40].compute == pytest.approx(one.total / (SPEED.flops * POOL.ranks))
    assert layers[40].upstream.hidden == pytest.approx(
        layers[40].compute * (1 - one.attention / one.total)
    )


@given(FORWARDS, st.sampled_from([SPEED, SLOW]))
def test_ours_sends_and_exposes_no_more_than_upstream_while_the_prefix_fits_its_pool(
    forward: Forward, speed: Speed
) -> None:
    assert forward.prefix + PAGE <= POOL.upstream()
    assert forward.our_bytes(POOL) <= forward.upstream_bytes(POOL)
    layers = list(forward.layers(POOL, speed))
    ours, upstream = (
        sum(getattr(layer, who).exposed for layer in layers) for who in ("ours", "upstream")
    )
    assert ours <= upstream + CLOSE


@given(
    st.lists(FORWARDS, min_size=1, max_size=4),
    st.sampled_from(["none", "whole", "split"]),
    st.sampled_from([SPEED, SLOW, replace(SLOW, upstream_hides=0.5)]),
)
def test_layers_of_a_batch_are_those_of_its_requests_together(
    batch: list[Forward], mtp: str, speed: Speed
) -> None:
    """Layer by layer: compute adds up, prefixes travel together, upstream's pool travels once."""
    pool = replace(POOL, mtp=mtp)
    alone = [list(one.layers(pool, speed)) for one in batch]
    together = [layer for count, layer in layer_runs(batch, pool, speed) for _ in range(count)]
    assert len(together) == pool.unsplit_layers
    before = 0.0
    for number, layer in enumerate(together):
        of_each = [layers[number] for layers in alone]
        assert layer.compute == pytest.approx(sum(one.compute for one in of_each))
        assert layer.ours.transfer == pytest.approx(sum(one.ours.transfer for one in of_each))
        assert layer.ours.exposed == pytest.approx(max(layer.ours.transfer - before, 0), abs=CLOSE)
        assert {one.upstream.transfer for one in of_each} == {layer.upstream.transfer}
        assert layer.upstream.exposed <= min(one.upstream.exposed for one in of_each) + CLOSE
        before = layer.compute
