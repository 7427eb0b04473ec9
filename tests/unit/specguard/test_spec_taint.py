"""Suspect prefixes: who is kept away from them, and that nobody is forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.specguard import notify
from sglang_scaling_fixes.specguard.taint import PAGES, Taint, beginnings

PAGE = 4
BAD = [1, 2, 3, 4, 5, 6]


def test_only_requests_with_the_same_first_page_are_moved() -> None:
    taint = Taint(PAGE)
    assert taint.namespace(BAD) is None
    taint.add(BAD)
    assert taint.namespace(BAD) == taint.namespace([1, 2, 3, 4, 99]) == "kv-anomaly-0-1"
    assert taint.namespace([1, 2, 3, 99, 5]) is None
    assert taint.namespace([1, 2, 3]) is None  # less than a page is never cached


def test_a_second_anomaly_of_the_same_beginning_leaves_the_second_namespace_too() -> None:
    taint = Taint(PAGE)
    taint.add(BAD)
    taint.add(BAD)
    assert taint.namespace(BAD) == "kv-anomaly-0-2"


def test_schedulers_and_starts_have_namespaces_of_their_own() -> None:
    """A storage tier outlives them, and keeps by namespace what each has found suspect."""
    first, second = Taint(PAGE, "a"), Taint(PAGE, "b")
    first.add(BAD)
    second.add(BAD)
    assert first.namespace(BAD) != second.namespace(BAD)


def test_a_prompt_written_in_two_ways_is_suspect_in_both() -> None:
    taint = Taint(PAGE)
    taint.add(BAD)
    assert taint.namespace([7, 7, 7, 7], BAD) is not None
    assert taint.namespace([7, 7, 7, 7], [8, 8, 8, 8]) is None


def test_a_full_table_makes_everything_suspect_and_forgets_nobody() -> None:
    taint = Taint(PAGE, limit=3)
    bad = [[n, n, n, n] for n in range(5)]
    for prompt in bad:
        taint.add(prompt)
    seen = {taint.namespace(prompt) for prompt in bad}
    assert None not in seen
    assert taint.namespace([8, 8, 8, 8]) is not None


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), max_size=30), st.integers(1, 4)
)
def test_no_later_request_shares_a_namespace_with_a_suspect_page(
    prompts: list[list[int]], limit: int
) -> None:
    """Whatever came before: a beginning's namespace after an anomaly is one it never had."""
    taint = Taint(2, limit=limit)
    had: dict[tuple[int, ...], set[str | None]] = {}
    for prompt in prompts:
        page = tuple(prompt[:2])
        for other in [*had, page]:
            had.setdefault(other, set()).add(taint.namespace(other))
        taint.add(prompt)
        if len(prompt) >= 2:
            assert taint.namespace(prompt) not in had[page]


def test_another_server_learns_of_it_for_its_own_page_size() -> None:
    prompt = list(range(100))
    for page in (1, 16, 64):
        taint = Taint(page)
        taint.add_beginnings(beginnings(prompt))
        assert taint.namespace(prompt) == "kv-anomaly-0-1"
        assert taint.namespace([*reversed(prompt)]) is None


def test_a_page_size_that_is_not_described_makes_everything_suspect() -> None:
    taint = Taint(48)
    taint.add_beginnings(beginnings(list(range(100))))
    assert taint.namespace(list(range(500, 600))) is not None


def test_a_prompt_shorter_than_the_other_servers_page_is_not_cached_there() -> None:
    taint = Taint(64)
    taint.add_beginnings(beginnings(list(range(20))))
    assert len(taint) == 0


def test_digests_pass_through_json_and_through_stocks_message() -> None:
    import json

    known = beginnings(list(range(3000)))
    assert set(known) == set(PAGES)
    assert notify.read(json.dumps(known).encode()) == known
    assert notify.from_fields(notify.to_fields(known)) == known
    assert notify.from_fields({"pp_max_micro_batch_size": 8}) == {}


@pytest.mark.parametrize("value", [-1, 2**63, 1.5, True, "a", None])
@pytest.mark.parametrize("page", ["64", "63", "x", ""])
def test_whoever_may_set_a_servers_state_cannot_end_it(page: str, value: object) -> None:
    assert notify.from_fields({f"{notify.FIELD}{page}": value}) == {}


@given(st.binary(max_size=200))
def test_hostile_notifications_are_an_error_and_nothing_else(body: bytes) -> None:
    try:
        known = notify.read(body)
    except (ValueError, RecursionError):
        return
    assert set(known) <= set(PAGES)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"64": 1.5}',
        b'{"63": 1}',
        b'{"64": -1}',
        b'{"64": 9223372036854775808}',
        b'{"64": true}',
        b'{"x": 1}',
        b'{"64": "1"}',
        b" " * 5000,
    ],
)
def test_what_is_no_notification(body: bytes) -> None:
    with pytest.raises(ValueError):
        notify.read(body)
