"""Random load, aborts, kills and stalls on one cluster: is everything right, and all back?

A set of prompts with known answers and KV digests runs through two prefill servers, several
at once.  Requests are aborted or hung up on at random moments; servers are stopped and
continued; prefill servers are killed and started again.  Then the load ends, everything
settles, and the decode server must have every slot back.
"""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.console import Progress
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import install
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
from sglang_scaling_fixes.lab.races.run import new_run_dir
from sglang_scaling_fixes.lab.servers import checkpoints
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import link
from sglang_scaling_fixes.lab.servers.pending import Outcome
from sglang_scaling_fixes.lab.servers.server import ANSWER_S, Server
from sglang_scaling_fixes.lab.verbs import Transport
from sglang_scaling_fixes.lab.verbs.build import prepare

FIXED_FLAGS = ("--plugin",)
RATE_MBIT = 48.0
PROMPTS = 12
PROMPT_TOKENS = (80, 420)
NEW_TOKENS = (12, 40)
NO_LOGPROBS = ("0.5.12",)
"""Releases whose tokenizer manager ends at a request for top log-probabilities in PD."""
CLIENTS = 5
ABORTED, HUNG_UP = 0.2, 0.1  # shares of the requests
GIVE_UP_S = (0.0, 2.5)
STALL_EVERY_S, STALL_S = (6.0, 20.0), (1.0, 15.0)
KILL_EVERY_S = (15.0, 45.0)
WAITING_S = 60  # decode's own time-out: below ANSWER_S, so that no answer is a hang
SETTLE_S = 180.0
EVENTS_S = 5.0
_STEADY_S = 1.0


def run(
    release: str,
    minutes: float,
    seed: int = 1,
    progress: Progress = print,
    *,
    stock: bool = False,
    transport: Transport = "tcp",
) -> dict[str, Any]:
    """Soak one cluster of `release`; `stock` without the plugin, as the control."""
    if release in NO_LOGPROBS:
        raise LabError(
            f"release {release!r}: its server dies of a request for log-probabilities, which "
            "the soak needs for its references; take 0.5.23"
        )
    began = time.monotonic()
    environment = install(release, progress)
    prepare(transport, progress)
    checkpoint = checkpoints.llama(environment)
    run_dir = new_run_dir(release, "soak-stock" if stock else "soak")
    with link(RATE_MBIT, run_dir) as way:
        progress(f"starting 2 prefill servers and 1 decode server ({way.reason})")
        with Cluster(environment, checkpoint, way, run_dir, _spec(stock, transport)) as cluster:
            progress(f"ready after {cluster.ready_s:.0f} s")
            soak = Soak(cluster, seed, progress)
            soak.load(60 * minutes)
            found = soak.settle()
    return {
        "release": release,
        "minutes": minutes,
        "seed": seed,
        "half": "stock" if stock else "fixed",
        "transport": transport,
        "run_dir": str(run_dir),
        "link": way.reason,
        **found,
        "seconds": round(time.monotonic() - began, 1),
    }


