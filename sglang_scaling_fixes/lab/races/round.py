"""One round of a race: does a late KV write land in memory that has a new owner?

The same for stock and fixed servers:

1. the victims' prompts run alone through the fast prefill, twice: the reference;
2. the late requests start through the slow prefill; while their KV is on the wire,
   they end (`Ending`);
3. the victims' prompts come through the fast prefill.  Not all fits, so that they must
   take the late requests' slots, as soon as the decode server gives them;
4. the victims' slots and greedy tokens are compared with the reference.

A round whose transfer was not in flight when the end came, or had nothing left to
send, proves nothing: it is `Invalid`.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace

from sglang_scaling_fixes.lab.observing.events import Kind
from sglang_scaling_fixes.lab.observing.reader import Event
from sglang_scaling_fixes.lab.races.reference import (
    MARGIN,
    WITH_MARGIN,
    Reference,
    differing,
    margin,
    random_prompt,
)
from sglang_scaling_fixes.lab.races.result import Round, Verdict, ranges
from sglang_scaling_fixes.lab.races.scenarios import (
    IN_FLIGHT_SHARE,
    Ending,
    Scenario,
    says_margins,
)
from sglang_scaling_fixes.lab.races.traffic import SAMPLE_S, Traffic
from sglang_scaling_fixes.lab.servers.cluster import Cluster
from sglang_scaling_fixes.lab.servers.link import Link
from sglang_scaling_fixes.lab.servers.pending import Outcome, Pending
from sglang_scaling_fixes.lab.servers.server import ANSWER_S, Server

LATE_BYTES = 100_000  # less than this after the end is chatter, not KV
STALL_S = 4.0  # below the two missed heartbeats (10 s) that fail a stopped prefill
SETTLE_S = 0.05  # bytes already in socket buffers arrive within this
REUSE_S = 0.5  # a prefill that learns of an abort has ended the request by then
REFUSED_S = 1.0  # before the load tries again
REFUSED_TRIES = 30
CLEAR_TRIES = 20
_STALL_SAMPLE_S = 0.0005


@dataclass(frozen=True)
class Victim:
    """A request that must get what its prompt got when it was alone."""

    rid: str
    right: Reference


@dataclass(frozen=True)
class Played:
    """What was measured while a round was played."""

    number: int
    attempt: int
    sent_at_end: int
    sending: float  # when the victims were sent, seconds since the epoch
    traffic: Traffic


class Invalid(Exception):
    """The round did not race, or its reference is no reference."""


class Race:
    """Plays rounds on one cluster."""

    def __init__(self, cluster: Cluster, way: Link, plan: Scenario) -> None:
        self.cluster = cluster
        self.plan = plan
        self._link = way
        self._slow_ended = False

    def round(self, number: int, attempt: int, seed: int) -> Round:
        """Play one round; `Invalid` if it proves nothing."""
        plan = self.plan
        if self._slow_ended:
            self.cluster.slow.restart()
            self.cluster.slow.wait_ready()
        draw = random.Random(f"{seed}-{number}-{attempt}")
        name = f"{plan.name}-{number}-{attempt}"
        late_prompts = [random_prompt(draw, length) for length in plan.late]
        victims = [
            self._victim(f"{name}-victim-{i}", draw, length, plan.new_tokens)
            for i, length in enumerate(plan.victims)
        ]
        runners = [
            self._victim(f"{name}-runner-{i}", draw, length, plan.runner_tokens)
            for i, length in enumerate(plan.runners)
        ]
        hold = self._hold()
        self._slow_ended = plan.ends_slow
        with Traffic(self._link) as traffic:
            running = [self._send(runner) for runner in runners]
            self._until(
                lambda: all(Kind.ADMITTED in self._events(one.rid) for one in running),
                "the running requests were not admitted",
            )
            late = self._start_late(name, late_prompts, traffic)
            if running:  # the victims wait for room already
                sending = time.time()
                waiting = [self._send(victim) for victim in victims]
                time.sleep(REUSE_S)
                if any(Kind.EXPOSED in self._events(one.rid) for one in waiting):
                    raise Invalid("the pool was not full: a victim had room before the end")
            with hold:
                self._end(late)
                sent_at_end = traffic.sent()
                if sent_at_end > IN_FLIGHT_SHARE * plan.late_bytes:
                    raise Invalid(f"{sent_at_end} bytes were sent before the end came")
                if not running:
                    sending = time.time()
                    waiting = [self._send(victim) for victim in victims]
                self._wait_admitted(waiting[0])
            compared = [*victims, *runners]
            outcomes = [one.wait(prefill=False) for one in (*waiting, *running)]
            if running:
                compared += self._load_goes_on(victims, outcomes, traffic)
            else:
                compared += self._refused_come_again(victims, outcomes)
            self._wait_quiet(traffic)
            if traffic.sent() - sent_at_end < LATE_BYTES:
                raise Invalid(f"{traffic.sent() - sent_at_end} bytes were sent after the end")
        ended = [one.wait(timeout_s=ANSWER_S) for one in late]
        if any(outcome.ids is not None for outcome in ended):
            raise Invalid("the end came too late: a late request completed")
        after = self._alone(f"{name}-afterwards", victims[0].right.prompt, plan.new_tokens)
        played = Played(number, attempt, sent_at_end, sending, traffic)
        report = self._judge(played, compared, outcomes, ended)
        if report.slots_shared == 0:
            raise Invalid(
                f"no victim got a slot of a late request; {report.refused} of {report.victims}"
                f" were refused: {next((o.refusal for o in outcomes if o.refusal), None)}"
            )
        report.clean_afterwards = after.ids == victims[0].right.ids
        report.lost = sum(self.cluster.observations.lost(room) for room in {o.room for o in late})
        return report

    def settle(self) -> None:
        """After a round that was broken off: let what it left on the link drain."""
        with suppress(Invalid), Traffic(self._link) as traffic:
            self._wait_quiet(traffic)

    # -- the late requests ---------------------------------------------------------

    def _start_late(self, name: str, prompts: list[list[int]], traffic: Traffic) -> list[Pending]:
        if self.plan.reuse_room:
            return self._start_in_one_room(name, prompts, traffic)
        late = [self._send_late(f"{name}-late-{i}", prompt) for i, prompt in enumerate(prompts)]
        self._wait_in_flight(traffic, late)
        self._wait_exposed(late[1:])
        return late

    def _start_in_one_room(
        self, name: str, prompts: list[list[int]], traffic: Traffic
    ) -> list[Pending]:
        """Each but the last is aborted, and its room used again at once."""
        late = [self._send_late(f"{name}-late-0", prompts[0])]
        self._wait_in_flight(traffic, late)
        for i, prompt in enumerate(prompts[1:], start=1):
            before = late[-1]
            self.cluster.abort(before.rid)
            give_up = time.monotonic() + REUSE_S
            while not before.done("prefill") and time.monotonic() < give_up:
                time.sleep(SAMPLE_S)
            late.append(self._send_late(f"{name}-late-{i}", prompt, room=before.room))
            self._wait_exposed(late[-1:])
            time.sleep(REUSE_S)  # prefill computes it and queues its KV
        return late

    def _send_late(self, rid: str, prompt: list[int], room: int | None = None) -> Pending:
        return self.cluster.send(self.cluster.slow, prompt, rid, max_new_tokens=8, room=room)

    def _end(self, late: list[Pending]) -> None:
        """End the late requests, or wait until they have ended by themselves."""
        ending = self.plan.ending
        if ending is Ending.KILL:
            self.cluster.slow.signal(signal.SIGKILL)
        if ending in (Ending.KILL, Ending.ABORT):
            for one in late:
                self.cluster.abort(one.rid)
            return
        self._until(
            lambda: all(one.done("decode") for one in late), f"nothing ended by {ending.value}"
        )

    def _wait_in_flight(self, traffic: Traffic, late: Sequence[Pending]) -> None:
        step = SAMPLE_S if self._link.mode == "shaped" else _STALL_SAMPLE_S
        deadline = time.monotonic() + ANSWER_S
        while traffic.sent() < self.plan.start_bytes:
            for one in late:
                if one.done("decode") or one.done("prefill"):
                    body = one.wait(timeout_s=1.0).decode.body
                    raise Invalid(f"the request ended before the end came: {body!s:.200}")
            if time.monotonic() > deadline:
                raise Invalid(f"no transfer within {ANSWER_S:.0f} s")
            time.sleep(step)

    def _wait_exposed(self, late: Sequence[Pending]) -> None:
        self._until(
            lambda: all(Kind.EXPOSED in self._events(one.rid) for one in late),
            "the late requests did not all get room",
        )

    # -- the victims -----------------------------------------------------------------

    def _victim(self, rid: str, draw: random.Random, length: int, new_tokens: int) -> Victim:
        """Run a prompt alone, twice: what is right.

        Where victims share a batch the prompt is one without near-ties.
        """
        margins = bool(self.plan.runners) and says_margins(self.cluster.release)
        for number in range(CLEAR_TRIES):
            prompt = random_prompt(draw, length)
            first = f"{rid}-reference-{number}"
            options = WITH_MARGIN if margins else None
            reference = self._alone(first, prompt, new_tokens, options)
            if not margins or margin(reference.decode.body) >= MARGIN:
                break
        again = self._alone(f"{rid}-reference-again", prompt, new_tokens)
        if reference.ids is None or reference.ids != again.ids:
            bodies = [f"{outcome.decode.body!s:.200}" for outcome in (reference, again)]
            raise Invalid(f"two runs of a prompt alone differ: {' and '.join(bodies)}")
        right = self._digests(reference.rid)
        if right != self._digests(again.rid):
            raise Invalid("two runs of the same prompt alone left different KV")
        return Victim(rid, Reference(prompt, new_tokens, reference.ids, right))

    def _alone(
        self,
        rid: str,
        prompt: Sequence[int],
        new_tokens: int,
        options: Mapping[str, object] | None = None,
    ) -> Outcome:
        return self.cluster.send(
            self.cluster.fast, prompt, rid, max_new_tokens=new_tokens, options=options
        ).wait(prefill=False)

    def _load_goes_on(
        self, victims: list[Victim], outcomes: list[Outcome], traffic: Traffic
    ) -> list[Victim]:
        """The same victims again and again until the link is quiet; adds their outcomes."""
        repeated: list[Victim] = []
        while traffic.quiet_s() < self._quiet_s:
            repeated += self._come_again(victims, outcomes)
            time.sleep(SAMPLE_S if outcomes[-1].refusal is None else REFUSED_S)
        return repeated

    def _refused_come_again(self, victims: list[Victim], outcomes: list[Outcome]) -> list[Victim]:
        """As a client does at a 503 with Retry-After, a bounded number of times; adds outcomes."""
        repeated: list[Victim] = []
        asked = victims
        for _ in range(REFUSED_TRIES):
            last = zip(asked, outcomes[-len(asked) :], strict=True)
            asked = [victim for victim, outcome in last if outcome.refusal is not None]
            if not asked:
                break
            time.sleep(REFUSED_S)
            repeated += self._come_again(asked, outcomes)
        return repeated

    def _come_again(self, victims: list[Victim], outcomes: list[Outcome]) -> list[Victim]:
        """The same victims, all at once, under names of their own; adds their outcomes."""
        again = [replace(victim, rid=f"{victim.rid}-{len(outcomes)}") for victim in victims]
        sent = [self._send(victim) for victim in again]
        outcomes += [one.wait(prefill=False) for one in sent]
        return again

    def _send(self, victim: Victim) -> Pending:
        return self.cluster.send(
            self.cluster.fast,
            victim.right.prompt,
            victim.rid,
            max_new_tokens=victim.right.new_tokens,
        )

    def _hold(self) -> AbstractContextManager[None]:
        """On a stalled link: the slow prefill's processes stand still inside."""
        return nullcontext() if self._link.mode == "shaped" else _Stopped(self.cluster.slow)

    def _wait_admitted(self, victim: Pending) -> None:
        """While stalled, wait until stock has let the victim in, or a while if it holds."""
        if self._link.mode == "shaped":
            return
        deadline = time.monotonic() + STALL_S
        while time.monotonic() < deadline and Kind.ADMITTED not in self._events(victim.rid):
            time.sleep(0.02)

    @property
    def _quiet_s(self) -> float:
        """Nothing sent for so long: the transfer is over."""
        return max(1.5, 18 / self._link.rate_mbit) if self._link.rate_mbit else 1.5

    def _wait_quiet(self, traffic: Traffic) -> None:
        drain_s = 30.0
        if self._link.rate_mbit:
            drain_s += 2 * self.plan.late_bytes * 8e-6 / self._link.rate_mbit
        deadline = time.monotonic() + drain_s
        while traffic.quiet_s() < self._quiet_s:
            if time.monotonic() > deadline:
                raise Invalid(f"the transfer did not end within {drain_s:.0f} s")
            time.sleep(SAMPLE_S)

    def _until(self, holds: Callable[[], bool], otherwise: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                raise Invalid(f"{otherwise} within {timeout_s:.0f} s")
            time.sleep(0.01)

    # -- judging -----------------------------------------------------------------------

    def _judge(
        self,
        played: Played,
        victims: list[Victim],
        outcomes: list[Outcome],
        ended: list[Outcome],
    ) -> Round:
        verdicts = [self._verdict(*pair) for pair in zip(victims, outcomes, strict=True)]
        events = [self._events(victim.rid).get(Kind.ADMITTED) for victim in victims]
        waited = [event for event in events[: len(self.plan.victims)] if event is not None]
        first = min((event["time"] for event in waited), default=None)
        owned = {
            slot
            for outcome in ended
            for slot in self._events(outcome.rid).get(Kind.EXPOSED, {}).get("slots", ())
        }
        slots = [slot for event in events if event is not None for slot in event["slots"]]
        return Round(
            round=played.number,
            tries=played.attempt,
            sent_at_end=played.sent_at_end,
            sent_after_end=played.traffic.sent() - played.sent_at_end,
            sent_after_admission=played.traffic.sent_after(first) if first else None,
            victim_wait_s=round(first - played.sending, 2) if first else None,
            slots_shared=sum(slot in owned for slot in slots),
            victims=len(victims),
            corrupted_pages=sum(len(verdict.corrupted) for verdict in verdicts),
            wrong_ids=sum(verdict.wrong_ids for verdict in verdicts),
            wrong_outputs=sum(verdict.wrong_ids > 0 for verdict in verdicts),
            refused=sum(outcome.refusal is not None for outcome in outcomes),
            aborted=sum(outcome.ids is None for outcome in ended),
            lost=0,
            clean_afterwards=False,
            corrupted="; ".join(ranges(verdict.corrupted) for verdict in verdicts),
            ends=[f"{outcome.refusal or outcome.decode.body!s:.300}" for outcome in ended],
            problems=[problem for verdict in verdicts for problem in verdict.problems],
        )

    def _verdict(self, victim: Victim, outcome: Outcome) -> Verdict:
        if outcome.refusal is not None:
            return Verdict([], 0, [])
        problems = []
        seen = self.cluster.observations.digests(outcome.rid)
        if len(seen) < 2:  # at its admission and at its end
            problems.append(f"{outcome.rid} has {len(seen)} digests: {outcome.decode.body!s:.200}")
        corrupted = {
            i for digests in seen for i, d in enumerate(digests) if d != victim.right.digests[i]
        }
        if outcome.ids is None:
            problems.append(f"{outcome.rid} was not answered: {outcome.decode.body!s:.200}")
        wrong = differing(outcome.ids or [], victim.right.ids)
        return Verdict(sorted(corrupted), wrong, problems)

    def _digests(self, rid: str) -> list[int]:
        seen = self.cluster.observations.digests(rid)
        if not seen:
            raise Invalid(f"no KV digests of {rid}")
        return seen[-1]

    def _events(self, rid: str) -> dict[str, Event]:
        return self.cluster.observations.of(rid)


class _Stopped:
    """SIGSTOP on entry, SIGCONT on the way out whatever happens: of its RDMA devices, too, since
    this stands in for a link."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __enter__(self) -> None:
        self._server.signal(signal.SIGSTOP, nics=True)
        time.sleep(SETTLE_S)

    def __exit__(self, *_error: object) -> None:
        self._server.signal(signal.SIGCONT, nics=True)
