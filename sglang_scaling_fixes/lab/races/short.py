"""One round of short sends: does decode answer from KV that nobody wrote?

No race: prefill computes less than decode has slots for, and reports success.

1. the victims' prompts run alone through the fast prefill, twice: the reference;
2. another user's prompts run through the fast prefill and leave their KV in every slot;
3. the victims' prompts come through the slow prefill, which takes no prompt as long as
   theirs (`Scenario.slow_flags`);
4. the victims' slots and greedy tokens are compared with the reference.

A round in which the slow prefill computed a whole prompt, or a victim got no slot of the
other user's, proves nothing: it is `Invalid`.
"""

from __future__ import annotations

import random
import time

from sglang_scaling_fixes.lab.observing.events import Kind
from sglang_scaling_fixes.lab.races.reference import random_prompt
from sglang_scaling_fixes.lab.races.result import Round
from sglang_scaling_fixes.lab.races.round import Invalid, Played, Race, Victim
from sglang_scaling_fixes.lab.races.traffic import Traffic
from sglang_scaling_fixes.lab.servers.pending import Outcome

OTHERS = 2  # so often the other user's prompts run: then no slot is as the victims left it


class ShortSends(Race):
    """Plays rounds of short sends on one cluster."""

    def round(self, number: int, attempt: int, seed: int) -> Round:
        """Play one round; `Invalid` if it proves nothing."""
        draw = random.Random(f"{seed}-{number}-{attempt}")
        name = f"{self.plan.name}-{number}-{attempt}"
        victims = [
            self._victim(f"{name}-victim-{i}", draw, length, self.plan.new_tokens)
            for i, length in enumerate(self.plan.victims)
        ]
        others = [
            self._alone(f"{name}-other-{turn}-{i}", random_prompt(draw, length), 8)
            for turn in range(OTHERS)
            for i, length in enumerate(self.plan.late)
        ]
        if any(outcome.ids is None for outcome in others):
            raise Invalid("a request of the other user's was not answered")
        with Traffic(self._link) as traffic:
            sending = time.time()
            outcomes = [self._through_slow(victim) for victim in victims]
        played = Played(number, attempt, 0, sending, traffic)
        report = self._judge(played, victims, outcomes, others)
        taken = {slot for outcome in outcomes for slot in self._slots(outcome.rid)}
        left = {slot for outcome in others for slot in self._slots(outcome.rid)}
        report.slots_shared = len(taken & left)
        if not report.slots_shared:
            raise Invalid("no victim got a slot of the other user's")
        after = self._alone(f"{name}-afterwards", victims[0].right.prompt, self.plan.new_tokens)
        report.clean_afterwards = after.ids == victims[0].right.ids
        return report

    def _through_slow(self, victim: Victim) -> Outcome:
        sent = self.cluster.send(
            self.cluster.slow,
            victim.right.prompt,
            victim.rid,
            max_new_tokens=victim.right.new_tokens,
        )
        outcome = sent.wait()
        body = outcome.prefill.body if outcome.prefill is not None else None
        meta = body.get("meta_info") if isinstance(body, dict) else None
        if not meta or meta.get("prompt_tokens", 0) >= len(victim.right.prompt):
            raise Invalid(f"prefill did not cut the prompt short: {body!s:.200}")
        return outcome

    def _slots(self, rid: str) -> list[int]:
        slots: list[int] = self._events(rid).get(Kind.EXPOSED, {}).get("slots", [])
        return slots
