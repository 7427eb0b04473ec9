"""Attention's tables in the words of the scratch, and stores that are run once for each place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_scaling_fixes.layersplit import index_writes, metadata
from sglang_scaling_fixes.layersplit.plan import Plan
from sglang_scaling_fixes.layersplit.scratch import Size
from sglang_scaling_fixes.layersplit.sharing import Sharing
from tests.layersplit.stand_ins import PAGE, Pool, module, pool_module


def plan() -> Plan:
    """Pool pages 5 and 2 lie in scratch pages 1 and 2."""
    pages = torch.tensor([0, 5, 2])
    table = torch.zeros(8, dtype=torch.int32)
    table[pages] = torch.arange(3, dtype=torch.int32)
    return Plan(pages[1:2], pages, table, PAGE)


@dataclass(frozen=True)
class Metadata:
    page_table_1: Tensor
    real_page_table: Tensor
    page_table_1_flattened: Tensor | None = None
    cache_seqlens_int32: Tensor | None = None


SLOTS = torch.tensor([[5 * PAGE, 2 * PAGE + 7, -1]], dtype=torch.int32)
MOVED = torch.tensor([[PAGE, 2 * PAGE + 7, -1]], dtype=torch.int32)
PAGES = torch.tensor([[5, 2, 0]], dtype=torch.int32)
LENGTHS = torch.tensor([2], dtype=torch.int32)


def test_slots_are_translated_and_pages_are_the_pools() -> None:
    given = Metadata(SLOTS, PAGES, SLOTS[0, :2], LENGTHS)
    found = metadata.remapped(given, plan(), paged_index=False)
    assert torch.equal(found.page_table_1, MOVED)
    assert torch.equal(found.page_table_1_flattened, MOVED[0, :2])
    assert found.real_page_table is PAGES and found.cache_seqlens_int32 is LENGTHS
    assert torch.equal(given.page_table_1, SLOTS)  # stock's own object stays


def test_pages_are_translated_where_the_indexer_reads_them_in_place() -> None:
    found = metadata.remapped(Metadata(SLOTS, PAGES), plan(), paged_index=True)
    assert found.real_page_table.tolist() == [[1, 2, 0]]
    assert found.page_table_1_flattened is None


def mode(**true: bool) -> Any:
    asked = ("is_decode", "is_extend_without_speculative", "is_idle", "is_target_verify")
    return SimpleNamespace(**{name: lambda name=name: true.get(name, False) for name in asked})


class Planned:
    """A pool that keeps what it was asked to plan."""

    def __init__(self) -> None:
        self.sharing = Sharing()

    def begin(self, *batch: Any, paged_index: bool, shared: list[int] | None) -> Plan:
        self.batch, self.paged_index, self.shared = batch, paged_index, shared
        return plan()


class PlannedSplit(Planned, Pool):
    def __init__(self) -> None:
        Pool.__init__(self, Size(4, 4))


def batch(forward_mode: Any) -> Any:
    return SimpleNamespace(
        forward_mode=forward_mode,
        seq_lens_cpu=torch.tensor([9, 4]),
        extend_prefix_lens_cpu=[3, 0],
        rids=["a", "b"],
        req_pool_indices="rows",
        spec_info=SimpleNamespace(draft_token_num=3),
    )


def test_a_pass_is_planned_from_the_whole_batch() -> None:
    pool = Planned()
    metadata.begin(pool, "table", batch(mode(is_extend_without_speculative=True)))
    assert (pool.batch, pool.paged_index) == (("table", "rows", [3, 0], [9, 4]), False)
    metadata.begin(pool, "table", batch(mode(is_decode=True)))
    assert (pool.batch, pool.paged_index) == (("table", "rows", [8, 3], [9, 4]), True)
    metadata.begin(pool, "table", batch(mode(is_target_verify=True)))
    assert (pool.batch, pool.paged_index) == (("table", "rows", [9, 4], [12, 7]), True)


def test_a_pass_that_no_prefill_server_has_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no forward pass"):
        metadata.begin(Planned(), "table", batch(mode()))


class Backend:
    def __init__(self, pool: Any) -> None:
        self.token_to_kv_pool = pool
        self.req_to_token_pool = SimpleNamespace(req_to_token="table")
        self.forward_metadata: Any = None


def stock_metadata(backend: Backend, forward_batch: Any) -> None:
    backend.forward_metadata = Metadata(SLOTS, PAGES)


@pytest.mark.parametrize(
    ("split", "forward_mode", "table"),
    [
        (True, mode(is_extend_without_speculative=True), MOVED),
        (True, mode(is_idle=True), SLOTS),
        (False, mode(is_extend_without_speculative=True), SLOTS),
    ],
    ids=["split", "idle", "a draft's own pool"],
)
def test_only_passes_over_a_split_pool_are_translated(
    monkeypatch: pytest.MonkeyPatch, split: bool, forward_mode: Any, table: Tensor
) -> None:
    pool_module(monkeypatch)
    backend = Backend(PlannedSplit() if split else Planned())
    metadata.after_metadata(stock_metadata)(backend, batch(forward_mode))
    assert torch.equal(backend.forward_metadata.page_table_1, table)


# -- index keys ----------------------------------------------------------------------------


class Store(Pool):
    """Index keys of two places, and which of them is written to now."""

    def __init__(self) -> None:
        super().__init__(Size(4, 4))
        self.place: str | None = None

    @property
    def writing(self) -> bool:
        return self.place is not None

    @contextlib.contextmanager
    def at(self, place: str) -> Iterator[None]:
        self.place = place
        yield
        self.place = None

    def index_writes(self, layer: int, loc: Tensor) -> Iterator[tuple[Any, Tensor]]:
        yield self.at(f"scratch of {layer}"), plan().slot(loc)
        yield self.at(f"layer {layer}"), loc


class Indexer:
    """Stock's two stores, one of which may call the other."""

    def __init__(self) -> None:
        self.stored: list[tuple[str | None, Any, list[int]]] = []
        self.pool: Any = None

    def store(
        self,
        forward_batch: Any,
        layer_id: int,
        key: str,
        *,
        act_quant: Any = None,
        out_cache_loc: Any = None,
    ) -> None:
        assert layer_id == 3 and act_quant in (None, "quant")
        if out_cache_loc is None:
            out_cache_loc = forward_batch.out_cache_loc
        self.stored.append((getattr(self.pool, "place", None), key, out_cache_loc.tolist()))

    def fused(  # noqa: PLR0917, as stock has it
        self,
        key_raw: str,
        positions: Any,
        forward_batch: Any,
        layer_id: int,
        act_quant: Any,
        out_cache_loc: Any = None,
    ) -> None:
        self.wrapped(forward_batch, layer_id, key_raw, out_cache_loc=out_cache_loc)

    wrapped: Callable[..., None]


