"""The replay: what fits is found, who waits, and what each pass costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.layersplit.planner import plan
from sglang_scaling_fixes.layersplit.planner.capacity import Pool
from sglang_scaling_fixes.layersplit.planner.flags import size
from sglang_scaling_fixes.layersplit.planner.models import GLM_5_1, PAGE
from sglang_scaling_fixes.layersplit.planner.traffic import Speed
from sglang_scaling_fixes.layersplit.simulator import deployment
from sglang_scaling_fixes.layersplit.simulator.cost import Rates
from sglang_scaling_fixes.layersplit.simulator.deployment import Deployment
from sglang_scaling_fixes.layersplit.simulator.engine import Outcome, Replay
from sglang_scaling_fixes.layersplit.simulator.records import Request, reuse

BLOCK = 512
SPEED = Speed(bandwidth=300e9, flops=600e12)
RATES = Rates(SPEED, load=25e9, transfer=50e9, output_token=0.02)
POOL = Pool(GLM_5_1, 8, "fp8", size("--mem", "26.22GiB"), "none", 2 * GLM_5_1.context, 8192)
UNSPLIT, UPSTREAM, OURS = deployment.of(POOL, 0)


def turn(session: int, number: int, tokens: int, shared: int, arrival: float = 0.0) -> Request:
    """The turn's prompt begins with the first `shared` blocks of its session, and goes on with
    blocks of its own."""
    blocks = -(-tokens // BLOCK)
    ids = [(session, 0 if n < shared else number, n) for n in range(blocks)]
    when = None if number else arrival
    return Request(0, session, when, 1.0, tokens, 10, tuple(ids), BLOCK)


def conversations(sessions: int, turns: int, tokens: int, share: float = 0.9) -> list[Request]:
    """All begin at once; of every later turn `share` was in the first."""
    shared = int(share * tokens) // BLOCK
    return [
        turn(session, number, tokens, shared)
        for number in range(turns)
        for session in range(sessions)
    ]


def replayed(
    trace: Sequence[Request], one: Deployment, hold: float = 0.0, load: float = RATES.load
) -> Outcome:
    return Replay(trace, POOL, one, replace(RATES, hold=hold, load=load)).run()


def hits(outcome: Outcome) -> float:
    return sum(one.hit for one in outcome.answers) / sum(
        one.request.prompt for one in outcome.answers
    )


def test_the_deployments_are_the_planners() -> None:
    assert [one.cached for one in (UNSPLIT, UPSTREAM, OURS)] == [
        *(POOL.unsplit(), POOL.upstream(), POOL.ours())
    ]
    assert all(one.running == one.cached for one in (UNSPLIT, UPSTREAM, OURS))
    assert [one.kept_layers for one in deployment.of(POOL, 0)] == [78, 10, 10]
    draft = deployment.of(replace(POOL, mtp="split"), 0)
    assert [one.kept_layers for one in draft] == [79, 11, 10]


# -- capacity ------------------------------------------------------------------------------


def test_a_trace_that_fits_all_pools_is_found_alike_in_all() -> None:
    """4 x 100K tokens fit the smallest pool, 458K."""
    trace = conversations(4, 6, 100_000)
    assert [hits(replayed(trace, one)) for one in (UNSPLIT, UPSTREAM, OURS)] == [
        pytest.approx(reuse(trace))
    ] * 3
    assert reuse(trace) > 0.7


def test_a_trace_that_fits_only_the_split_pools_is_found_only_there() -> None:
    """30 x 100K tokens are 3.0M of 3.2M and 3.5M, and 6.5 times the unsplit pool."""
    trace = conversations(30, 4, 100_000)
    unsplit, upstream, ours = (replayed(trace, one) for one in (UNSPLIT, UPSTREAM, OURS))
    assert hits(ours) == hits(upstream) == pytest.approx(reuse(trace))
    assert hits(unsplit) < 0.1
    assert ours.compute < unsplit.compute / 2 and ours.ended < unsplit.ended


def test_control_with_equal_capacity_there_is_no_difference() -> None:
    trace = conversations(30, 4, 100_000)
    small = OURS.but(cached=UNSPLIT.cached, running=UNSPLIT.running, scratch=None)
    shrunk, unsplit = replayed(trace, small), replayed(trace, UNSPLIT)
    assert hits(shrunk) == hits(unsplit)
    assert shrunk.compute == unsplit.compute and shrunk.passes == unsplit.passes
    silent = replayed(trace, small.but(sends="unsplit"))
    assert silent == unsplit


@given(st.integers(1, 8), st.integers(1, 4), st.integers(BLOCK, 60_000), st.integers(0, 2**19))
def test_no_pool_finds_more_than_came_before_and_an_endless_one_finds_it_all(
    sessions: int, turns: int, tokens: int, room: int
) -> None:
    trace = conversations(sessions, turns, tokens)
    pool = UNSPLIT.but(cached=room, running=max(room, tokens + PAGE))
    found = replayed(trace, pool)
    assert len(found.answers) == len(trace) and hits(found) <= reuse(trace) + 1e-9
    endless = Replay(trace, POOL, pool, RATES, endless=True).run()
    assert hits(endless) == pytest.approx(reuse(trace))


# -- concurrency ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [40_000, 80_000, 120_000])
def test_so_many_requests_hold_kv_as_contexts_fit(tokens: int) -> None:
    """floor(T / L), of prompts that share nothing, where decode is slow to take them."""
    trace = [turn(session, 0, tokens, 0) for session in range(40)]
    for one in (UNSPLIT, OURS):
        rounded = PAGE * -(-tokens // PAGE)
        found = replayed(trace, one, hold=1e-2)
        assert found.most_held == min(one.running // rounded, 40)


def test_more_room_to_run_helps_only_while_decode_holds_kv() -> None:
    trace = [turn(session, 0, 120_000, 0) for session in range(12)]
    wide = UNSPLIT.but(running=OURS.running)
    assert replayed(trace, wide).ended == replayed(trace, UNSPLIT).ended
    assert replayed(trace, wide, hold=1e-3).ended < replayed(trace, UNSPLIT, hold=1e-3).ended


def test_a_request_longer_than_the_pool_is_refused_with_the_rest_of_its_session() -> None:
    trace = conversations(1, 3, 500_000) + conversations(2, 2, 1000)[1::2]
    found = replayed(trace, UNSPLIT)
    assert (found.refused, len(found.answers)) == (3, 2)
    assert replayed(trace, OURS).refused == 0
    assert replayed(trace, OURS.but(longest=200_000)).refused == 3


def test_a_scratch_closes_the_batch_and_refuses_nobody() -> None:
    """Three short turns with prefixes of 90K tokens fit one chunk, and no scratch of two."""
    trace = conversations(3, 2, 91_000, share=0.99)
    wide, narrow = (replayed(trace, OURS.but(scratch=room)) for room in (None, 2 * 91_008))
    assert len(wide.answers) == len(narrow.answers) == 6
    together = Replay(
        [*trace[:3], *(replace(one, arrival=100.0) for one in trace[3:])],
        POOL,
        OURS.but(scratch=2 * 91_008),
        RATES,
    ).run()
    alone = Replay(
        [*trace[:3], *(replace(one, arrival=100.0) for one in trace[3:])], POOL, OURS, RATES
    ).run()
    assert together.passes == alone.passes + 1


# -- cost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [40_000, 120_000])
def test_one_request_costs_what_the_planner_says(context: int) -> None:
    """The second turn of a conversation, alone: its compute and exposed time in all pools."""
    block = 200  # divides nine tenths of both contexts
    shared = 9 * context // 10
    first = Request(0, 0, 0.0, 0.0, shared, 1, tuple(range(shared // block)), block)
    more = tuple(range(10_000, 10_000 + (context - shared) // block))
    second = Request(0, 0, None, 1.0, context, 1, first.blocks + more, block)
    (row,) = plan.make(plan.Asked(POOL, [context], 0.9, SPEED))["rows"]
    for one in (UNSPLIT, UPSTREAM, OURS):
        both, cold = replayed([first, second], one), replayed([first], one)
        assert both.answers[1].hit == shared
        assert 1e3 * (both.compute - cold.compute) == pytest.approx(row["compute_ms"])
        exposed = 1e3 * (both.broadcast - cold.broadcast)
        assert exposed == pytest.approx(row["exposed_ms"].get(one.name, 0.0), rel=1e-3)
        waited = both.answers[1].ended - both.answers[1].arrived
        assert 1e3 * waited == pytest.approx(row["compute_ms"] + exposed)


def test_a_split_rank_loads_only_its_own_layers() -> None:
    """What the pool lost comes from the host: 78 layers to each rank, or 10."""
    trace = conversations(30, 3, 100_000)
    slow = 1e9
    unsplit, _, ours = (
        one.but(cached=UNSPLIT.cached, running=UNSPLIT.running)
        for one in deployment.of(POOL, 2000 << 30)
    )
    whole, split = (replayed(trace, one, load=slow) for one in (unsplit, ours))
    assert sum(one.loaded for one in whole.answers) == sum(one.loaded for one in split.answers) > 0
    assert whole.load > 0 and split.load < whole.load / 7
    assert replayed(trace, UNSPLIT, load=slow).load == 0


def test_twice_as_fast_comes_in_half_the_time() -> None:
    trace = [turn(session, 0, 1000, 0, arrival=10.0 * session) for session in range(5)]
    slow = Replay(trace, POOL, OURS, RATES).run()
    fast = Replay(trace, POOL, OURS, RATES, 2.0).run()
    assert [2 * one.arrived for one in fast.answers] == [one.arrived for one in slow.answers]


def test_a_turn_comes_after_the_answer_before_it() -> None:
    first, second = replayed(conversations(1, 2, 50_000), OURS).answers
    sent = 50_000 * POOL.row * 78 / RATES.transfer
    assert second.arrived > first.ended + 10 * RATES.output_token + 1.0
    assert second.arrived < first.ended + sent + 10 * RATES.output_token + 1.0 + 1e-6
