"""What tests of both sides need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from sglang_scaling_fixes.reclaim.decode import fence
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide


@dataclass
class Fences:
    """What happened to the receiving engine, in place of Mooncake's."""

    switched: list[str] = field(default_factory=list)
    """Sessions that another engine took over from."""
    proofs_at_close: list[str] = field(default_factory=list)
    """For each engine closed: what had proven the writers of held exposures by then."""
    error: str = ""
    """A `FenceError` for whoever wants a second engine."""
    unclosable: str = ""
    """A `FenceError` for whoever closes one."""

    def switch(self, manager: Any) -> fence.Retiring:
        if self.error:
            raise fence.FenceError(self.error)
        old = manager.session
        self.switched.append(old)
        ip, _, number = old.rpartition(":")
        manager.session = f"{ip}:{int(number) + 1}"
        return fence.Retiring(old, raw=None, opened=set(), knocked_at=-fence.KNOCK_S)

    def retire(self, old: fence.Retiring, of_all_ranks: Any) -> None:
        assert old.session == self.switched[-1]
        assert of_all_ranks({1}) == {1}
        if self.unclosable:
            raise fence.FenceError(self.unclosable)
        held = DecodeSide.current.ledger.held if DecodeSide.current is not None else []
        self.proofs_at_close.append(",".join(str(w.proof) for e in held for w in e.unproven))


@pytest.fixture
def fences(monkeypatch: pytest.MonkeyPatch) -> Fences:
    found = Fences()
    monkeypatch.setattr(fence, "switch", found.switch)
    monkeypatch.setattr(fence, "retire", found.retire)
    return found


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    saved = DecodeSide.current
    yield
    DecodeSide.current = saved
