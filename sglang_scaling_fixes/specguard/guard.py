"""The guard in a scheduler: watches every request that is verified, and acts on an anomaly.

verification -> counters of the request -> Watch -> anomaly
    observe: counted, logged
    abort:   the request finishes with 503 `kv_anomaly`; its KV is not inserted, what is
             cached of it is suspect (taint.py), its prefill server is told (tell.py)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, ClassVar

from sglang_scaling_fixes import metrics
from sglang_scaling_fixes.specguard import settings
from sglang_scaling_fixes.specguard.detector import Anomaly, Rules, Watch
from sglang_scaling_fixes.specguard.metrics import SPEC_GUARD
from sglang_scaling_fixes.specguard.taint import PAGES, Taint

logger = logging.getLogger(__name__)

ERROR_TYPE = "kv_anomaly"
_WATCH = "sglang_scaling_fixes_watch"
_TAINTED = "sglang_scaling_fixes_tainted"
_NAMESPACE = "sglang_scaling_fixes_namespace"

Depth = int | Callable[[], int]
"""How many drafts of a verification can be accepted: for good, or at present."""
Tell = Callable[[Any, Sequence[int]], None]


class SpecGuard:
    """One per scheduler process, made once stock has built the scheduler.

    `depth` is how many drafts a verification can accept; `counter` the name of the request's
    count of accepted drafts; `tell(req, tokens)` lets the prefill server of a pair know that what
    begins like this is suspect.
    """

    current: ClassVar[SpecGuard | None] = None

    def __init__(
        self,
        rules: Rules,
        action: str,
        taint: Taint,
        depth: Depth,
        counter: str,
        *,
        worker: str = "",
        tell: Tell | None = None,
        counted: metrics.Metrics | None = None,
        speaks: bool = True,
    ) -> None:
        self.rules = rules
        self.action = action
        self.taint = taint
        self.metrics = counted or metrics.Metrics(SPEC_GUARD, None)
        self._depth = depth
        self._counter = counter
        self._worker = worker
        self._tell = tell
        self._speaks = speaks  # one rank of a group logs, counts and tells

    # -- every step ---------------------------------------------------------------------

    def look(self, req: Any) -> None:
        """Before stock asks whether `req` is finished."""
        verifications = req.spec_verify_ct
        accepted = getattr(req, self._counter)
        watch = req.__dict__.get(_WATCH)
        if watch is None or verifications < watch.verifications:
            if watch is None:
                self._count("requests")
            watch = req.__dict__[_WATCH] = Watch(self.rules)
        depth = self._depth
        if not isinstance(depth, int):
            depth = depth()
        elif verifications + accepted < watch.next_look:
            return
        if verifications == watch.verifications:
            return  # asked again within one verification
        anomaly = watch.observe(self.rules, verifications, accepted, depth, req.output_ids)
        if anomaly is not None:
            self._act(req, anomaly)

    def _act(self, req: Any, anomaly: Anomaly) -> None:
        if self.action == "abort":
            self._quarantine(req)
            # Who is ending anyway, by a client's abort for example, is left to end that way.
            if req.finished_reason is None and req.to_finish is None:
                self._abort(req, anomaly)
        if not self._speaks:
            return
        action = "aborted" if self.action == "abort" else "observed"
        self._count("anomalies", anomaly.kind, action)
        self.metrics.observe("detection_tokens", anomaly.tokens)
        line = {
            "event": ERROR_TYPE,
            "action": action,
            "rid": req.rid,
            "room": getattr(req, "bootstrap_room", None),
            "worker": self._worker,
            "prompt_tokens": len(req.origin_input_ids),
            "cached_tokens": getattr(req, "cached_tokens", None),
            "output_tokens": len(req.output_ids),
            **anomaly.as_dict(),
            "window_tokens": self.rules.window,
        }
        logger.warning("sglang-scaling-fixes: %s", json.dumps(line))

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

    def _quarantine(self, req: Any) -> None:
        """Nothing of the request is kept, and nobody reads what is kept of it already."""
        req.skip_radix_cache_insert = True
        req.__dict__[_TAINTED] = True
        for tokens in heads(req, PAGES[-1]):
            self.taint.add(tokens)
            if self._tell is not None and self._speaks:
                self._tell(req, tokens)

    # -- requests that come later ----------------------------------------------------------

    def place(self, req: Any) -> None:
        """Before `req` looks for cached KV: give it a namespace without suspect pages."""
        if not len(self.taint):
            return
        old = req.__dict__.get(_NAMESPACE)
        new = self.taint.namespace(*heads(req, self.taint.page_size))
        if new == old or holds_kv(req):
            return  # a request with KV stays where it is: its pages are locked there
        own = (req.extra_key or "").replace(f"|{old}", "") if old else (req.extra_key or "")
        req.extra_key = f"{own}|{new}" if new else own or None
        req.__dict__[_NAMESPACE] = new
        self._count("moved_requests")

    def moved(self, req: Any) -> bool:
        """Whether what is stored outside under this request's tokens may be suspect."""
        return req.__dict__.get(_NAMESPACE) is not None

    def told(self, beginnings: dict[int, int]) -> None:
        """A decode server found one of our requests anomalous. Observing, we change nothing."""
        if self.action == "abort":
            self.taint.add_beginnings(beginnings)
        self._count("told")

    def _count(self, name: str, *labels: str) -> None:
        if self._speaks:
            self.metrics.inc(name, *labels)

    def report(self) -> dict[str, Any]:
        """For `/server_info`: what it does, by which rules, and what it counted."""
        return {
            "action": self.action,
            "rules": dict(vars(self.rules)),
            "suspect_namespaces": len(self.taint),
            **self.metrics.report(),
        }


def tainted(req: Any) -> bool:
    """Whether this request was ended by the guard: its KV must go nowhere."""
    return bool(req.__dict__.get(_TAINTED))


def heads(req: Any, length: int) -> list[Any]:
    """The first tokens (at most `length`) that the prefix cache may know this request by.

    Its prompt, and what it generated if the prompt is short: a retracted request computes both
    again, and both are inserted. With images the cache knows the prompt with their placeholders
    replaced, which happens after the request was made; other servers may know it before.
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
    """Whether the request has a row of KV slots (where, depends on the release)."""
    row = getattr(getattr(req, "kv", None), "req_pool_idx", None)
    if row is None:
        row = req.__dict__.get("req_pool_idx")
    return row is not None and row != -1


def depth_of(scheduler: Any, server_args: Any) -> Depth:
    """How many drafts a verification can accept; an adaptive worker changes it."""
    worker: Any = getattr(scheduler, "draft_worker", None)
    if settings.resolved(server_args, "speculative_adaptive") and hasattr(
        worker, "speculative_num_steps"
    ):
        return lambda: int(worker.speculative_num_steps)
    return settings.depth(server_args)
