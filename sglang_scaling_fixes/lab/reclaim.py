"""The abort race: does a late KV write land in memory that has a new owner?

One round, the same for stock and fixed:

1. the victim's prompt runs twice through the fast prefill: the reference;
2. the aborted request starts through the slow prefill, and once its KV is on the
   way, it is aborted on the decode server;
3. the victim's prompt comes again through the fast prefill.  Both do not fit, so that
   it must take the aborted request's slots, as soon as the decode server gives them;
4. the victim's slots and greedy tokens are compared with the reference.

A round whose transfer was not in flight when the abort came proves nothing; it is
repeated, a bounded number of times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_scaling_fixes.lab import model as lab_model
from sglang_scaling_fixes.lab.cluster import ANSWER_S, Cluster, Outcome, Pending
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import install, lab_home
from sglang_scaling_fixes.lab.link import Link, link

Progress = Callable[[str], None]

ABORTED_TOKENS = 1000  # prompt length of the request that is aborted
VICTIM_TOKENS = 900  # prompt length of the victim; both together exceed the pool
POOL_TOKENS = 1500
TRANSFER_BYTES = ABORTED_TOKENS * lab_model.KV_BYTES_PER_TOKEN
IN_FLIGHT_SHARE = 0.75  # the abort must come before this share of the transfer is sent
TRIES_PER_ROUND = 3
RUNS_KEPT = 20
STALL_S = 4.0  # below the two missed heartbeats (10 s) that fail a stopped prefill
SETTLE_S = 0.05  # bytes already in socket buffers arrive within this
_SAMPLE_S = 0.05
_STALL_SAMPLE_S = 0.0005


@dataclass(frozen=True)
class Scenario:
    """What the race needs; rates in megabits per second, sizes in bytes, times in seconds."""

    name: str
    rate_mbit: float
    victim_new_tokens: int
    start_bytes: int  # the abort comes once this much of the transfer has been sent
    quiet_s: float  # the transfer is over once nothing was sent for so long
    drain_s: float  # give up waiting for that
    stallable: bool  # whether stopping processes can stand in for the slow link


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("abort", 48, 100, 1_500_000, 1.5, 60, stallable=True),
        Scenario("abort-slow-link", 6, 100, 2_000_000, 3.0, 120, stallable=False),
    )
}


@dataclass
class Round:
    """One valid round as it is reported."""

    round: int
    tries: int
    sent_at_abort: int  # bytes of the transfer sent when the abort came
    sent_after_admission: int | None  # bytes sent after the victim was admitted
    victim_wait_s: float | None  # from the victim's sending to its admission
    slots_shared: int  # slots of the victim that were the aborted request's
    corrupted_pages: int
    wrong_ids: int  # generated ids that differ from the reference
    aborted: int
    clean_afterwards: bool  # the victim's prompt, run alone once more, is right
    corrupted: str  # the corrupted positions of the prompt, as ranges
    problems: list[str] = field(default_factory=list)


def run(
    release: str,
    scenario: str = "abort",
    seed: int = 1,
    rounds: int = 3,
    progress: Progress = print,
    *,
    stock_only: bool = False,
    fixed_only: bool = False,
    shaped: bool = True,
) -> dict[str, Any]:
    """Race stock and fixed servers of `release` on the same schedule; counts per half.

    A half that was not asked for is None.  `shaped=False` takes the stalled link even
    where a shaped one is possible.
    """
    plan = SCENARIOS.get(scenario)
    if plan is None:
        raise LabError(f"unknown scenario {scenario!r}; there are: {', '.join(SCENARIOS)}")
    if rounds < 1:
        raise LabError(f"rounds={rounds}: at least 1 is needed")
    if stock_only and fixed_only:
        raise LabError("stock_only and fixed_only exclude each other")
    began = time.monotonic()
    environment = install(release, progress)
    checkpoint = lab_model.checkpoint(environment)
    run_dir = _new_run_dir(release, plan)
    result: dict[str, Any] = {
        "release": release,
        "scenario": plan.name,
        "seed": seed,
        "run_dir": str(run_dir),
        "stock": None,
        "fixed": None,
        "ready_s": {},
    }
    details: dict[str, Any] = {}
    for half, flags in (("stock", ()), ("fixed", ("--plugin",))):
        if (stock_only and half == "fixed") or (fixed_only and half == "stock"):
            continue
        tell = _prefixed(progress, half)
        folder = run_dir / half
        folder.mkdir()
        with link(plan.rate_mbit, folder, shaped=shaped) as way:
            if way.mode == "stalled" and not plan.stallable:
                raise LabError(
                    f"scenario {plan.name} needs a shaped link, and there is none: {way.reason}."
                    " Run as root with iproute2 installed, or take scenario abort"
                )
            result["link"] = way.reason
            tell(f"starting 2 prefill servers and 1 decode server ({way.reason})")
            with Cluster(
                environment,
                checkpoint,
                way,
                folder,
                extra_flags=flags,
                max_total_tokens=POOL_TOKENS,
            ) as cluster:
                tell(f"ready after {cluster.ready_s:.0f} s")
                counts, details[half] = _half(Race(cluster, way, plan), seed, rounds, tell)
                result[half] = counts
                result["ready_s"][half] = round(cluster.ready_s, 1)
    result["rounds"] = details
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def _new_run_dir(release: str, plan: Scenario) -> Path:
    """A fresh folder for logs; the oldest ones go."""
    runs = lab_home() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for old in sorted(runs.iterdir())[: -RUNS_KEPT + 1]:
        shutil.rmtree(old, ignore_errors=True)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{release}-{plan.name}-{os.getpid()}"
    run_dir = runs / name
    run_dir.mkdir()
    return run_dir


def _prefixed(progress: Progress, half: str) -> Progress:
    return lambda line: progress(f"{half}: {line}")


def _half(
    race: Race, seed: int, rounds: int, progress: Progress
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    done = []
    for number in range(1, rounds + 1):
        reasons: list[str] = []
        for attempt in range(1, TRIES_PER_ROUND + 1):
            try:
                outcome = race.round(number, attempt, seed)
            except Invalid as reason:
                progress(f"round {number} does not count: {reason}")
                reasons.append(str(reason))
                race.settle()
                continue
            done.append(outcome)
            progress(
                f"round {number}: {outcome.corrupted_pages} of {VICTIM_TOKENS} KV slots"
                f" corrupted, {outcome.wrong_ids} of {race.plan.victim_new_tokens} ids wrong"
            )
            break
        else:
            raise LabError(
                f"round {number} was not valid in {TRIES_PER_ROUND} tries ({reasons[-1]});"
                f" logs in {race.cluster.decode.process.log.parent}"
            )
    counts = {
        "requests": race.cluster.requests,
        "aborted": sum(item.aborted for item in done),
        "victims": len(done),
        "corrupted_pages": sum(item.corrupted_pages for item in done),
        "wrong_outputs": sum(item.wrong_ids > 0 for item in done),
    }
    return counts, [asdict(item) for item in done]


@dataclass(frozen=True)
class Played:
    """What was measured while a round was played."""

    number: int
    attempt: int
    sent_at_abort: int
    sending: float  # when the victim was sent, seconds since the epoch
    traffic: Traffic
    right: list[int]  # the reference's digests


class Invalid(Exception):
    """The round did not race, or its reference is no reference."""


class Race:
    """Plays rounds on one cluster."""

    def __init__(self, cluster: Cluster, way: Link, plan: Scenario) -> None:
        self.cluster = cluster
        self.plan = plan
        self._link = way

    def round(self, number: int, attempt: int, seed: int) -> Round:
        """Play one round; `Invalid` if it proves nothing."""
        draw = random.Random(f"{seed}-{number}-{attempt}")
        aborted_prompt = _prompt(draw, ABORTED_TOKENS)
        victim_prompt = _prompt(draw, VICTIM_TOKENS)
        name = f"{self.plan.name}-{number}-{attempt}"
        reference = self._alone(f"{name}-reference-1", victim_prompt)
        again = self._alone(f"{name}-reference-2", victim_prompt)
        if reference.ids is None or reference.ids != again.ids:
            raise Invalid(f"two runs of a prompt alone differ: {reference.decode.body!s:.200}")
        right = self._digests(reference.rid)
        if right != self._digests(again.rid):
            raise Invalid("two runs of the same prompt alone left different KV")

        hold = self._hold()
        with Traffic(self._link) as traffic:
            late = self.cluster.send(
                self.cluster.slow, aborted_prompt, f"{name}-aborted", max_new_tokens=8
            )
            self._wait_in_flight(traffic, late)
            with hold:
                sent_at_abort = traffic.sent()
                if sent_at_abort > IN_FLIGHT_SHARE * TRANSFER_BYTES:
                    raise Invalid(f"{sent_at_abort} bytes were sent before the abort came")
                self.cluster.abort(late.rid)
                sending = time.time()
                pending = self.cluster.send(
                    self.cluster.fast,
                    victim_prompt,
                    f"{name}-victim",
                    max_new_tokens=self.plan.victim_new_tokens,
                )
                self._wait_admitted(pending)
            if not traffic.moved_since(sent_at_abort, within_s=5.0):
                raise Invalid("nothing was sent after the abort")
            victim = pending.wait()
            self._wait_quiet(traffic)
        late_outcome = late.wait(timeout_s=ANSWER_S)
        if late_outcome.ids is not None:
            raise Invalid("the abort came too late: the request completed")
        after = self._alone(f"{name}-afterwards", victim_prompt)
        return self._judge(
            Played(number, attempt, sent_at_abort, sending, traffic, right),
            reference=reference,
            victim=victim,
            late=late_outcome,
            after=after,
        )

    def settle(self) -> None:
        """After a round that was broken off: let what it left on the link drain."""
        with suppress(Invalid), Traffic(self._link) as traffic:
            self._wait_quiet(traffic)

    def _judge(
        self, played: Played, *, reference: Outcome, victim: Outcome, late: Outcome, after: Outcome
    ) -> Round:
        problems = []
        events = self._events(victim.rid)
        admitted, final = events.get("admitted"), events.get("final")
        corrupted: set[int] = set()
        for event in (admitted, final):
            if event is None or event["digests"] is None:
                problems.append(f"the victim has no digests: {victim.decode.body!s:.200}")
                continue
            corrupted |= {i for i, d in enumerate(event["digests"]) if d != played.right[i]}
        ids, expected = victim.ids or [], reference.ids or []
        if victim.ids is None:
            problems.append(f"the victim was not answered: {victim.decode.body!s:.200}")
        wrong = sum(
            i >= len(ids) or i >= len(expected) or ids[i] != expected[i]
            for i in range(max(len(ids), len(expected)))
        )
        owned = self._events(late.rid).get("final", {}).get("slots", [])
        return Round(
            round=played.number,
            tries=played.attempt,
            sent_at_abort=played.sent_at_abort,
            sent_after_admission=played.traffic.sent_after(admitted["time"]) if admitted else None,
            victim_wait_s=round(admitted["time"] - played.sending, 2) if admitted else None,
            slots_shared=len(set(owned) & set(admitted["slots"])) if admitted else 0,
            corrupted_pages=len(corrupted),
            wrong_ids=wrong,
            aborted=int(late.aborted),
            clean_afterwards=after.ids == reference.ids,
            corrupted=_ranges(sorted(corrupted)),
            problems=problems,
        )

    def _alone(self, rid: str, prompt: Sequence[int]) -> Outcome:
        pending = self.cluster.send(
            self.cluster.fast, prompt, rid, max_new_tokens=self.plan.victim_new_tokens
        )
        return pending.wait()

    def _wait_in_flight(self, traffic: Traffic, late: Pending) -> None:
        step = _SAMPLE_S if self._link.mode == "shaped" else _STALL_SAMPLE_S
        deadline = time.monotonic() + ANSWER_S
        while traffic.sent() < self.plan.start_bytes:
            if late.done("decode") or late.done("prefill"):
                outcome = late.wait(timeout_s=1.0)
                raise Invalid(f"the request ended before the abort: {outcome.decode.body!s:.200}")
            if time.monotonic() > deadline:
                raise Invalid(f"no transfer within {ANSWER_S:.0f} s")
            time.sleep(step)

    def _hold(self) -> AbstractContextManager[None]:
        """On a stalled link: the slow prefill's processes stand still inside."""
        if self._link.mode == "shaped":
            return nullcontext()
        return _Stopped(self.cluster.slow.process.pids())

    def _wait_admitted(self, victim: Pending) -> None:
        """While stalled, wait until stock has let the victim in, or a while if it holds."""
        if self._link.mode == "shaped":
            return
        deadline = time.monotonic() + STALL_S
        while time.monotonic() < deadline and "admitted" not in self._events(victim.rid):
            time.sleep(0.02)

    def _wait_quiet(self, traffic: Traffic) -> None:
        deadline = time.monotonic() + self.plan.drain_s
        while traffic.quiet_s() < self.plan.quiet_s:
            if time.monotonic() > deadline:
                raise Invalid(f"the transfer did not end within {self.plan.drain_s:.0f} s")
            time.sleep(_SAMPLE_S)

    def _digests(self, rid: str) -> list[int]:
        event = self._events(rid).get("final")
        if event is None or event["digests"] is None:
            raise Invalid(f"no KV digests of {rid}")
        digests: list[int] = event["digests"]
        return digests

    def _events(self, rid: str) -> dict[str, dict[str, Any]]:
        """The observer's events of one request, by kind."""
        found = {}
        needle = f'"rid": "{rid}"'
        path = self.cluster.observations
        if path.exists():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    if needle in line and line.endswith("\n"):
                        event = json.loads(line)
                        found[event["event"]] = event
        return found


