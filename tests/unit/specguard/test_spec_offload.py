"""Decode's KV offload waits for the verdict: stock's own manager, in a process of its own."""

from __future__ import annotations

import sys

import pytest

from sglang_scaling_fixes.lab.runtime import cpu_env
from tests import child

SCRIPT = """
import json, sys
from array import array
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import torch
from sglang.srt.disaggregation import decode_kvcache_offload_manager as stock
from sglang_scaling_fixes.specguard import attach, guard
from sglang_scaling_fixes.specguard.detector import Rules
from sglang_scaling_fixes.specguard.taint import Taint

action = sys.argv[1]
attach.attach()
if action != "off":
    guard.SpecGuard.current = guard.SpecGuard(
        Rules(), action, Taint(4), guard.DraftCounters(3, "accepted")
    )

written = []

class Manager(stock.DecodeKVCacheOffloadManager):
    def __init__(self):
        self.page_size = self.offload_stride = 4
        self.request_counter = 0
        self.kv_cache = None
        self.decode_host_mem_pool = object()
        self.req_to_token_pool = SimpleNamespace(req_to_token=torch.arange(64).reshape(1, 64))
        self.cache_controller = SimpleNamespace(
            get_hash_str=lambda tokens, prior: "hash",
            write=lambda device_indices, **more: written.append(len(device_indices)) or 1,
        )
        self.ongoing_offload, self.offloaded_state = {}, WeakKeyDictionary()
        self.offload_inflight = WeakKeyDictionary()
        self.released = []

    def _release_finished_req(self, req):
        self.released.append(req)

class Request:
    def __init__(self):
        self.kv = SimpleNamespace(req_pool_idx=0)
        self.rid, self.extra_key, self.cache_salt = "r", None, None
        self.origin_input_ids = array("q", range(8))
        self.output_ids = array("q", range(13))
        self.ended = False

    def finished(self):
        return self.ended

said = {}
manager, running = Manager(), Request()
manager.offload_kv_cache(running)
said["while it runs"] = list(written)
written.clear()
running.ended = True
manager.finalize_release_on_finish(running)
said["when it has ended"] = list(written)
said["released at once"] = len(manager.released)
written.clear()
manager, bad = Manager(), Request()
bad.ended = True
if action != "off":
    bad.__dict__["sglang_scaling_fixes_tainted"] = True
manager.offload_kv_cache(bad)
manager.finalize_release_on_finish(bad)
said["of an anomalous one"] = list(written)
said["its slots are back"] = len(manager.released)
print("said:" + json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, object]]:
    found = {}
    for action in ("off", "abort"):
        found[action] = child.said(sys.executable, SCRIPT, action, env=cpu_env({}), mark="said:")
    return found


def test_stock_offloads_while_the_request_runs(said: dict[str, dict[str, object]]) -> None:
    """The control: 12 generated tokens, three pages of them, are stored before any verdict."""
    assert said["off"]["while it runs"] == [12]


def test_with_abort_nothing_is_stored_before_the_request_has_ended_well(
    said: dict[str, dict[str, object]],
) -> None:
    assert said["abort"]["while it runs"] == []
    assert said["abort"]["when it has ended"] == [12]
    assert said["abort"]["released at once"] == 0  # stock waits for the copy


def test_of_an_anomalous_request_nothing_is_ever_stored(
    said: dict[str, dict[str, object]],
) -> None:
    assert said["off"]["of an anomalous one"] == [12]
    assert said["abort"]["of an anomalous one"] == []
    assert said["abort"]["its slots are back"] == 1
