"""What stock has counted when a step samples: played token by token, then asked for at once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.resume.penalties import counted

PROMPT_END = 99
outputs = st.lists(st.integers(0, 5), min_size=2, max_size=12)


def stock(output: list[int], sampled: int, *, overlap: bool, pair: bool) -> list[int]:
    """The tokens counted when `output[sampled]` is sampled, without a break.

    Each step that decodes counts the last token that is known when it is prepared.
    """
    counts = []
    for step in range(1, sampled + 1):
        known = output[: step - 1] if overlap else output[:step]
        if pair:
            known = known or output[:1]  # prefill's token, there from the start
        counts.append(known[-1] if known else PROMPT_END)
    return counts


@given(outputs, st.booleans(), st.data())
def test_alone_the_next_step_finds_what_it_would_have(
    output: list[int], overlap: bool, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(output) - 1))
    past = counted(output[:cut], PROMPT_END, overlap=overlap, pair=False)
    assert list(past.tokens) == stock(output, cut, overlap=overlap, pair=False)
    assert past.early is None


@given(outputs, st.booleans(), st.data())
def test_on_prefill_of_a_pair_too(output: list[int], overlap: bool, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(output) - 1))
    past = counted(output[:cut], PROMPT_END, overlap=overlap, pair=True)
    assert list(past.tokens) == stock(output, cut, overlap=overlap, pair=True)


@given(outputs, st.booleans(), st.data())
def test_on_decode_of_a_pair_the_sums_agree_from_the_first_step_on(
    output: list[int], overlap: bool, data: st.DataObject
) -> None:
    """Prefill's token is known there from the start, so the first step counts it."""
    cut = data.draw(st.integers(1, len(output) - 1))
    past = counted(output[:cut], PROMPT_END, overlap=overlap, pair=True, waiting=output[cut])
    sums = Counter(past.tokens)
    if past.early is not None:
        sums[past.early] -= 1
    for sampled in range(cut + 1, len(output)):
        known = output[:sampled] if not overlap else output[: max(sampled - 1, cut + 1)]
        sums[known[-1]] += 1
        right = Counter(stock(output, sampled, overlap=overlap, pair=True))
        assert +sums == +right, sampled
