"""What prefill's ledger decided, done: rooms failed in stock, answers sent to decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.kv_poll import FAILED, SUCCESS
from sglang_scaling_fixes.metrics import Metrics
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.rules.prefill_actions import (
    Action,
    FailRoom,
    ForgetRoom,
    SendAck,
    SendEnded,
    ends_room,
)

Reply = Callable[[str, bytes], object]
"""Sends one frame to a decode rank's endpoint, without blocking."""


class Actions:
    """The hands of one prefill rank's ledger."""

    def __init__(self, manager: Any, incarnation: str, metrics: Metrics, reply: Reply) -> None:
        self._manager = manager
        self._incarnation = incarnation
        self._metrics = metrics
        self._reply = reply

    def act(self, actions: list[Action]) -> None:
        """Carry out all but `ForgetRoom`. Not under the ledger's lock."""
        for action in actions:
            if isinstance(action, FailRoom):
                self._fail(action.room, action.reason)
            elif isinstance(action, SendAck):
                self._acknowledge(action)
            elif isinstance(action, SendEnded):
                self._tell(action)

    def forget_rooms(self, actions: list[Action]) -> None:
        """Under the lock of the bind that asks for it: until the old destinations are
        gone no chunk of the new attempt may be taken, and taking needs the lock."""
        for action in actions:
            if isinstance(action, ForgetRoom):
                self._manager.transfer_infos.pop(action.room, None)

    def greet(
        self, reply_to: str, rank: str, lease: str | None = None, seq: int | None = None
    ) -> None:
        """Say who serves `rank`, in answer to destinations or to a Hello."""
        message = messages.HelloAck(rank, self._incarnation, lease, seq)
        self._reply(reply_to, messages.encode(message))

    def _acknowledge(self, action: SendAck) -> None:
        self._metrics.inc("abort_acks", action.verdict)
        reason = action.reason[: messages.MAX_REASON]
        message = messages.AbortAck(
            action.rank, self._incarnation, action.lease, action.verdict, reason
        )
        self._reply(action.reply_to, messages.encode(message))

    def _tell(self, action: SendEnded) -> None:
        self._metrics.inc("endings_told", action.verdict)
        reason = action.reason[: messages.MAX_REASON]
        message = messages.AttemptEnded(
            action.rank, self._incarnation, action.lease, action.verdict, reason
        )
        self._reply(action.reply_to, messages.encode(message))

    def _fail(self, room: int, reason: str) -> None:
        """End the room in stock as stock ends its own failures, so that its request ends."""
        status = self._manager.request_status.get(room)
        if ends_room(known=status is not None, succeeded=status == SUCCESS):
            self._manager.record_failure(room, reason)
            self._manager.update_status(room, FAILED)
