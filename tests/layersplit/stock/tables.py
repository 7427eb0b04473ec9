"""Stock's own metadata of a forward pass, before and after its tables are translated."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from sglang_scaling_fixes.standin_objects import Anything, Lenient
from tests.layersplit.stock import fakes, pools

FIRST_PAGE = 40
"""Of those in use. So every slot is larger than any length here, and than any row of a scratch."""
SHARED = 3
"""Pages with which both requests begin."""

_REQUESTS, _LONGEST = 8, 1024


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of `req_to_token`, and each request's tokens before and after the pass."""

    mode: str
    prefix: tuple[int, ...]
    seq: tuple[int, ...]
    rows: tuple[int, ...] = (3, 5)

    @property
    def new(self) -> list[int]:
        return [after - before for before, after in zip(self.prefix, self.seq, strict=True)]


EXTEND = Batch("EXTEND", (448, 250), (500, 300))
DECODE = Batch("DECODE", (499, 299), (500, 300))
FEW = Batch("EXTEND", (448, 250), (449, 300))
"""The first request has one new token, and there are two ranks."""


def req_to_token() -> Any:
    """Pages in no order; the requests share their first ones."""
    import torch

    table = torch.zeros((_REQUESTS, _LONGEST), dtype=torch.int32)
    pages = FIRST_PAGE + torch.randperm(20, generator=torch.Generator().manual_seed(1))
    within = torch.arange(fakes.PAGE)
    for row, own in ((3, pages[:8]), (5, torch.cat([pages[:SHARED], pages[8:10]]))):
        slots = (own[:, None] * fakes.PAGE + within).flatten()
        table[row, : len(slots)] = slots.to(torch.int32)
    return table


def forward_batch(batch: Batch) -> Any:
    import torch
    from sglang.srt.layers.dp_attention import DpPaddingMode
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    seq = torch.tensor(batch.seq)
    return Lenient(
        batch_size=len(batch.seq),
        seq_lens=seq,
        seq_lens_cpu=seq,
        seq_lens_sum=sum(batch.seq),
        req_pool_indices=torch.tensor(batch.rows),
        forward_mode=ForwardMode[batch.mode],
        extend_seq_lens_cpu=batch.new,
        extend_seq_lens=torch.tensor(batch.new, dtype=torch.int32),
        extend_prefix_lens_cpu=list(batch.prefix),
        extend_num_tokens=sum(batch.new),
        global_num_tokens_cpu=[sum(batch.new)],
        dp_padding_mode=DpPaddingMode.MAX_LEN,
        get_max_chunk_capacity=lambda: 0,
    )


def backend(pool: Any, table: Any, dtype: str) -> Any:
    """Stock's backend around a pool. Packed fp8 takes top-k as RAGGED, bf16 as PAGED."""
    import torch
    from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend

    class Bare(Lenient, DeepseekSparseAttnBackend):
        pass

    no = bool
    return Bare(
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        req_to_token=table,
        device="cpu",
        real_page_size=fakes.PAGE,
        physical_page_size=fakes.PAGE,
        dsa_index_kpool=1,
        dsa_index_topk=2048,
        dsa_prefill_impl="flashmla_sparse",
        dsa_decode_impl="fa3",
        dsa_kv_cache_store_fp8=dtype == "packed",
        speculative_num_draft_tokens=0,
        _arange_buf=torch.arange(4096, dtype=torch.int32),
        _is_in_breakable_cuda_graph=no,
        _is_in_tc_piecewise_cuda_graph=no,
        _is_blackwell=no,
        _get_device_sm=int,
        _build_topk_v2_plan=lambda _lengths: None,
    )


_RULES = {
    "is_dsa_enable_prefill_cp": True,
    "is_dsa_prefill_cp_interleave": True,
    "is_dsa_prefill_cp_round_robin_split": True,
    "is_dsa_prefill_cp_in_seq_split": False,
    "is_prefill_cp_in_seq_split": False,
}
"""What stock asks its server's arguments about context parallelism, under the names of releases."""
_RULES_IN = ("sglang.srt.layers.attention.dsa.utils", "sglang.srt.layers.utils.cp_utils")


def _module(name: str) -> Any:
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(name)
    return None


@contextlib.contextmanager
def context_parallel(rank: int, ranks: int) -> Iterator[None]:
    """Stock's interleaved context parallelism is in force here, if there are two ranks or more."""
    from sglang.srt.layers.cp import base, interleave

    with contextlib.ExitStack() as stack:
        stack.enter_context(fakes.parallel(rank, ranks))
        for name, value in _RULES.items():
            for module in map(_module, _RULES_IN):
                if hasattr(module, name):
                    patch = mock.patch.object(module, name, partial(bool, value and ranks > 1))
                    stack.enter_context(patch)
        strategy = interleave.InterleaveCPStrategy(cp_size=ranks)
        stack.enter_context(mock.patch.object(base, "_STRATEGY", strategy))
        yield


def metadata(pool: Any, table: Any, dtype: str, batch: Batch) -> Any:
    from sglang.srt.layers.attention import dsa_backend

    made = backend(pool, table, dtype)
    # What it computes for kernels of a GPU has no slots, and needs one.
    with mock.patch.object(dsa_backend, "is_cuda", lambda: False):
        made.init_forward_metadata(forward_batch(batch))
    return made.forward_metadata


