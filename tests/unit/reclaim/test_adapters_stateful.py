"""The real adapters of both sides, driven by Hypothesis over sockets and writes in memory.

`tests.stateful` plays stock and keeps the oracle. The exhaustive model (`test_explore`) visits
every state of the ledgers in small worlds; this goes through what lies between them and stock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

pytest.importorskip("sglang.srt.mem_cache.allocator")

from sglang_scaling_fixes.kv_poll import SUCCESS, WAITING
from sglang_scaling_fixes.reclaim.decode.gate import Gate, Slots
from sglang_scaling_fixes.reclaim.decode.inbox import Inbox
from sglang_scaling_fixes.reclaim.decode.peers import Peers
from sglang_scaling_fixes.reclaim.decode.rooms import Rooms
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide
from sglang_scaling_fixes.reclaim.prefill.actions import Actions
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide
from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.reclaim.rules.prefill_actions import Action, SendEnded
from tests.stateful.machine import Adapters
from tests.stateful.wire import Harm

SETTINGS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    stateful_step_count=20,
    suppress_health_check=list(HealthCheck),
)
CONTROL = settings(SETTINGS, max_examples=1000, phases=[Phase.generate], report_multiple_bugs=False)


def test_no_slot_is_reachable_that_is_not_its_own() -> None:
    run_state_machine_as_test(Adapters, settings=SETTINGS)


def lets_frees_through(gate: Gate, *_: Any) -> bool:
    for slots in gate._open.values():
        slots.seen[:] = True
    return False


def frees_metadata_slots(gate: Gate, slots: Slots, call: Callable[[], None]) -> None:
    del gate, slots
    call()


def takes_any_chunk(side: PrefillSide, attempt: Attempt, chunk: Any) -> bool:
    del side
    attempt.begin()
    pages, last = len(chunk.prefill_kv_indices), bool(chunk.is_last_chunk)
    attempt.coverage.begin(pages, last, attempt.exposed.values())
    return True


def says_at_once(attempt: Attempt) -> list[Action]:
    told = [
        SendEnded(*attempt.bindings[lease], lease, "drained", "")
        for lease in attempt.untold
        if attempt.closed
    ]
    attempt.untold = () if told else attempt.untold
    return [*told, *SAYS(attempt)]


SAYS = Attempt.says


def yes(*_: Any) -> bool:
    return True


def masks_the_room(rooms: Rooms, stock: Callable[[Any], Any], receiver: Any) -> Any:
    """Another attempt's success is taken out of the state that all receivers of the room share."""
    status = stock(receiver)
    if status != SUCCESS or rooms._complete(receiver):
        return status
    receiver.conclude_state = None
    receiver.kv_mgr.request_status[receiver.bootstrap_room] = WAITING
    return WAITING


def forgets_the_room(rooms: Rooms, stock: Callable[[Any], Any], receiver: Any) -> Any:
    receiver.sglang_scaling_fixes_cleared = True
    rooms._uncleared[receiver.bootstrap_room] -= 1
    return stock(receiver)


Broken = tuple[tuple[type, str, Callable[..., Any]], ...]
CONTROLS: dict[str, Broken] = {
    "the gate keeps no free": ((Gate, "_kept", lets_frees_through),),
    "the gate keeps no metadata slot": ((Gate, "_keep_aux", frees_metadata_slots),),
    "every success reaches stock, and is shown": (
        (Inbox, "_admits", yes),
        (DecodeSide, "_complete", yes),
    ),
    "every success leaves": ((PrefillSide, "success_leaves", yes),),
    "chunks of closed attempts are taken": ((PrefillSide, "take", takes_any_chunk),),
    "no slot is asked for": ((Peers, "send_aborts", lambda *_: None),),
    "a success of another attempt is masked for the whole room": (
        (Rooms, "succeeded", masks_the_room),
    ),
    "a receiver forgets the room of another": ((Rooms, "clear", forgets_the_room),),
    "nothing that ends on prefill is told": ((Actions, "_tell", lambda *_: None),),
    "it is told while a chunk is being written": ((Attempt, "says", says_at_once),),
    "it is told after a success as well": ((Attempt, "reports", lambda *_: None),),
    "a failed write is not recorded": ((PrefillSide, "failed", lambda *_: None),),
}
"""One rule of an adapter off, or two that stand in for each other."""


@pytest.mark.parametrize("name", CONTROLS)
def test_without_one_rule_the_harm_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, method, broken in CONTROLS[name]:
        monkeypatch.setattr(owner, method, broken)
    with pytest.raises(Harm):
        run_state_machine_as_test(Adapters, settings=CONTROL)
