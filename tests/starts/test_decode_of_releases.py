"""Two requests of one room, and operations that need an idle server, on stock's own classes.

Each release's code is imported in a process of its own; no server is started. What the fix does not
do here is done by stock: receivers are stock's, and so are the states of rooms and the assertions.
"""

from __future__ import annotations

from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from tests import child
from tests.contract import wheels
from tests.releases import NEW

COMMON = """
import dataclasses, json, logging, threading, time
from types import SimpleNamespace
import torch
from sglang.srt.disaggregation import decode as stock_decode
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVReceiver
from sglang.srt.disaggregation.utils import ReqToMetadataIdxAllocator, TransferBackend
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.ranks import TpGroup
from sglang_scaling_fixes.reclaim import FIX, layout, messages, points, probe
from sglang_scaling_fixes.reclaim.decode import maintenance
from sglang_scaling_fixes.reclaim.decode.rooms import Rooms
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide
from sglang_scaling_fixes.attach import present, resolve
from sglang_scaling_fixes.standin_objects import Anything, Lenient

logging.disable(logging.CRITICAL)
Scheduler.is_fully_idle = lambda scheduler, for_health_check=False, **_: True
FIX.arm(Config())
RANK = "192.0.2.1:9"
ROOM = 777


class Receiver(MooncakeKVReceiver):
    @classmethod
    def _connect(cls, *_, **__):
        return probe._Socket(), threading.Lock()


class Queue(Lenient, stock_decode.DecodePreallocQueue):
    def __init__(self, **attributes):
        Lenient.__init__(self, **attributes)


stock_decode.get_kv_class = lambda *_: Receiver


class Decode:
    def __init__(self):
        self.manager = manager = probe._manager(kv_args=SimpleNamespace(state_types=[]))
        manager.defer_decode_allocation = manager.enable_deferred_decode_kv_release = False
        manager._deferred_ack_targets, manager._deferred_ack_poisoned_rooms = {}, set()
        manager.waiting_timeout = 300.0
        manager.connection_pool, manager.connection_lock = {}, threading.Lock()
        self.side = DecodeSide(manager, Config()).install()
        self.tokens = TokenToKVPoolAllocator(256, torch.float32, "cpu", None, False)
        self.aux = ReqToMetadataIdxAllocator(8)
        self.ended = []
        streams = lambda reqs, *_: self.ended.extend(reqs)
        self.scheduler = Scheduler.__new__(Scheduler)
        self.scheduler.__dict__.update(
            tp_cpu_group=None, stream_output=streams, waiting_queue=[],
            output_streamer=SimpleNamespace(stream_output=streams),
            running_batch=SimpleNamespace(reqs=[]), enable_hierarchical_cache=True,
            disaggregation_mode=None, server_args=Anything(),
        )
        self.transfers = []
        self.queue = Queue(
            num_reserved_decode_tokens=512,
            queue=[], transfer_queue=SimpleNamespace(queue=self.transfers), kv_manager=manager,
            scheduler=self.scheduler, transfer_backend=TransferBackend.MOONCAKE,
            token_to_kv_pool_allocator=self.tokens, req_to_metadata_buffer_idx_allocator=self.aux,
        )
        self.side.install_gate(self.queue)
        self.side.maintenance = maintenance.Maintenance(
            self.side.ledger, self.side.tick, self.scheduler, TpGroup()
        )
        self.side.ledger.hello_acked(RANK, "prefill")

    def request(self, room):
        return Lenient(
            bootstrap_room=room, bootstrap_host="192.0.2.1", bootstrap_port=8, rid=object(),
            origin_input_ids=[1], output_ids=[], return_logprob=False,
            sampling_params=SimpleNamespace(max_new_tokens=8),
        )

    def expose(self, room=ROOM):
        req = self.request(room)
        made = self.queue._create_receiver_and_enqueue(req)
        receiver = made.kv_receiver
        ip, port = RANK.split(":")
        receiver.bootstrap_infos = [{"rank_ip": ip, "rank_port": int(port), "is_dummy": False}]
        receiver.required_dst_info_num = 1
        receiver.abort_notified = True
        self.manager.update_status(room, 2)
        made.slots, made.aux = self.tokens.alloc(4), self.aux.alloc()
        del receiver.__dict__["sglang_scaling_fixes_tokens"]
        receiver.sglang_scaling_fixes_rejected = lambda: False
        receiver.send_metadata(made.slots.numpy().astype("int32"), made.aux, [])
        self.transfers.append(self.queue.queue.pop())
        return made

    def succeeds(self, made):
        mark = messages.SuccessTag(made.kv_receiver.sglang_scaling_fixes_exposure.lease, RANK)
        room = str(made.req.bootstrap_room).encode()
        if self.manager.server_socket.read([room, b"4", b"0", messages.encode(mark)]) is not None:
            self.manager.update_status(made.req.bootstrap_room, 4)

    def poll(self, made):
        try:
            return int(made.kv_receiver.poll())
        except KeyError as error:
            return f"KeyError {error}"

    def commit(self, made):
        receiver = made.kv_receiver
        self.side.commit(lambda *_: receiver.clear(), None, SimpleNamespace(kv_receiver=receiver))
        self.transfers.remove(made)

    def give_up(self, made):
        made.kv_receiver.abort()
        made.kv_receiver.clear()
        if made in self.transfers:
            self.transfers.remove(made)
        self.tokens.free(made.slots)
        self.aux.free(made.aux)

    def free(self):
        return self.tokens.available_size(), self.aux.available_size()
"""

