"""Attaches the guard to stock: where a request may finish, find cached KV, or be stored."""

from __future__ import annotations

import inspect
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes import metrics
from sglang_scaling_fixes.attach import (
    AttachPoint,
    is_wrapped,
    present,
    replace,
    require_in_place,
    resolve,
    unwrap,
    wrap,
)
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.ranks import TpGroup
from sglang_scaling_fixes.resolved_args import resolved
from sglang_scaling_fixes.specguard import notify, points, settings, tellings, words
from sglang_scaling_fixes.specguard.guard import (
    ERROR_TYPE,
    DraftCounters,
    Sharing,
    SpecGuard,
    depth_of,
    tainted,
)
from sglang_scaling_fixes.specguard.metrics import SPEC_GUARD
from sglang_scaling_fixes.specguard.reporting import Reporting
from sglang_scaling_fixes.specguard.rooms import Rooms
from sglang_scaling_fixes.specguard.taint import Limits, Taint
from sglang_scaling_fixes.specguard.tellings import Telling

logger = logging.getLogger(__name__)

FINISH = (points.FINISH, points.FINISH_BEFORE)
"""Where a request's end is decided: the first since 0.5.13, the second before."""
PLACES = (points.REQUEST_INIT, points.NEXT_ROUND)
"""Where every request is placed: in a namespace without suspect KV."""
ACCEPTED = ("spec_num_correct_drafts", "spec_accepted_drafts")
"""The request's count of accepted drafts: the first since 0.5.12, the second before."""


def finish_point() -> AttachPoint:
    """The one of `FINISH` that this release has."""
    return present(FINISH)


def finish_target() -> str:
    """The target of `finish_point`."""
    return finish_point().target


def attach() -> None:
    """Once per process. Without a bound guard every wrapper only calls stock."""
    if is_wrapped(finish_target()):
        return
    _wrap_requests()
    _wrap_stores()
    _wrap_errors()
    wrap(points.TOKENIZED, _tokenized)
    wrap(points.SET_STATE, _set_internal_state)
    wrap(points.BOOTSTRAP_ROUTES, _setup_routes)


