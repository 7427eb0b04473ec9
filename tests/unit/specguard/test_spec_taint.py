"""Suspect prefixes: who is kept away from them, how often, how long, and how that ends."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.specguard.rooms import Rooms
from sglang_scaling_fixes.specguard.taint import BEGINNING, Limits, Outcome, Taint

PAGE = 64
SYSTEM = list(range(1000, 1000 + 4 * PAGE))
"""A prompt that many share."""


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Cache:
    """A Taint as requests and the guard use it."""

    def __init__(self, page: int = PAGE, origin: str = "0", **limits: int) -> None:
        self.clock = Clock()
        self.ended: list[str] = []
        self.taint = Taint(page, origin, self.clock, Limits(**limits), self.ended.append)

    def number(self, *prompts: Sequence[int], own: str = "") -> int:
        return self.taint.number(own, lambda length: [p[:length] for p in prompts])

    def accuse(
        self, name: int, *prompts: Sequence[int], ran_in: int | None = None, own: str = ""
    ) -> Outcome | None:
        """A request with this prompt; it ran in `ran_in`, or where it would be placed now."""
        number = self.number(*prompts, own=own) if ran_in is None else ran_in
        forms = [*prompts]
        path = self.taint.path(own, lambda length: [p[:length] for p in forms], forms, number)
        return None if path is None else self.taint.accuse(name, path)


def asking(*more: int) -> list[int]:
    return [*SYSTEM, *more, *range(2 * PAGE)]


def test_only_requests_with_the_same_beginning_are_moved() -> None:
    cache = Cache()
    assert cache.number(SYSTEM) == 0
    assert cache.accuse(1, asking(1)) == "namespace"
    assert cache.number(asking(1)) == cache.number([*SYSTEM[:PAGE], 7]) == 1
    assert cache.number([*SYSTEM[: PAGE - 1], 7, *SYSTEM]) == 0
    assert cache.number(SYSTEM[: PAGE - 1]) == 0  # less than a page is never cached


def test_with_pages_of_one_token_not_everybody_with_the_same_first_token_is_moved() -> None:
    """The control is the page: everybody's prompt begins with it."""
    cache = Cache(page=1)
    cache.accuse(1, [0, *SYSTEM])
    assert cache.taint.beginning == BEGINNING
    assert cache.number([0, *range(500)]) == 0
    assert cache.number([0, *SYSTEM[: BEGINNING - 1]]) == 1
    assert Cache(page=48).taint.beginning == 96  # whole pages