ROOMS = (
    COMMON
    + """
def masks_the_room(rooms, stock, receiver):
    # As it was: in the state that all receivers of the room share.
    status = stock(receiver)
    if status != 4 or rooms._complete(receiver):
        return status
    receiver.conclude_state = None
    receiver.kv_mgr.request_status[receiver.bootstrap_room] = type(status)(2)
    return type(status)(2)


def order(served, first):
    decode = Decode()
    waiting = {name: decode.expose() for name in "AB"}
    other = "BA"["AB".index(served)]
    decode.succeeds(waiting[served])
    turns = []
    for _ in range(3):
        polls = {}
        for name in (first, "BA"["AB".index(first)]):
            if name in waiting:
                polls[name] = decode.poll(waiting[name])
        turns.append(polls)
        for name, status in polls.items():
            if status == 4:
                decode.commit(waiting.pop(name))
    end = {}
    if other in waiting and served not in waiting:
        # What has not come yet comes now, or never.
        kept = waiting.pop(other)
        if first == "A":
            decode.succeeds(kept)
            end["its own success"] = decode.poll(kept)
        else:
            kept.kv_receiver.init_time, decode.manager.waiting_timeout = 1.0, 0.0
            end["stock's time-out"] = decode.poll(kept)
    return {"turns": turns, **end}


ORDERS = [(served, first) for served in "AB" for first in "AB"]
found = {"fixed": [order(*o) for o in ORDERS]}
kept = Rooms.succeeded, Rooms.clear
Rooms.succeeded, Rooms.clear = masks_the_room, lambda rooms, stock, receiver: stock(receiver)
found["as it was"] = [order(*o) for o in ORDERS]
Rooms.succeeded, Rooms.clear = kept


def admitted(decode, room, **back):
    # Stock's own `add` is reached, or not.
    before = len(decode.queue.queue)
    stock, decode.queue._check_if_req_exceed_kv_capacity = None, lambda req: False
    req = decode.request(room)
    decode.queue._resolve_prefill_dp_rank = lambda req: None
    decode.queue.pending_reqs, decode.queue.retracted_queue = [], []
    stock_decode.DecodePreallocQueue.add(decode.queue, req, **back)
    reason = getattr(req.finished_reason, "status_code", None), str(
        getattr(req.finished_reason, "message", "")
    )
    return len(decode.queue.queue) > before or bool(decode.queue.retracted_queue), int(
        reason[0] or 0
    ), reason[1]


decode = Decode()
first = decode.expose()
found["second"] = admitted(decode, ROOM)
found["streamed"] = len(decode.ended)
found["other room"] = admitted(decode, ROOM + 1)[:2]
found["retracted"] = admitted(decode, ROOM, is_retracted=True)[:2]
decode.succeeds(first)
found["first"] = decode.poll(first)
decode.commit(first)
found["after it"] = admitted(decode, ROOM)[:2]

# Its KV is held, and a retry takes the room. Then stock clears the first once more.
decode = Decode()
first = decode.expose()
decode.give_up(first)
found["held"] = decode.side.ledger.holding
found["retry"] = admitted(decode, ROOM)[:2]
decode.queue.queue.clear()
retry = decode.expose()
first.kv_receiver.clear()
found["retry polls"] = decode.poll(retry)
decode.succeeds(retry)
found["retry polls then"] = decode.poll(retry)

# A retracted request does not fit beside what is held, and stock takes nothing in before it.
decode = Decode()
decode.give_up(decode.expose())
(exposure,) = decode.side.ledger.held
queue = decode.queue
queue.retracted_queue, queue._uses_swa_tail_prealloc = [decode.request(8)], lambda: False
queue._uses_swa_reservation = queue._uses_swa_tail_prealloc
queue._allocatable_tokens = queue._allocatable_token_budgets = lambda **_: 0
queue.req_to_token_pool = SimpleNamespace(available_size=lambda: 0)
resume = resolve(points.RESUME_RETRACTED.target)[2]


def refuses(resume, age=10.0, running=()):
    exposure.gave_up_at = time.monotonic() - age
    decode.scheduler.running_batch.reqs = list(running)
    assert resume(queue) == [] and len(queue.retracted_queue) == 1
    decode.side.tick()
    return decode.side.relief.refusing


found["stands still"] = {
    "as it was": refuses(resume.__wrapped__),
    "fixed": refuses(resume),
    "something runs": refuses(resume, running=[queue]),
    "a hold that is young": refuses(resume, age=0.0),
}
print("rooms:" + json.dumps(found))
"""
)