LOC = SLOTS[0, :2]
BATCH = SimpleNamespace(out_cache_loc=LOC)
BOTH = [("scratch of 3", "key", MOVED[0, :2].tolist()), ("layer 3", "key", LOC.tolist())]


@pytest.fixture
def indexer(monkeypatch: pytest.MonkeyPatch) -> Indexer:
    pool_module(monkeypatch)
    made = Indexer()
    stock = SimpleNamespace(get_token_to_kv_pool=lambda: made.pool)
    module(monkeypatch, "sglang.srt.layers.attention.dsa", dsa_indexer=stock)
    made.pool = Store()
    store = index_writes.everywhere(Indexer.store)
    made.wrapped = lambda *args, **kwargs: store(made, *args, **kwargs)
    return made


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store(BATCH, 3, "key"),
        lambda store: store(BATCH, 3, "key", act_quant="quant"),
        lambda store: store(key="key", layer_id=3, forward_batch=BATCH, out_cache_loc=None),
        lambda store: store(SimpleNamespace(out_cache_loc=None), 3, "key", out_cache_loc=LOC),
    ],
    ids=["positions", "quantised", "names", "slots given"],
)
def test_a_store_runs_for_each_place_with_its_slots(
    indexer: Indexer, call: Callable[[Any], None]
) -> None:
    call(indexer.wrapped)
    assert indexer.stored == BOTH


def test_a_store_within_a_store_runs_once_for_each_place(indexer: Indexer) -> None:
    fused = index_writes.everywhere(Indexer.fused)
    fused(indexer, "key", None, BATCH, 3, "quant")
    assert indexer.stored == BOTH


def test_control_stock_alone_stores_once(indexer: Indexer) -> None:
    Indexer.store(indexer, BATCH, 3, "key")
    assert indexer.stored == [(None, "key", LOC.tolist())]


def test_another_pool_is_stocks(indexer: Indexer) -> None:
    indexer.pool = object()
    indexer.wrapped(BATCH, 3, "key")
    assert indexer.stored == [(None, "key", LOC.tolist())]
