"""Where the plugin touches a stock SGLang: every place, as data, and the one way to wrap it.

`ATTACH_POINTS` is the whole surface between this project and SGLang's private
code. The adapters wrap exactly these places through `wrap_method`; the contract
tests resolve every entry against every supported wheel without importing it.
A name that moved upstream therefore fails a test before it fails a server.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sglang_scaling_fixes.errors import AttachError

FIRST_RELEASE = "0.5.11"
"""First stock release with a plugin loader (entry-point group `sglang.srt.plugins`)."""
LAST_RELEASE = "0.5.23"
"""Newest stock release whose wheel the contract tests have read."""

_MARK = "__sglang_scaling_fixes__"

Role = Literal["decode", "prefill", "both", "server"]


@dataclass(frozen=True)
class AttachPoint:
    """One place in stock SGLang that a fix relies on.

    `target` is `"module:Qual.name"`; `params` are the parameter names (after
    self/cls) the adapter relies on, a prefix of the real ones; `uses` are
    attributes of the same class (own or inherited) the adapter reads or writes.
    """

    fix: str
    role: Role
    target: str
    params: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    first: str = FIRST_RELEASE
    last: str = LAST_RELEASE
    wrapped: bool = True
    """False: called or wrapped on the object, the class itself is left alone."""


_DECODE = "sglang.srt.disaggregation.decode"
_COMMON = "sglang.srt.disaggregation.common.conn"
_MOONCAKE = "sglang.srt.disaggregation.mooncake.conn"
_UTILS = "sglang.srt.disaggregation.utils"
_SCHEDULER = "sglang.srt.managers.scheduler"
_FIX = "safe-reclaim"
_ORDER = "hicache-ordering"
_CONTROLLER = "sglang.srt.managers.cache_controller"
_HYBRID = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller"
_NIXL = "sglang.srt.disaggregation.nixl.conn"
_GUARD = "spec-guard"
_BATCH = "sglang.srt.managers.schedule_batch"
_OFFLOAD = "sglang.srt.disaggregation.decode_kvcache_offload_manager:DecodeKVCacheOffloadManager"
_OPENAI = "sglang.srt.entrypoints.openai.serving_base:OpenAIServingBase"
_RESPONSES = "sglang.srt.entrypoints.openai.serving_responses:OpenAIServingResponses"
_MIXIN = "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin"

ATTACH_POINTS: tuple[AttachPoint, ...] = (
    # -- every process: flags in, states out ---------------------------------
    AttachPoint("plugin", "server", "sglang.srt.server_args:ServerArgs.add_cli_args", ("parser",)),
    AttachPoint("plugin", "server", "sglang.srt.server_args:ServerArgs.from_cli_args", ("args",)),
    AttachPoint("plugin", "server", "sglang.srt.entrypoints.engine:Engine._launch_subprocesses"),
    AttachPoint(
        "plugin", "server", "sglang.srt.entrypoints.http_server:_setup_and_run_http_server"
    ),
    AttachPoint(
        "plugin",
        "both",
        f"{_SCHEDULER}:Scheduler.__init__",
        ("server_args",),
        uses=("tree_cache", "tp_worker"),
    ),
    AttachPoint("plugin", "both", f"{_SCHEDULER}:Scheduler.get_init_info"),
    AttachPoint("plugin", "both", f"{_SCHEDULER}:Scheduler.get_internal_state", ("recv_req",)),
    # -- decode: exposure, gate, tick ----------------------------------------
    AttachPoint(
        _FIX,
        "decode",
        f"{_DECODE}:DecodePreallocQueue.__init__",
        uses=(
            "token_to_kv_pool_allocator",
            "req_to_metadata_buffer_idx_allocator",
            "kv_manager",
            "scheduler",
            "gloo_group",
            "metadata_buffers",
            "tree_cache",
        ),
    ),
    AttachPoint(_FIX, "decode", f"{_DECODE}:DecodePreallocQueue.add", ("req", "is_retracted")),
    AttachPoint(
        _FIX,
        "decode",
        f"{_UTILS}:prepare_abort",
        ("req", "error_message", "status_code"),
        wrapped=False,
    ),
    AttachPoint(
        _FIX, "decode", f"{_DECODE}:DecodePreallocQueue._create_receiver_and_enqueue", ("req",)
    ),
    AttachPoint(_FIX, "decode", f"{_SCHEDULER}:Scheduler.process_input_requests"),
    AttachPoint(_FIX, "decode", f"{_SCHEDULER}:Scheduler.is_fully_idle"),
    AttachPoint(
        _FIX,
        "decode",
        f"{_MOONCAKE}:MooncakeKVReceiver.send_metadata",
        ("kv_indices", "aux_index", "state_indices"),
        uses=("bootstrap_infos", "bootstrap_room", "kv_mgr", "conclude_state"),
    ),
    AttachPoint(_FIX, "decode", f"{_MOONCAKE}:MooncakeKVReceiver.poll", uses=("conclude_state",)),
    AttachPoint(_FIX, "decode", f"{_MOONCAKE}:MooncakeKVReceiver.clear"),
    AttachPoint(
        _FIX,
        "decode",
        f"{_DECODE}:DecodeTransferQueue._commit_transfer_to_req",
        ("decode_req",),
    ),
    AttachPoint(
        _FIX,
        "decode",
        f"{_MOONCAKE}:MooncakeKVReceiver._connect_to_bootstrap_server",
        ("bootstrap_info",),
    ),
    AttachPoint(
        _FIX, "decode", f"{_UTILS}:ReqToMetadataIdxAllocator.free", ("free_index",), wrapped=False
    ),
    AttachPoint(
        _FIX,
        "decode",
        f"{_MOONCAKE}:MooncakeKVManager.start_decode_thread",
        uses=(
            "server_socket",
            "request_status",
            "local_ip",
            "rank_port",
            "prefill_response_tracker",
            "get_session_id",
            "register_buffer_to_engine",
            "update_status",
            "record_failure",
        ),
    ),
    # The fence makes a second one like it and moves its parts over.
    AttachPoint(
        _FIX,
        "decode",
        "sglang.srt.distributed.device_communicators.mooncake_transfer_engine"
        ":MooncakeTransferEngine.__init__",
        ("hostname", "gpu_id", "ib_device"),
        uses=("engine", "session_id", "hostname", "gpu_id", "ib_device", "batch_register"),
    ),
    # -- prefill: binding, accounting, drain ----------------------------------
    AttachPoint(
        _FIX,
        "prefill",
        f"{_MOONCAKE}:MooncakeKVManager.start_prefill_thread",
        uses=("server_socket", "transfer_queues", "request_status"),
    ),
    AttachPoint(
        _FIX,
        "prefill",
        f"{_MOONCAKE}:MooncakeKVManager.transfer_worker",
        ("queue", "executor"),
    ),
    AttachPoint(_FIX, "prefill", f"{_MOONCAKE}:MooncakeKVManager.init_engine", uses=("engine",)),
    # Called by the probe: stock's own write.
    AttachPoint(
        _FIX,
        "prefill",
        f"{_MOONCAKE}:MooncakeKVManager._transfer_data",
        ("mooncake_session_id", "transfer_blocks"),
        wrapped=False,
    ),
    AttachPoint(
        _FIX, "prefill", f"{_MOONCAKE}:MooncakeKVManager._connect", ("endpoint", "is_ipv6")
    ),
    AttachPoint(_FIX, "prefill", f"{_MOONCAKE}:MooncakeKVSender.__init__"),
    AttachPoint(
        _FIX, "prefill", f"{_MOONCAKE}:MooncakeKVSender.send", ("kv_indices", "state_indices")
    ),
    AttachPoint(_FIX, "prefill", f"{_MIXIN}.send_kv_chunk", ("req",)),
    AttachPoint(_FIX, "prefill", f"{_MOONCAKE}:MooncakeKVSender.poll", uses=("bootstrap_room",)),
    AttachPoint(_FIX, "prefill", f"{_MOONCAKE}:MooncakeKVSender.clear"),
    AttachPoint(
        _FIX,
        "prefill",
        f"{_MOONCAKE}:MooncakeKVManager.update_status",
        ("bootstrap_room", "status"),
        wrapped=False,
    ),
    AttachPoint(
        _FIX,
        "prefill",
        f"{_MOONCAKE}:MooncakeKVManager.record_failure",
        ("bootstrap_room", "failure_reason"),
        wrapped=False,
    ),
    # -- HiCache: copies behind the forward stream, reads behind the loads ---------
    # Wrapped only where a probe finds the wait missing.
    AttachPoint(
        _ORDER, "both", f"{_CONTROLLER}:HiCacheController.start_loading", uses=("load_queue",)
    ),
    AttachPoint(
        _ORDER, "both", f"{_CONTROLLER}:HiCacheController.start_writing", uses=("write_queue",)
    ),
    AttachPoint(_ORDER, "both", f"{_HYBRID}:HybridCacheController.start_loading"),
    AttachPoint(_ORDER, "both", f"{_HYBRID}:HybridCacheController.start_writing"),
    AttachPoint(
        _ORDER,
        "both",
        f"{_CONTROLLER}:HiCacheController.__init__",
        uses=("load_stream", "write_stream"),
        last="0.5.17",
        wrapped=False,
    ),
    AttachPoint(
        _ORDER,
        "both",
        "sglang.srt.mem_cache.l2_transfer:L2TransferEngine.__init__",
        uses=("host_to_device_stream", "device_to_host_stream"),
        first="0.5.18",
        wrapped=False,
    ),
    AttachPoint(
        _ORDER,
        "prefill",
        "sglang.srt.mem_cache.dsa_cache_layer_split:LayerSplitDSATokenToKVPool.prefetch_kv_buffer",
        ("layer_id", "layer_transfer_counter", "layer_transfer_idx"),
        uses=("layer_transfer_counter", "start_layer", "layer_broadcast_comm"),
        first="0.5.16",
    ),
    AttachPoint(
        _ORDER, "prefill", f"{_MIXIN}.maybe_send_cached_prefix_chunk", ("req",), first="0.5.15"
    ),
    AttachPoint(_ORDER, "prefill", f"{_SCHEDULER}:Scheduler.run_batch", ("batch",)),
    AttachPoint(_ORDER, "prefill", f"{_NIXL}:NixlKVSender.send", ("kv_indices",), first="0.5.16"),
    AttachPoint(
        _ORDER,
        "prefill",
        f"{_NIXL}:NixlKVManager.add_transfer_request",
        ("bootstrap_room",),
        uses=("transfer_queues",),
        first="0.5.16",
    ),
    AttachPoint(
        _ORDER, "prefill", f"{_NIXL}:NixlKVManager.transfer_worker", ("queue",), first="0.5.16"
    ),
    # -- spec guard: where a request may end, find cached KV, or be stored -----------------
    AttachPoint(
        _GUARD,
        "both",
        f"{_BATCH}:Req.update_finish_state",
        ("new_accepted_len",),
        uses=(
            "spec_verify_ct",
            "spec_num_correct_drafts",
            "to_finish",
            "finished_reason",
            "skip_radix_cache_insert",
            "extra_key",
            "origin_input_ids_unpadded",
        ),
        first="0.5.13",
    ),
    AttachPoint(
        _GUARD,
        "both",
        f"{_BATCH}:Req.check_finished",
        ("new_accepted_len",),
        uses=("spec_verify_ct", "to_finish", "finished_reason", "skip_radix_cache_insert"),
        last="0.5.12.post1",
    ),
    AttachPoint(_GUARD, "both", f"{_BATCH}:Req.__init__", ("rid", "origin_input_text")),
    AttachPoint(_GUARD, "both", f"{_BATCH}:Req.init_next_round_input", ("tree_cache",)),
    AttachPoint(
        _GUARD, "decode", f"{_DECODE}:DecodePreallocQueue._match_prefix_and_lock", ("req",)
    ),
    AttachPoint(
        _GUARD,
        "both",
        f"{_SCHEDULER}:Scheduler._prefetch_kvcache",
        ("req",),
        uses=("page_size", "attn_tp_cpu_group", "tp_cpu_group", "draft_worker"),
    ),
    AttachPoint(_GUARD, "prefill", f"{_SCHEDULER}:Scheduler.set_internal_state", ("recv_req",)),
    AttachPoint(_GUARD, "decode", f"{_OFFLOAD}.offload_kv_cache", ("req",)),
    AttachPoint(_GUARD, "decode", f"{_OFFLOAD}.finalize_release_on_finish", ("req",)),
    AttachPoint(_GUARD, "prefill", f"{_COMMON}:CommonKVBootstrapServer._setup_routes"),
    *(
        AttachPoint(
            _GUARD,
            "server",
            f"{serving}.create_{kind}response",
            ("message", "err_type", "status_code"),
        )
        for serving in (_OPENAI, _RESPONSES)
        for kind in ("error_", "streaming_error_")
    ),
)


def resolve(target: str) -> tuple[Any, str, Any]:
    """Import and return `(owner, attribute name, raw attribute)` of a target.

    Raises `AttachError` naming the target when any part of it is missing.
    """
    module_name, _, qualname = target.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise AttachError(f"{module_name} cannot be imported ({error})") from error
    *path, name = qualname.split(".")
    for part in path:
        if not hasattr(owner, part):
            raise AttachError(f"{module_name} has no {qualname}")
        owner = getattr(owner, part)
    if not hasattr(owner, name):
        raise AttachError(f"{module_name} has no {qualname}")
    raw = owner.__dict__.get(name, getattr(owner, name))
    return owner, name, raw


_replaced: dict[str, tuple[Any, Any]] = {}
"""Target -> the wrapper put there, and what stood there before (None: inherited)."""


def wrap_method(target: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, *args, **kwargs)`, once."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        return wrapper

    replace_method(target, make)


def replace_method(target: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method by `make(original)`, once; for methods so hot that one call more counts.

    Class and static methods stay what they are. An inherited method is wrapped
    on the named class only, so other backends that share the base are left
    alone. Wrapping twice is an error: two layers would count twice.
    """
    owner, name, raw = resolve(target)
    if getattr(getattr(raw, "__func__", raw), _MARK, False):
        raise AttachError(f"{target} is already wrapped")
    kind: Callable[[Any], Any] | None = None
    original = raw
    if isinstance(raw, classmethod | staticmethod):
        kind = type(raw)
        original = raw.__func__
    elif hasattr(raw, "__self__") and isinstance(raw.__self__, type):
        # An inherited classmethod, seen bound through the subclass.
        kind = classmethod
        original = raw.__func__

    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _MARK, True)
    installed = kind(wrapper) if kind is not None else wrapper
    _replaced[target] = installed, vars(owner).get(name)
    setattr(owner, name, installed)