MAINTENANCE = (
    COMMON
    + """
import asyncio
from sglang.srt.managers import io_struct
try:
    from sglang.srt.managers.communicator import FanOutCommunicator
except ModuleNotFoundError:  # before 0.5.11
    from sglang.srt.managers import tokenizer_communicator_mixin
    FanOutCommunicator = tokenizer_communicator_mixin._Communicator

decode = Decode()


def stock_of(point):
    return resolve(point.target)[2].__wrapped__


def armed(point):
    return resolve(point.target)[2]


def held():
    made = decode.expose(ROOM + 1)
    decode.give_up(made)
    return next(e for e in decode.side.ledger.held)


def proof(exposure):
    answer = messages.AbortAck(RANK, "prefill", exposure.lease, "drained")
    decode.manager.server_socket.read([messages.encode(answer)])


class Saver:
    def __init__(self):
        self.calls = []

    def pause(self, tag):
        self.calls.append("pause " + tag)

    def resume(self, tag):
        self.calls.append("resume " + tag)


class Runner:
    weight_updater = property(lambda self: self)

    def update_weights_from_disk(self, *_, **__):
        return True, "updated"

    def weight_update_runners(self):
        return [("target", self)]


saver = Saver()
flushes = []


def flush_cache(*_, **__):
    flushes.append(decode.scheduler.is_fully_idle())
    return flushes[-1]


owner_class, _, _ = resolve(present(points.RELEASE_MEMORY).target)
attributes = dict(
    tp_worker=Runner(), draft_worker=None, tp_cpu_group=None, memory_saver_adapter=saver,
    flush_cache=flush_cache, is_fully_idle=decode.scheduler.is_fully_idle, offload_tags=set(),
    metrics_collector=None, scheduler=Lenient(record_weight_version_change=lambda **_: None),
)
if dataclasses.is_dataclass(owner_class):
    owner = owner_class.__new__(owner_class)
    for field in dataclasses.fields(owner_class):
        setattr(owner, field.name, attributes.get(field.name))
else:
    owner = type("Owner", (owner_class,), attributes)()
    for name, value in attributes.items():
        setattr(owner, name, value)


def outcome(call, *args):
    try:
        output = call(*args)
    except (AssertionError, KeyError) as error:
        return {"raised": type(error).__name__}
    return {name: getattr(output, name, None) for name in ("rid", "success", "message")}


def release(call):
    return outcome(call, owner, io_struct.ReleaseMemoryOccupationReqInput(tags=["kv_cache"]))


def resume(call):
    return outcome(call, owner, io_struct.ResumeMemoryOccupationReqInput(tags=["kv_cache"]))


def update(call):
    request = io_struct.UpdateWeightFromDiskReqInput(model_path="model")
    return outcome(call, owner, request)


maintenance.WAIT_S = 0.0
found = {}
exposure = held()
before = decode.free()
found["release, as it was"] = release(stock_of(present(points.RELEASE_MEMORY)))
found["release"] = release(armed(present(points.RELEASE_MEMORY)))
found["resume, as it was"] = resume(stock_of(present(points.RESUME_MEMORY)))
found["resume"] = resume(armed(present(points.RESUME_MEMORY)))
update_point = present(points.UPDATE_WEIGHTS[0])
found["update, as it was"] = update(stock_of(update_point))
found["update"] = update(armed(update_point))
scheduler = decode.scheduler
flush_point = present(points.FLUSH)
flusher = scheduler
if flush_point == points.FLUSH[0]:
    flusher = Lenient.__new__(type("Flusher", (Lenient, resolve(flush_point.target)[0]), {}))
    flusher._flush_cache, flusher._is_fully_idle = flush_cache, scheduler.is_fully_idle
scheduler._pending_flush, scheduler.flush_cache = None, flush_cache
flush = lambda: outcome(armed(flush_point), flusher, io_struct.FlushCacheReqInput())
found["flush"] = flush()
attach = io_struct.AttachHiCacheStorageReqInput(hicache_storage_backend="file")
found["attach"] = outcome(armed(points.ATTACH_STORAGE), scheduler, attach)
found["detach"] = outcome(
    armed(points.DETACH_STORAGE), scheduler, io_struct.DetachHiCacheStorageReqInput()
)
found["freed"] = decode.free() != before
found["touched"] = list(saver.calls), sorted(owner.offload_tags)


def told(rid):
    async def call():
        communicator = FanOutCommunicator.__new__(FanOutCommunicator)
        communicator._mode = "queueing"

        async def answered(request):
            return [io_struct.ReleaseMemoryOccupationReqOutput(rid=rid)]

        communicator.queueing_call = answered
        try:
            return len(await communicator(io_struct.ReleaseMemoryOccupationReqInput()))
        except maintenance.NotReleased as error:
            return [str(error), error.status_code]

    return asyncio.run(call())


found["told"] = told(found["release"]["rid"]), told(None)

# Proof comes while the operation waits; every look is a tick, as in the scheduler's loop.
looks = []


def proof_at_the_third_look(seconds):
    looks.append(seconds)
    if len(looks) == 3:
        proof(exposure)


maintenance.WAIT_S = 1000.0
maintenance.time = SimpleNamespace(monotonic=time.monotonic, sleep=proof_at_the_third_look)
found["release after proof"] = release(armed(present(points.RELEASE_MEMORY)))
found["looks"] = len(looks), list(saver.calls), sorted(owner.offload_tags)
found["resume after it"] = resume(armed(present(points.RESUME_MEMORY)))
found["nothing held"] = update(armed(update_point)), flush(), decode.free()
exposure, looks[:] = held(), []
scheduler_is_busy = lambda scheduler, for_health_check=False, **_: False
idle = resolve(points.FULLY_IDLE.target)[2]
idle.__wrapped__ = scheduler_is_busy
found["busy"] = flush()["success"] is not None, len(looks)
print("maintenance:" + json.dumps(found))
"""
)

