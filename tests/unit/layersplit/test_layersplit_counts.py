"""What the split pool of this process says of itself, on this release's own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("sglang")
from sglang_scaling_fixes.layersplit import probe, report
from sglang_scaling_fixes.layersplit.metrics import PREFILL
from sglang_scaling_fixes.layersplit.schedule import SCRATCHES
from sglang_scaling_fixes.layersplit.scratch import Size
from sglang_scaling_fixes.metrics import Metrics

PREFIX, NEW = 2 * probe._PAGE, 5


class Waited(probe._Late):
    """A lane whose readers have waited for so long."""

    ms = 0.0

    def exposed_ms(self) -> float:
        return self.ms


@pytest.fixture
def pool() -> Any:
    made = probe._pool(0, {})
    made.lane = Waited()
    return made


def begin(pool: Any, prefix: int) -> None:
    slots = torch.arange(probe._PAGE, probe._PAGE * (probe._PAGES - 1))
    pool.begin(slots[None], torch.tensor([0]), [prefix], [prefix + NEW])


def counts(pool: Any) -> dict[str, Any]:
    found: dict[str, Any] = pool.stats.report()
    return found


def test_a_pass_counts_what_it_sends(pool: Any) -> None:
    begin(pool, 0)
    assert (counts(pool)["forwards"], counts(pool)["bytes"]) == (1, 0)
    begin(pool, PREFIX)
    assert (counts(pool)["pages"], counts(pool)["broadcasts"]) == (2, SCRATCHES)
    row = pool.kv_buffer[0][0].nbytes + pool.index_k_with_scale_buffer[0][0].nbytes // probe._PAGE
    assert counts(pool)["bytes"] == SCRATCHES * PREFIX * row


@pytest.mark.parametrize(("shared", "waits"), [(None, 1), ([0, 1], 0)])
def test_a_pass_counts_when_the_host_has_to_ask(
    pool: Any, shared: list[int] | None, waits: int
) -> None:
    slots = torch.arange(probe._PAGE, probe._PAGE * (probe._PAGES - 1)).expand(2, -1)
    prefixes = [probe._PAGE] * 2
    pool.begin(slots, torch.tensor([0, 1]), prefixes, [p + NEW for p in prefixes], shared=shared)
    assert counts(pool)["host_waits"] == waits


def test_exposed_time_is_exported_in_whole_milliseconds(pool: Any) -> None:
    for ms, exported in ((0.4, 0), (1.7, 1), (1.9, 1), (7.0, 7)):
        pool.lane.ms = ms
        begin(pool, 0)
        assert counts(pool)["exposed_ms"] == exported


def test_what_was_exposed_before_a_scheduler_counts_is_not_counted_again(pool: Any) -> None:
    pool.lane.ms = 5.0
    begin(pool, 0)
    pool.stats = Metrics(PREFILL, None)  # `bind`
    pool.lane.ms = 8.0
    begin(pool, 0)
    assert counts(pool)["exposed_ms"] == 3


def test_a_pass_that_does_not_fit_is_an_error_with_the_figures(pool: Any) -> None:
    pool.size_of_scratch = Size(prefix=1, chunk=1)
    with pytest.raises(RuntimeError, match="reads and writes 3 pages, and a scratch has 2"):
        begin(pool, PREFIX)


def test_server_info_says_what_this_rank_owns(monkeypatch: pytest.MonkeyPatch, pool: Any) -> None:
    monkeypatch.setattr(report, "pool", lambda: None)
    assert report.report() is None
    monkeypatch.setattr(report, "pool", lambda: pool)
    pool.lane.ms = 1.23456
    found = report.report()
    assert found is not None
    assert found["owned_layers"] == list(pool._owned_local_layer_range())
    assert found["exposed_ms"] == 1.235  # with its fraction, up to now
    assert found["scratch_bytes"] == sum(s.kv.nbytes + s.index.nbytes for s in pool.scratches)
    assert found["scratch_capacity"] == pool.size_of_scratch.pages
