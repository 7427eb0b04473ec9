"""The race checker on real releases, and its negative controls.

Every check runs in a process of its own on this environment's dependencies.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes import racecheck
from sglang_scaling_fixes.lab.runtime import STANDINS, cpu_env
from sglang_scaling_fixes.paths import ROOT
from tests import child
from tests.contract.wheels import between

INDEX, KV = "load-before-index-read", "load-before-kv-read"
LOAD, WRITE = "load-over-inflight-write", "writeback-before-forward-write"
PREFETCH, SPLIT = "layersplit-prefetch-before-load", "layersplit-read-before-load"
PDMUX = "pdmux-load-before-kv-read"
NIXL, MOONCAKE = "early-send-before-write-nixl", "early-send-before-write-mooncake"
EARLY = "early-send-before-load"
CHUNK_NIXL, CHUNK_MOONCAKE = "middle-chunk-before-write-nixl", "middle-chunk-before-write-mooncake"
CHUNK_PP = "middle-chunk-before-write-pp"

# Of layer-split's own pool.
SEND, ARRIVE, ARRIVE_WRITE = (
    "layersplit-broadcast-before-load",
    "layersplit-read-before-broadcast",
    "layersplit-write-before-broadcast",
)
REUSE, CHUNK_SEND = "layersplit-scratch-reuse-before-read", "layersplit-pack-before-write"
OURS = (SEND, ARRIVE, ARRIVE_WRITE, REUSE, CHUNK_SEND)

OVER_NIXL, OVER_MOONCAKE = (
    {NIXL: 4, CHUNK_NIXL: 4},
    {MOONCAKE: 4, CHUNK_MOONCAKE: 4},
)
STOCK = {
    "0.5.9": {INDEX: 4, LOAD: 12, WRITE: 12, PDMUX: 4, CHUNK_PP: 4},
    "0.5.18": {
        LOAD: 12,
        WRITE: 12,
        PREFETCH: 2,
        PDMUX: 4,
        EARLY: 4,
        CHUNK_PP: 4,
        **OVER_NIXL,
        **OVER_MOONCAKE,
    },
    "0.5.22": {WRITE: 12, PREFETCH: 2, PDMUX: 4, EARLY: 4, CHUNK_PP: 4, **OVER_NIXL},
    "installed": {PREFETCH: 2, PDMUX: 4, CHUNK_PP: 4, **OVER_NIXL},
}
"""Buffers raced on, by hazard: 4 layers, of which LayerSplit's second rank owns 2."""
FIXED = {"0.5.9": {PDMUX: 4}}
"""What stays with the fixes on: an armed server refuses PD multiplexing, a patched one not. A last
pipeline stage with micro-batches ahead (`CHUNK_PP`) is not ordered by any fix yet."""


def races(report: dict[str, Any]) -> dict[str, int]:
    assert not [h for h in report["hazards"] if "broken" in h]
    return {h["name"]: h["races"] for h in report["hazards"] if h["verdict"] == "race"}


