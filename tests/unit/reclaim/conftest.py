"""What tests of both sides need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sglang_scaling_fixes.reclaim.decode import fence
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What had been freed by ledger and allocators when the engine was replaced."""
    from tests.decode_rank import NEW, OLD  # with torch and SGLang: not every test needs them

    seen: list[str] = []

    def renew(manager: Any, of_all_ranks: Any) -> tuple[str, str]:
        assert of_all_ranks({1}) == {1}
        held = DecodeSide.current.ledger.held if DecodeSide.current is not None else []
        seen.append(",".join(str(w.proof) for e in held for w in e.writers.values()))
        manager.session = NEW
        return OLD, NEW

    monkeypatch.setattr(fence, "renew", renew)
    return seen


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    saved = DecodeSide.current
    yield
    DecodeSide.current = saved
