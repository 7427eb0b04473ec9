"""One rank of a split pool, beside stock's unsplit pool that is fed by the same kernels.

A process of its own, driven over a pipe by `ranks.Ranks`. It keeps the tables of a small scheduler:
pages are taken, shared and given back as a batch says, and every layer of every batch is written
and read as attention and the indexer do.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, NamedTuple

PAGE, PAGES, LAYERS, REQUESTS, LONGEST = 64, 40, 5, 4, 1024
SCRATCH_PAGES, CHUNK = 1 + 26 + 12 + REQUESTS, 12 * PAGE
INDEX_BYTES = 132
GIVE_UP_S = 60
"""After which a collective that not every rank joins is an error."""

DTYPES = {"bf16": 576, "packed": 656}


@dataclass(frozen=True)
class Part:
    """One request of a batch: how many tokens it has new, and whose beginning it shares first."""

    request: int
    new: int
    shares: int | None = None
    """Before its new tokens: drop what it had, and take this request's whole pages."""


@dataclass
class Seen:
    """What a batch came to on one rank."""

    differs: list[str] = field(default_factory=list)
    sent: int = 0
    """Bytes of all broadcasts of ours."""
    stock_sent: int = 0
    unique: int = 0
    """Bytes of the unique prefix pages in all layers."""
    collectives: list[tuple[int, int]] = field(default_factory=list)
    """(source, bytes) in order."""


class New(NamedTuple):
    """Arguments of the two stores of a layer, behind the slots."""

    index_keys: tuple[Any, Any]
    kv: tuple[Any, Any]


@dataclass(frozen=True)
class Batch:
    """One forward pass: slots that it writes, slots and pages of whole contexts."""

    plan: Any
    written: Any
    slots: Any
    pages: Any
    lengths: list[int]