def verdicts(report: dict[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    return {h["name"]: h["verdict"] for h in report["hazards"] if h["name"] in names}


@pytest.mark.parametrize("build", STOCK)
def test_stock_and_fixed(build: str) -> None:
    stock = racecheck.check(build)
    assert races(stock) == STOCK[build]
    assert verdicts(stock, OURS) == dict.fromkeys(OURS, "n/a")
    assert racecheck.exit_status(stock) == 1
    fixed = racecheck.check(build, "on")
    assert races(fixed) == {CHUNK_PP: 4, **FIXED.get(build, {})}
    split = build not in racecheck.RELEASES or build in between("0.5.16", "0.5.23")
    assert verdicts(fixed, OURS) == dict.fromkeys(OURS, "ordered" if split else "n/a")


CONTROLS = """
import contextlib, importlib, json
from unittest import mock
from sglang_scaling_fixes import ordering
from sglang_scaling_fixes.early_send_ordering import sends
from sglang_scaling_fixes.layersplit import lane
from sglang_scaling_fixes.layersplit.schedule import SCRATCHES, Schedule
from sglang_scaling_fixes.ordering import loads, probe
from sglang_scaling_fixes.racecheck import recording_cuda, worker

recording_cuda.install()
for module in worker._MODULES:
    importlib.import_module(module)
recording_cuda.replace_kernels()
worker._arm()
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager
from sglang.srt.disaggregation.prefill import SchedulerDisaggregationPrefillMixin as Prefill
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache.dsa_cache_layer_split import LayerSplitIndexKeyCache
from sglang.srt.mem_cache.index_key_cache import IndexKeyCache
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang_scaling_fixes.layersplit.pool import LayerSplitDSATokenToKVPool
from sglang_scaling_fixes.racecheck.hazards import HAZARDS

def without_counter(method, pool_of=lambda self: self):
    def unguarded(self, *args, **kwargs):
        pool = pool_of(self)
        kept, pool.layer_transfer_counter = pool.layer_transfer_counter, None
        try:
            return method(self, *args, **kwargs)
        finally:
            pool.layer_transfer_counter = kept
    return unguarded

def without_fence(name, hand_over=probe.hand_over_streams):
    def partly(controller, forward):
        hand_over(controller, forward)
        setattr(controller, name, None)
    return partly

def deaf(add=MooncakeKVManager.add_transfer_request):
    return lambda self, *args, wait_event=None, **kwargs: add(self, *args, **kwargs)

def unrecorded(copy=GenerationBatchResult.copy_to_cpu):
    def copy_to_cpu(self, **kwargs):
        kept, self.copy_done = self.copy_done, mock.MagicMock()
        copy(self, **kwargs)
        self.copy_done = kept
    return copy_to_cpu

def eager(send=Prefill.maybe_send_cached_prefix_chunk):
    return lambda self, req, allow_send=True: send(self, req)

def consuming(split=TpModelWorker.forward_batch_split_prefill):
    def forward(self, batch):
        self.set_hicache_consumer(batch.hicache_consumer_index)
        return split(self, batch)
    return forward

def unfollowing(launch=lane.StreamLane.launch):
    def launched(self, work, *used):
        self._stream.wait_stream = lambda stream: None
        return launch(self, work, *used)
    return launched

of_pool = lambda cache: cache.pool
controls = {
    "nothing": (),
    "index": ((IndexKeyCache, "get_local_buffer",
               without_counter(IndexKeyCache.get_local_buffer, of_pool)),),
    "kv": ((MLATokenToKVPool, "get_key_buffer",
            without_counter(MLATokenToKVPool.get_key_buffer)),),
    "load": ((probe, "hand_over_streams", without_fence("load_fence_stream")),),
    "write": ((probe, "hand_over_streams", without_fence("write_fence_stream")),),
    "prefetch": ((loads, "waits_per_layer", lambda counter: False),),
    "split": ((LayerSplitIndexKeyCache, "get_buffer",
               without_counter(LayerSplitIndexKeyCache.get_buffer, of_pool)),),
    "nixl": ((sends._Waiting, "get", lambda self: self._stock.get()),),
    "mooncake": ((MooncakeKVManager, "add_transfer_request", deaf()),),
    "result": ((GenerationBatchResult, "copy_to_cpu", unrecorded()),
               (Prefill, "maybe_send_cached_prefix_chunk", lambda *_, **__: None)),
    "nothing early": ((Prefill, "maybe_send_cached_prefix_chunk", lambda *_, **__: None),),
    "early": ((Prefill, "maybe_send_cached_prefix_chunk", eager()),),
    "pdmux": ((ordering, "check", lambda args: None),),
    "pdmux consumed": ((ordering, "check", lambda args: None),
                       (TpModelWorker, "forward_batch_split_prefill", consuming())),
    "sent unloaded": ((LayerSplitDSATokenToKVPool, "_send",
                       without_counter(LayerSplitDSATokenToKVPool._send)),),
    "not arrived": ((lane._Event, "wait", lambda self: None),),
    "not following": ((lane.StreamLane, "launch", unfollowing()),),
    "too far ahead": ((Schedule, "enter", lambda self, l: self._up_to(l + SCRATCHES)),),
}
found, buffers = {}, {}
for control, removed in controls.items():
    with contextlib.ExitStack() as stack:
        for owner, name, broken in removed:
            stack.enter_context(mock.patch.object(owner, name, broken))
        played = [worker.play(hazard) for hazard in HAZARDS]
    found[control] = {h["name"]: h.get("broken") or h["verdict"] for h in played}
    buffers[control] = {h["name"]: [race["buffer"] for race in h.get("found", ())] for h in played}
print("found:" + json.dumps([found, buffers]))
"""

EXPECTED = {
    "nothing": set(),
    "index": {INDEX},
    "kv": {KV},
    "load": {LOAD},
    "write": {WRITE},
    "prefetch": {PREFETCH},
    "split": {SPLIT},
    "nixl": {NIXL, CHUNK_NIXL},
    "mooncake": {MOONCAKE, CHUNK_MOONCAKE},
    "result": {CHUNK_NIXL, CHUNK_MOONCAKE},
    "nothing early": set(),
    "early": {EARLY},
    "pdmux": {PDMUX},
    "pdmux consumed": set(),
    "sent unloaded": {SEND},
    "not arrived": {ARRIVE, ARRIVE_WRITE},
    "not following": {REUSE, CHUNK_SEND},
    "too far ahead": {REUSE},
}

SCRATCHES = {
    rank: {f"rank {rank}: scratch[{i}].{kind}" for i in range(2) for kind in ("kv", "index_k")}
    for rank in range(2)
}
"""Rank 0 owns layers 0 and 1, rank 1 layers 2 and 3; scratch `l % 2` is layer `l`'s."""
OWNED = {
    rank: {f"{kind}[{layer}]" for layer in layers for kind in ("kv_buffer", "index_k")}
    for rank, layers in enumerate(((0, 1), (2, 3)))
}
BUFFERS = {
    ("sent unloaded", SEND): OWNED[0] | OWNED[1],
    ("not arrived", ARRIVE): SCRATCHES[0] | SCRATCHES[1],
    ("not arrived", ARRIVE_WRITE): SCRATCHES[0] | SCRATCHES[1] | OWNED[1],
    ("not following", REUSE): SCRATCHES[0] | SCRATCHES[1],
    ("not following", CHUNK_SEND): SCRATCHES[0] | SCRATCHES[1] | OWNED[0] | OWNED[1],
    ("too far ahead", REUSE): SCRATCHES[0] | SCRATCHES[1],
}
"""Where KV and index keys then race, on an owner and on a peer. Only an owner loads."""


def test_one_wait_removed_turns_exactly_its_hazards() -> None:
    """On the newest release, armed: every other wait stays, ours or stock's."""
    env = cpu_env({"CUDA_VISIBLE_DEVICES": ""})
    env.pop(STANDINS)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env["PYTHONPATH"]])
    found, buffers = child.said(sys.executable, CONTROLS, env=env, mark="found:")
    for control, hazards in EXPECTED.items():
        calm = {name: v for name, v in found[control].items() if v in ("ordered", "n/a")}
        turned = {name: v for name, v in found[control].items() if name not in calm}
        assert turned == dict.fromkeys({*hazards, CHUNK_PP}, "race"), control
    assert found["pdmux consumed"][PDMUX] == "ordered"
    assert {found["nothing"][name] for name in OURS} == {"ordered"}
    for (control, name), raced in BUFFERS.items():
        assert set(buffers[control][name]) == raced, (control, name)


