"""Operations that need an idle server: what the ranks agree on, and what was not released.

On stock's own classes, with their assertions: `tests/starts/test_decode_of_releases.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang.srt.managers.io_struct")

from sglang_scaling_fixes.ranks import TpGroup
from sglang_scaling_fixes.reclaim import layout
from sglang_scaling_fixes.reclaim.decode import maintenance
from sglang_scaling_fixes.reclaim.decode.maintenance import Maintenance
from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger


class OtherRank(TpGroup):
    """This rank and another, which holds something for the first `looks` looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks
        self.asked = 0

    def all_true(self, flags: Sequence[bool]) -> list[bool]:
        self.asked += 1
        nothing_held, early = flags
        return [nothing_held and self.asked > self.looks, early]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)

    def sleep(seconds: float) -> None:
        now.seconds += 1.0

    here = SimpleNamespace(monotonic=lambda: now.seconds, sleep=sleep)
    monkeypatch.setattr(maintenance, "time", here)
    return now


def rank(group: TpGroup, ticks: list[int] | None = None) -> Maintenance:
    counted = ticks if ticks is not None else []
    return Maintenance(DecodeLedger("d"), lambda: counted.append(1), SimpleNamespace(), group)


def released(maintenance: Maintenance, tags: list[str]) -> Any:
    owner = SimpleNamespace(offload_tags=set())
    return maintenance.release(lambda *_: "released", owner, SimpleNamespace(tags=tags))


def test_a_rank_that_holds_nothing_waits_for_one_that_does_and_ticks_like_it() -> None:
    ticks: list[int] = []
    assert released(rank(OtherRank(looks=3), ticks), ["kv_cache"]) == "released"
    assert len(ticks) == 4


class StocksQueue:
    """Stock's transfer queue: what it keeps is let go at the look of this number."""

    def __init__(self, look: int) -> None:
        self.left = look

    def resolve_deferred_releases(self) -> None:
        self.left -= 1

    def has_pending_deferred_releases(self) -> bool:
        return self.left > 0


def test_what_stock_itself_keeps_is_waited_for_and_looked_for() -> None:
    """Stock's loop stands still meanwhile, and its release asserts that nothing is kept."""
    queue = StocksQueue(look=3)
    one = rank(TpGroup())
    one._scheduler.disagg_decode_transfer_queue = queue
    assert released(one, ["kv_cache"]) == "released" and queue.left == 0
    one._scheduler.disagg_decode_transfer_queue = StocksQueue(look=1000)
    answer = released(one, ["kv_cache"])
    assert answer.rid.startswith(maintenance.NOT_RELEASED) and "stock keeps" in answer.rid


def test_none_goes_on_alone_after_the_wait() -> None:
    group = OtherRank(looks=1000)
    answer = released(rank(group), ["kv_cache"])
    assert answer.rid.startswith(maintenance.NOT_RELEASED) and "another rank" in answer.rid
    assert group.asked == int(maintenance.WAIT_S) + 1, "a second a look, by this clock"


def test_what_was_not_released_is_not_resumed_and_the_rest_is() -> None:
    """Stock removes each from its set of what is released, and dies of one that is not there."""
    refusing = rank(OtherRank(looks=1000))
    released(refusing, ["kv_cache"])
    owner, asked = SimpleNamespace(offload_tags={"weights"}), SimpleNamespace(tags=None)
    resumed: list[list[str]] = []

    def stock(owner: Any, request: Any) -> str:
        resumed.append(request.tags)
        return "resumed"

    assert refusing.resume(stock, owner, asked) == "resumed"
    assert "kv_cache" not in resumed[0] and "weights" in resumed[0]
    asked = SimpleNamespace(tags=["kv_cache"])
    assert refusing.resume(stock, owner, asked) == "resumed", "once: it is stock's to judge now"
    assert resumed[1] == ["kv_cache"]


@pytest.mark.parametrize("apart", [False, True])
def test_ranks_that_get_operations_apart_agree_apart(apart: bool) -> None:
    server_args = SimpleNamespace(enable_dp_attention_local_control_broadcast=apart)
    scheduler = SimpleNamespace(server_args=server_args, tp_cpu_group="server")
    queue = SimpleNamespace(scheduler=scheduler, gloo_group="DP rank")
    assert layout.in_step(queue) == ("DP rank" if apart else "server")
