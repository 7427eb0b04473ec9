"""The text of an answer token by token: whole characters only, and in the end what stock made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.resume import texts


def of_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def of_words(ids: Sequence[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def test_words_keep_the_spaces_between_them() -> None:
    assert texts.growing([1, 2, 3], of_words, "w1 w2 w3") == [
        (1, "w1"),
        (2, "w1 w2"),
        (3, "w1 w2 w3"),
    ]


def test_a_character_is_shown_when_it_is_whole() -> None:
    ids = list("aé€".encode())
    assert texts.growing(ids, of_bytes, "aé€") == [(1, "a"), (3, "aé"), (6, "aé€")]


def test_a_cut_character_ends_with_what_stock_showed() -> None:
    ids = list("aé".encode())[:-1]
    assert texts.growing(ids, of_bytes, "a")[-1] == (2, "a")


def test_where_the_steps_do_not_lead_there_is_one() -> None:
    assert texts.growing([1, 2], of_words, "another text") == [(2, "another text")]
    assert texts.growing([], of_words, "") == [(0, "")]


@given(st.text(min_size=1, max_size=60))
def test_any_text_grows_to_itself(text: str) -> None:
    text = text.encode(errors="ignore").decode()
    ids = list(text.encode())
    steps = texts.growing(ids, of_bytes, text)
    assert steps[-1] == (len(ids), text)
    for (count, shown), (more, longer) in itertools.pairwise(steps):
        assert count <= more and longer.startswith(shown)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=60))
def test_words_grow_one_by_one(ids: list[int]) -> None:
    steps = texts.growing(ids, of_words, of_words(ids))
    assert [count for count, _ in steps] == list(range(1, len(ids) + 1))
    assert all(shown == of_words(ids[:count]) for count, shown in steps)