class Tables:
    """Pages of each request; `free` is reused from its front, so that pages come back soon."""

    def __init__(self) -> None:
        import torch

        self.req_to_token = torch.zeros((REQUESTS, LONGEST), dtype=torch.int32)
        self.free = list(range(1, PAGES + 1))
        self.length = [0] * REQUESTS
        self.uses = [0] * (PAGES + 1)

    def drop(self, request: int) -> None:
        for page in self.pages(request):
            self.uses[page] -= 1
            if not self.uses[page]:
                self.free.append(page)
        self.length[request] = 0

    def pages(self, request: int) -> list[int]:
        row = self.req_to_token[request, : self.length[request] : PAGE] // PAGE
        return [int(page) for page in row]

    def give(self, request: int, page: int, at: int) -> None:
        import torch

        slots = torch.arange(page * PAGE, (page + 1) * PAGE, dtype=torch.int32)
        self.req_to_token[request, at : at + PAGE] = slots
        self.uses[page] += 1

    def take(self, part: Part) -> tuple[int, int] | None:
        """Tokens before and after, or None if there is no room: then the request is dropped."""
        request = part.request
        if part.shares is not None and part.shares != request:
            self.drop(request)
            whole = self.length[part.shares] // PAGE
            for i, page in enumerate(self.pages(part.shares)[:whole]):
                self.give(request, page, i * PAGE)
            self.length[request] = whole * PAGE
        before = self.length[request]
        after = before + part.new
        needed = -(-after // PAGE) - -(-before // PAGE)
        if needed > len(self.free) or after > LONGEST - PAGE:
            self.drop(request)
            return None
        for i in range(needed):
            self.give(request, self.free.pop(0), (-(-before // PAGE) + i) * PAGE)
        self.length[request] = after
        return before, after


class Rank:
    """Both pools of one rank, and what was broadcast for each."""

    def __init__(self, rank: int, ranks: int, port: int) -> None:
        import torch.distributed as dist

        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group(
            "gloo",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=GIVE_UP_S),
        )
        self.rank, self.ranks = rank, ranks
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_parallel(rank, ranks))
        self._stack.enter_context(self._counted())
        self._for: list[tuple[int, int]] = []
        self.undo: Callable[[], None] = lambda: None
        """Takes a control's fault out again."""

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Every broadcast goes through here, whoever asks for it."""
        import torch.distributed as dist

        stock = dist.broadcast

        def broadcast(tensor: Any, src: int, *args: Any, **kwargs: Any) -> Any:
            self._for.append((src, tensor.numel() * tensor.element_size()))
            return stock(tensor, src, *args, **kwargs)

        dist.broadcast = broadcast
        try:
            yield
        finally:
            dist.broadcast = stock

    def reset(self, dtype: str, pages: int = PAGES, stock: bool = False) -> None:
        """New pools. `stock`: stock's own split pool as well, for what it sends."""
        import torch
        from sglang.srt.mem_cache.dsa_cache_layer_split import (
            LayerSplitDSATokenToKVPool as StockSplit,
        )
        from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

        from sglang_scaling_fixes.layersplit import scratch
        from sglang_scaling_fixes.layersplit.pool import LayerSplitDSATokenToKVPool as Split

        made = {
            "page_size": PAGE,
            "kv_lora_rank": 512,
            "dtype": torch.bfloat16 if dtype == "bf16" else torch.float8_e4m3fn,
            "qk_rope_head_dim": 64,
            "layer_num": LAYERS,
            "device": "cpu",
            "index_head_dim": 128,
            "enable_memory_saver": False,
            "kv_cache_dim": DTYPES[dtype],
        }
        shard = {"layer_shard_rank": self.rank, "layer_shard_size": self.ranks}
        Split.scratch_size = scratch.size(SCRATCH_PAGES * PAGE, CHUNK, REQUESTS, PAGE)
        self.whole: Any = DSATokenToKVPool(pages * PAGE, **made)
        self.split: Any = Split(pages * PAGE, **made, **shard)
        self.stock: Any = StockSplit(pages * PAGE, **made, **shard) if stock else None
        self.tables = Tables()
        self.row = DTYPES[dtype] * (2 if dtype == "bf16" else 1) + INDEX_BYTES
        self._draw = torch.Generator().manual_seed(1)

    def batch(self, parts: list[Part]) -> Seen:
        import torch

        spans: list[tuple[int, int, int]] = []
        for part in parts:
            if part.request in [request for request, _, _ in spans]:
                continue
            span = self.tables.take(part)
            if span is not None:
                spans.append((part.request, *span))
        # A request whose place another one took has left the batch.
        spans = [span for span in spans if self.tables.length[span[0]] == span[2]]
        seen = Seen()
        if not spans:
            return seen
        table = self.tables.req_to_token
        requests = torch.tensor([request for request, _, _ in spans])
        prefix, lengths = [span[1] for span in spans], [span[2] for span in spans]
        read = {int(p) for r, a, _ in spans for p in table[r, :a:PAGE] // PAGE}
        seen.unique = len(read) * PAGE * self.row * LAYERS
        self._for = []
        plan = self.split.begin(table, requests, prefix, lengths)
        batch = Batch(
            plan=plan,
            written=torch.cat([table[r, a:b] for r, a, b in spans]).long(),
            slots=torch.cat([table[r, :b] for r, _, b in spans]).long(),
            pages=table[requests, : max(lengths) : PAGE] // PAGE,
            lengths=lengths,
        )
        for layer in range(LAYERS):
            self._layer(layer, batch, seen)
        seen.collectives = self._for
        seen.sent = sum(size for _, size in self._for)
        seen.differs += [f"owner's layer {i}" for i in range(LAYERS) if not self._kept(i)]
        return seen

    def _layer(self, layer: int, batch: Batch, seen: Seen) -> None:
        import torch

        new = self._new(len(batch.written))
        found = []
        for pool in (self.whole, self.split):
            pool.set_index_k_scale_buffer(layer, batch.written, *new.index_keys)
            found.append([part.clone() for part in self._index_keys(pool, layer, batch)])
            pool.set_mla_kv_buffer(SimpleNamespace(layer_id=layer), batch.written, *new.kv)
        if not all(torch.equal(*pair) for pair in zip(*found, strict=True)):
            seen.differs.append(f"index keys of {layer}")
        expected = self.whole.get_key_buffer(layer)[batch.slots].view(torch.uint8)
        ours = self.split.get_key_buffer(layer)[batch.plan.slot(batch.slots)].view(torch.uint8)
        if not torch.equal(expected, ours):
            seen.differs.append(f"KV of {layer}")
        self.split.prefetch_kv_buffer(layer + 1)
        if self.stock is not None:
            ours_sent, self._for = self._for, []
            self.stock.set_index_k_scale_buffer(layer, batch.written, *new.index_keys)
            self._index_keys(self.stock, layer, batch)
            self.stock.set_mla_kv_buffer(SimpleNamespace(layer_id=layer), batch.written, *new.kv)
            self.stock.get_key_buffer(layer)
            seen.stock_sent += sum(size for _, size in self._for)
            self._for = ours_sent

    @staticmethod
    def _index_keys(pool: Any, layer: int, batch: Batch) -> Any:
        import torch

        lengths = batch.lengths
        return pool.get_index_k_scale_buffer(
            layer,
            torch.tensor(lengths, dtype=torch.int32),
            batch.pages,
            sum(lengths),
            max(lengths),
        )

    def _new(self, tokens: int) -> New:
        """What the model writes: the same on every rank."""
        import torch

        draw = self._draw
        keys = torch.randint(0, 120, (tokens, 128), dtype=torch.uint8, generator=draw)
        scales = torch.rand((tokens, 1), generator=draw)
        latent = torch.randn((tokens, 1, 512), generator=draw).bfloat16()
        rope = torch.randn((tokens, 1, 64), generator=draw).bfloat16()
        return New((keys.view(torch.float8_e4m3fn), scales), (latent, rope))

    def _kept(self, layer: int) -> bool:
        """Whether an owner's layer is the unsplit pool's, to the byte."""
        import torch

        if not self.split.owns(layer):
            return True
        pairs = (
            (self.split.kv_buffer, self.whole.kv_buffer),
            (self.split.index_k_with_scale_buffer, self.whole.index_k_with_scale_buffer),
        )
        return all(
            torch.equal(mine[layer].view(torch.uint8), whole[layer].view(torch.uint8))
            for mine, whole in pairs
        )

    def in_pairs(self, dtype: str) -> tuple[list[Seen], str]:
        """Context parallelism within pairs of ranks, as beside attention DP: what a story differs
        in, and what stock's pool says to its first broadcast."""
        import torch.distributed as dist

        first = self.rank // 2 * 2
        pair = [first, first + 1]
        group = dist.new_group(pair, backend="gloo", use_local_synchronization=True)
        whole_rank, whole_ranks = self.rank, self.ranks
        with _parallel(self.rank - first, 2, pair, group):
            self.rank, self.ranks = self.rank - first, 2
            try:
                self.reset(dtype)
                seen = [self.batch([Part(0, 70)]), self.batch([Part(0, 70)])]
                self.reset(dtype, stock=True)
                try:
                    self.batch([Part(0, 70)])
                    said = ""
                except ValueError as error:
                    said = str(error)
            finally:
                self.rank, self.ranks = whole_rank, whole_ranks
        return seen, said

    def moved(self, dtype: str) -> tuple[bool, str]:
        """Tokens moved within a page and to another: is it as in the unsplit pool (its own bytes
        taken one by one), and what stock's split pool says."""
        import torch

        self.reset(dtype, stock=True)
        self.batch([Part(0, 3 * PAGE)])
        rows = self.tables.req_to_token[0, : 3 * PAGE].long()
        target, source = rows[[0, 5, 70]], rows[[130, 1, 9]]
        before = [index.clone() for index in self.split.index_k_with_scale_buffer]
        self.split.move_kv_cache(target, source)
        right = True
        for layer, old in enumerate(before):
            if self.split.owns(layer):
                new = self.split.index_k_with_scale_buffer[layer]
                moved = [_index_key(old, int(slot)) for slot in source]
                found = [_index_key(new, int(slot)) for slot in target]
                right &= all(torch.equal(*pair) for pair in zip(moved, found, strict=True))
                kv = self.split.kv_buffer[layer]
                right &= torch.equal(kv[target], self.whole.kv_buffer[layer][source])
        try:
            self.stock.move_kv_cache(target, source)
            return right, ""
        except IndexError as error:
            return right, str(error)

    def sizes(self) -> dict[str, int]:
        split = self.split
        tensors = [*split.kv_buffer, *split.index_k_with_scale_buffer]
        tensors += [part for one in split.scratches for part in (one.kv, one.index)]
        return {
            "said": split.get_kv_size_bytes(),
            "held": sum({t.data_ptr(): t.nbytes for t in tensors if len(t)}.values()),
            "whole": self.whole.get_kv_size_bytes(),
        }


def _index_key(index: Any, slot: int) -> Any:
    """The key and the scale of one token: a page holds all keys, then all scales."""
    import torch

    page, place = slot // PAGE, slot % PAGE
    keys, scales = index[page, : PAGE * 128], index[page, PAGE * 128 :]
    return torch.cat([keys[place * 128 : (place + 1) * 128], scales[place * 4 : (place + 1) * 4]])


@contextlib.contextmanager
def _parallel(
    rank: int, ranks: int, global_ranks: list[int] | None = None, process_group: Any = None
) -> Iterator[None]:
    import torch.distributed as dist
    from sglang.srt.runtime_context import get_parallel

    group = SimpleNamespace(
        ranks=global_ranks or list(range(ranks)),
        world_size=ranks,
        rank_in_group=rank,
        pynccl_comm=None,
        cpu_group=process_group or dist.group.WORLD,
        device="cpu",
    )
    with get_parallel().override(attn_dcp_size=1, attn_dcp_rank=0, attn_cp_group=group):
        yield


def serve(rank: int, ranks: int, port: int, pipe: Connection) -> None:
    """Answer calls until the pipe closes: `(function of controls or method's name, arguments)`."""
    try:
        this = Rank(rank, ranks, port)
        pipe.send(None)
        while True:
            name, args, kwargs = pipe.recv()
            if callable(name):
                pipe.send(name(this, *args, **kwargs))
            else:
                pipe.send(getattr(this, name)(*args, **kwargs))
    except EOFError:
        os._exit(0)
    except BaseException:
        pipe.send(RuntimeError(traceback.format_exc()))
        os._exit(1)
