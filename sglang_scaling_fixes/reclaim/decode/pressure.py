"""Decode under pressure: too much is held without proof. New requests are refused; a fence falls.

`rules.quarantine` decides, the TP ranks agree, and what they agreed on is done here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from sglang_scaling_fixes.kv_poll import FAILED, SUCCESS
from sglang_scaling_fixes.ranks import TpGroup
from sglang_scaling_fixes.reclaim.decode import fence
from sglang_scaling_fixes.reclaim.decode.gate import Gate
from sglang_scaling_fixes.reclaim.decode.liveness import Liveness
from sglang_scaling_fixes.reclaim.decode.peers import Peers
from sglang_scaling_fixes.reclaim.decode.records import Records
from sglang_scaling_fixes.reclaim.retry_after import REFUSAL
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.quarantine import GRACE_S, Hold, Pressure, Quarantine

logger = logging.getLogger(__name__)


class Relief:
    """The bound on what one decode rank holds, and the ways out past it."""

    def __init__(
        self,
        manager: Any,
        records: Records,
        peers: Peers,
        *,
        may_fence: bool,
    ) -> None:
        self._manager = manager
        self._ledger = records.ledger
        self._lock = records.lock
        self._metrics = records.metrics
        self._peers = peers
        self._may_fence = may_fence
        self._liveness = Liveness()
        self.refusing = False
        """More is held than allowed: new requests are refused. The same on all TP ranks."""
        self.no_fence = fence.obstacle(getattr(manager, "server_args", None))
        """Why a fence is impossible here, None if it is not: then refusing has to do."""

    def assess(self, held: Sequence[Exposure], gate: Gate, quarantine: Quarantine) -> Pressure:
        """What this rank alone would do about what it holds."""
        now = time.monotonic()
        with self._lock:
            late = [e for e in held if now - e.gave_up_at > GRACE_S]
            suspects = {w.rank for e in late for w in e.unproven}
            flying = len(self._ledger.exposures()) - len(held)
        if self.no_fence is None:
            self._liveness.look(suspects)
        with self._lock:
            holds = [self._hold(e, gate, now) for e in held]
        may_fence = self._may_fence if self.no_fence is None else None
        return quarantine.decide(holds, flying=flying, may_fence=may_fence)

    def _hold(self, exposure: Exposure, gate: Gate, now: float) -> Hold:
        unproven = exposure.unproven
        gone = [w for w in unproven if self._ledger.replaced(w) or self._liveness.gone(w.rank)]
        return Hold(
            now - exposure.gave_up_at,
            gate.tokens(exposure),
            gate.metadata_slot(exposure) is not None,
            unproven=len(unproven),
            gone=len(gone),
        )

    # -- refusing -----------------------------------------------------------------------

    def refuse_requests(self, refusing: bool, gate: Gate, max_held: float) -> None:
        """Begin to refuse new requests, or stop."""
        if refusing and not self.refusing:
            logger.error(
                "safe-reclaim: %d token slots are held without proof, more than "
                "--safe-reclaim-max-held %g allows: new requests are refused with 503 until "
                "proof comes; the log and /server_info say what is held and why%s",
                gate.held_tokens,
                max_held,
                f" (no fence: {self.no_fence})" if self.no_fence else "",
            )
        self.refusing = refusing

    def refuse(self, queue: Any, req: Any) -> None:
        """End a request that has not been admitted with 503, as stock ends its own refusals."""
        from sglang.srt.disaggregation.utils import prepare_abort

        self._metrics.inc("refusals", "held")
        message = f"{REFUSAL}; retry here later, or at another decode now"
        prepare_abort(req, message, status_code=HTTPStatus.SERVICE_UNAVAILABLE)
        scheduler = queue.scheduler
        streamer = getattr(scheduler, "output_streamer", scheduler)
        streamer.stream_output([req], req.return_logprob)

    # -- fencing ------------------------------------------------------------------------

    def fence(self, group: TpGroup) -> None:
        """Make everything sent so far harmless (P4), and be reachable again under a new session.

        The engine goes first: only when nothing can land any more does the ledger learn
        of it. Transfers in flight are lost with it and end as failed.
        """
        logger.error(
            "safe-reclaim: fencing: the receiving engine is replaced, transfers in flight end"
        )
        began = time.monotonic()
        old, new = fence.renew(self._manager, group.union)
        self._peers.end_session(old)
        with self._lock:
            lost = self._ledger.fence()
        for exposure in lost:
            if self._manager.request_status.get(exposure.room) != SUCCESS:
                self.end_room(
                    exposure.room,
                    "this decode fenced its memory (safe-reclaim) while the KV was on its way: "
                    "retry the request",
                )
        self._peers.register_everywhere()
        self._metrics.inc("fences")
        logger.error(
            "safe-reclaim: fenced in %.1f s: session %s is gone, %s took its place; %d transfers "
            "in flight were ended",
            time.monotonic() - began,
            old,
            new,
            len(lost),
        )

    def end_room(self, room: int, reason: str) -> None:
        """Fail a room in stock, as stock fails its own."""
        self._manager.record_failure(room, reason)
        self._manager.update_status(room, FAILED)
