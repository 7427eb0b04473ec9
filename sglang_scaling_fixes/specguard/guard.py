"""The guard in a scheduler: it watches every request that verifies drafts, and acts on an anomaly.

verification -> counters of the request -> Watch -> anomaly
    observe: the anomaly is counted and logged
    abort:   the request also finishes with 503 `kv_anomaly`. Its KV is not inserted into the
             prefix cache, its cached prefix becomes suspect (taint.py), and its prefill server
             is notified (notify.py)

With the retry proxy's word (words.py) a request has a namespace that nobody shares, so its anomaly
makes nobody else suspect; or it is not ended at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sglang_scaling_fixes.resolved_args import resolved
from sglang_scaling_fixes.specguard import abort, settings, tellings, words
from sglang_scaling_fixes.specguard.abort import ERROR_TYPE
from sglang_scaling_fixes.specguard.baseline import Baseline
from sglang_scaling_fixes.specguard.detector import Anomaly, Rules, Watch
from sglang_scaling_fixes.specguard.reporting import Reporting
from sglang_scaling_fixes.specguard.rooms import Rooms
from sglang_scaling_fixes.specguard.taint import Path, Taint
from sglang_scaling_fixes.specguard.tellings import Telling
from sglang_scaling_fixes.vouch import UNGUARDED

__all__ = ["ERROR_TYPE", "DraftCounters", "SpecGuard"]

_WATCH = "sglang_scaling_fixes_watch"
_TAINTED = "sglang_scaling_fixes_tainted"
_NAMESPACE = "sglang_scaling_fixes_namespace"
CAPS = "spec_cap_lens_histogram"
"""Since 0.5.16: how often a verification of this request took so many tokens, where that varies.
One of them is no draft."""

Depth = int | Callable[[], int]
"""How many drafts one verification can accept: a constant, or a function for an adaptive depth."""


@dataclass(frozen=True)
class DraftCounters:
    """How a request's acceptance is read on this server.

    `accepted_field`: the name of the request's count of accepted drafts.
    """

    depth: Depth
    accepted_field: str


@dataclass(frozen=True)
class Sharing:
    """With whom this scheduler's requests share KV and secrets.

    `by_namespace`: no cache or store keeps KV by its tokens alone. `rooms`: of a prefill server.
    """

    secret: bytes | None = None
    by_namespace: bool = True
    rooms: Rooms | None = None


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
        *,
        sharing: Sharing | None = None,
    ) -> None:
        self.rules = rules
        self.action = action
        self.taint = taint
        self.sharing = sharing or Sharing()
        self.baseline = Baseline()
        self._depth = drafts.depth
        self._accepted_field = drafts.accepted_field
        self._reporting = reporting or Reporting()
        self._accusations = 0

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
        caps = req.__dict__.get(CAPS)
        offered = offered_drafts(caps, verifications, depth) if caps else None
        drafted, before = watch.drafted, watch.accepted
        anomaly = watch.observe(
            self.rules, verifications, accepted, depth, req.output_ids, offered=offered
        )
        if anomaly is not None:
            self._act(req, anomaly)
        elif watch.found is None and self.baseline.add(watch.drafted - drafted, accepted - before):
            self._reporting.baseline(self.baseline)

    def _act(self, req: Any, anomaly: Anomaly) -> None:
        action = "observed"
        if self.action == "abort":
            word = words.find(self.sharing.secret, req.extra_key)
            action = "aborted"
            if word is not None and word.kind == UNGUARDED:
                action = "false_alarm"
            else:
                self._end(req, anomaly, unshared=word is not None)
        self._reporting.anomaly(req, anomaly, action, self.rules.window)

    def _end(self, req: Any, anomaly: Anomaly, *, unshared: bool) -> None:
        self._accusations += 1
        name = f"{self.taint.origin}-{self._accusations:x}"
        self._taint_request(req, name, unshared=unshared)
        # A request that is ending already, by a client's abort for example, ends that way.
        if req.finished_reason is None and req.to_finish is None:
            req.to_finish = abort.reason(anomaly, name, len(req.output_ids))

    def _taint_request(self, req: Any, name: str, *, unshared: bool) -> None:
        """Keep the request's KV out of the caches, and later requests away from its cached KV.

        `unshared`: no other request reads its namespace, and it has read nobody else's.
        """
        req.skip_radix_cache_insert = True
        req.__dict__[_TAINTED] = True
        if unshared and self.sharing.by_namespace:
            self._reporting.increment("accusations", "unshared")
            return
        number = tellings.number(name)
        if (path := self._path(req)) is not None:
            self._accuse(number, path)
        self._reporting.accuse_prefill(req, number)

    def _accuse(self, name: int, path: Path) -> None:
        self._reporting.increment("accusations", self.taint.accuse(name, path))
        self._reporting.suspicions(len(self.taint))

    # -- requests that come later ----------------------------------------------------------

    def choose_namespace(self, req: Any) -> None:
        """Give `req` a namespace without suspect pages. Call it before `req` matches cached KV."""
        old = req.__dict__.get(_NAMESPACE)
        if not self.taint and old is None:
            return
        number = self.taint.number(self._own(req), lambda length: heads(req, length))
        if number == (old or 0) or holds_kv(req):
            return  # the pages of a request with KV are locked in its present namespace
        own, new = self._stripped(req), self.taint.name(number)
        req.extra_key = f"{own}|{new}" if new else own or None
        req.__dict__[_NAMESPACE] = number
        self._reporting.increment("moved_requests")

    def note(self, req: Any) -> None:
        """Remember what `req` computes and reads, on a server that may hear of it later."""
        rooms, room = self.sharing.rooms, req.bootstrap_room
        if rooms is not None and room is not None and not holds_kv(req):
            unshared = self.sharing.by_namespace and words.find(self.sharing.secret, req.extra_key)
            rooms.note(room, None if unshared else self._path(req))

    def _path(self, req: Any) -> Path | None:
        number = req.__dict__.get(_NAMESPACE) or 0
        forms = [form for form in written(req) if form is not None]
        return self.taint.path(self._own(req), lambda length: heads(req, length), forms, number)

    def _own(self, req: Any) -> str:
        """The namespace that the request came with, if caches are told apart by it."""
        if not self.sharing.by_namespace:
            return ""
        return f"{self._stripped(req)}\0{getattr(req, 'cache_salt', None) or ''}"

    def _stripped(self, req: Any) -> str:
        added = self.taint.name(req.__dict__.get(_NAMESPACE) or 0)
        return (req.extra_key or "").replace(f"|{added}", "") if added else req.extra_key or ""

    def avoids_storage(self, req: Any) -> bool:
        """Whether KV that an outside store keeps for this request's tokens must not be read."""
        return bool(req.__dict__.get(_NAMESPACE)) or words.is_fresh(req.extra_key)

    def told(self, telling: Telling | None) -> None:
        """What the main process says: a request of this prefill server was found anomalous on
        decode, or an accusation is withdrawn. None: it was not signed.

        With `observe` it is only counted.
        """
        if telling is None:
            self._reporting.increment("notifications_received", "refused")
        elif telling.room is None:
            self._withdraw(telling.name)
        else:
            path = self.sharing.rooms and self.sharing.rooms.get(telling.room)
            if path and self.action == "abort":
                self._accuse(telling.name, path)
            outcome = "taken" if path or self.action == "observe" else "unknown"
            self._reporting.increment("notifications_received", outcome)

    def _withdraw(self, name: int) -> None:
        self.taint.withdraw(name)
        self._reporting.suspicions(len(self.taint))
        self._reporting.withdraw_at_prefill(name)

    def report(self) -> dict[str, Any]:
        """For `/server_info`: the action, the rules, and the counts."""
        return {
            "action": self.action,
            "rules": dict(vars(self.rules)),
            "suspicions": len(self.taint),
            "suspect_namespaces": self.taint.namespaces,
            "accept_length": {"recent": self.baseline.recent, "reference": self.baseline.reference},
            **self._reporting.metrics.report(),
        }


