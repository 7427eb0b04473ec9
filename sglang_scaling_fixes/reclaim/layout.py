"""How a release lays out what a transfer writes: state kinds, allocators, captured frees.

What the gate cannot hold slot by slot is refused here, with one line.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.kv_poll import FAILED, SUCCESS

PAGE_STATES = frozenset({"nsa", "dsa", "block_scale", "minimax_index_k", "minimax_dense_kv"})
"""State transfers addressed by the KV pages themselves (index-K, scales)."""
WINDOW_STATES = frozenset({"swa", "block_scale_swa"})
"""State transfers into sliding-window slots, freed together with their full slots."""


def state_kinds(kv_args: Any) -> list[str]:
    """The kinds of state transferred beside KV: a list from 0.5.12 on, one word in 0.5.11."""
    kinds = getattr(kv_args, "state_types", None)
    if kinds is None:
        kind = getattr(kv_args, "state_type", "none")
        kinds = [] if kind in ("none", None) else [kind]
    return [str(getattr(kind, "value", kind)).lower() for kind in kinds]


def check_states(kv_args: Any) -> None:
    """Refuse a model whose state lives in slots the gate does not hold."""
    if unknown := [k for k in state_kinds(kv_args) if k not in PAGE_STATES | WINDOW_STATES]:
        raise AttachError(
            f"this model also transfers {', '.join(unknown)} state, which lives in slots "
            "safe-reclaim does not hold yet; start with --plugin none"
        )


def check_allocator(allocator: Any) -> None:
    """Refuse an allocator whose transfer indices are not its own page numbers."""
    if type(allocator).__name__.startswith(("Unified", "MultiEnded")):
        raise AttachError(
            f"{type(allocator).__name__} hands out virtual slots, which safe-reclaim cannot "
            "match to pages yet; start without the unified pool, or with --plugin none"
        )
    translate = getattr(type(allocator), "translate_kv_indices_for_transfer", None)
    if translate is None:
        return
    base = next(c for c in type(allocator).__mro__[::-1] if "free_group_begin" in vars(c))
    if translate is not vars(base).get("translate_kv_indices_for_transfer"):
        raise AttachError(
            f"{type(allocator).__name__} sends translated KV indices, which safe-reclaim "
            "cannot match to its pages yet; start with --plugin none"
        )


def rebind_captured(tree_cache: Any, allocator: Any) -> None:
    """Make frees that stock captured before the gate look the method up again.

    Releases 0.5.11 to 0.5.16: a component of the unified radix tree keeps
    `allocator.free` from its construction.
    """

    def late(name: str) -> Callable[..., Any]:
        def free(*args: Any, **kwargs: Any) -> Any:
            return getattr(allocator, name)(*args, **kwargs)

        return free

    components = getattr(tree_cache, "components", None) or {}
    for holder in (tree_cache, *(components.values() if isinstance(components, dict) else ())):
        for attribute, value in list(getattr(holder, "__dict__", {}).items()):
            name = getattr(value, "__name__", "")
            if getattr(value, "__self__", None) is allocator and name.startswith("free"):
                setattr(holder, attribute, late(name))


def page_states(kv_args: Any, state_indices: Any) -> list[np.ndarray]:
    """Page numbers that state transfers may write, in the allocator's page space.

    `state_indices` as stock passes them: a list by kind, or in 0.5.11 one flat array.
    """
    if state_indices is None:
        return []
    kinds = state_kinds(kv_args)
    return [
        np.array(indices, dtype=np.int64)
        for kind, indices in zip(kinds, _by_kind(kinds, state_indices), strict=False)
        if kind in PAGE_STATES and indices is not None
    ]


def state_rows(kv_args: Any, state_indices: Any) -> tuple[int, ...]:
    """How many rows of each kind of state a transfer has; `state_indices` as stock passes them."""
    if state_indices is None:
        return ()
    by_kind = _by_kind(state_kinds(kv_args), state_indices)
    return tuple(0 if indices is None else len(indices) for indices in by_kind)


def _by_kind(kinds: list[str], state_indices: Any) -> Any:
    """`state_indices`, one entry for each kind: 0.5.11 has one kind, and its indices flat."""
    flat = len(kinds) == 1 and (len(state_indices) != 1 or np.ndim(state_indices[0]) == 0)
    return [state_indices] if flat else state_indices


def sends_kv(manager: Any, session: str) -> bool:
    """Whether this prefill rank is to send KV to decode's `session` at all.

    A rank without KV layers does not, nor one whose equals hold the same KV and send it.
    """
    if not manager.kv_args.kv_data_ptrs:
        return False
    skips = getattr(manager, "_get_dsa_cache_transfer_skip_flags", None)  # since 0.5.16
    return skips is None or not skips(manager.decode_kv_args_table.get(session))[0]


def counts_rows(manager: Any, session: str) -> bool:
    """Whether decode at `session` lists one destination for each token, not for each page.

    Its HiSparse does so in 0.5.11 and 0.5.12, and says that it is on only there.
    """
    return bool(getattr(manager.decode_kv_args_table.get(session), "enable_hisparse", False))


def rejected(manager: Any, request: Any) -> bool:
    """Whether decode has replaced a prompt it rejects by a placeholder that nobody will read.

    Up to 0.5.20 it makes room for it, takes whatever prefill sends, and answers with the reason.
    With a radix cache it would keep what it got under the placeholder's one token.
    """
    keeps = getattr(manager.server_args, "disaggregation_decode_enable_radix_cache", False)
    return getattr(request, "to_finish", None) is not None and not keeps


def may_send_nothing(manager: Any) -> bool:
    """Whether this rank may by design queue nothing of a chunk: its share of it is empty."""
    dummy = getattr(manager, "is_dummy_cp_rank", False)
    return bool(dummy or getattr(manager, "kv_shard_size", 1) > 1)


def prompt_tokens(queue: Any, request: Any) -> int:
    """Length of the sequence whose KV decode waits for, as its preallocation queue counts it."""
    count = getattr(queue, "_rebootstrap_prefill_len", None)  # since 0.5.16
    return int(count(request)) if count is not None else len(request.origin_input_ids)


def lock_prefix(queue: Any, decode_request: Any) -> tuple[int, Callable[[], None]] | None:
    """Lock what a request shares in the radix tree, on top of the request's own lock on it.

    Returns how many tokens that is, and what unlocks it. None where it is not known to be all that
    is shared: before 0.5.13, while a part is still to be loaded from the host, and in a session,
    whose KV is in no tree.
    """
    match = getattr(decode_request, "prefix_match", None)
    if match is None or match.needs_local_restore:
        return None
    if getattr(decode_request.req, "session", None) is not None:
        return None
    tree, node = queue.tree_cache, match.last_device_node
    receipt = tree.inc_lock_ref(node).to_dec_params()
    return len(match.prefix_indices), functools.partial(tree.dec_lock_ref, node, receipt)


def check_shared_windows(manager: Any) -> None:
    """Refuse a shared prefix whose window slots a transfer may write for several requests."""
    server_args = getattr(manager, "server_args", None)
    radix = getattr(server_args, "disaggregation_decode_enable_radix_cache", False)
    if radix and WINDOW_STATES.intersection(state_kinds(manager.kv_args)):
        raise AttachError(
            "--disaggregation-decode-enable-radix-cache with a sliding-window model: "
            "window slots of a shared prefix are not held yet; drop the flag, or start "
            "with --plugin none"
        )


def restores_fail_alone() -> bool:
    """Does a failed load of HiCache end a request of this release past its transfer's own end?

    From 0.5.13 to 0.5.21 it does: on that rank alone, and before the receiver is cleared. Since
    then it is shown as a failed transfer, once the transfer is over. Asked of the release's class.
    """
    try:
        from sglang.srt.disaggregation import decode_hicache_mixin as restores
    except ImportError:
        return False  # decode has no HiCache in this release
    failed = restores.HiCacheRestoreResult.FAILED
    landed = SimpleNamespace(poll=lambda: SUCCESS)
    request = SimpleNamespace(kv_receiver=landed, hicache_restore_status=failed)
    return int(restores.HiCacheRestoreGatedKVReceiver(request).poll()) != FAILED


def prefill_of(req: Any) -> str:
    """The prefill instance that a request names: host and port of its bootstrap server."""
    return f"{req.bootstrap_host}:{req.bootstrap_port}"


def longest_reserved() -> int:
    """Tokens of an answer that stock wants free beside its prompt, at most."""
    from sglang.srt.disaggregation.decode import CLIP_MAX_NEW_TOKEN

    return int(CLIP_MAX_NEW_TOKEN)


def admission_tokens(queue: Any, req: Any, longest: int) -> int:
    """Token slots that stock wants free before it takes a request in: its prompt and some of its
    answer, of that `longest_reserved` at most. `queue`: the preallocation queue. In it a request
    that does not fit keeps all others waiting.
    """
    wanted = min(req.sampling_params.max_new_tokens or 0, longest)
    return int(len(req.origin_input_ids) + max(queue.num_reserved_decode_tokens, wanted))


def in_step(queue: Any) -> Any:
    """The group of ranks that get an operator's request in the same turn of their loops.

    All of a server's, unless each DP rank is to get it by itself. `queue`: the preallocation queue.
    """
    flag = "enable_dp_attention_local_control_broadcast"
    apart = getattr(queue.scheduler.server_args, flag, False)
    with contextlib.suppress(Exception):  # where newer releases keep it, once it is filled
        apart = getattr(importlib.import_module("sglang.srt.runtime_context").get_parallel(), flag)
    return queue.gloo_group if apart else queue.scheduler.tp_cpu_group


def is_fake(req: Any) -> bool:
    """Whether a request's transfer is stock's fake one (health checks, warm-up): no writer."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    return bool(req.bootstrap_host == FAKE_BOOTSTRAP_HOST)
