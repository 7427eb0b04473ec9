"""Early-send ordering in a scheduler: what stays of it in which role, and what it warns of."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes import attach
from sglang_scaling_fixes.attach import AttachPoint
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.early_send_ordering import FIX, UNORDERED_PIPELINE, points, sends
from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.fix import Armed, Native
from sglang_scaling_fixes.parts import Part, Parts

POINT = AttachPoint(points.NAME, "prefill", "stock_prefill:Prefill.send")


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = ModuleType("stock_prefill")
    exec("class Prefill:\n    def send(self): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "stock_prefill", module)
    monkeypatch.setattr(attach, "_replaced", {})
    attach.wrap(POINT, lambda stock, *args: stock(*args))
    return module


def bind(role: str, **args: Any) -> None:
    scheduler = SimpleNamespace(disaggregation_mode=SimpleNamespace(value=role))
    FIX.bind(scheduler, SimpleNamespace(**args), Config())


@pytest.mark.parametrize(
    ("role", "switch", "stays"),
    [
        ("prefill", False, True),
        ("decode", False, False),
        ("null", False, False),
        ("decode", True, True),
    ],
)
def test_what_only_a_prefill_needs_comes_off_unless_the_role_may_change(
    stock: Any, role: str, switch: bool, stays: bool
) -> None:
    bind(role, enable_pd_role_switch=switch)
    assert attach.is_wrapped(POINT.target) == stays


def test_a_place_that_was_hooked_again_is_refused_on_prefill(stock: Any) -> None:
    stock.Prefill.send = lambda self: None
    with pytest.raises(AttachError, match="hooked again"):
        bind("prefill")


@pytest.mark.parametrize(
    ("role", "depth", "warns"), [("prefill", 1, 1), ("prefill", 0, 0), ("decode", 1, 0)]
)
def test_a_pipeline_that_is_not_ordered_is_warned_of(
    stock: Any, caplog: pytest.LogCaptureFixture, role: str, depth: int, warns: int
) -> None:
    bind(role, pp_async_batch_depth=depth)
    assert sum(UNORDERED_PIPELINE in record.getMessage() for record in caplog.records) == warns


class Release:
    """A release with some waits, of which some are its own."""

    def __init__(self, there: bool, holds: bool, helps: bool = True) -> None:
        self.there, self.holds, self.helps = there, holds, helps
        self.attached = 0

    def attach(self) -> None:
        self.attached += 1
        self.holds = self.helps

    def part(self) -> Part:
        return Part("wait", lambda: self.there, lambda: self.holds, self.attach)


@pytest.mark.parametrize(
    ("there", "holds", "state", "attached"),
    [(False, False, Native, 0), (True, True, Native, 0), (True, False, Armed, 1)],
)
def test_only_what_is_there_and_missing_is_attached_and_only_once(
    there: bool, holds: bool, state: type, attached: int
) -> None:
    release = Release(there, holds)
    parts = Parts(lambda: [release.part()], "nothing of it is there")
    for _ in range(2):
        assert isinstance(parts.arm(), state)
    assert release.attached == attached


def test_a_wait_that_does_not_hold_after_attaching_is_not_armed() -> None:
    release = Release(there=True, holds=False, helps=False)
    with pytest.raises(AttachError, match="wait does not hold"):
        Parts(lambda: [release.part()], "").arm()


def scheduler(backend: str, *, overlap: bool = True) -> tuple[Any, Any]:
    sender = type("Sender", (), {"__module__": f"{sends.PACKAGE}.{backend}.conn"})()
    return SimpleNamespace(enable_overlap=overlap), SimpleNamespace(disagg_kv_sender=sender)


@pytest.mark.parametrize(
    ("backend", "overlap", "consumer", "sent"),
    [
        ("mooncake", True, -1, False),
        ("mooncake", False, -1, True),
        ("mooncake", False, 0, False),
        ("nixl", True, -1, True),
        ("nixl", True, 0, False),
    ],
)
def test_nothing_is_sent_early_through_who_does_not_wait_nor_during_a_load(
    monkeypatch: pytest.MonkeyPatch, backend: str, overlap: bool, consumer: int, sent: bool
) -> None:
    wrapped: dict[AttachPoint, Any] = {}
    monkeypatch.setattr(sends, "wrap", wrapped.__setitem__)
    sends.attach_hold_back(loading=True, deaf=[f"{sends.PACKAGE}.mooncake."])
    this, request = scheduler(backend, overlap=overlap)
    went: list[Any] = []
    batch = SimpleNamespace(hicache_consumer_index=consumer)

    def run_batch(this: Any, _batch: Any) -> None:
        wrapped[points.EARLY_SEND](lambda _this, req: went.append(req), this, request)

    wrapped[points.RUN_BATCH](run_batch, this, batch)
    assert went == ([request] if sent else [])