def test_every_release_can_be_named() -> None:
    assert racecheck.RELEASES[-len(between("0.5.11", "0.5.23")) :] == between("0.5.11", "0.5.23")


def test_a_class_that_moved_is_named_and_the_others_still_run(tmp_path: Path) -> None:
    installed = racecheck._installed()
    shutil.copytree(
        installed / "sglang" / "srt",
        tmp_path / "sglang" / "srt",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for entry in (installed / "sglang").iterdir():
        if entry.name not in ("srt", "__pycache__"):
            (tmp_path / "sglang" / entry.name).symlink_to(entry)
    file = tmp_path / "sglang/srt/mem_cache/dsa_cache_layer_split.py"
    text = file.read_text().replace("LayerSplitDSATokenToKVPool", "Renamed")
    file.unlink()
    file.write_text(text)
    report = {"release": "moved", "fixes": "off", **racecheck._run(tmp_path, "off", ())}
    found = {hazard["name"]: hazard for hazard in report["hazards"]}
    for name in (PREFETCH, SPLIT):
        assert found[name]["verdict"] == "n/a"
        assert "LayerSplitDSATokenToKVPool" in found[name]["broken"]
    assert found[INDEX]["verdict"] == "ordered" and found[NIXL]["verdict"] == "race"
    assert racecheck.exit_status(report) == 2
    assert "expected sglang.srt.mem_cache.dsa_cache_layer_split" in racecheck.text(report)