class _Stopped:
    """SIGSTOP on entry, SIGCONT on the way out whatever happens."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids

    def __enter__(self) -> None:
        self._signal(signal.SIGSTOP)
        time.sleep(SETTLE_S)

    def __exit__(self, *_error: object) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


class Traffic:
    """Samples the link's byte counter, in a thread, from entry on."""

    def __init__(self, way: Link) -> None:
        self._link = way
        self._base = way.sent_bytes()
        self._samples = [(time.time(), 0)]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            self._samples.append((time.time(), self.sent()))

    def sent(self) -> int:
        """Bytes sent since entry."""
        return self._link.sent_bytes() - self._base

    def moved_since(self, sent: int, within_s: float) -> bool:
        """Whether more than `sent` has been sent, waiting a while for it."""
        deadline = time.monotonic() + within_s
        while self.sent() <= sent:
            if time.monotonic() > deadline:
                return False
            time.sleep(_SAMPLE_S)
        return True

    def sent_after(self, moment: float) -> int:
        """Bytes sent after `moment` (seconds since the epoch) as far as sampled."""
        before = max((n for t, n in self._samples if t <= moment), default=0)
        return self._samples[-1][1] - before

    def quiet_s(self, noise_bytes: int = 20_000) -> float:
        """For how long nothing but chatter (heartbeats) has been sent."""
        now, total = self._samples[-1]
        since = next((t for t, n in reversed(self._samples) if total - n > noise_bytes), None)
        return now - (self._samples[0][0] if since is None else since)


def _prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(3, lab_model.VOCAB) for _ in range(length)]


def _ranges(positions: Sequence[int]) -> str:
    """`0-3,7` for [0, 1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)
