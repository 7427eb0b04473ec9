"""Which servers safe reclaim can protect, said before they start, and checked after."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec

from sglang_scaling_fixes import machine, release
from sglang_scaling_fixes.attach import require_in_place, unwrap_other_roles
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.reclaim import layout, points
from sglang_scaling_fixes.reclaim.decode import fence
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide

_QUEUES_WAIT_S = 5.0
"""Seconds for stock's worker threads to reach their first line after construction."""

_ONE_SUBMISSION = ("batch_transfer_async_write", "get_batch_transfer_status")
"""What `interposers.EngineInterposer` calls on Mooncake's engine instead of stock's call."""

_REFUSED = {
    "use_ray": "Ray's scheduler actors do not load plugins",
    "enable_pd_role_switch": "a role switch tears the KV manager down under open transfers",
    "enable_hisparse": "HiSparse transfers into host slots",
    "disaggregation_decode_host_receive_threshold": "host receive transfers into host slots",
    "disaggregation_decode_allocation_policy": "late allocation speaks a protocol of its own",
}
"""Field -> why any value but the release's own default (which is off) is not protected yet."""

_REFUSED_BACKENDS = {
    "nixl": "a worker of its own posts and polls its writes, and its completion notice names only "
    "the room",
    "mori": "its failed writes may still land, and nothing here can fence them",
    "ascend": "it writes with another engine, whose success nobody has shown to mean landed",
}
"""Transfer backends whose writes are not accounted for, and what is missing."""

_REFUSED_ON_DECODE = {
    "pp_size": "pipeline stages take requests in one after another, and one that still holds "
    "slots the others have back keeps a request waiting for ever",
    "dcp_size": "decode context parallelism lays pages out differently",
}


def check(server_args: Any, *, fence_asked: bool = False) -> None:
    """Raise `ConfigError`, naming flag, value and remedy, for a server we cannot protect."""
    mode = server_args.disaggregation_mode
    if mode not in ("prefill", "decode"):
        return  # not disaggregated: no slot is ever handed to a remote writer
    backend = server_args.disaggregation_transfer_backend
    if backend == "fake":
        return  # writes nothing
    if backend != "mooncake":
        why = _REFUSED_BACKENDS.get(backend, "only Mooncake's writes are accounted for")
        _refuse("disaggregation_transfer_backend", backend, why)
    if (problem := release.mooncake_problem(release.mooncake())) is not None:
        raise ConfigError(problem)
    if machine.here.env.get("SGLANG_DISAGG_STAGING_BUFFER", "").lower() not in release.OFF:
        raise ConfigError(
            "SGLANG_DISAGG_STAGING_BUFFER: transfers through staging buffers are not protected "
            "yet; unset it, or start with --plugin none"
        )
    if release.POSTS in machine.here.env and (problem := release.posts_again()) is not None:
        raise ConfigError(problem)
    obstacle = fence.obstacle(server_args)
    if mode == "decode" and fence_asked and obstacle is not None:
        raise ConfigError(f"--safe-reclaim-fence always: {obstacle}; drop one of the two")
    restores = getattr(server_args, "enable_hierarchical_cache", False) and getattr(
        server_args, "disaggregation_decode_enable_radix_cache", False
    )
    if mode == "decode" and restores and layout.restores_fail_alone():
        raise ConfigError(
            "--enable-hierarchical-cache with --disaggregation-decode-enable-radix-cache: this "
            "release frees a request whose load from the host failed, on the rank where it failed, "
            "while its KV may still be on the wire; drop one of the two, use SGLang 0.5.22 or "
            "later, or start with --plugin none"
        )
    defaults = field_defaults(type(server_args))
    for field, why in {**_REFUSED, **(_REFUSED_ON_DECODE if mode == "decode" else {})}.items():
        value = getattr(server_args, field, None)
        if value is not None and value != defaults.get(field):
            _refuse(field, value, why)


def field_defaults(record: type) -> dict[str, Any]:
    """Defaults of stock's ServerArgs: a dataclass up to 0.5.19, a msgspec struct since."""
    if dataclasses.is_dataclass(record):
        return {field.name: field.default for field in dataclasses.fields(record)}
    return {field.name: field.default for field in msgspec.structs.fields(record)}


def check_in_force(scheduler: Any) -> None:
    """After stock built its scheduler: what this role needs is really in its objects.

    What the other role needs is taken off again: a role is for good (a switch is refused).
    """
    mode = scheduler.disaggregation_mode.value
    if mode == "decode":
        manager = scheduler.disagg_decode_prealloc_queue.kv_manager
        side = DecodeSide.current
        if _is_mooncake(manager) and (side is None or not side.protects(manager)):
            raise ConfigError("the decode allocators of this scheduler are not gated")
        _check_transport(manager)
    elif mode == "prefill":
        manager = scheduler.disagg_prefill_bootstrap_queue.kv_manager
        deadline = time.monotonic() + _QUEUES_WAIT_S
        while _is_mooncake(manager) and not (
            PrefillSide.current is not None and PrefillSide.current.protects(manager)
        ):
            if time.monotonic() >= deadline:
                raise ConfigError("the transfer queues of this scheduler are not accounted for")
            time.sleep(0.01)
        _check_transport(manager)
    require_in_place(points.NAME, mode, "both")
    unwrap_other_roles(points.NAME, mode)


def _check_transport(manager: Any) -> None:
    """Mooncake has its devices by now: an RDMA device that this engine could not open is none."""
    found = release.mooncake()
    if found is None or not _is_mooncake(manager):
        return
    if release.needs_rdma(found) and not fence.opened_rdma(manager.engine):
        raise ConfigError(release.without_rdma(found.distribution))
    if (problem := release.posts_again()) is not None:
        raise ConfigError(problem)
    missing = [name for name in _ONE_SUBMISSION if not hasattr(manager.engine.engine, name)]
    if release.mooncake_retries() and missing:
        raise ConfigError(
            f"Mooncake {found.version} has no {missing[0]}, without which a write cannot be "
            "submitted only once where there may be RDMA devices; use Mooncake 0.3.5 or later"
        )


def _is_mooncake(manager: Any) -> bool:
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

    return isinstance(manager, MooncakeKVManager)


def _refuse(field: str, value: object, why: str) -> None:
    flag = "--" + field.replace("_", "-")
    raise ConfigError(
        f"{flag} {value}: not protected by safe-reclaim yet ({why}); "
        "change it, or start with --plugin none"
    )