def offered_drafts(caps: Sequence[int], verifications: int, depth: int) -> tuple[int, int]:
    """Verifications that had a draft, and their drafts, where stock may offer fewer than `depth`.

    `caps`: see `CAPS`. Verifications that it does not count were offered all.
    """
    whole = verifications - sum(caps)
    drafts = sum((tokens - 1) * count for tokens, count in enumerate(caps[2:], start=2))
    return whole + sum(caps[2:]), whole * depth + drafts


def tainted(req: Any) -> bool:
    """Whether the guard found this request anomalous: no cache or store may keep its KV."""
    return bool(req.__dict__.get(_TAINTED))


def written(req: Any) -> tuple[Any, Any]:
    """The forms of the request's prompt. One with images has two, others have one or the same.

    This server's cache holds the one whose placeholders are replaced, which stock does after the
    request was made; another server's cache may hold the other.
    """
    return req.origin_input_ids, req.origin_input_ids_unpadded


def heads(req: Any, length: int | None) -> list[Any]:
    """The first tokens, at most `length`, under which a prefix cache may hold this request's KV.

    They are the prompt's, and generated ones behind: a retracted request computes both again, and
    both are inserted.
    """
    found: list[Any] = []
    for prompt in written(req):
        if prompt is None and found:
            continue
        head = [*(prompt or ())[:length]]
        head += req.output_ids[: None if length is None else length - len(head)]
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
    if resolved(server_args, "speculative_adaptive") and hasattr(worker, "speculative_num_steps"):
        return lambda: int(worker.speculative_num_steps)
    return settings.depth(server_args)