def _wrap_requests() -> None:
    def finish(stock: Callable[..., Any]) -> Callable[..., Any]:
        def finished(req: Any, new_accepted_len: int = 1) -> Any:
            if req.spec_verify_ct and SpecGuard.current is not None:
                SpecGuard.current.inspect(req)
            return stock(req, new_accepted_len)

        return finished

    def init(stock: Callable[..., Any], req: Any, *args: Any, **kwargs: Any) -> None:
        stock(req, *args, **kwargs)
        if SpecGuard.current is not None:
            SpecGuard.current.choose_namespace(req)

    def next_round(
        stock: Callable[..., Any], req: Any, tree_cache: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        # `tree_cache` is None for a continued prefill chunk; then there is no cache lookup.
        if SpecGuard.current is not None and tree_cache is not None:
            SpecGuard.current.choose_namespace(req)
            SpecGuard.current.note(req)
        return stock(req, tree_cache, *args, **kwargs)

    def match(stock: Callable[..., Any], queue: Any, req: Any) -> Any:
        if SpecGuard.current is not None:
            SpecGuard.current.choose_namespace(req)
        return stock(queue, req)

    replace(finish_point(), finish)
    wrap(points.REQUEST_INIT, init)
    wrap(points.NEXT_ROUND, next_round)
    wrap(points.MATCH_PREFIX, match)


def _prefetch(
    stock: Callable[..., Any], scheduler: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    guard = SpecGuard.current
    if guard is not None:
        guard.choose_namespace(req)
        if guard.avoids_storage(req) and not settings.storage_is_namespaced():
            return None  # these releases store by tokens alone
    return stock(scheduler, req, *args, **kwargs)


def _wrap_stores() -> None:
    def offload(stock: Callable[..., Any], manager: Any, req: Any) -> Any:
        """Held back until the request has ended well, whole: before, it is not yet judged."""
        if SpecGuard.current is not None and SpecGuard.current.action == "abort":
            return req.finished() and not tainted(req) and stock(manager, req)
        return stock(manager, req)

    def finalize(stock: Callable[..., Any], manager: Any, req: Any) -> Any:
        # Stock waits for a copy in flight before it gives the slots back.
        if SpecGuard.current is not None and SpecGuard.current.action == "abort":
            manager.offload_kv_cache(req)
        return stock(manager, req)

    wrap(points.PREFETCH, _prefetch)
    wrap(points.OFFLOAD, offload)
    wrap(points.FINALIZE_OFFLOAD, finalize)


def _wrap_errors() -> None:
    def typed(
        stock: Callable[..., Any], serving: Any, message: str, *args: Any, **kwargs: Any
    ) -> Any:
        # Stock hands on an abort's message, not its type; /v1/responses not even its status.
        ours = str(message).removeprefix("503: ")
        if ours.startswith(f"{ERROR_TYPE}: "):
            return stock(serving, ours, ERROR_TYPE, 503)
        return stock(serving, message, *args, **kwargs)

    for point in points.ERROR_RESPONSES:
        wrap(point, typed)


_secret: bytes | None = None
"""The one that this process was started with."""


def use(secret: bytes | None) -> None:
    global _secret  # noqa: PLW0603
    _secret = secret


def secret() -> bytes | None:
    return _secret


def _tokenized(stock: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """The one process that has every request and a clock judges what a word is worth now."""
    made = stock(manager, *args, **kwargs)
    key = getattr(made, "extra_key", None)
    if _secret is not None and isinstance(key, str):
        made.extra_key = words.settled(_secret, key, time.time())
    return made


def _set_internal_state(stock: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    if not any(name.startswith(tellings.FIELD) for name in request.server_args):
        return stock(scheduler, request)
    if (guard := SpecGuard.current) is None:
        return _updated()
    try:
        telling = tellings.from_fields(request.server_args, guard.sharing.secret)
    except ValueError:
        telling = None
    guard.told(telling)
    return _updated()


def _updated() -> Any:
    """Stock's answer to set_internal_state, without anything stock does on the way."""
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    names = inspect.signature(SetInternalStateReqOutput).parameters
    return SetInternalStateReqOutput(
        updated=True, **({"server_args": {}} if "server_args" in names else {})
    )


def _setup_routes(stock: Callable[..., Any], server: Any) -> Any:
    result = stock(server)
    notify.add_route(server, secret)
    return result


def bind(scheduler: Any, server_args: Any, config: Config) -> None:
    """After stock built its scheduler: make the guard. ConfigError where it cannot judge."""
    settings.check(server_args, config)  # again: what stock made of the arguments is known now
    role = str(getattr(server_args, "disaggregation_mode", "null"))
    judges = settings.judges(server_args)
    if not judges:
        unwrap([finish_point()])
    if config.guard != "abort" or not (judges or role == "prefill"):
        unwrap(PLACES)  # nothing becomes suspect here
    if not judges and role != "prefill":
        _nothing_to_judge(server_args)
        return
    require_in_place(points.NAME, role, "both")
    if config.guard == "abort" and type(scheduler.tree_cache).__name__ == "RadixCacheCpp":
        raise ConfigError(
            "--spec-guard abort with SGLANG_EXPERIMENTAL_CPP_RADIX_TREE: that tree knows no "
            "namespaces; unset it, or use --spec-guard observe"
        )
    known = settings.secret(config)
    reporting = Reporting(
        worker=f"{server_args.host}:{server_args.port}",
        metrics=metrics.of_scheduler(SPEC_GUARD, scheduler, server_args),
        is_reporting_rank=metrics.is_reporting_rank(scheduler),
    )
    if role == "decode" and config.guard == "abort" and reporting.is_reporting_rank:
        reporting.prefill = _PrefillServers(reporting, known)
    stores = resolved(server_args, "hicache_storage_backend")
    SpecGuard.current = SpecGuard(
        settings.rules(config, server_args),
        config.guard,
        Taint(
            _page_size(scheduler),
            _origin(scheduler),
            lambda: int(scheduler.forward_ct),
            # What is stored does not grow old.
            Limits(life=None) if stores else Limits(),
            lambda reason: reporting.increment("suspicions_ended", reason),
        ),
        DraftCounters(depth_of(scheduler, server_args) if judges else 1, accepted_field()),
        reporting,
        sharing=Sharing(
            known,
            not stores or settings.storage_is_namespaced(),
            Rooms() if role == "prefill" and config.guard == "abort" else None,
        ),
    )


nothing_to_judge: str | None = None
"""Why a bare --plugin guards nothing in this scheduler, although it verifies drafts."""


def _nothing_to_judge(server_args: Any) -> None:
    global nothing_to_judge  # noqa: PLW0603
    if settings.algorithm(server_args) is not None:
        nothing_to_judge = settings.why_simulated()
        logger.warning("sglang-scaling-fixes: spec-guard is inactive: %s", nothing_to_judge)


def _page_size(scheduler: Any) -> int:
    """Tokens below which two requests share nothing in this scheduler's cache."""
    tree = getattr(getattr(scheduler, "tree_cache", None), "page_size", None)
    return int(min(scheduler.page_size, tree or scheduler.page_size))


def _origin(scheduler: Any) -> str:
    """A name for this start of this scheduler: one for all ranks that share its decisions."""
    import torch

    name = secrets.token_hex(4)
    if torch.distributed.is_initialized():
        for group in (getattr(scheduler, g, None) for g in metrics.DECIDING_GROUPS):
            name = TpGroup(group).of_first(name)
    return name


class _PrefillServers:
    """The prefill servers of this decode server, each found by a request that it had."""

    def __init__(self, reporting: Reporting, known: bytes | None) -> None:
        def count(outcome: str) -> None:
            reporting.metrics.inc("notifications", outcome)

        self._notifier = notify.Notifier(count, known)

    def accuse(self, req: Any, name: int) -> None:
        from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

        host, room = req.bootstrap_host, req.bootstrap_room
        if host and host != FAKE_BOOTSTRAP_HOST and room is not None:
            self._notifier.accuse(str(host), int(req.bootstrap_port), Telling(name, int(room)))

    def withdraw(self, name: int) -> None:
        self._notifier.withdraw(name)


def accepted_field() -> str:
    """The name of the counter on this release's requests, found in their constructor's code."""
    _, _, init = resolve(points.REQUEST_INIT.target)
    names = getattr(init, "__wrapped__", init).__code__.co_names
    for name in ACCEPTED:
        if name in names:
            return name
    raise ConfigError(f"this release's requests count neither {' nor '.join(ACCEPTED)}")