RELEASES = ("0.5.10.post1", "0.5.11", "0.5.13", "0.5.17", "0.5.20", NEW)
"""Receivers, states of rooms and the operations changed between these."""


def run(script: str, release: str, old: Environment, new: Environment, mark: str) -> Any:
    environment, source = new if release == NEW else old, wheels.source(release)
    env = cpu_env(environment.env)
    env["PYTHONPATH"] = f"{source}:{env['PYTHONPATH']}"
    return child.said(environment.python, script, env=env, mark=mark)


@pytest.mark.parametrize("release", RELEASES)
def test_each_of_two_requests_of_a_room_has_its_own_end(
    old: Environment, new: Environment, release: str
) -> None:
    found = run(ROOMS, release, old, new, "rooms:")
    assert found["fixed"] == [
        {"turns": [{served: 4, other: 2}, {other: 2}, {other: 2}], **end}
        for served, other in ("AB", "BA")
        for end in ({"its own success": 4}, {"stock's time-out": 0})
    ]
    # Control: in two orders the landed one is never shown, in two the scheduler dies.
    gone = [f"KeyError {777}"] * 2
    dies, lost = ([{s: 4, o: 2}] for s, o in ("AB", "BA")), [{"A": 2, "B": 2}] * 3
    first, last = dies
    assert [o["turns"] for o in found["as it was"]] == [
        [*first, *({"B": end} for end in gone)],
        lost,
        lost,
        [*last, *({"A": end} for end in gone)],
    ]
    served, status, message = found["second"]
    assert (served, status, found["streamed"]) == (False, 503, 1)
    assert "777" in message and "room of its own" in message
    assert found["other room"] == found["after it"] == [True, 0]
    assert found["retracted"] == [True, 0], "stock brings back its own"
    assert found["first"] == 4
    # A held room is free: what is held waits for proof under its lease.
    assert found["held"] and found["retry"] == [True, 0]
    assert (found["retry polls"], found["retry polls then"]) == (2, 4)
    assert found["stands still"] == {
        "as it was": False,
        "fixed": True,
        "something runs": False,
        "a hold that is young": False,
    }


