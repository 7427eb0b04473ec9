"""The guard's benchmark: what a stream becomes, and what replaying it through the guard says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.spec_guard import __main__ as command
from benchmarks.spec_guard import (
    figure,
    honest,
    plan,
    record,
    recording,
    repeats,
    replay,
    report,
    texts,
)
from benchmarks.spec_guard.plan import Request
from benchmarks.spec_guard.recording import Corruption, Record, Recording
from sglang_scaling_fixes.lab.faults import corrupt
from sglang_scaling_fixes.specguard.detector import Rules

ABOUT = {
    "release": "0.5.23",
    "cores": 2,
    "concurrency": 4,
    "seconds": 60,
    "documents": {"prose": 3},
}


def recorded(name: str, accepted: str, role: str = "clean", **more: Any) -> Record:
    """Each token another one, unless `ids` says otherwise."""
    tokens = 1 + len(accepted) + sum(map(int, accepted))
    values: dict[str, Any] = {
        "group": "prose",
        "prompt": 100,
        "ids": tuple(range(tokens)),
        "cached": 0,
        "merged": 0,
        **more,
    }
    return Record(name, accepted=accepted, role=role, **values)


def collapsed(name: str, before: int, twin: str) -> Record:
    """All drafts accepted up to token 1 + 4 * before, none in the 300 tokens after."""
    after = 1 + 4 * before
    return recorded(
        name,
        "3" * before + "0" * 300,
        "corrupt",
        corruption=Corruption("noise", 1.0, after),
        twin=twin,
        ids=(*range(after), *range(5000, 5300)),
    )


def small() -> Recording:
    records = (
        recorded("clean-0", "2" * 70),
        recorded("clean-1", "0" * 160),
        recorded("long-0", "23" * 100, "long"),
        recorded("twin-0", "2" * 150, "twin"),
        recorded("again-0", "2" * 150, "again", twin="twin-0"),
        collapsed("corrupt-0", 0, "twin-0"),
        collapsed("corrupt-1", 25, "twin-0"),
    )
    return Recording(ABOUT, records)


# -- a stream ----------------------------------------------------------------------------


def chunks(*lengths: int, verified: int, correct: int) -> list[dict[str, Any]]:
    """A stream: as many new ids in each chunk; totals with the last, as stock sends them."""
    stream: list[dict[str, Any]] = [
        {"output_ids": [7] * length, "meta_info": {"cached_tokens": 0}} for length in lengths
    ]
    stream[-1]["meta_info"] |= {"spec_verify_ct": verified, "spec_num_correct_drafts": correct}
    return stream


ASKED = Request("clean-1", "code", "clean", (5, 6, 7), tokens=8)


def test_each_chunk_after_the_first_is_a_verification() -> None:
    parsed = record.parse(ASKED, chunks(1, 4, 1, 2, verified=3, correct=4))
    assert (parsed.accepted, parsed.merged, parsed.ids) == ("301", 0, (7,) * 8)
    assert (parsed.name, parsed.group, parsed.prompt) == ("clean-1", "code", 3)


def test_verifications_in_one_chunk_are_told_apart_by_the_totals() -> None:
    parsed = record.parse(ASKED, chunks(1, 5, 2, verified=3, correct=4))
    assert (parsed.accepted, parsed.merged) == ("211", 1)
    parsed = record.parse(ASKED, chunks(1, 4, 3, verified=3, correct=4))  # 4 may be 2 + 2 too
    assert (parsed.accepted, parsed.merged) == ("112", 1)


def test_the_last_verification_may_go_past_the_limit() -> None:
    assert record.parse(ASKED, chunks(1, 4, 3, verified=2, correct=6)).accepted == "32"


@pytest.mark.parametrize(
    "stream",
    [
        chunks(1, 4, 1, verified=2, correct=3),  # too short
        chunks(1, 4, 3, verified=1, correct=3),  # fewer verifications than chunks
        chunks(1, 4, 3, verified=2, correct=3),  # tokens from nowhere
    ],
)
def test_a_stream_that_does_not_add_up_is_refused(stream: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="clean-1"):
        record.parse(ASKED, stream)


def test_a_recording_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "recording.jsonl.gz"
    recording.write(path, ABOUT, small().records)
    assert recording.read(path) == small()
    written = path.read_bytes()
    recording.write(path, ABOUT, small().records)
    assert path.read_bytes() == written


# -- what is asked --------------------------------------------------------------------------


DOCUMENTS = {name: [f"{name} " + " ".join(map(str, range(n, 900)))] * 2
             for n, name in enumerate(texts.CLASSES)}  # fmt: skip


def test_no_prompt_is_given_twice_and_a_copy_begins_again() -> None:
    prompts = plan.Prompts(DOCUMENTS)
    given = [prompts.give(group) for group in plan.GROUPS * 5]
    assert len(set(given)) == len(given)
    assert all(plan.SHORTEST <= len(prompt) <= plan.LONGEST for prompt in given)
    copied = prompts.give("copy")
    assert copied[-plan.BEGUN :] == copied[: plan.BEGUN]
    assert len(copied) >= plan.COPIED + plan.BEGUN


def test_the_server_reads_from_an_id_what_to_corrupt() -> None:
    prompts = plan.Prompts(DOCUMENTS)
    early, late = plan.twins(prompts, 3), plan.long(prompts, 3)
    asked = list(plan.corrupt(early, late, each=2))
    conditions = {request.corruption for request in asked}
    assert len(asked) == 2 * len(conditions)
    for request in asked:
        what = request.corruption
        assert what is not None
        assert corrupt.parse(request.rid) == (what.kind, what.share, what.after)
        assert request.tokens > what.after + 128
    ids = [request.rid for request in (*asked, *early, *late)]
    assert not any(a != b and b.startswith(a) for a in ids for b in ids)


def test_words_have_stable_ids_of_the_model() -> None:
    assert texts.words("f(x) = 'a b'\n") == ["f", "(", "x", ")", "=", "'", "a", "b", "'"]
    assert texts.token("the") == texts.token("the")
    ids = {texts.token(str(n)) for n in range(20_000)}
    assert min(ids) >= texts.FIRST_ID
    assert max(ids) < texts.VOCAB
    assert texts.excerpt(random.Random(1), range(5), 9) == range(5)


# -- replay ---------------------------------------------------------------------------------


def test_a_request_whose_drafts_are_accepted_is_left_alone() -> None:
    for rules in replay.settings().values():
        assert replay.watch(recorded("clean", "2" * 400), rules) is None


def test_a_request_whose_drafts_are_never_accepted_is_found() -> None:
    for rules in replay.settings().values():
        found = replay.watch(recorded("corrupt", "0" * 200), rules)
        assert found is not None
        assert (found.kind, found.tokens) == ("low_accept_length", rules.after)


def test_a_perfect_copy_is_found_only_where_it_repeats_itself() -> None:
    new = recorded("copy", "3" * 100)
    loop = recorded("loop", "3" * 100, ids=tuple(n % 9 for n in range(401)))
    published, asked = Rules(window=0, repetition=0), Rules()
    assert [replay.watch(new, published) is None, replay.watch(new, asked) is None] == [
        False,
        True,
    ]
    for rules in (published, asked):
        found = replay.watch(loop, rules)
        assert found is not None
        assert found.kind == "high_accept_rate"


def test_the_window_finds_what_a_lifetime_hides() -> None:
    late = collapsed("corrupt", 250, "twin-0")
    assert replay.watch(late, Rules(window=0)) is None
    found = replay.watch(late, Rules(window=256))
    assert found is not None
    assert found.scope == "window"
    (verdict,) = replay.verdicts([late], {"twin-0": small().records[3]}, Rules(window=256))
    assert verdict.delay == found.tokens - 1001
    assert not verdict.twin_found


def test_an_alarm_before_the_corruption_is_no_detection() -> None:
    early = collapsed("corrupt", 100, "twin-0")
    early = Record(**{**vars(early), "accepted": "0" * 200 + "3" * 50})
    (verdict,) = replay.verdicts([early], {"twin-0": small().records[3]}, Rules())
    assert verdict.found is not None
    assert verdict.delay is None


def test_only_what_the_twin_does_in_the_same_time_counts() -> None:
    corrupted = collapsed("corrupt", 0, "twin-0")  # 301 tokens
    for good, expected in ((25, True), (100, False)):
        twin = recorded("twin-0", "2" * good + "0" * 400, "twin")
        (verdict,) = replay.verdicts([corrupted], {"twin-0": twin}, Rules())
        assert verdict.twin_found is expected


def test_where_two_answers_part() -> None:
    one = recorded("a", "2" * 5)
    assert replay.agreement(one, one) is None
    other = recorded("b", "2" * 5, ids=(0, 1, 2, 9, *range(4, 16)))
    assert replay.agreement(one, other) == 3


def test_a_count_without_a_hit_has_a_bound() -> None:
    assert str(replay.Count(0, 500)) == "0 of 500 (< 0.6%)"
    assert str(replay.Count(5, 500)) == "5 of 500 (1.0%)"
    assert str(replay.Count(0, 0)) == "-"


# -- report -----------------------------------------------------------------------------------


def test_a_recording_becomes_tables_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "recording.jsonl.gz", tmp_path / "picture.svg"
    recording.write(path, ABOUT, small().records)
    assert command.main(["report", str(path), "--figure", str(picture)]) == 0
    told = capsys.readouterr().out
    assert "| 256 / 0.5 | 1 of 2 (50.0%) | 0 of 1 (< 100.0%) |" in told
    assert "| noise, 100%, at 1 | 1 | 0 | 1 of 1 (100.0%) | - |" in told
    assert "0 of 1 (< 100.0%) differ in some token." in told
    root = ElementTree.fromstring(picture.read_text())
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "clean prose" in words
    assert "overwritten after 101 tokens, window of 256" in words


def test_accept_length_since_the_corruption() -> None:
    assert figure.since(collapsed("corrupt", 25, "twin-0"), 100) == 1.0
    assert figure.since(recorded("a", "2" * 50), 100) == 3.0


def test_curves_rise_to_what_was_found() -> None:
    assert figure.cumulative([2.0, 3.0]) == [
        (1.0, 0.0), (2.0, 0.0), (2.0, 0.5), (3.0, 0.5), (3.0, 1.0), (4.0, 1.0),
    ]  # fmt: skip
    twin = small().records[3]
    found = replay.verdicts(
        [collapsed("corrupt", 0, "twin-0")], {"twin-0": twin}, Rules(min_length=0)
    )
    assert figure.found(found) == [(0.0, 0.0), (figure.MOST_TOKENS, 0.0)]


def test_repetition_of_real_text() -> None:
    new = " ".join(f"w{n}" for n in range(600))
    measured = repeats.measure([new, "the same five words again " * 120, "short"], 0)
    assert measured.documents == 2
    assert min(measured.scores) == 0
    assert measured.reached == dict.fromkeys(repeats.THRESHOLDS, 1)
    assert repeats.pieces("token isation", 4) == ["toke", "n", "isat", "ion"]


def test_the_rules_are_counted_apart() -> None:
    """One clean request without an accepted draft; one of perfect drafts that is a loop."""
    never = recorded("clean-0", "0" * 160)
    loop = recorded("clean-1", "3" * 100, ids=tuple(n % 9 for n in range(401)))
    groups = report.clean_groups([never, loop])
    for settings, found in ((report.low_settings(), [never]), (report.high_settings(), [loop])):
        for rules in settings.values():
            alarmed = [r for r in groups["prose"] if replay.watch(r, rules) is not None]
            assert alarmed == found


def test_the_rules_by_name_are_compared() -> None:
    table = report.by_name(report.clean_groups(small().records), [], {})
    assert table.count("\n") == 2  # nothing was overwritten: a head and no row
    whole = [r for r in small().records if r.corruption is not None]
    twins = {r.name: r for r in small().records if r.role == "twin"}
    table = report.by_name(report.clean_groups(small().records), whole, twins)
    names = [line.split(" | ")[0] for line in table.splitlines()[2:]]
    assert [*dict.fromkeys(names)] == ["| windowed", "| persistent", "| published"]


def test_simulated_acceptance_has_the_accept_length_asked_for() -> None:
    for depth in (1, 3, 5):
        p = honest.chance(1.5, depth)
        drawn = list(honest.steps(random.Random(1), depth, p, 20_000))
        assert 1 + sum(drawn) / len(drawn) == pytest.approx(1.5, abs=0.02)
        assert max(drawn) <= depth


def test_sound_text_is_counted_as_ended_or_not() -> None:
    never = honest.ended(Rules(min_length=1.0, max_rate=1.0), lambda draw: iter([0] * 500))
    always = honest.ended(Rules(), lambda draw: iter([0] * 500))
    assert (never.hits, always.hits) == (0, honest.SEEDS)
    assert all(len(repeats.pieces(text, 4)) >= 192 for text in honest.honest_texts().values())
