"""The guard in a scheduler: it watches every request that verifies drafts, and acts on an anomaly.

verification -> counters of the request -> Watch -> anomaly
    observe: the anomaly is counted and logged
    abort:   the request also finishes with 503 `kv_anomaly`. Its KV is not inserted into the
             prefix cache, its cached prefix becomes suspect (taint.py), and its prefill server
             is notified (notify.py)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

from sglang_scaling_fixes.specguard import settings
from sglang_scaling_fixes.specguard.detector import Anomaly, Rules, Watch
from sglang_scaling_fixes.specguard.reporting import ERROR_TYPE, Reporting
from sglang_scaling_fixes.specguard.taint import PAGES, Taint

__all__ = ["ERROR_TYPE", "DraftCounters", "SpecGuard"]

_WATCH = "sglang_scaling_fixes_watch"
_TAINTED = "sglang_scaling_fixes_tainted"
_NAMESPACE = "sglang_scaling_fixes_namespace"

Depth = int | Callable[[], int]
"""How many drafts one verification can accept: a constant, or a function for an adaptive depth."""


@dataclass(frozen=True)
class DraftCounters:
    """How a request's acceptance is read on this server.

    `accepted_field`: the name of the request's count of accepted drafts.
    """

    depth: Depth
    accepted_field: str


class SpecGuard:
    """One per scheduler process, made once stock has built the scheduler.

    `action` is `observe` or `abort`.
    """

    current: ClassVar[SpecGuard | None] = None

    def __init__(
        self,
        rules: Rules,
        action: str,
        taint: Taint,
        drafts: DraftCounters,
        reporting: Reporting | None = None,
    ) -> None:
        self.rules = rules
        self.action = action
        self.taint = taint
        self._depth = drafts.depth
        self._accepted_field = drafts.accepted_field
        self._reporting = reporting or Reporting()

    # -- every step ---------------------------------------------------------------------

    def inspect(self, req: Any) -> None:
        """Judge `req` by its counters. Call it before stock decides whether `req` is finished."""
        verifications = req.spec_verify_ct
        accepted = getattr(req, self._accepted_field)
        watch = req.__dict__.get(_WATCH)
        if watch is None or verifications < watch.verifications:
            if watch is None:
                self._reporting.increment("requests")
            watch = req.__dict__[_WATCH] = Watch(self.rules)
        depth = self._depth
        if not isinstance(depth, int):
            depth = depth()
        elif verifications + accepted < watch.next_check:
            return
        if verifications == watch.verifications:
            return  # stock asks more than once per verification
        anomaly = watch.observe(self.rules, verifications, accepted, depth, req.output_ids)
        if anomaly is not None:
            self._act(req, anomaly)

    def _act(self, req: Any, anomaly: Anomaly) -> None:
        action = "observed"
        if self.action == "abort":
            action = "aborted"
            self._taint_request(req)
            # A request that is ending already, by a client's abort for example, ends that way.
            if req.finished_reason is None and req.to_finish is None:
                self._abort(req, anomaly)
        self._reporting.anomaly(req, anomaly, action, self.rules.window)

    def _abort(self, req: Any, anomaly: Anomaly) -> None:
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        name = "accept length" if anomaly.kind == "low_accept_length" else "accept rate"
        # The enum, not the number: stock's OpenAI streams drop the error of a bare number.
        req.to_finish = FINISH_ABORT(
            f"{ERROR_TYPE}: {name} {anomaly.value:.3f} after {anomaly.tokens} tokens; the request's"
            " KV cache is suspect, retry it on another worker",
            HTTPStatus.SERVICE_UNAVAILABLE,
            ERROR_TYPE,
        )

    def _taint_request(self, req: Any) -> None:
        """Keep the request's KV out of the caches, and later requests away from its cached KV."""
        req.skip_radix_cache_insert = True
        req.__dict__[_TAINTED] = True
        for tokens in heads(req, PAGES[-1]):
            self.taint.add(tokens)
            self._reporting.notify_prefill(req, tokens)

    # -- requests that come later ----------------------------------------------------------

    def choose_namespace(self, req: Any) -> None:
        """Give `req` a namespace without suspect pages. Call it before `req` matches cached KV."""
        if not len(self.taint):
            return
        old = req.__dict__.get(_NAMESPACE)
        new = self.taint.namespace(*heads(req, self.taint.page_size))
        if new == old or holds_kv(req):
            return  # the pages of a request with KV are locked in its present namespace
        own = (req.extra_key or "").replace(f"|{old}", "") if old else (req.extra_key or "")
        req.extra_key = f"{own}|{new}" if new else own or None
        req.__dict__[_NAMESPACE] = new
        self._reporting.increment("moved_requests")

    def was_moved(self, req: Any) -> bool:
        """Whether KV that an outside store keeps for this request's tokens may be suspect."""
        return req.__dict__.get(_NAMESPACE) is not None

    def notified(self, beginnings: dict[int, int]) -> None:
        """A decode server found a request of this prefill server anomalous.

        `beginnings`: digests of its prompt's first page by page size. With `observe` they are
        only counted.
        """
        if self.action == "abort":
            self.taint.add_beginnings(beginnings)
        self._reporting.increment("notifications_received")

    def report(self) -> dict[str, Any]:
        """For `/server_info`: the action, the rules, and the counts."""
        return {
            "action": self.action,
            "rules": dict(vars(self.rules)),
            "suspect_namespaces": len(self.taint),
            **self._reporting.metrics.report(),
        }


def tainted(req: Any) -> bool:
    """Whether the guard found this request anomalous: no cache or store may keep its KV."""
    return bool(req.__dict__.get(_TAINTED))


def heads(req: Any, length: int) -> list[Any]:
    """The first tokens, at most `length`, under which a prefix cache may hold this request's KV.

    They are the prompt's, and generated ones if the prompt is shorter: a retracted request
    computes both again, and both are inserted. A prompt with images has two forms. This server's
    cache holds the one whose placeholders are replaced, which stock does after the request was
    made; another server's cache may hold the other.
    """
    written = [req.origin_input_ids]
    if req.origin_input_ids_unpadded is not None:
        written.append(req.origin_input_ids_unpadded)
    found: list[Any] = []
    for prompt in written:
        head = [*(prompt or ())[:length]]
        head += req.output_ids[: length - len(head)]
        if head not in found:
            found.append(head)
    return found


def holds_kv(req: Any) -> bool:
    """Whether the request has a row of KV slots. Releases keep the row in different places."""
    row = getattr(getattr(req, "kv", None), "req_pool_idx", None)
    if row is None:
        row = req.__dict__.get("req_pool_idx")
    return row is not None and row != -1


def depth_of(scheduler: Any, server_args: Any) -> Depth:
    """How many drafts one verification can accept. An adaptive worker changes it as it runs."""
    worker: Any = getattr(scheduler, "draft_worker", None)
    if settings.resolved(server_args, "speculative_adaptive") and hasattr(
        worker, "speculative_num_steps"
    ):
        return lambda: int(worker.speculative_num_steps)
    return settings.depth(server_args)