def numbers(made: Any) -> dict[str, Any]:
    """Every tensor of integers within a metadata object, by the names that lead to it."""
    import torch

    found: dict[str, Any] = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if not value.is_floating_point():
                found[name] = value
        elif isinstance(value, list | tuple):
            if value and all(isinstance(item, int) for item in value):
                found[name] = torch.tensor(value)
            else:
                for place, item in enumerate(value):
                    look(f"{name}.{place}", item)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                look(f"{name}.{field.name}" if name else field.name, getattr(value, field.name))

    look("", made)
    return found


def with_slots(tensors: dict[str, Any], table: Any) -> list[str]:
    """Those of them whose numbers are KV slots of these requests, or 0 or -1 for padding."""
    import torch

    slots = torch.cat([table.unique(), torch.tensor([-1])])
    return sorted(
        name for name, t in tensors.items() if (t > 0).any() and bool(torch.isin(t, slots).all())
    )


def with_pages(tensors: dict[str, Any], table: Any, batch: Batch) -> list[str]:
    """Those that name the pages of the batch's requests, one row for each request."""
    import torch

    pages = [table[row, : seq : fakes.PAGE] // fakes.PAGE for row, seq in _rows(batch)]

    def names(t: Any) -> bool:
        return t.dim() == 2 and all(
            any(torch.equal(line[: len(own)].int(), own) for line in t) for own in pages
        )

    return sorted(name for name, t in tensors.items() if names(t))


def _rows(batch: Batch) -> Iterator[tuple[int, int]]:
    return zip(batch.rows, batch.seq, strict=True)


class Never:
    """A lane on which nothing runs, so that a scratch can be filled by hand."""

    def launch(self, _work: Any, *_used: Any) -> Any:
        return SimpleNamespace(wait=lambda: None)

    def exposed_ms(self) -> float:
        return 0.0


def fill(pool: Any, whole: Any) -> None:
    """Layer 0's scratch as the plan has it, from a pool with all pages: bytes `[rows, bytes]`."""
    import torch

    kv = pool.scratches[0].kv.view(torch.uint8).view(-1, fakes.PAGE, whole.shape[1])
    pages = whole.view(-1, fakes.PAGE, whole.shape[1])
    for page, place in enumerate(pool.plan.table.tolist()):
        if place:
            kv[place] = pages[page]


def case(dtype: str, batch: Batch, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """One batch with stock's tables and with ours. `ranks`: those that share the batch's rows."""
    import torch

    table = req_to_token()
    plain: Any = Anything()
    plain.size, plain.page_size, plain.dtype = pools.TOKENS, fakes.PAGE, torch.bfloat16
    pool = pools.ours(rank, dtype)
    pool.lane = Never()
    with context_parallel(rank, ranks):
        before = metadata(plain, table, dtype, batch)
        after = metadata(pool, table, dtype, batch)
    stock, translated = numbers(before), numbers(after)
    row = pool.scratches[0].kv[0].nbytes
    draw = torch.Generator().manual_seed(2)
    shape = (pools.TOKENS + fakes.PAGE, row)
    whole = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    fill(pool, whole)
    seen = pool.scratches[0].kv.view(torch.uint8).view(-1, row)
    tables = with_slots(stock, table)
    lengths = stock["indexer_seq_lens_cpu"].tolist()

    def used(table: Any) -> Any:
        """Its entries without the padding behind the shorter requests."""
        if table.dim() == 1:
            return table
        return torch.cat([line[:length] for line, length in zip(table, lengths, strict=True)])

    def reads(buffer: Any, table: Any) -> Any:
        return buffer[used(table).long()]

    rows = [used(translated[name]) for name in tables]

    return {
        "slots": tables,
        "pages": with_pages(stock, table, batch) if ranks == 1 else [],
        "slots left": with_slots(translated, table),
        "unchanged": sorted(name for name, t in stock.items() if torch.equal(t, translated[name])),
        "changed": sorted(
            name for name, t in stock.items() if not torch.equal(t, translated[name])
        ),
        "same names": sorted(stock) == sorted(translated),
        "requests": len(stock["page_table_1"]),
        "smallest row": min(int(t.min()) for t in rows),
        "largest row": max(int(t.max()) for t in rows),
        "scratch rows": len(seen),
        "same bytes": {
            name: torch.equal(reads(whole, stock[name]), reads(seen, translated[name]))
            for name in tables
        },
        "untranslated bytes": any(
            torch.equal(reads(whole, stock[name]), reads(whole, translated[name]))
            for name in tables
        ),
        "pages translated": torch.equal(
            translated["real_page_table"], pool.plan.page(stock["real_page_table"])
        ),
        "page_table_1": stock["page_table_1"].tolist(),
        "plan": [pool.plan.prefix.tolist(), pool.plan.pages.tolist(), pool.plan.table.tolist()],
    }


def attached() -> dict[str, Any]:
    found = {
        f"{dtype} {batch.mode}": case(dtype, batch)
        for dtype, batch in itertools.product(pools.DTYPES, (EXTEND, DECODE))
    }
    ranks = [
        [case(dtype, FEW, rank, pools.RANKS) for rank in range(pools.RANKS)]
        for dtype in pools.DTYPES
    ]
    for dtype, of in zip(pools.DTYPES, ranks, strict=True):
        found[f"{dtype} CP"] = {
            "ranks": of,
            "stock's tables differ": of[0]["page_table_1"] != of[1]["page_table_1"],
            "same plan": of[0]["plan"] == of[1]["plan"],
        }
    for one in [*itertools.chain(*ranks), *found.values()]:
        one.pop("page_table_1", None)
        one.pop("plan", None)
    return found
