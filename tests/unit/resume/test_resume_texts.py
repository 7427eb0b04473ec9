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


def test_where_the_steps_do_not_lead_the_text_comes_in_as_many_pieces() -> None:
    """Never in one: a parser says late what it is given at once."""
    found = texts.growing([1, 2, 3], of_words, "another text")
    assert found == [(1, "anot"), (2, "another "), (3, "another text")]
    assert texts.growing([], of_words, "") == [(0, "")]


def test_the_space_behind_a_prompt_is_stocks() -> None:
    """A tokenizer of words says none before the first; stock decodes it behind the prompt."""
    assert texts.growing([1, 2], of_words, " w1 w2") == [(1, " w1"), (2, " w1 w2")]


def test_a_text_at_some_numbers_of_tokens() -> None:
    grown = texts.growing(list("aé€b".encode()), of_bytes, "aé€b")
    assert texts.at(grown, [1, 2, 3, 7]) == [(1, "a"), (2, "a"), (3, "aé"), (7, "aé€b")]
    assert texts.at(grown, [3]) == [(3, "aé"), (7, "aé€b")]


class Lagging:
    """A parser as stock's are of tool calls: it says what its last two texts have in common."""

    def __init__(self) -> None:
        self._text, self.said = "", ""

    def read(self, text: str) -> str:
        pairs = zip(self._text, text, strict=False)
        common = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        new, self._text = common[len(self.said) :], text
        self.said = common
        return new


@given(
    st.lists(st.integers(0, 99), min_size=2, max_size=30),
    st.sets(st.integers(1, 29), min_size=1, max_size=12),
    st.data(),
)
def test_a_parser_goes_on_as_if_nothing_had_happened(
    ids: list[int], breaks: set[int], data: st.DataObject
) -> None:
    """Given in the pieces in which it read them; token by token it would leave words out."""
    counts = [*sorted(count for count in breaks if count < len(ids)), len(ids)]
    whole = Lagging()
    said = [whole.read(of_words(ids[:count])) for count in counts]
    cut = data.draw(st.integers(1, len(counts)))
    given_ids = ids[: counts[cut - 1]]
    grown = texts.growing(given_ids, of_words, of_words(given_ids))
    resumed = Lagging()
    for _, text in texts.at(grown, counts[:cut]):
        resumed.read(text)
    assert [resumed.read(of_words(ids[:count])) for count in counts[cut:]] == said[cut:]


def test_control_token_by_token_it_leaves_words_out() -> None:
    whole, resumed = Lagging(), Lagging()
    said = [whole.read(of_words(range(count))) for count in (2, 6, 8)]
    for count in range(1, 7):
        resumed.read(of_words(range(count)))
    assert resumed.read(of_words(range(8))) != said[2]


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
