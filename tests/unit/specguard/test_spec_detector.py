"""The rules over a request's counters: what they find, when, and what they leave alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.specguard import detector
from sglang_scaling_fixes.specguard.detector import Anomaly, Rules, Watch, repetition

DEPTH = 3
PUBLISHED = Rules()
NEW_TEXT = list(range(100_000))


def run(
    steps: Iterable[int],
    rules: Rules = PUBLISHED,
    output: Sequence[int] = NEW_TEXT,
    depth: int = DEPTH,
) -> tuple[Anomaly | None, Watch]:
    """Feed accepted drafts, a verification each; `output` is what all of it generated."""
    watch = Watch(rules)
    accepted = 0
    for number, more in enumerate(steps, 1):
        accepted += more
        tokens = number + accepted
        found = watch.observe(rules, number, accepted, depth, output[:tokens])
        if found is not None:
            return found, watch
    return None, watch


def loop(period: int, length: int = 10_000) -> list[int]:
    return [number % period for number in range(length)]


def test_nothing_accepted_is_found_at_the_128th_token() -> None:
    found, _ = run([0] * 1000)
    assert found is not None
    assert (found.kind, found.scope, found.tokens, found.value) == (
        "low_accept_length",
        "life",
        128,
        1.0,
    )


@pytest.mark.parametrize(("accepted", "caught"), [(39, True), (41, False)])
def test_the_low_threshold_is_the_published_one(accepted: int, caught: bool) -> None:
    """1.39 and 1.41 tokens per verification, on both sides of 1.4."""
    evenly = [(n + 1) * accepted // 100 - n * accepted // 100 for n in range(100)]
    found, _ = run(evenly * 20, Rules(window=0))
    assert (found is not None) == caught


def test_a_late_onset_is_found_by_the_window_and_not_by_the_lifetime() -> None:
    good, bad = [2] * 1700, [0] * 600  # 5,100 tokens, then garbage
    found, _ = run([*good, *bad])
    assert found is not None
    assert found.scope == "window"
    assert 5100 < found.tokens <= 5100 + Rules.window + detector.STRIDE
    assert run([*good, *bad], Rules(window=0))[0] is None


def test_a_loop_is_found_by_its_rate_and_its_repetition() -> None:
    found, _ = run([3] * 200, output=loop(period=20))
    assert found is not None
    assert (found.kind, found.value) == ("high_accept_rate", 1.0)
    assert found.repetition is not None and found.repetition > 0.8
    assert found.tokens == 128


def test_a_long_copy_is_left_alone_unless_the_rate_alone_is_asked_for() -> None:
    """All drafts of new text accepted: what a quotation looks like."""
    assert run([3] * 2000)[0] is None
    published, _ = run([3] * 2000, Rules(repetition=0.0))
    assert published is not None
    assert published.repetition is None


def test_a_loop_after_a_long_copy_is_found() -> None:
    output = [*range(4000), *loop(period=10, length=4000)]
    found, _ = run([3] * 2000, output=output)
    assert found is not None
    assert 4000 < found.tokens <= 4000 + detector.TAIL + detector.PATIENCE


def test_the_rate_counts_what_can_be_accepted() -> None:
    """Top-k 4 drafts 16 tokens, of which a path of 3 can be accepted at most."""
    assert run([3] * 100, depth=3, output=loop(5))[0] is not None
    assert run([3] * 100, depth=15, output=loop(5))[0] is None  # as stock's rate counts


def test_an_adaptive_depth_is_weighed_step_by_step() -> None:
    rules = Rules()
    watch, accepted, found = Watch(rules), 0, None
    for number in range(1, 400):
        depth = 1 if number % 2 else 3
        accepted += depth
        found = found or watch.observe(rules, number, accepted, depth, loop(7))
    assert found is not None
    assert found.value == 1.0


def test_without_drafts_a_verification_says_nothing() -> None:
    """An adaptive worker may draft nothing for a while: an accept length of 1 is right then."""
    rules = Rules()
    watch = Watch(rules)
    for number in range(1, 1000):
        assert watch.observe(rules, number, 0, 0, []) is None
    assert watch.drafted == 0


def test_an_anomaly_is_told_once() -> None:
    rules = Rules()
    watch = Watch(rules)
    found = [watch.observe(rules, number, 0, DEPTH, []) for number in range(1, 500)]
    assert sum(anomaly is not None for anomaly in found) == 1


def test_thresholds_at_their_ends_never_fire() -> None:
    never = Rules(min_length=1.0, max_rate=1.0)
    assert run([0] * 1000, never)[0] is None
    assert run([3] * 1000, never, output=loop(3))[0] is None


@given(st.lists(st.integers(0, DEPTH), max_size=600), st.integers(0, 512))
def test_two_ranks_with_the_same_counters_decide_alike(steps: list[int], window: int) -> None:
    rules = Rules(window=window)
    output = loop(period=40)
    first, second = run(steps, rules, output), run(steps, rules, output)
    assert first[0] == second[0]


@given(st.lists(st.integers(0, DEPTH), min_size=1, max_size=600))
def test_what_is_found_did_break_its_rule(steps: list[int]) -> None:
    rules = Rules()
    found, watch = run(steps, rules, loop(period=30))
    tokens = watch.verifications + watch.accepted
    if found is None:
        return
    assert found.tokens == tokens >= rules.after
    if found.kind == "low_accept_length":
        assert found.value == 1 + found.accepted / found.verifications < rules.min_length
    else:
        assert found.value == found.accepted / found.possible > rules.max_rate


@given(st.lists(st.integers(0, DEPTH), min_size=40, max_size=600))
def test_the_whole_request_is_judged_at_least_every_stride(steps: list[int]) -> None:
    """Against a naive detector that looks after every single verification."""
    rules = Rules(window=0, repetition=0.0)
    found, _ = run(steps, rules)
    accepted, naive = 0, None
    for number, more in enumerate(steps, 1):
        accepted += more
        tokens = number + accepted
        low = 1 + accepted / number < rules.min_length
        high = accepted / (number * DEPTH) > rules.max_rate
        if tokens >= rules.after and (low or high) and naive is None:
            naive = tokens
    if found is not None:
        assert naive is not None and naive <= found.tokens


def test_the_error_names_the_look_before_which_all_was_well() -> None:
    good, bad = [2] * 200, [0] * 600
    found, _ = run([*good, *bad])
    assert found is not None and found.scope == "window"
    assert found.tokens - Rules.window - detector.STRIDE <= found.suspect_from <= 600
    whole, _ = run([0] * 200)
    assert whole is not None and whole.suspect_from == 0


# -- persistence ----------------------------------------------------------------------------------

PERSISTENT = detector.SETS["persistent"]


def stretch(length: int) -> list[int]:
    """Sound text around so many tokens that no draft can guess."""
    return [*([2] * 300), *([0] * length), *([2] * 300)]


@pytest.mark.parametrize(("length", "left_alone"), [(487, True), (560, True), (900, False)])
def test_a_stretch_that_no_draft_can_guess_ends(length: int, left_alone: bool) -> None:
    """20 UUIDs are 487 tokens. The control: without persistence each of them is ended."""
    assert (run(stretch(length), PERSISTENT)[0] is None) == left_alone
    assert run(stretch(length))[0] is not None


def test_a_corruption_that_stays_is_found_later_and_dated_as_early() -> None:
    steps = [*([2] * 300), *([0] * 2000)]
    at_once, _ = run(steps)
    late, _ = run(steps, PERSISTENT)
    assert at_once is not None and late is not None
    waited = late.tokens - at_once.tokens
    assert PERSISTENT.persistence <= waited < PERSISTENT.persistence + detector.STRIDE
    assert late.suspect_from == at_once.suspect_from


def test_a_request_that_was_never_sound_does_not_wait() -> None:
    found, _ = run([0] * 200, PERSISTENT)
    assert found is not None and found.tokens == Rules.after


@pytest.mark.parametrize(("cells", "left_alone"), [(100, True), (500, False)])
def test_a_table_of_equal_cells_ends_and_a_loop_does_not(cells: int, left_alone: bool) -> None:
    table = [number % 5 for number in range(5 * cells)]
    output = [*range(1000, 1400), *table, *range(2000, 3000)]
    found, _ = run([3] * (len(output) // 4), PERSISTENT, output)
    assert (found is None) == left_alone
    assert run([3] * (len(output) // 4), output=output)[0] is not None  # the control


def test_another_rule_begins_to_wait_anew() -> None:
    """An answer that copies, then cannot be guessed, has broken neither for long."""
    output = [number % 5 for number in range(2000)]
    steps = [*([3] * 140), *([0] * 420), *([3] * 140)]
    assert run(steps, PERSISTENT, output)[0] is None


# -- verifications that were offered fewer drafts --------------------------------------------------


def test_what_was_offered_is_what_counts() -> None:
    rules = Rules()
    found = {}
    for known in (True, False):
        watch = Watch(rules)
        for number in range(1, 400):
            drafted = number // 10  # one verification of ten has a draft, which is accepted
            offered = (drafted, drafted) if known else None
            watch.observe(rules, number, drafted, DEPTH, NEW_TEXT[:number], offered=offered)
        found[known] = watch.found
    assert found[True] is None
    unknown = found[False]
    assert unknown is not None and unknown.kind == "low_accept_length"


def test_repetition_of_what_is_new_is_none_and_of_a_loop_nearly_all() -> None:
    assert repetition(list(range(1000))) == 0.0
    assert repetition([]) == repetition([1] * (detector.NGRAM - 1)) == 0.0
    assert repetition([7] * 1000) > 0.99
    half = repetition(loop(period=detector.TAIL // 2))
    assert half == pytest.approx(0.5, abs=0.05)
