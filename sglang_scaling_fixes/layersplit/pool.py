"""The split pool: whole layers where they are owned, two compact scratches for every reader.

    rank 1 of 3    layers 0 1 2 | 3 4 5 | 6 7 8
    kv_buffer             - - -   # # #   - - -     #: all pages    -: no row
    scratch 0                          0, 2, 4, 6, 8  in turn: the pages of this forward pass
    scratch 1                          1, 3, 5, 7

Invariants:
- An owned layer is laid out as stock lays it out: transfers, HiCache and the host pool see nothing
  else, by the names that stock's own split pool has.
- Attention and the indexer see the scratch only, on the owner too: all layers have one page table.
- New tokens are written twice, by the same kernel of stock's: into the scratch on every rank, and
  into the layer on its owner. That costs no traffic, since under context parallelism every rank has
  the whole chunk's keys before it writes.

`_view` is stock's own unsplit pool whose layers are the scratches. Reads and writes are handed to
it with translated addresses, so this file repeats no layout, no dtype and no kernel of a release.

Imported only where a pool is about to be built.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from sglang.srt.layers.cp.utils import get_layer_owner, get_layer_shard_range
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, unwrap_write_loc
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.layersplit import plan as plans
from sglang_scaling_fixes.layersplit.channel import Channel
from sglang_scaling_fixes.layersplit.forward import Forward
from sglang_scaling_fixes.layersplit.lane import Sent, lane
from sglang_scaling_fixes.layersplit.metrics import PREFILL
from sglang_scaling_fixes.layersplit.moves import move_index_keys
from sglang_scaling_fixes.layersplit.pack import pack
from sglang_scaling_fixes.layersplit.schedule import SCRATCHES
from sglang_scaling_fixes.layersplit.scratch import Scratch, Size
from sglang_scaling_fixes.layersplit.sharing import Sharing, several
from sglang_scaling_fixes.metrics import Metrics

_SCRATCH, _OWNER = "scratch", "owner"


class LayerSplitDSATokenToKVPool(DSATokenToKVPool):  # type: ignore[misc]  # sglang has no types
    """Stock's DSA pool, split by layer over the ranks of prefill context parallelism.

    It has stock's name, since stock imports it by that name where it builds the pool.
    """

    layer_shard_enabled = True
    scratch_size: ClassVar[Size | None] = None
    """Of the pools that are built from now on; `sizing` decides it."""
    current: ClassVar[weakref.ref[LayerSplitDSATokenToKVPool] | None] = None
    """The newest pool of this process."""
    kv_buffer: list[Tensor]
    layer_num: int
    _forward: Forward | None = None
    _exposed_ms: int = 0
    """Counted so far: whole milliseconds, up to the newest pass."""
    _writes: str | None = None

    def __init__(
        self, *args: Any, layer_shard_rank: int, layer_shard_size: int, **kwargs: Any
    ) -> None:
        if self.scratch_size is None:
            raise RuntimeError("layer-split: a pool is built before its scratch was sized")
        if kwargs.get("index_kpool", 1) > 1:
            raise ConfigError(
                "--enable-dsa-cache-layer-split: this model pools its index keys, which layer-split"
                " has not been tried with; start without layer-split"
            )
        self.size_of_scratch: Size = self.scratch_size
        self.layer_shard_rank = layer_shard_rank
        self.layer_shard_size = layer_shard_size
        self.stats = Metrics(PREFILL, None)
        self.sharing = Sharing()
        layers = kwargs["layer_num"]
        if layer_shard_size > layers:
            raise ConfigError(
                f"--enable-dsa-cache-layer-split: {layer_shard_size} ranks share {layers} layers,"
                f" and some would have none; use --tp {layers} or less"
            )
        super().__init__(*args, **kwargs)
        self.layer_shard_start = self.start_layer + self._owned_local_layer_range()[0]
        self.channel = Channel(get_parallel().attn_cp_group.ranks, self.device)
        self.lane = lane(self.device)
        self._view = self._scratch_as_pool()
        type(self).current = weakref.ref(self)

    # What is owned, and where it is kept.

    def _owned_local_layer_range(self) -> tuple[int, int]:
        """Stock's split: contiguous, since decode pairs layers by position; even to one layer."""
        start, end = get_layer_shard_range(
            self.layer_shard_rank, self.layer_shard_size, self.layer_num
        )
        return start, end

    def owns(self, layer: int) -> bool:
        """`layer` counts from 0, whatever the first layer of this pool is called."""
        start, end = self._owned_local_layer_range()
        return start <= layer < end

    @contextlib.contextmanager
    def _only_owned(self) -> Iterator[None]:
        """Within the block this is a pool of the owned layers alone, to stock's own methods."""
        start, end = self._owned_local_layer_range()
        kv, index = self.kv_buffer, self.index_k_with_scale_buffer
        self.kv_buffer = kv[start:end]
        self._set_index_buffers(index[start:end])
        try:
            with self._fewer_layers():
                yield
        finally:
            self.kv_buffer = kv
            self._set_index_buffers(index)

    def _set_index_buffers(self, buffers: list[Tensor]) -> None:
        cache = getattr(self, "index_key_cache", None)
        if cache is None:  # before 0.5.18
            self.index_k_with_scale_buffer = buffers
        else:
            cache.buffer = buffers

    def _padded(self, owned: list[Tensor]) -> list[Tensor]:
        """`owned`, with buffers of no row in the places of the other ranks' layers."""
        start, end = self._owned_local_layer_range()
        none = owned[0][:0].clone()
        return [none] * start + owned + [none] * (self.layer_num - end)

    @contextlib.contextmanager
    def _fewer_layers(self) -> Iterator[None]:
        start, end = self._owned_local_layer_range()
        layers, self.layer_num = self.layer_num, end - start
        try:
            yield
        finally:
            self.layer_num = layers

    def _create_buffers(self) -> None:
        with self._fewer_layers():
            super()._create_buffers()
        self.kv_buffer = self._padded(self.kv_buffer)

    def _create_index_buffers(self) -> None:
        """Before 0.5.18."""
        with self._fewer_layers():
            super()._create_index_buffers()
        self.index_k_with_scale_buffer = self._padded(self.index_k_with_scale_buffer)
        self._create_scratches(self.index_k_with_scale_buffer)

    def _create_index_key_cache(self) -> Any:
        """From 0.5.18 on."""
        start, end = self._owned_local_layer_range()
        skips = getattr(self, "skip_topk_layers", None)
        if skips is not None:
            self.skip_topk_layers = skips[start:end]
        with self._fewer_layers():
            cache = super()._create_index_key_cache()
        if skips is not None:
            self.skip_topk_layers = skips
        cache.buffer = self._padded(cache.buffer)
        self._create_scratches(cache.buffer)
        return cache

    def _create_scratches(self, index: list[Tensor]) -> None:
        rows = self.size_of_scratch.pages * self.page_size
        kv, keys = self.kv_buffer[0], index[0]
        # Zeros: rows that nobody has written are read, masked, by kernels that multiply by 0.
        self.scratches = [
            Scratch(
                kv.new_zeros((rows, *kv.shape[1:])),
                keys.new_zeros((self.size_of_scratch.pages, *keys.shape[1:])),
            )
            for _ in range(SCRATCHES)
        ]

    def _scratch_as_pool(self) -> Any:
        view = copy.copy(self)
        view.__class__ = DSATokenToKVPool
        view.layer_shard_enabled = False
        view.layer_transfer_counter = None  # the broadcasts wait for loads
        view.size = (self.size_of_scratch.pages - 1) * self.page_size
        view.kv_buffer = [self.scratches[i % SCRATCHES].kv for i in range(self.layer_num)]
        index = [self.scratches[i % SCRATCHES].index for i in range(self.layer_num)]
        if hasattr(self, "index_key_cache"):
            view.index_key_cache = copy.copy(self.index_key_cache)
            view.index_key_cache.pool = view
            view.index_key_cache.buffer = index
        else:
            view.index_k_with_scale_buffer = index
        return view

    def _clear_buffers(self) -> None:
        super()._clear_buffers()
        self.scratches.clear()
        del self._view

    def get_kv_size_bytes(self) -> int:
        """What is allocated: owned layers and both scratches."""
        owned: int = super().get_kv_size_bytes()
        return owned + sum(scratch.nbytes for scratch in self.scratches)

    # The forward pass.

    def begin(
        self,
        req_to_token: Tensor,
        requests: Tensor,
        prefix_lens: list[int],
        seq_lens: list[int],
        *,
        paged_index: bool = False,
        shared: list[int] | None = None,
    ) -> plans.Plan:
        """A forward pass begins: plan it, and send what can be sent. `plan.make` says what is what.

        Raises `RuntimeError` if it does not fit the scratch; admission sees to it that it does.
        """
        pool_pages = self.size // self.page_size + 1
        plan = plans.make(
            req_to_token,
            requests,
            prefix_lens,
            seq_lens,
            page_size=self.page_size,
            pool_pages=pool_pages,
            room=self.size_of_scratch.pages,
            shared=shared,
        )
        if len(plan.pages) > self.size_of_scratch.pages:
            raise RuntimeError(
                f"layer-split: a batch of {len(prefix_lens)} requests reads and writes"
                f" {len(plan.pages) - 1} pages, and a scratch has {self.size_of_scratch.pages - 1}"
            )
        self.stats.inc("forwards")
        self.stats.inc("host_waits", by=shared is None and several(prefix_lens))
        exposed_ms = int(self.lane.exposed_ms())
        self.stats.inc("exposed_ms", by=exposed_ms - self._exposed_ms)
        self._exposed_ms = exposed_ms
        self.stats.inc("pages", by=len(plan.prefix))
        self.stats.set("scratch_pages", len(plan.pages))
        self._forward = Forward(plan, self.layer_num, partial(self._send, plan), paged_index)
        return plan

    @property
    def plan(self) -> plans.Plan:
        return self._now().plan

    def _now(self) -> Forward:
        if self._forward is None:
            raise RuntimeError("layer-split: KV is used outside of a planned forward pass")
        return self._forward

    def _send(self, plan: plans.Plan, layer: int) -> Sent:
        counter = self.layer_transfer_counter
        scratch = self.scratches[layer % SCRATCHES]
        first, last = 1, 1 + len(plan.prefix)
        kv = scratch.kv[first * self.page_size : last * self.page_size]
        parts = [kv]
        index = self.index_k_with_scale_buffer[layer]
        if self._has_index(layer):
            parts.append(scratch.index[first:last])
        owner = get_layer_owner(layer, self.layer_shard_size, self.layer_num)

        def work() -> None:
            if owner == self.layer_shard_rank:
                if counter is not None:
                    counter.wait_until(layer)
                own = self.kv_buffer[layer].view(-1, self.page_size, *kv.shape[1:])
                pack(
                    plan.prefix,
                    own,
                    kv.view(-1, *own.shape[1:]),
                    index if len(parts) > 1 else index[:0],
                    parts[-1],
                )
            self.channel.broadcast(owner, parts)

        self.stats.inc("broadcasts")
        self.stats.inc("bytes", by=sum(part.nbytes for part in parts))
        return self.lane.launch(work, plan.prefix)

    def _has_index(self, layer: int) -> bool:
        """Layers that take another one's top-k keep no index keys, on any rank."""
        skips = getattr(self, "skip_topk_layers", None)
        return not (skips and skips[layer])

    def _enter(self, layer_id: int) -> None:
        self._now().enter(layer_id - self.start_layer)

    def prefetch_kv_buffer(self, layer_id: int, *_args: Any, **_kwargs: Any) -> None:
        """Stock calls it for the next layer once attention of a layer has been launched."""
        del layer_id  # not the next one in models that have others between
        if self._forward is not None:  # a pass of no token plans nothing
            self._forward.leave()

    # Reads: of the scratch, in which `begin`'s caller has seen to it that tables point.

    def get_key_buffer(self, layer_id: int) -> Tensor:
        self._enter(layer_id)
        buffer: Tensor = self._view.get_key_buffer(layer_id)
        return buffer

    def get_value_buffer(self, layer_id: int) -> Tensor:
        self._enter(layer_id)
        buffer: Tensor = self._view.get_value_buffer(layer_id)
        return buffer

    def get_mla_kv_buffer(self, layer: Any, loc: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._enter(layer.layer_id)
        return self._view.get_mla_kv_buffer(layer, self.plan.slot(loc), *args, **kwargs)

    def get_kv_buffer_shape(self) -> tuple[torch.Size, torch.Size]:
        """A probe, outside of any pass."""
        key = self._view.get_key_buffer(self.start_layer).shape
        value = self._view.get_value_buffer(self.start_layer).shape
        rows = self.size + self.page_size
        return torch.Size((rows, *key[1:])), torch.Size((rows, *value[1:]))

    def get_index_k_scale_buffer(
        self, layer_id: int, seq_len_tensor: Tensor, page_indices: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Index keys of whole requests, by pool page."""
        self._enter(layer_id)
        pages = self.plan.page(page_indices)
        return self._view.get_index_k_scale_buffer(layer_id, seq_len_tensor, pages, *args, **kwargs)

    def get_index_k_continuous(self, layer_id: int, seq_len: int, page_indices: Tensor) -> Any:
        self._enter(layer_id)
        return self._view.get_index_k_continuous(layer_id, seq_len, self.plan.page(page_indices))

    def get_index_k_scale_continuous(
        self, layer_id: int, seq_len: int, page_indices: Tensor
    ) -> Any:
        self._enter(layer_id)
        pages = self.plan.page(page_indices)
        return self._view.get_index_k_scale_continuous(layer_id, seq_len, pages)

    # Writes.

    def set_mla_kv_buffer(self, layer: Any, loc_info: Any, *keys: Tensor, **kwargs: Any) -> None:
        loc = unwrap_write_loc(loc_info)[0]
        self._enter(layer.layer_id)
        self._view.set_mla_kv_buffer(layer, self.plan.slot(loc), *keys, **kwargs)
        if self.owns(layer.layer_id - self.start_layer):
            super().set_mla_kv_buffer(layer, loc, *keys, **kwargs)

    def set_kv_buffer(self, layer: Any, loc_info: Any, *keys: Tensor, **kwargs: Any) -> None:
        loc = unwrap_write_loc(loc_info)[0]
        self._enter(layer.layer_id)
        self._view.set_kv_buffer(layer, self.plan.slot(loc), *keys, **kwargs)
        if self.owns(layer.layer_id - self.start_layer):
            super().set_kv_buffer(layer, loc, *keys, **kwargs)

    def set_index_k_scale_buffer(
        self, layer_id: int, loc: Tensor, index_k: Tensor, index_k_scale: Tensor
    ) -> None:
        if self._writes is None:
            for where, slots in self.index_writes(layer_id, loc):
                with where:
                    self.set_index_k_scale_buffer(layer_id, slots, index_k, index_k_scale)
        elif self._writes == _OWNER:
            super().set_index_k_scale_buffer(layer_id, loc, index_k, index_k_scale)
        else:
            self._view.set_index_k_scale_buffer(layer_id, loc, index_k, index_k_scale)

    def index_writes(
        self, layer_id: int, loc: Tensor
    ) -> Iterator[tuple[contextlib.AbstractContextManager[None], Tensor]]:
        """Where new index keys go: for each place a context, and the slots to write there.

        Within the context `get_index_k_with_scale_buffer` and `set_index_k_scale_buffer` are those
        of that place, so that any of stock's stores can be run once for each.
        """
        self._enter(layer_id)
        yield self._writing(_SCRATCH), self.plan.slot(loc)
        if self.owns(layer_id - self.start_layer):
            yield self._writing(_OWNER), loc

    @property
    def writing(self) -> bool:
        return self._writes is not None

    @contextlib.contextmanager
    def _writing(self, place: str) -> Iterator[None]:
        self._writes = place
        try:
            yield
        finally:
            self._writes = None

    def get_index_k_with_scale_buffer(self, layer_id: int) -> Tensor:
        """The index keys of a layer as they lie: to write them, or to read pages in place."""
        if self._writes == _OWNER:
            own: Tensor = super().get_index_k_with_scale_buffer(layer_id)
            return own
        if self._writes is None and not self._now().paged_index:
            raise RuntimeError("layer-split: this pass has no tables to read index keys in place")
        self._enter(layer_id)
        buffer: Tensor = self._view.get_index_k_with_scale_buffer(layer_id)
        return buffer

    # What only concerns owned layers: stock's own methods over them.

    def get_contiguous_buf_infos(self) -> Any:
        with self._only_owned():
            return super().get_contiguous_buf_infos()

    def get_state_buf_infos(self) -> Any:
        with self._only_owned():
            return super().get_state_buf_infos()

    def get_cpu_copy(self, *args: Any, **kwargs: Any) -> Any:
        with self._only_owned():
            return super().get_cpu_copy(*args, **kwargs)

    def load_cpu_copy(self, *args: Any, **kwargs: Any) -> None:
        with self._only_owned():
            super().load_cpu_copy(*args, **kwargs)

    def move_kv_cache(self, tgt_loc: Tensor, src_loc: Tensor) -> None:
        """Stock's index keys are moved by token where they lie by page (`IndexError`)."""
        if not tgt_loc.numel():
            return
        target, source = tgt_loc.view(-1).long(), src_loc.view(-1).long()
        for kv in self.kv_buffer:
            if len(kv):
                kv[target] = kv[source]
        for index in self.index_k_with_scale_buffer:
            move_index_keys(index, target, source, self.page_size, self.index_head_dim)