@pytest.mark.parametrize("release", RELEASES)
def test_what_needs_an_idle_server_waits_for_holds_or_is_told(
    old: Environment, new: Environment, release: str
) -> None:
    found = run(MAINTENANCE, release, old, new, "maintenance:")
    assert found["release, as it was"] == {"raised": "AssertionError"}, "the scheduler dies"
    assert found["resume, as it was"] == {"raised": "KeyError"}
    why = found["release"]["rid"]
    assert "no memory was released" in why and "room 778" in why and "try again" in why
    assert "raised" not in found["resume"]
    dies = release not in wheels.between("0.5.22", NEW)
    assert found["update, as it was"].get("raised") == ("AssertionError" if dies else None)
    for name in ("update", "flush", "attach", "detach"):
        said = found[name]
        assert said.get("success") is False and "room 778" in said["message"], (name, said)
    assert found["freed"] is False
    assert found["touched"] == [[], []], "nothing was released, so nothing resumed"
    assert found["told"] == [[why, 503], 1]
    assert found["release after proof"]["rid"] is None
    assert found["looks"] == [3, ["pause kv_cache"], ["kv_cache"]]
    assert "raised" not in found["resume after it"]
    updated, flushed, free = found["nothing held"]
    assert updated["success"] and flushed["success"] and free == [256, 8]
    assert found["busy"] == [True, 0], "a busy server does not stand still for it"
