"""The split pool over 2 and 4 gloo ranks, to the byte: what any reader can address is what stock's
unsplit pool holds, fed by the same kernels: the lab's in PyTorch, and once stock's in Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import controls
from .rank import DTYPES, LAYERS, PAGE, REQUESTS, Part, Seen
from .ranks import Ranks


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    started = Ranks(request.param)
    yield started
    started.end()


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    started = Ranks(2)
    yield started
    started.end()


@pytest.fixture
def interpreting() -> Iterator[Ranks]:
    started = Ranks(2, interpreted=True)
    yield started
    started.end()


EXAMPLES = 50  # of four batches and more: 200 at least
NEW = st.sampled_from([1, 2, 3, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 5])
"""New tokens: fewer than ranks, a page, and a bit more or less."""
REQUEST = st.integers(0, REQUESTS - 1)
PARTS = st.builds(Part, REQUEST, NEW, st.none() | st.none() | REQUEST)
BATCHES = st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=4, max_size=6)


def run(ranks: Ranks, batches: list[list[Part]]) -> list[list[Seen]]:
    return [ranks.ask("batch", parts) for parts in batches]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_any_rank_reads_is_what_an_unsplit_pool_holds(ranks: Ranks, dtype: str) -> None:
    """And the bytes that were sent are those of the unique prefix pages, in the same order on every
    rank: 0 without a prefix."""

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(BATCHES)
    def bytes_are_equal(batches: list[list[Part]]) -> None:
        ranks.ask("reset", dtype)
        for seen in run(ranks, batches):
            assert [one.differs for one in seen] == [[]] * len(seen)
            assert all(one.collectives == seen[0].collectives for one in seen)
            for one in seen:
                assert one.sent == one.unique
                assert len(one.collectives) in (0, 2 * LAYERS)

    bytes_are_equal()


# New; a chunk behind an unaligned prefix; a shared prefix; two with prefixes, one of them shared.
STORY = [
    [Part(0, 70)],
    [Part(0, 20)],
    [Part(1, 8, shares=0)],
    [Part(0, 5), Part(1, 66), Part(2, 3, shares=0)],
]


def test_stocks_own_kernels_agree(interpreting: Ranks) -> None:
    """Triton, interpreted: a second for what takes a GPU a microsecond."""
    for dtype in DTYPES:
        interpreting.ask("reset", dtype)
        told = run(interpreting, STORY)
        assert [seen[0].unique > 0 for seen in told] == [False, True, True, True]
        assert not any(one.differs for seen in told for one in seen)


@pytest.mark.parametrize(
    "control",
    [
        controls.owners_off_by_one,
        controls.nothing_new_in_the_scratch,
        controls.nobody_waits,
        controls.the_page_that_a_prefix_fills_partly_is_not_sent,
    ],
)
def test_control_a_fault_is_seen(two: Ranks, control: Callable[..., None]) -> None:
    two.ask("reset", "bf16")
    two.ask(control)
    try:
        told = run(two, STORY)
    finally:
        two.ask(controls.put_right)
    assert any(one.differs for seen in told for one in seen)


def test_control_plans_of_one_ranks_rows_would_send_different_bytes(two: Ranks) -> None:
    """Why a plan is made from the whole batch: a request with one new token is on one rank only."""
    batch = [(0, 640, 641), (1, 64, 65)]
    local = two.ask(controls.collectives_of_rank_local_plans, batch)
    assert local[0] != local[1]


def test_it_sends_a_25th_of_stocks_bytes(two: Ranks) -> None:
    """A pool of 27 times the prefix. Both pools serve the same batches in one run."""
    prefix = 5
    two.ask("reset", "bf16", pages=27 * prefix, stock=True)
    two.ask("batch", [Part(0, prefix * PAGE)])
    for seen in two.ask("batch", [Part(0, 10)]):
        assert not seen.differs
        assert 0 < seen.sent <= 1.05 * seen.unique
        assert seen.stock_sent >= 25 * seen.sent


def test_beside_attention_dp_it_sends_within_its_own_ranks() -> None:
    """Stock 0.5.16 to 0.5.23, without NCCL: a rank of the group is taken for one of the world."""
    four = Ranks(4)
    try:
        for number, (seen, said) in enumerate(four.ask("in_pairs", "bf16")):
            assert [one.differs for one in seen] == [[], []]
            assert seen[1].sent > 0
            assert ("is not part of group" in said) == (number >= 2)
    finally:
        four.end()


def test_tokens_are_moved_as_they_lie(two: Ranks) -> None:
    """Stock takes a token's slot for a page of index keys."""
    for right, said in two.ask("moved", "bf16"):
        assert right and "out of bounds" in said


def test_sizes_are_said_as_they_are_held(ranks: Ranks) -> None:
    ranks.ask("reset", "packed", pages=200)
    for sizes in ranks.ask("sizes"):
        assert sizes["said"] == sizes["held"]
