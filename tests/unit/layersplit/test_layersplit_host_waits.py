"""What makes the host wait for a GPU: nothing, where the tree says what prefixes share."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_scaling_fixes.layersplit import plan

WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "item", "equal", "is_nonzero")
"""Operations whose result, or the shape of it, the host has to read from the device."""
PAGE, PAGES = 64, 50


class Waits(TorchDispatchMode):
    """Counts them: the same operations run on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(word in name for word in WAITS) or _indexed_by_bool(name, args):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def _indexed_by_bool(name: str, args: Any) -> bool:
    if not name.startswith(("index", "_index")) or len(args) < 2:
        return False
    indices = args[1] if isinstance(args[1], list | tuple) else [args[1]]
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)


def waits(prefix: list[int], shared: list[int] | None = None) -> int:
    table = torch.arange(PAGE, PAGE * PAGES, dtype=torch.int32).repeat(4, 1)
    requests = torch.arange(len(prefix))
    lengths = [before + 10 for before in prefix]
    with Waits() as seen:
        made = plan.make(
            table,
            requests,
            prefix,
            lengths,
            page_size=PAGE,
            pool_pages=PAGES,
            room=PAGES,
            shared=shared,
        )
        made.slot(table[0, :100].long())
        made.slot(table)
        made.page(table[:, ::PAGE] // PAGE)
        made.slot_back(made.slot(table[0, :100]))
    return sum(seen.found.values())


@pytest.mark.parametrize("prefix", [[0], [0, 0], [640], [640, 0], [0, 70, 0]])
def test_a_plan_waits_for_nothing(prefix: list[int]) -> None:
    assert waits(prefix) == 0


@pytest.mark.parametrize("shared", [[0, 10, 0], [0, 10, 3]])
def test_it_waits_for_nothing_where_the_tree_says_what_is_shared(shared: list[int]) -> None:
    assert waits([640, 640, 200], shared) == 0


def test_it_waits_once_where_nobody_says() -> None:
    assert waits([640, 640]) == 1


def test_control_reading_one_element_is_seen() -> None:
    with Waits() as seen:
        SimpleNamespace(read=torch.arange(3)[torch.tensor(1)].item())
    assert seen.found
