"""A request on its way to a prefill and a decode server, and how it ended."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sglang_scaling_fixes.lab.servers.client import Answer, Call
from sglang_scaling_fixes.lab.servers.server import ANSWER_S, Role, Server


@dataclass(frozen=True)
class Outcome:
    """How a request ended on the decode side."""

    rid: str
    ids: list[int] | None  # generated token ids; None if there was no such answer
    aborted: bool
    decode: Answer
    prefill: Answer | None  # None if prefill had not answered by then

    @property
    def refusal(self) -> str | None:
        """The error decode answered in words; None for an answer, silence or garbage."""
        return None if self.ids is not None else refusal(self.decode)


def refusal(answer: Answer) -> str | None:
    """The words of an error answer: an HTTP error with a message, or a 200 that says abort."""
    if answer.status == 0 or not isinstance(answer.body, dict):
        return None
    if answer.status == 200:
        reason = (answer.body.get("meta_info") or {}).get("finish_reason") or {}
        words = reason.get("message") if reason.get("type") == "abort" else None
    else:
        error = answer.body.get("error") or answer.body.get("detail") or answer.body
        words = error.get("message") if isinstance(error, dict) else error
    return words if isinstance(words, str) and words.strip() else None


class Pending:
    """A request on its way to both servers."""

    def __init__(
        self,
        prefill: Server,
        decode: Server,
        rid: str,
        room: int,
        payload: Mapping[str, object],
    ) -> None:
        self.rid = rid
        self.room = room
        self._answers: dict[Role, Answer] = {}
        self._threads: dict[Role, threading.Thread] = {}
        self._calls = {
            server.role: server.calling("/generate", payload) for server in (prefill, decode)
        }
        for role, ringing in self._calls.items():
            thread = threading.Thread(target=self._send, args=(role, ringing), daemon=True)
            self._threads[role] = thread
            thread.start()

    def _send(self, role: Role, ringing: Call) -> None:
        self._answers[role] = ringing.run(ANSWER_S)

    def hang_up(self) -> None:
        """Close both connections, as a client that goes away."""
        for ringing in self._calls.values():
            ringing.hang_up()

    def done(self, role: Role) -> bool:
        return role in self._answers

    def wait(self, timeout_s: float = ANSWER_S + 10, prefill: bool = True) -> Outcome:
        """Wait for the decode server's answer, and for prefill's unless told not to."""
        self._threads["decode"].join(timeout_s)
        if prefill:
            self._threads["prefill"].join(timeout_s)
        answer = self._answers.get("decode", Answer(0, f"no answer within {timeout_s:g} s"))
        body = answer.body if isinstance(answer.body, dict) else {}
        meta = body.get("meta_info") or {}
        reason = (meta.get("finish_reason") or {}).get("type")
        ids = body.get("output_ids") if answer.status == 200 and reason != "abort" else None
        return Outcome(
            rid=self.rid,
            ids=ids,
            aborted=reason == "abort" or (answer.status >= 400 and "bort" in str(answer.body)),
            decode=answer,
            prefill=self._answers.get("prefill"),
        )


def greedy(prompt: Sequence[int], max_new_tokens: int) -> dict[str, object]:
    """The JSON of a request for exactly so many greedy tokens."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling}