def test_a_path_that_is_shorter_than_a_beginning_is_covered_whole() -> None:
    cache = Cache(page=4)
    cache.accuse(1, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert cache.number([1, 2, 3, 4, 5, 6, 7, 8]) == 1
    assert cache.number([1, 2, 3, 4, 5, 6, 7, 99, *range(100)]) == 0
    assert cache.accuse(2, [1, 2, 3]) is None
    cache.taint.withdraw(1)
    assert cache.number([1, 2, 3, 4, 5, 6, 7, 8]) == 0


def test_another_namespace_shares_no_kv_and_is_not_moved() -> None:
    cache = Cache()
    cache.accuse(1, SYSTEM, own="tenant a")
    assert cache.number(SYSTEM, own="tenant a") == 1
    assert cache.number(SYSTEM, own="tenant b") == cache.number(SYSTEM) == 0


def test_a_prompt_written_in_two_ways_is_suspect_in_both() -> None:
    cache = Cache()
    other = [5] * 200
    cache.accuse(1, SYSTEM, other)
    assert cache.number(SYSTEM) == cache.number(other) == 1
    assert cache.number([7] * 200, [8] * 200) == 0


def test_schedulers_and_starts_have_namespaces_of_their_own() -> None:
    """A storage tier outlives them, and keeps by namespace what each has found suspect."""
    first, second = Taint(PAGE, "a"), Taint(PAGE, "b")
    assert first.name(1) != second.name(1)
    assert first.name(0) is None


# -- it is no weapon ----------------------------------------------------------------------------


def test_one_request_a_second_does_not_keep_everybodys_prefix_cold() -> None:
    """The control: with no interval, each of them moves everybody who shares the beginning."""
    moves = {}
    for interval in (1000, 0):
        cache = Cache(interval=interval, life=10**9)
        seen = set()
        for second in range(100):
            cache.clock.now += 30
            cache.accuse(second, asking(second))
            seen.add(cache.number(asking(10_000)))
        moves[interval] = len(seen)
    assert moves == {1000: 3, 0: 100}  # once in 1,000 passes


def test_meanwhile_the_accused_prompt_itself_is_moved_and_nobody_else() -> None:
    cache = Cache()
    cache.accuse(1, asking(1))
    assert cache.accuse(2, asking(2)) == "path"
    assert cache.number(asking(2)) == cache.number([*asking(2), 5]) == 2
    assert cache.number(asking(3)) == cache.number(SYSTEM) == 1
    assert cache.accuse(3, asking(2)) == "path"
    # But few times: such a prompt may be nothing but what others share.
    found = [cache.accuse(10 + n, asking(10 + n)) for n in range(10)]
    assert found.count("path") == Limits().paths - 2
    assert found.count("limited") == 12 - Limits().paths
    assert cache.number(asking(2)) == 3 and cache.number(SYSTEM) == 1


def test_a_prompt_of_the_beginning_alone_moves_it_once() -> None:
    cache = Cache()
    assert cache.accuse(1, SYSTEM[:PAGE]) == "namespace"
    assert cache.accuse(2, SYSTEM[:PAGE]) == "limited"
    assert cache.number(SYSTEM) == 1


def test_who_ran_where_nobody_goes_any_more_moves_nobody() -> None:
    cache = Cache()
    cache.accuse(1, asking(1))
    cache.clock.now = 10**5
    assert cache.accuse(2, asking(2), ran_in=0) == "covered"
    assert cache.number(SYSTEM) == 1
    assert cache.accuse(1, asking(1), ran_in=0) == "covered"  # told twice
    assert cache.accuse(3, asking(3), ran_in=1) == "namespace"
    assert cache.number(SYSTEM) == 2


def test_a_narrow_suspicion_covers_no_wider_accusation() -> None:
    """The prompt alone is left; who ran before the beginning was moved is not covered by that."""
    cache = Cache()
    cache.accuse(1, asking(1))
    cache.accuse(2, asking(2))
    cache.taint.withdraw(1)
    cache.clock.now = 10**5
    assert cache.number(asking(3)) == 0
    assert cache.accuse(3, asking(2), ran_in=0) == "namespace"
    assert cache.number(asking(3)) == 3


def test_a_full_table_lets_the_oldest_suspicion_go_and_moves_nobody_else() -> None:
    cache = Cache(suspicions=3)
    prompts = [[n] * PAGE for n in range(5)]
    for n, prompt in enumerate(prompts):
        cache.accuse(n, prompt)
    assert [cache.number(prompt) for prompt in prompts] == [0, 0, 3, 4, 5]
    assert cache.number([9] * PAGE) == 0
    assert cache.ended == ["dropped", "dropped"]
    assert len(cache.taint) == 3


def test_suspicion_ends() -> None:
    cache = Cache(life=100)
    cache.accuse(1, SYSTEM)
    cache.clock.now = 99
    assert cache.number(SYSTEM) == 1
    cache.clock.now = 100
    assert cache.number(SYSTEM) == 0
    assert cache.ended == ["expired"] and len(cache.taint) == 0
    cache.clock.now = 10**5
    assert cache.accuse(2, SYSTEM) == "namespace"
    assert cache.number(SYSTEM) == 2  # never the number of another suspicion


def test_where_kv_is_stored_suspicion_does_not_end() -> None:
    cache = Cache()
    cache.taint = Taint(PAGE, "0", cache.clock, Limits(life=None))
    cache.accuse(1, SYSTEM)
    cache.clock.now = 10**12
    assert cache.number(SYSTEM) == 1


# -- false alarms -------------------------------------------------------------------------------


def test_a_false_alarm_brings_the_old_namespace_back() -> None:
    cache = Cache()
    cache.accuse(1, asking(1))
    assert not cache.taint.withdraw(99)
    assert cache.taint.withdraw(1)
    assert cache.number(asking(1)) == cache.number(SYSTEM) == 0
    assert cache.ended == ["false_alarm"]
    assert not cache.taint.withdraw(1)


def test_a_false_alarm_clears_nobody_but_itself() -> None:
    """Somebody may repeat himself behind a prompt whose KV really is corrupt."""
    cache = Cache()
    cache.accuse(1, asking(1))
    cache.accuse(2, asking(2), ran_in=0)  # it read what the first one read
    cache.taint.withdraw(1)
    assert cache.number(SYSTEM) == 1
    cache.taint.withdraw(2)
    assert cache.number(SYSTEM) == 0


def test_a_false_alarm_inside_the_interval_does_not_clear_what_came_before() -> None:
    cache = Cache()
    cache.accuse(1, asking(1))
    for name in range(2, 12):
        cache.accuse(name, asking(name))
        cache.taint.withdraw(name)
    assert cache.number(SYSTEM) == 1


def test_a_withdrawn_beginning_is_not_moved_again_within_the_interval() -> None:
    """Else accusing and withdrawing in turn would be the weapon."""
    cache = Cache()
    cache.accuse(1, asking(1))
    cache.taint.withdraw(1)
    assert cache.accuse(2, asking(2)) == "path"
    assert cache.number(SYSTEM) == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["accuse", "withdraw", "pass"]),
            st.lists(st.integers(0, 1), min_size=2, max_size=5),
            st.integers(0, 8),
        ),
        max_size=40,
    )
)
def test_no_later_request_shares_a_namespace_with_a_suspect_path(
    steps: list[tuple[str, list[int], int]],
) -> None:
    """Whatever came before. What the limits do not cover is exempt: they say so."""
    cache = Cache(page=BEGINNING, interval=5, life=10**9)
    live: dict[int, tuple[list[int], int]] = {}
    for name, (what, word, number) in enumerate(steps):
        prompt = [token for token in word for _ in range(BEGINNING)]
        if what == "accuse":
            ran_in = min(number, cache.number(prompt))
            if cache.accuse(name, prompt, ran_in=ran_in) != "limited":
                live[name] = prompt, ran_in
        elif what == "withdraw" and live:
            cleared = sorted(live)[number % len(live)]
            cache.taint.withdraw(cleared)
            del live[cleared]
        else:
            cache.clock.now += number
        for accused, ran_in in live.values():
            assert cache.number([*accused, 7]) > ran_in


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 2), min_size=1, max_size=4)), max_size=40
    )
)
def test_nothing_is_left_of_suspicions_that_are_over(steps: list[tuple[bool, list[int]]]) -> None:
    cache = Cache(page=4, interval=3)
    for name, (is_long, word) in enumerate(steps):
        cache.clock.now += 1
        cache.accuse(name, [token for token in word for _ in range(70 if is_long else 5)])
    for name in range(len(steps)):
        cache.taint.withdraw(name)
    cache.clock.now += 10
    taint = cache.taint
    assert len(taint) == 0
    assert [taint._by_key, taint._by_name, taint._wholes, taint._short] == [{}, {}, {}, {}]
    cache.accuse(-1, [9] * 100)
    assert len(taint._opened) == 1 and not any(taint._paths.values())


def test_rooms_are_remembered_and_the_oldest_forgotten() -> None:
    taint, rooms = Taint(PAGE), Rooms(limit=2)
    path = taint.path("", lambda n: [SYSTEM[:n]], [SYSTEM], 0)
    for room in (1, 2, 3):
        rooms.note(room, path)
    rooms.note(3, None)  # used again, by one that shares nothing
    assert [rooms.get(room) is path for room in (1, 2, 3)] == [False, True, False]
