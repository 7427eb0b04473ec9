"""What a pool holds: the published figures, the bars, and what must be so for any deployment."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.layersplit import scratch
from sglang_scaling_fixes.layersplit.planner.capacity import MTP, Pool, owned_layers
from sglang_scaling_fixes.layersplit.planner.flags import size
from sglang_scaling_fixes.layersplit.planner.labels import PUBLISHED, published
from sglang_scaling_fixes.layersplit.planner.models import (
    GLM_5_1,
    KV_DTYPES,
    PAGE,
    index_bytes,
    kv_bytes,
)
from sglang_scaling_fixes.layersplit.schedule import SCRATCHES

NEAR = 0.001
CHUNK = 8192
BAR, BAR_SCRATCH = 3_519_000, 262_144
"""Tokens that ours is to hold with so many scratch tokens, where upstream published its own."""
PUBLISHED_POOL = Pool(GLM_5_1, 8, "fp8", size("--mem", "26.22GiB"), "none", BAR_SCRATCH, CHUNK)

POOLS = st.builds(
    Pool,
    model=st.just(GLM_5_1),
    ranks=st.integers(2, GLM_5_1.layers),
    dtype=st.sampled_from(list(KV_DTYPES)),
    memory=st.integers(0, 200 << 30),
    mtp=st.sampled_from(list(MTP)),
    scratch_tokens=st.integers(GLM_5_1.context, 8 * GLM_5_1.context),
    chunk=st.integers(1, 65_536),
)


def test_rows_have_the_widths_of_stocks_layouts() -> None:
    assert [kv_bytes(GLM_5_1, dtype) for dtype in ("bf16", "fp8", "fp8-raw")] == [1152, 656, 576]
    assert index_bytes(GLM_5_1) == 132


def test_published_capacities_are_reproduced() -> None:
    found = {"unsplit": PUBLISHED_POOL.unsplit(), "upstream": PUBLISHED_POOL.upstream()}
    assert {one.figure: one.tokens for one in PUBLISHED} == {
        "unsplit": 457_920,
        "upstream": 3_247_296,
    }
    for one in PUBLISHED:
        assert found[one.figure] == pytest.approx(one.tokens, rel=NEAR)
    assert [one["modelled_tokens"] for one in published()] == list(found.values())


@pytest.mark.parametrize("change", [{"dtype": "fp8-raw"}, {"mtp": "whole"}, {"ranks": 7}])
def test_control_another_deployment_does_not_reproduce_them(change: dict) -> None:
    assert replace(PUBLISHED_POOL, **change).upstream() != pytest.approx(3_247_296, rel=NEAR)


def test_ours_against_its_bar() -> None:
    """The scratch of the bar holds everything: prefixes, chunk and padding."""
    assert PUBLISHED_POOL.ours() >= BAR
    wider = replace(PUBLISHED_POOL, scratch_tokens=BAR_SCRATCH + PUBLISHED_POOL.chunk)
    assert wider.ours() < BAR


@pytest.mark.parametrize(
    ("mtp", "upstream", "ours"),
    [("none", 7.09, 7.69), ("whole", 6.58, 7.08), ("split", 6.58, 7.78)],
)
def test_times_the_unsplit_pool(mtp: str, upstream: float, ours: float) -> None:
    pool = replace(PUBLISHED_POOL, mtp=mtp)
    assert pool.upstream() / pool.unsplit() == pytest.approx(upstream, abs=0.005)
    assert pool.ours() / pool.unsplit() == pytest.approx(ours, abs=0.005)


@given(POOLS)
def test_a_scratch_is_whole_pages_and_holds_a_context_a_chunk_and_padding(pool: Pool) -> None:
    assert pool.scratch_rows % PAGE == 0
    assert 0 <= pool.scratch_rows - pool.scratch_tokens < PAGE
    assert pool.least_scratch >= pool.model.context + pool.chunk + PAGE


@given(POOLS, st.integers(1, 1000))
def test_a_server_starts_with_the_least_that_a_plan_asks_for(pool: Pool, requests: int) -> None:
    """And one with as many requests in a batch as there may be starts with no less."""
    found = scratch.size(pool.least_scratch, pool.chunk, requests, PAGE)
    assert found.prefix * PAGE >= pool.model.context
    less = scratch.size(pool.least_scratch - PAGE, pool.chunk, scratch.REQUESTS, PAGE)
    assert less.prefix * PAGE < pool.model.context


@given(st.integers(1, 200), st.integers(1, 200))
def test_ranks_own_every_layer_once_and_no_rank_two_more_than_another(
    layers: int, ranks: int
) -> None:
    owned = owned_layers(layers, ranks)
    assert len(owned) == ranks and sum(owned) == layers
    assert max(owned) - min(owned) <= 1 and list(owned) == sorted(owned, reverse=True)


def test_78_layers_over_8_ranks() -> None:
    assert owned_layers(78, 8) == (10, 10, 10, 10, 10, 10, 9, 9)


@given(POOLS, st.integers(0, 1 << 36))
def test_more_memory_never_holds_less(pool: Pool, more: int) -> None:
    richer = replace(pool, memory=pool.memory + more)
    for tokens in (Pool.unsplit, Pool.upstream, Pool.ours):
        assert tokens(richer) >= tokens(pool) >= 0
        assert tokens(pool) % PAGE == 0


@given(POOLS)
def test_ours_holds_more_exactly_where_its_scratches_are_smaller_than_upstreams(
    pool: Pool,
) -> None:
    scratches, page = SCRATCHES * pool.scratch_rows, PAGE
    if pool.mtp == "split":  # upstream has no such; its whole draft layer is one more in our favour
        pool = replace(pool, mtp="whole")
    if scratches <= pool.upstream():
        assert pool.ours() >= pool.upstream()
    elif scratches > pool.upstream() + 2 * page * pool.upstream_layers:
        assert pool.ours() < pool.upstream() or pool.ours() == pool.upstream() == 0


@given(POOLS)
def test_a_pool_takes_no_more_than_its_memory_and_no_page_would_fit_beside(pool: Pool) -> None:
    ours = pool.ours()
    if pool.memory >= pool.scratch_bytes:
        assert pool.memory_for(ours) <= pool.memory < pool.memory_for(ours + 1)
    else:
        assert ours == 0


@given(POOLS)
def test_a_split_draft_layer_never_costs_more_than_a_whole_one(pool: Pool) -> None:
    split, whole = replace(pool, mtp="split"), replace(pool, mtp="whole")
    assert split.ours() >= whole.ours()
    assert (split.unsplit(), split.upstream()) == (whole.unsplit(), whole.upstream())
