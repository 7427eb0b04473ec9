"""Questions to a rank that says nothing must not fill the queue they share with stock."""

from __future__ import annotations

from sglang_scaling_fixes.reclaim.rules.pace import RARELY_S, UNHEARD, Pace


def test_a_silent_rank_is_asked_often_and_then_rarely() -> None:
    pace = Pace()
    assert all(pace.may("p0", 1.0) for _ in range(UNHEARD))
    assert not pace.may("p0", 2.0)
    assert pace.may("p1", 2.0), "another rank's silence is its own"
    asked = sum(pace.may("p0", 1.0 + second) for second in range(3600))
    assert asked <= 3600 / RARELY_S


def test_a_word_from_it_starts_anew() -> None:
    pace = Pace()
    for _ in range(UNHEARD + 1):
        pace.may("p0", 1.0)
    pace.heard("p0")
    assert pace.may("p0", 1.0)
