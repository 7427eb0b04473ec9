"""The calibration's parts: its workload, its window, its parts of a pool, and its report."""

from __future__ import annotations

import math

import pytest

from benchmarks.layersplit.calibration import ablation, mechanisms, published, report, rounds
from benchmarks.layersplit.calibration.gain import POOL, Setting, play, steady
from benchmarks.layersplit.calibration.workload import Sessions
from sglang_scaling_fixes.layersplit.planner.labels import PUBLISHED_POOL
from sglang_scaling_fixes.layersplit.simulator import deployment, readers
from sglang_scaling_fixes.layersplit.simulator.engine import Answer, Outcome
from sglang_scaling_fixes.layersplit.simulator.records import Request, reuse
from sglang_scaling_fixes.paths import ROOT

HERE = ROOT / "benchmarks" / "layersplit"
TRACE = readers.read(HERE / "traces" / "agentic_code_30sessions_seed42.jsonl", "auto", None)[1]
SESSIONS = Sessions(TRACE)
SMALL = Setting(live=24, turns=8)


@pytest.mark.parametrize("context", [40_000, 120_000])
def test_a_workload_is_the_trace_scaled_to_its_context(context: int) -> None:
    """All of the trace's turns, by as many users as it has sessions."""
    longest = max(len(session) for session in SESSIONS._sessions)
    made = SESSIONS.kept_up(context, live=31, turns=longest, amid=False)
    first = [
        one
        for user, session in enumerate(SESSIONS._sessions)
        for one in [turn for turn in made if turn.session == user][: len(session)]
    ]
    assert sum(one.prompt for one in first) / len(first) == pytest.approx(context, rel=0.005)
    assert len(first) == len(TRACE)
    for one in made:
        assert len(one.blocks) == -(-one.prompt // one.block)
    assert reuse(first) == pytest.approx(reuse(TRACE), abs=0.01)


def test_a_session_that_is_played_again_is_another_conversation() -> None:
    """But for the beginning that all sessions have."""
    made = SESSIONS.kept_up(40_000, live=1, turns=len(TRACE) + 1, amid=False)
    first, again = made[0], made[-1]
    assert first.prompt == again.prompt and first.blocks != again.blocks
    common = [one for one, other in zip(first.blocks, again.blocks, strict=True) if one == other]
    assert 0 < len(common) < len(first.blocks)
    assert set(common) == set(first.blocks[: len(common)])


def test_users_have_as_many_turns_as_asked_and_begin_where_asked() -> None:
    made = SESSIONS.kept_up(40_000, live=5, turns=7, first=3, amid=False)
    for user in range(5):
        turns = [one for one in made if one.session == user]
        assert len(turns) == 7 and [one.arrival for one in turns] == [0.0] + [None] * 6
    assert made[0].line == SESSIONS._sessions[3][0].line


@pytest.mark.parametrize("live", [20, 96])
def test_users_amid_their_conversations_have_prompts_of_all_lengths(live: int) -> None:
    """From the first request on, so that a short replay has prompts as long as the context."""
    made = SESSIONS.kept_up(100_000, live, turns=8)
    mean = sum(one.prompt for one in made) / len(made)
    assert mean == pytest.approx(100_000, rel=0.15)
    begun = [one.prompt for one in made if one.arrival is not None]
    assert len(begun) == live and max(begun) > 2 * min(begun)
    from_start = SESSIONS.kept_up(100_000, live, turns=8, amid=False)  # control
    assert sum(one.prompt for one in from_start) / len(from_start) < 0.85 * mean


def test_the_window_leaves_out_the_beginning_and_the_end() -> None:
    one = Request(0, 0, 0.0, 0.0, 100, 0, (0,), 512)
    ends = (10.0, 24.0, 26.0, 50.0, 75.0, 76.0, 100.0)
    outcome = Outcome([Answer(one, 0.0, end, 50, 20) for end in ends], ended=100.0)
    found = steady(outcome)
    assert (found.goodput, found.hits, found.loaded, found.prompt) == (300 / 50, 0.5, 0.2, 100)


def test_the_pool_is_the_one_whose_capacity_is_published() -> None:
    assert (POOL.unsplit(), POOL.upstream()) == (
        PUBLISHED_POOL.unsplit(),
        PUBLISHED_POOL.upstream(),
    )
    assert {"unsplit": 1, "upstream": 1, "ours": 1}.keys() == SMALL.deployments().keys()


def test_the_parts_of_a_pool_are_all_that_differs() -> None:
    """With every part of ours, no split is ours; so the table leaves no mechanism out."""
    unsplit, _, ours = deployment.of(POOL, 1 << 40)
    fields = [field for fields in ablation.PARTS.values() for field in fields]
    same = unsplit.but(**{field: getattr(ours, field) for field in fields})
    assert same.but(name="ours", host=ours.host) == ours
    assert unsplit.host != ours.host  # the host is endless in every fit, or there is none


def test_control_with_nothing_of_ours_there_is_no_gain() -> None:
    trace = SESSIONS.kept_up(120_000, SMALL.live, SMALL.turns)
    unsplit = SMALL.deployments()["unsplit"]
    assert play(trace, unsplit, SMALL) == play(trace, unsplit.but(name="again"), SMALL)
    found = ablation.ablation(SESSIONS, 120_000, SMALL)
    gain = mechanisms.gain(SESSIONS, 120_000, SMALL)
    assert found["all"][0] == pytest.approx(gain) and found["all"][1] == 1.0
    assert gain > 1.01
    assert found["hits: tokens that the pool keeps"][0] == pytest.approx(gain, rel=0.05)
    assert found["loads: layers that a rank loads"][0] == 1.0  # no host, nothing to load


def test_the_error_is_none_only_where_both_ends_are_met() -> None:
    assert mechanisms.error(published.GAIN, published.GAIN) == 0
    off = {context: 2 * gain for context, gain in published.GAIN.items()}
    assert mechanisms.error(off, published.GAIN) == pytest.approx(math.log(2))


def test_rounds_find_what_was_published_where_everything_fits() -> None:
    """0, 1/2, 2/3: so every round adds as much as the one before."""
    ours = deployment.of(POOL, 0)[2]
    played = rounds.play(8, 4096, ours)
    assert played.hits == pytest.approx(published.ROUNDS.hits_split, abs=0.005)
    small = rounds.play(8, 4096, ours.but(cached=60_000, running=60_000))
    assert small.hits[2] < played.hits[2] and small.worst > played.worst


def test_the_prefill_speed_of_the_rounds_is_the_published_one() -> None:
    """A cold prompt takes as long as 11,632 tokens/s say."""
    clients, turn = 1, 8192
    played = rounds.conversation(clients, turn, seed=1)
    assert [one.prompt for one in played] == [turn, 2 * turn, 3 * turn]
    assert rounds.tflops(turn) == pytest.approx(148, abs=1)
    nothing = deployment.of(POOL, 0)[0].but(cached=0)
    waited = rounds.play(clients, turn, nothing).worst
    assert waited > 3 * turn / published.ROUNDS.prefill_tokens_s  # a longer prompt is slower


def test_the_committed_report_is_what_the_committed_figures_say() -> None:
    found = report.committed()
    assert (HERE / "results" / "calibration.md").read_text() == report.text(found)
    assert {fit["mechanism"] for fit in found["fits"]} == {m.name for m in mechanisms.MECHANISMS}
    for fit in found["fits"]:
        chosen = Setting(**fit["setting"])
        known = {mechanism.name: mechanism for mechanism in mechanisms.MECHANISMS}
        assert chosen in known[fit["mechanism"]].candidates


def test_control_a_changed_figure_changes_the_report() -> None:
    found = report.committed()
    before = report.text(found)
    found["fits"][0]["contexts"]["80000"]["gain"] += 1
    assert report.text(found) != before