def _spec(stock: bool, transport: Transport) -> ClusterSpec:
    return ClusterSpec(
        transport=transport,
        flags=() if stock else FIXED_FLAGS,
        prefill_flags=("--prefill-max-requests", "1"),
        decode_env={"SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(WAITING_S)},
    )


def passed(result: dict[str, Any]) -> bool:
    """Nothing corrupted, nothing leaked, every request answered one way or the other."""
    return not result["decode_crashed"] and not any(
        result[name]
        for name in (
            "corrupted_outputs",
            "corrupted_kv",
            "leaked_tokens",
            "leaked_metadata",
            "held_tokens",
            "unanswered",
        )
    )


class Soak:
    """One cluster under load."""

    def __init__(self, cluster: Cluster, seed: int, progress: Progress) -> None:
        self._cluster = cluster
        self._seed = seed
        self._say = progress
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._up = {server.name: server for server in (cluster.fast, cluster.slow)}
        self._counts: Counter[str] = Counter()
        self._texts: Counter[str] = Counter()
        self._unclear: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._later: list[tuple[Reference, str]] = []
        self._errors: list[BaseException] = []
        self._known = self._references()
        self._start = self._steady_pool()

    # -- references --------------------------------------------------------------------

    def _references(self) -> list[Reference]:
        draw = random.Random(f"{self._seed}-prompts")
        known: list[Reference] = []
        for tries in range(20 * PROMPTS):
            length, new = draw.randint(*PROMPT_TOKENS), draw.randint(*NEW_TOKENS)
            prompt = random_prompt(draw, length)
            one = self._reference(f"reference-{tries}", prompt, new)
            if one is not None:
                known.append(one)
            if len(known) == PROMPTS:
                return known
        raise LabError(f"only {len(known)} of {20 * PROMPTS} prompts have a clear answer")

    def _reference(self, rid: str, prompt: list[int], new_tokens: int) -> Reference | None:
        """What the prompt gives alone, through the fast prefill; None if it is a near-tie."""
        outcome = self._cluster.send(
            self._cluster.fast,
            prompt,
            rid,
            max_new_tokens=new_tokens,
            options=WITH_MARGIN,
        ).wait()
        digests = self._cluster.observations.digests(rid)
        if outcome.ids is None or not digests:
            raise LabError(f"a prompt alone was not answered: {outcome.decode.body!s:.300}")
        self._cluster.observations.forget(rid)
        if margin(outcome.decode.body) < MARGIN:
            return None
        return Reference(prompt, new_tokens, outcome.ids, digests[-1])

    def _steady_pool(self) -> Event:
        """The free slots once they have not changed for a second."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            pool = self._cluster.observations.pool()
            if pool is not None and time.time() - pool["time"] > _STEADY_S:
                return pool
            time.sleep(0.1)
        raise LabError("the decode server's free slots never stood still")

    # -- load ----------------------------------------------------------------------------

    def load(self, seconds: float) -> None:
        """Clients and chaos, side by side, for so long."""
        self._say(f"load for {seconds:.0f} s: {CLIENTS} clients, {PROMPTS} prompts")
        ends = time.monotonic() + seconds
        jobs: list[Callable[[], None]] = [self._stalls, self._kills]
        jobs += [self._client_job(number) for number in range(CLIENTS)]
        threads = [threading.Thread(target=self._run_job, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        while time.monotonic() < ends and not self._over.is_set():
            if not self._cluster.decode.process.alive:
                self._say("the decode server has died")
                break
            time.sleep(0.5)
        self._over.set()
        self._say("load ends; settling")
        for thread in threads:
            thread.join(ANSWER_S + STALL_S[1] + 120)
        if self._errors:
            raise self._errors[0]
        if any(thread.is_alive() for thread in threads):
            raise LabError("a client or a restart of the soak did not come to an end")

    def _run_job(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._errors.append(error)
            self._over.set()

    def _client_job(self, number: int) -> Callable[[], None]:
        return lambda: self._client(number)

    def _client(self, number: int) -> None:
        draw = random.Random(f"{self._seed}-client-{number}")
        sent = 0
        while not self._over.is_set():
            prefill = self._pick(draw)
            if prefill is None:
                self._over.wait(0.2)
                continue
            sent += 1
            self._request(draw, prefill, f"client-{number}-{sent:05d}.")

    def _pick(self, draw: random.Random) -> Server | None:
        """A prefill server that is up as far as a router knows."""
        with self._lock:
            up = sorted(self._up)
            return self._up[draw.choice(up)] if up else None

    def _request(self, draw: random.Random, prefill: Server, rid: str) -> None:
        known = draw.choice(self._known)
        fate, patience = draw.random(), draw.uniform(*GIVE_UP_S)
        with self._lock:
            pending = self._cluster.send(
                prefill, known.prompt, rid, max_new_tokens=known.new_tokens
            )
            self._counts["requests"] += 1
        aborted, hung_up = fate < ABORTED, ABORTED <= fate < ABORTED + HUNG_UP
        if aborted or hung_up:
            time.sleep(patience)
        if aborted:
            answer = self._cluster.decode.post("/abort_request", {"rid": rid}, timeout_s=60.0)
            self._count("aborts", int(answer.status == 200))
        elif hung_up:
            pending.hang_up()
        outcome = pending.wait(prefill=False)
        if hung_up and outcome.ids is None:
            self._count("hung_up")
        else:
            self._judge(known, outcome, aborted)
        if self._ended(rid):
            self._check_memory(known, rid)
        else:
            with self._lock:
                self._later.append((known, rid))

    def _judge(self, known: Reference, outcome: Outcome, aborted: bool) -> None:
        if outcome.ids is not None:
            wrong = differing(outcome.ids, known.ids)
            self._count("corrupted_outputs" if wrong else "right")
            if wrong:
                self._wrong.append(f"{outcome.rid} has {wrong} wrong ids")
        elif (words := outcome.refusal) is not None:
            self._count("aborted" if aborted else "refused")
            if not aborted:
                with self._lock:
                    self._texts[normal(words)] += 1
        else:
            self._count("unanswered")
            with self._lock:
                self._unclear[f"{outcome.decode.status} {outcome.decode.body!s:.200}"] += 1

    def _check_memory(self, known: Reference, rid: str) -> None:
        """The digests of whatever the request owned, from its admission to its end."""
        for digests in self._cluster.observations.digests(rid):
            wrong = sum(a != b for a, b in zip(digests, known.digests, strict=True))
            self._count("digested")
            if wrong:
                self._count("corrupted_kv", wrong)
                self._wrong.append(f"{rid} had {wrong} wrong KV slots")
        self._cluster.observations.forget(rid)

    def _ended(self, rid: str) -> bool:
        """Whether the decode server has given up the request's memory; waits a moment for it."""
        deadline = time.monotonic() + EVENTS_S
        while time.monotonic() < deadline:
            events = self._cluster.observations.of(rid)
            if Kind.FINAL in events or Kind.ADMITTED not in events:
                return Kind.FINAL in events
            time.sleep(0.02)
        return False

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    # -- chaos ---------------------------------------------------------------------------

    def _stalls(self) -> None:
        draw = random.Random(f"{self._seed}-stalls")
        servers = [self._cluster.decode, self._cluster.fast, self._cluster.slow]
        while not self._over.wait(draw.uniform(*STALL_EVERY_S)):
            server, seconds = draw.choice(servers), draw.uniform(*STALL_S)
            with self._lock:
                if server.role == "prefill" and server.name not in self._up:
                    continue
            self._say(f"stall {server.name} for {seconds:.1f} s")
            self._count("stalls")
            server.signal(signal.SIGSTOP)
            try:
                self._over.wait(seconds)
            finally:
                server.signal(signal.SIGCONT)

    def _kills(self) -> None:
        draw = random.Random(f"{self._seed}-kills")
        servers = [self._cluster.slow, self._cluster.fast]
        while not self._over.wait(draw.uniform(*KILL_EVERY_S)):
            server = draw.choice(servers)
            self._say(f"kill {server.name}")
            self._count("kills")
            server.signal(signal.SIGKILL)
            time.sleep(draw.uniform(0.0, 2.0))  # until a router has noticed
            with self._lock:
                del self._up[server.name]
            server.restart()
            server.wait_ready()
            with self._lock:
                self._up[server.name] = server
            self._say(f"{server.name} is back")

    # -- the end ---------------------------------------------------------------------------

    def settle(self) -> dict[str, Any]:
        """Wait until all slots are back, or a while; then the result."""
        began = time.monotonic()
        report: dict[str, Any] = {}
        leaked = {"tokens": 0, "metadata": 0}
        while self._cluster.decode.process.alive:
            report = self._report() or report
            pool = self._cluster.observations.pool() or self._start
            leaked = {kind: self._start[f"free_{kind}"] - pool[f"free_{kind}"] for kind in leaked}
            still = any(leaked.values()) or report.get("held_tokens", 0)
            if not still or time.monotonic() - began > SETTLE_S:
                break
            time.sleep(0.5)
        for known, rid in self._later:
            self._check_memory(known, rid)
        counts = {
            name: self._counts[name]
            for name in (
                "requests", "right", "aborted", "hung_up", "refused", "unanswered",
                "corrupted_outputs", "corrupted_kv", "digested", "aborts", "kills", "stalls",
            )
        }  # fmt: skip
        return {
            **counts,
            "leaked_tokens": leaked["tokens"],
            "leaked_metadata": leaked["metadata"],
            "held_tokens": report.get("held_tokens", 0),
            "fences": report.get("fences", 0),
            "frees_by_proof": report.get("frees", {}),
            "decode_crashed": not self._cluster.decode.process.alive,
            "refusals": dict(self._texts.most_common()),
            "unclear": dict(self._unclear.most_common()),
            "wrong": self._wrong[:50],
            "settle_s": round(time.monotonic() - began, 1),
            "plugin": report,
        }

    def _report(self) -> dict[str, Any] | None:
        """What the decode server's plugin says of itself; None if it does not answer."""
        body = self._cluster.decode.get("/server_info").body
        if not isinstance(body, dict):
            return None
        state = (body.get("internal_states") or [{}])[0]
        ours: dict[str, Any] = (state.get("sglang_scaling_fixes") or {}).get(
            "safe_reclaim_decode", {}
        )
        return ours


def normal(words: str) -> str:
    """An error text without what differs from request to request."""
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"client-\d+-\d+\.", "RID", words))[:300]
