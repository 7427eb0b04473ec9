"""Decode under pressure: a prefill is ailing. Its new requests are refused; a fence falls.

`rules.quarantine` decides, the TP ranks agree, and what they agreed on is done here.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from sglang_scaling_fixes.kv_poll import FAILED, SUCCESS
from sglang_scaling_fixes.ranks import TpGroup
from sglang_scaling_fixes.reclaim.decode import fence
from sglang_scaling_fixes.reclaim.decode.gate import Gate
from sglang_scaling_fixes.reclaim.decode.liveness import Liveness
from sglang_scaling_fixes.reclaim.decode.peers import Peers
from sglang_scaling_fixes.reclaim.decode.records import Records
from sglang_scaling_fixes.reclaim.retry_after import AILING, REFUSAL
from sglang_scaling_fixes.reclaim.rules.causes import Cause
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.quarantine import (
    FENCE_SHARE,
    GRACE_S,
    Hold,
    Pressure,
    Quarantine,
)
from sglang_scaling_fixes.reclaim.rules.reasons import why_held

logger = logging.getLogger(__name__)

PAUSE_S, PAUSES = 1.0, 64
"""What one wait for the next tick adds to a prefill's silence, at most. What is longer was a pause
of this scheduler: new weights, a compilation, a fence. So many are remembered."""
LOOK_AGAIN_S = 0.1
"""Seconds between two assessments of what is held."""


class Relief:
    """What one decode rank does about holds that do not drain."""

    def __init__(self, manager: Any, records: Records, peers: Peers, *, mode: str) -> None:
        self._manager = manager
        self._ledger = records.ledger
        self._lock = records.lock
        self._metrics = records.metrics
        self._peers = peers
        self._liveness = Liveness()
        self._next_look = 0.0
        self._looked_at = time.monotonic()
        self._stood_still: deque[tuple[float, float]] = deque(maxlen=PAUSES)
        """When this scheduler came to no tick: from, and until."""
        self._pressure = Pressure(refuse=False, fence=False)
        self._next_fence = 0.0
        self._retiring: fence.Retiring | None = None
        self._mode = mode
        self.refusing = False
        """Too little is left of the pool: every request is refused. The same on all TP ranks."""
        self._ailing: dict[str, Exposure] = {}
        """Prefill instance whose new requests are refused -> the oldest exposure that it is blamed
        for. The same keys on all TP ranks."""
        self._standing_tokens = 0
        """Token slots of the holds that do not drain. The same on all TP ranks."""
        self.crowded_out = False
        """Since the last tick stock failed to resume a retracted request, with nothing running.
        It takes no transfer in before that one is back: this decode stands still."""
        self.no_fence = fence.obstacle(getattr(manager, "server_args", None))
        """Why a fence is impossible here, None if it is not: then refusing has to do."""
        if mode == "off":
            self.no_fence = "--safe-reclaim-fence off"

    @property
    def retiring(self) -> bool:
        """An engine is on its way out; until it is closed every TP rank takes part in each tick."""
        return self._retiring is not None

    def assess(self, held: Sequence[Exposure], quarantine: Quarantine) -> Pressure:
        """What this rank alone would do about what it holds, and whom it blames (`blames`)."""
        now = time.monotonic()
        self._note_pause(held, now)
        stuck, self.crowded_out = self.crowded_out, False
        if now >= self._next_look:
            self._look(quarantine, now)
        stuck = stuck and bool(held) and now - held[0].gave_up_at > GRACE_S
        return replace(self._pressure, refuse=self._pressure.refuse or stuck)

    def _look(self, quarantine: Quarantine, now: float) -> None:
        self._next_look = now + LOOK_AGAIN_S
        holds: list[Hold] = []
        with self._lock:
            judged = [(cause, self._quiet_s(cause.held, now)) for cause in self._ledger.causes]
            self._liveness.look(self._suspects(judged))
            for cause, quiet_s in judged:
                for hold, exposures in self._holds(cause, quiet_s):
                    holds.append(hold)
                    blames, stands = hold.blames, hold.stands
                    for exposure in exposures:
                        exposure.blames, exposure.stands = blames, stands
        mode = "off" if self.no_fence else self._mode
        self._pressure = quarantine.decide(holds, mode=mode)

    def _note_pause(self, held: Sequence[Exposure], now: float) -> None:
        """Remember when nobody could be asked, as long as something is held since then.

        While nothing is held nobody looks, and that is no pause.
        """
        oldest = held[0].gave_up_at if held else now
        began = max(self._looked_at, oldest)
        if now - began > PAUSE_S:
            self._stood_still.append((began + PAUSE_S, now))
        self._looked_at = now
        while self._stood_still and self._stood_still[0][1] <= oldest:
            self._stood_still.popleft()

    def _quiet_s(self, held: Sequence[Exposure], now: float) -> list[float]:
        """For how long nobody has said anything of each while this rank could ask."""
        if not self._stood_still:  # as nearly always, and there may be thousands
            return [now - exposure.last_word for exposure in held]
        return [now - e.last_word - self._paused_s(e.last_word, now) for e in held]

    def _paused_s(self, since: float, now: float) -> float:
        paused = (min(until, now) - max(began, since) for began, until in self._stood_still)
        return sum(max(0.0, seconds) for seconds in paused)

    @staticmethod
    def _suspects(judged: Sequence[tuple[Cause, Sequence[float]]]) -> set[str]:
        """Ranks that have said nothing for so long that they may be gone, and their instances."""
        found: set[str] = set()
        for cause, quiet_s in judged:
            instances = {
                e.prefill for e, quiet in zip(cause.held, quiet_s, strict=True) if quiet > GRACE_S
            }
            if instances:
                found.update(cause.ranks, instances)
        return found - {""}

    def _holds(self, cause: Cause, quiet_s: Sequence[float]) -> list[tuple[Hold, list[Exposure]]]:
        """What waits for this, put together where it is judged alike, and the exposures of each.

        `quiet_s`: of each of `cause.held`.
        """
        replaced = [w for w in cause.waits if self._ledger.replaced(w)]
        gone = [w for w in cause.waits if w not in replaced and self._liveness.gone(w.rank)]
        live = [w for w in cause.waits if w not in replaced and w not in gone]
        mute = [w for w in live if not w.poisoned and not self._ledger.successes.runs_plugin(w)]
        others = [w for w in live if not w.poisoned and w not in mute]
        alike: dict[tuple[bool, bool], list[tuple[float, Exposure]]] = {}
        engine = self._ledger.engine
        for quiet, e in zip(quiet_s, cause.held, strict=True):
            alike.setdefault((quiet > GRACE_S, e.engine != engine), []).append((quiet, e))
        found = []
        for (_, fencing), alike_ones in alike.items():
            exposures = [exposure for _, exposure in alike_ones]
            hold = Hold(
                max(quiet for quiet, _ in alike_ones),
                sum(exposure.tokens for exposure in exposures),
                sum(exposure.metadata for exposure in exposures),
                unproven=len(cause.waits),
                poisoned=sum(w.poisoned for w in live),
                gone=len(gone),
                replaced=len(replaced),
                succeeded=sum(self._ledger.answered_for(w) for w in others),
                back=bool(gone) and all(map(self._liveness.back, {e.prefill for e in exposures})),
                mute=len(mute),
                fencing=fencing,
            )
            found.append((hold, exposures))
        return found

    # -- refusing -----------------------------------------------------------------------

    def refuse_requests(
        self,
        refusing: bool,
        blamed: Sequence[Exposure],
        standing: Sequence[Exposure],
        gate: Gate,
    ) -> None:
        """Take up what the ranks agreed on: refuse everybody, and the requests of these prefills.

        `blamed`: the exposures that some rank blames a prefill for. `standing`: those that on some
        rank do not drain.
        """
        if refusing and not self.refusing:
            logger.error(
                "safe-reclaim: %d token slots are held without proof, more than "
                "--safe-reclaim-max-held allows, or too many for a retracted request to come back: "
                "every new request is refused with 503 until some are back; the log and "
                "/server_info say what is held and why%s",
                gate.held_tokens,
                self._no_fence_either(),
            )
        self.refusing = refusing
        self._standing_tokens = sum(exposure.tokens for exposure in standing)
        before = self._ailing
        self._ailing = {exposure.prefill: exposure for exposure in reversed(blamed)}
        for prefill in self._ailing.keys() - before.keys():
            logger.error(
                "safe-reclaim: prefill %s: %s; new requests that name it are refused with 503 "
                "until that ends, others are served%s",
                prefill,
                self._why_ailing(prefill),
                self._no_fence_either(),
            )
        for prefill in before.keys() - self._ailing.keys():
            logger.warning("safe-reclaim: prefill %s is served again", prefill)

    @property
    def ailing(self) -> dict[str, str]:
        """Prefill instance -> why its new requests are refused."""
        return {prefill: self._why_ailing(prefill) for prefill in self._ailing}

    def _why_ailing(self, prefill: str) -> str:
        return why_held(self._ailing[prefill], self._ledger.peers)

    def _no_fence_either(self) -> str:
        return f" (no fence: {self.no_fence})" if self.no_fence else ""

    def refusal(self, prefill: str, tokens: int, pool: int) -> tuple[str, str] | None:
        """Why a new request of this prefill instance is not taken, None if it is: a word, a text.

        `tokens`: the slots that stock wants free for it; `pool`: those of this decode. What does
        not fit beside what stands would wait at the head of the queue, before all others.
        """
        crowded = self._standing_tokens and tokens > pool - self._standing_tokens
        if self.refusing or crowded:
            return "held", f"{REFUSAL}; retry here later, or at another decode now"
        if prefill in self._ailing:
            return "ailing", (
                f"{AILING} {prefill}: {self._why_ailing(prefill)}; retry with another prefill now, "
                "or with this one later"
            )
        return None

    def refuse(self, queue: Any, req: Any, reason: str, message: str) -> None:
        """End a request that has not been admitted with 503, as stock ends its own refusals."""
        from sglang.srt.disaggregation.utils import prepare_abort

        self._metrics.inc("refusals", reason)
        prepare_abort(req, message, status_code=HTTPStatus.SERVICE_UNAVAILABLE)
        scheduler = queue.scheduler
        streamer = getattr(scheduler, "output_streamer", scheduler)
        streamer.stream_output([req], req.return_logprob)

    # -- fencing ------------------------------------------------------------------------

    def wants_switch(self, pressure: Pressure) -> bool:
        """A fence is called for, none is under way, and the last one is long enough ago."""
        due = time.monotonic() >= self._next_fence
        return pressure.fence and due and self._retiring is None and self.no_fence is None

    def may_retire(self) -> bool:
        """Nobody waits any more for what the old engine receives, and it can go quickly."""
        if self._retiring is None:
            return False
        with self._lock:
            waiting = [e for e in self._ledger.receiving_elsewhere() if not self._hopeless(e)]
        return not waiting and self._retiring.ready(time.monotonic())

    def _hopeless(self, exposure: Exposure) -> bool:
        """Its transfer cannot complete, or `always` says not to wait for it."""
        if self._mode == "always" and exposure.prefill in self._ailing:
            return True
        return any(
            self._ledger.replaced(w) or self._liveness.gone(w.rank)
            for w in exposure.writers.values()
            if not w.reported
        )

    def switch(self, group: TpGroup) -> None:
        """From now on another engine receives what is sent; transfers under way go on."""
        began = time.monotonic()
        error, old = "", None
        try:
            old = fence.switch(self._manager)
        except fence.FenceError as problem:
            error = str(problem)
        (everywhere,) = group.all_true([old is not None])
        if not everywhere:
            if old is not None:
                fence.take_back(self._manager, old)
            self.no_fence = error or "another TP rank could not make a second engine"
            logger.error("safe-reclaim: no fence: %s", self.no_fence)
            return
        assert old is not None
        self._retiring = old
        self._peers.end_session(old.session)
        with self._lock:
            self._ledger.engine_made()
        self._peers.register_everywhere()
        self._took(began)
        logger.warning(
            "safe-reclaim: fencing: session %s takes over from %s, which is closed as soon as "
            "what is under way to it has landed",
            self._manager.get_session_id(),
            old.session,
        )

    def retire(self, group: TpGroup) -> None:
        """Close the old engine: nothing sent under its session can land any more (P4)."""
        assert self._retiring is not None
        began, old = time.monotonic(), self._retiring
        self._retiring = None
        error = ""
        try:
            fence.retire(old, group.union)
        except fence.FenceError as problem:
            error = str(problem)
        (everywhere,) = group.all_true([not error])
        self._took(began)
        if not everywhere:
            self.no_fence = error or "another TP rank could not close its engine"
            logger.error("safe-reclaim: no fence: %s; what it would free is held", self.no_fence)
            return
        with self._lock:
            lost = self._ledger.engines_closed()
        for exposure in lost:
            if self._manager.request_status.get(exposure.room) != SUCCESS:
                self.end_room(
                    exposure.room,
                    "this decode fenced its memory (safe-reclaim) while the KV was on its way "
                    "from a prefill that is gone or does not answer: retry the request",
                )
        self._metrics.inc("fences")
        logger.warning(
            "safe-reclaim: fenced: session %s is gone after %.2f s; %d transfers were ended",
            old.session,
            time.monotonic() - began,
            len(lost),
        )

    def _took(self, began: float) -> None:
        """Part of a fence is done: it is paid for before the next begins."""
        now = time.monotonic()
        self._next_fence = max(self._next_fence, now) + (now - began) / FENCE_SHARE

    def end_room(self, room: int, reason: str) -> None:
        """Fail a room in stock, as stock fails its own."""
        self._manager.record_failure(room, reason)
        self._manager.update_status(room, FAILED)
