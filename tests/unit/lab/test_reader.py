"""What the observer wrote, as the lab reads it."""

from __future__ import annotations

import json
from pathlib import Path

from sglang_scaling_fixes.lab.observing.reader import Observations


def test_observations_are_read_as_far_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "observations.jsonl"
    seen = Observations(path)
    assert seen.of("a") == {} and seen.pool() is None
    final = {"event": "final", "rid": "a", "digests": [1]}
    pool = {"event": "pool", "free_tokens": 5, "free_metadata": 2, "time": 0.0}
    half = json.dumps({"event": "lost", "bootstrap_room": 3})
    path.write_text(f"{json.dumps(final)}\n{json.dumps(pool)}\n{half[:9]}")
    assert seen.of("a") == {"final": final} and seen.digests("a") == [[1]]
    assert seen.pool() == pool and seen.lost(3) == 0
    with path.open("a") as file:
        file.write(half[9:] + "\n")
    assert seen.lost(3) == 1
    seen.forget("a")
    assert seen.of("a") == {}