def require_in_place(fix: str, *roles: str) -> None:
    """What `fix` has attached for these roles is what stock still calls: nobody has put something
    in its place.

    Other plugins' hooks are applied when all plugins have been loaded, so after our probe.
    Raises `AttachError` naming the first place that is not as we left it.
    """
    for point in ATTACH_POINTS:
        if point.fix != fix or point.role not in roles or point.target not in _replaced:
            continue
        if resolve(point.target)[2] is not _replaced[point.target][0]:
            raise AttachError(
                f"{point.target} was hooked again by something else after {fix} was proven, so it "
                "may no longer be in force; load the plugins apart (SGLANG_PLUGINS), or start "
                f"without {fix}"
            )


def unwrap(targets: Iterable[str]) -> None:
    """Put back what stood at these targets before we wrapped them.

    For wrappers that have nothing to do in this process: the hottest of them run for every
    token and every turn of a scheduler's loop. One that somebody else has wrapped again stays.
    """
    for target in targets:
        if target not in _replaced:
            continue
        installed, before = _replaced[target]
        owner, name, raw = resolve(target)
        if raw is not installed:
            continue
        del _replaced[target]
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def unwrap_other_roles(fix: str, role: str) -> None:
    """This process serves as `role` for good: take off what `fix` has attached for another."""
    unwrap(
        point.target
        for point in ATTACH_POINTS
        if point.fix == fix and point.wrapped and point.role not in (role, "both")
    )


def is_wrapped(target: str) -> bool:
    """True when `target` resolves and currently runs through our wrapper."""
    try:
        _, _, raw = resolve(target)
    except AttachError:
        return False
    return bool(getattr(getattr(raw, "__func__", raw), _MARK, False))


def require_wrapped(fix: str, absent: str = "") -> None:
    """Every place of `fix` runs through our wrapper; `absent`: one this release does not have.

    Raises `AttachError` naming the first that does not.
    """
    for point in ATTACH_POINTS:
        if point.fix != fix or not point.wrapped or point.target == absent:
            continue
        if not is_wrapped(point.target):
            raise AttachError(f"probe: {point.target} is not wrapped")
