"""A deterministic little world around the real ledgers.

Decode ranks (one `DecodeLedger` each), prefill ranks (one `PrefillLedger` each, or
stock without the plugin), FIFO channels, decode slots and writes on the wire. It
models of stock SGLang what the ledgers must survive:

* prefill keys everything but its senders by room: `status`, and `infos`, whose
  destinations the last delivered metadata of a decode rank replaces;
* a worker reads the destinations when it posts, not when its chunk was queued;
* a failed write may still land, and so may the writes of a dead process.

An event is a line of text (`"deliver d0>p0"`); `enabled` lists what can happen next,
`step` does it. What happens is logged in `said`. Nothing here knows a clock: every
`tick` is later than any backoff.

    names      r0 request   d0 decode rank   p0 prefill rank   d0-1 lease
               x0 a decode without the plugin: its slots are its own affair
    channels   d0>p0  metadata with Bind, Abort, Hello     (one socket, one order)
               p0>d0  HelloAck, AbortAck, AttemptEnded     (our reply socket)
               p0*d0  stock's success status, tagged     (stock's socket)

Exploring needs many worlds, so a clone shares everything with its origin. What an
event changes is replaced, never changed in place; ranks are the exception, they hold
real ledgers and are pickled by whoever is about to change them (`_decode`, `_prefill`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.reclaim.rules.coverage import Coverage, Extent
from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure, ExposureState
from sglang_scaling_fixes.reclaim.rules.forgotten import Forgotten
from sglang_scaling_fixes.reclaim.rules.prefill_actions import (
    Action,
    FailRoom,
    ForgetRoom,
    SendEnded,
    ends_room,
)
from sglang_scaling_fixes.reclaim.rules.prefill_ledger import Delivery, PrefillLedger
from sglang_scaling_fixes.reclaim.rules.reasons import why_held
from sglang_scaling_fixes.reclaim.rules.types import Verdict


class Violation(AssertionError):
    """The invariant does not hold. The text says what was reachable."""


@dataclass(frozen=True)
class Config:
    """What exists, how often things may go wrong, and which rule is switched off."""

    rooms: tuple[int, ...] = (7,)
    """One per request, in the order they may be exposed."""
    chunks: int = 1
    decodes: int = 1
    prefills: int = 1
    plugged: tuple[bool, ...] = (True, True)
    """Which prefill ranks run safe reclaim."""
    slots: int = 2
    """Per decode rank; a request takes one of each."""
    greeted: bool = True
    """Decode knows who speaks safe reclaim before its first request."""
    bare: tuple[int, ...] = ()
    """Requests of a decode without the plugin (x0) at the same prefill ranks."""
    memory: int = 65536
    """Of both ledgers."""
    forgetful: bool = False
    """Prefill remembers nothing that has ended, and one attempt whose request has not come."""
    late_arrival: bool = False
    """A request reaches prefill at a moment of its own, not when decode exposes it."""
    split_take: bool = False
    """A worker takes a chunk and reads its destinations at two moments."""
    split_end: bool = False
    """And it reports success at another than it goes for its next chunk."""
    split_bind: bool = False
    """Stock may lag behind the ledger's verdict on metadata (another thread runs)."""
    split_forget: bool = False
    """And the adapter, which makes stock forget the room, as well."""
    split_clear: bool = False
    """Stock's clear and the ledger's `retire` are two steps (another thread runs)."""
    split_made: bool = False
    """Stock's sender and the ledger's `sender_made` are two steps, too."""
    split_fail: bool = False
    """Stock may hear late of a room the ledger fails (another thread runs)."""
    split_admit: bool = False
    """Decode's stock may lag behind the ledger's verdict on a success."""
    helpers: bool = False
    """Writes are helper tasks; a chunk ends at the first failed one (up to 0.5.18)."""
    failed_is_final: bool = True
    """Stock never revives a failed room (0.5.13 and later)."""
    shrugs: bool = False
    """Stock takes no notice of a failed write (it does of most) and reports success."""
    foreign: bool = False
    """Also call it a violation when one request's KV lands in another's slots."""

    lose: int = 0
    dup: int = 0
    swap: int = 0
    tick: int = 0
    fail: int = 0
    crash: int = 0
    fence: int = 0
    restart: int = 0
    abort: int = 0
    drop: int = 0
    short: int = 0
    """Prefill replaces a request's prompt by a placeholder of one chunk."""
    skip: int = 0
    """A worker passes over a chunk that is not the last, and reports success in the end."""
    reject: int = 0
    """Prefill rejects a request that reaches it: it never has a sender (with `late_arrival`)."""

    gate: bool = True
    leases: bool = True
    poison: bool = True
    marks: bool = True
    masks: bool = True
    numbered: bool = True
    tombstones: bool = True
    """What prefill has forgotten it does not call unknown, and does not take again."""
    covers: bool = True
    """A success leaves only if it covers what was exposed."""
    stops: bool = True
    """A fence stops what was posted. Off: it only says so."""
    tells: bool = True
    """Prefill tells decode that it ended a request. Off: decode says that it reads none."""
    patient: bool = True
    """It tells so when nothing of it is being written. Off: at once."""
    remembers: bool = True
    """It knows to whom a success has left. Off: it tells of every end."""
    weighs: bool = True
    """Decode weighs an ending. Off: any that came before the owner gave up is proof."""


BUDGETED = (
    *("lose", "dup", "swap", "tick", "fail", "crash", "fence", "restart", "abort", "drop"),
    *("short", "skip", "reject"),
)


class Unpoisoned(PrefillLedger):
    """Negative control: a failed write counts as done, as in stock up to 0.5.21."""

    def failed(self, attempt: Attempt, reason: str) -> list[Action]:
        return []


class Amnesic(Forgotten):
    """Negative control: forgotten means unknown."""

    def poisoned(self, lease: str) -> str:
        return ""

    def refuses(self, lease: str) -> bool:
        return False


class Hasty(PrefillLedger):
    """Negative control: an ending is told while a chunk is still being written."""

    def stopped(self, sender: Hashable, room: int, now: float, why: str) -> list[Action]:
        said = super().stopped(sender, room, now, why)
        if (attempt := self._senders.get(sender)) is not None:
            said += [
                SendEnded(*attempt.bindings[lease], lease, "drained", why)
                for lease in attempt.untold
            ]
            attempt.untold = ()
        return said


class Forgetful(PrefillLedger):
    """Negative control: a success that has left is not remembered."""

    def success_leaves(self, attempt: Attempt, to: str, sends_kv: Callable[[str], bool]) -> bool:
        before = attempt.untold
        leaves = super().success_leaves(attempt, to, sends_kv)
        attempt.untold, attempt.reported = before, False
        return leaves


class Gullible(DecodeLedger):
    """Negative control: any ending that came while the owner waited is proof."""

    def give_up(self, exposure: Exposure, now: float, *, success_seen: bool = False) -> None:
        for writer in exposure.writers.values():
            writer.reported |= writer.ended is not None
        super().give_up(exposure, now, success_seen=success_seen)


class Credulous(DecodeLedger):
    """Negative control: whoever sends a HelloAck is taken for who got the destinations."""

    def _served_before(self, rank: str, incarnation: str, seq: int) -> None:
        for exposure in self.exposures():
            writer = exposure.writers[rank]
            writer.incarnation = writer.incarnation or incarnation


class Msg(NamedTuple):
    """One message. Unused fields stay empty."""

    kind: str
    """hello, hello_ack, meta, abort, abort_ack, attempt_ended or success."""
    lease: str = ""
    room: int = -1
    incarnation: str = ""
    """Whose word it is; in destinations, whom they are meant for."""
    verdict: Verdict = cast(Verdict, "")
    slot: int = -1
    epoch: int = 0
    """Of the decode memory the address belongs to."""
    attempt: str = ""
    """What the metadata of all decode ranks for one attempt share (`Exposure.attempt_id`)."""
    seq: int = 0
    """Of a Hello and of the HelloAck that answers it."""

    def __str__(self) -> str:
        return f"{self.kind}({' '.join(filter(None, (self.lease, self.verdict)))})"


class Write(NamedTuple):
    """Bytes posted for a destination: still in flight, or already failed."""

    decode: str
    lease: str
    slot: int
    epoch: int
    prefill: str
    life: int
    request: int
    chunk: int
    failed: bool = False
    whole: bool = True
    """It carries the KV of the request's prompt, not that of a placeholder."""

    @property
    def name(self) -> str:
        return f"{self.prefill}{'abcd'[self.life]}/{self.lease}/r{self.request}.{self.chunk}"


@dataclass
class Chunk:
    request: int
    room: int
    n: int
    last: bool
    attempt: Attempt | None
    posted: bool = False
    failed: bool = False
    reported: bool = False


@dataclass
class Decode:
    name: str
    ledger: DecodeLedger
    slots: list[str | None]
    life: int = 0
    receivers: dict[int, tuple[int, set[str]]] = field(default_factory=dict)
    """room -> (request, prefill ranks that reported success): stock's tracker."""
    exposures: dict[int, str] = field(default_factory=dict)
    """request -> its lease, until its slots are free."""
    failed: frozenset[int] = frozenset()
    """Rooms that stock was told have failed."""
    admitted: tuple[tuple[str, int], ...] = ()
    """Successes (prefill rank, room) let through that stock has not counted yet."""
    epoch: int = 0
    """The oldest engine that still receives: addresses that name one before reach nothing."""
    base: int = 0
    """Engines that decodes had at this address before."""
    number: int = 0
    blob: bytes = b""

    @property
    def engine(self) -> int:
        """What destinations name that are sent now."""
        return self.base + self.ledger.engine

    def exposure(self, request: int) -> Exposure:
        found = self.ledger.find(self.exposures[request])
        assert found is not None
        return found


@dataclass
class Prefill:
    name: str
    ledger: PrefillLedger | None
    life: int = 0
    status: dict[int, str] = field(default_factory=dict)
    infos: dict[int, dict[str, Msg]] = field(default_factory=dict)
    """room -> decode rank -> its destinations."""
    senders: dict[int, int] = field(default_factory=dict)
    """request -> chunks it has queued, while its sender lives."""
    placeholders: frozenset[int] = frozenset()
    """Requests whose prompt was replaced by one of a single token."""
    queue: list[Chunk] = field(default_factory=list)
    hand: Chunk | None = None
    deferred: list[tuple[str, Msg]] = field(default_factory=list)
    handing: tuple[str, Msg, list[Action]] | None = None
    """Metadata the ledger let through and stock has not stored yet."""
    making: int | None = None
    """Request whose sender stock made and the ledger has not seen yet."""
    retiring: int | None = None
    """Request whose sender stock cleared and the ledger has not retired yet."""
    failing: tuple[int, ...] = ()
    """Rooms the ledger failed and stock has not heard of yet."""
    helpers: dict[str, Attempt] = field(default_factory=dict)
    """write -> attempt, for writes that are helper tasks."""
    dead: set[str] = field(default_factory=set)
    """Decode ranks stock gave up on after a failed write."""
    number: int = 0
    blob: bytes = b""

    @property
    def incarnation(self) -> str:
        return f"{self.name}{'abcd'[self.life]}"


ORDER = {"bootstrapping": 1, "waiting": 2, "success": 3}


WITHOUT_PLUGIN = "x0"

TOKENS = 100
"""Length of every prompt; a placeholder has one token."""

LATER = 10.0
"""A moment later than any backoff of a question asked at 0."""


class World:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.said: list[str] = []
        self._own: set[str] = set()
        self.private = False
        """Never cloned: ranks may be changed in place."""
        self.lost: frozenset[str] = frozenset()
        """Kinds of messages that were."""
        self.left = {name: getattr(config, name) for name in BUDGETED}
        self.request = ("new",) * len(config.rooms)
        self.leases: dict[str, int] = {}
        """lease -> request."""
        self.back: frozenset[str] = frozenset()
        """Leases whose slots are ordinary or free: nothing may write there."""
        self.wire: tuple[Write, ...] = ()
        self.landed: frozenset[tuple[str, str, int]] = frozenset()
        """(lease, prefill rank, chunk) of a prompt's KV that is where it belongs; kept
        only where a success may be short."""
        self.arrived: frozenset[str] = frozenset()
        """Requests a prefill rank has a sender for, or had."""
        self.exposed_in: dict[tuple[str, str], int] = {}
        """(lease, prefill rank) -> life of the process then."""
        self.decodes = {f"d{i}": self._new_decode(f"d{i}", 0) for i in range(config.decodes)}
        self.prefills = {f"p{i}": self._new_prefill(f"p{i}", 0) for i in range(config.prefills)}
        self.strange: frozenset[tuple[str, str]] = frozenset()
        """(decode, prefill) where decode has not registered with the new process yet."""
        self.channels: dict[str, tuple[Msg, ...]] = {}
        for d in self.decodes:
            for p in self.prefills:
                self.channels |= {f"{d}>{p}": (), f"{p}>{d}": (), f"{p}*{d}": ()}
                if not config.greeted:
                    self._hello(d, p)
                elif self.prefills[p].ledger is not None:
                    self.decodes[d].ledger.hello_acked(p, self.prefills[p].incarnation)
        if config.bare:
            self.channels |= {f"{WITHOUT_PLUGIN}>{p}": () for p in self.prefills}

    def _new_decode(self, name: str, life: int) -> Decode:
        age = ("", "a", "b", "c")[life]
        rules = DecodeLedger if self.config.numbered else Credulous
        if not self.config.weighs:
            rules = Gullible
        ledger = rules(name + age, first_wait=1.0, max_wait=5.0, memory=self.config.memory)
        ledger.group = "d0" + age
        return Decode(name, ledger, [None] * self.config.slots, life)

    def _new_prefill(self, name: str, life: int) -> Prefill:
        if not self.config.plugged[int(name[1:])]:
            return Prefill(name, None, life)
        kind = PrefillLedger if self.config.poison else Unpoisoned
        if not (self.config.patient and self.config.remembers):
            kind = Forgetful if self.config.patient else Hasty
        ledger = kind(f"{name}{'abcd'[life]}", memory=self.config.memory)
        if self.config.forgetful:
            ledger = kind(ledger.incarnation, memory=0, unserved=1, kept_back=1)
        if not self.config.tombstones:
            ledger._forgotten = Amnesic(0)
        return Prefill(name, ledger, life)

    def _decode(self, name: str) -> Decode:
        """The rank, to be changed by the event being done."""
        if name not in self._own and not self.private:
            self._own.add(name)
            self.decodes[name] = copied(self.decodes[name])
        return self.decodes[name]

    def _prefill(self, name: str) -> Prefill:
        if name not in self._own and not self.private:
            self._own.add(name)
            self.prefills[name] = copied(self.prefills[name])
        return self.prefills[name]

    # -- running ------------------------------------------------------------------

    def step(self, event: str) -> list[str]:
        """Do one event; the lines say what came of it. Raises `Violation`."""
        self.said = []
        self._own = set()
        name, *args = event.split()
        if name in self.left:
            self.left = {**self.left, name: self.left[name] - 1}
        getattr(self, f"do_{name}")(*args)
        self._check()
        for name in self.prefills if self.private else self._own & self.prefills.keys():
            if (ledger := self.prefills[name].ledger) is not None:
                ledger.check_integrity()
        return self.said

    def clone(self) -> World:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.decodes, twin.prefills = dict(self.decodes), dict(self.prefills)
        twin.channels = dict(self.channels)
        twin._own = set()  # from here on they share their ranks
        return twin

    def say(self, text: str) -> None:
        self.said.append(text)

    def _send(self, source: str, target: str, message: Msg, stock: bool = False) -> None:
        channel = f"{source}{'*' if stock else '>'}{target}"
        self.channels[channel] = (*self.channels[channel], message)

    def _hello(self, d: str, p: str) -> None:
        """Stock's registration of decode's buffers, with ours."""
        seq = self._decode(d).ledger.hello(p)
        self._send(d, p, Msg("hello", seq=seq))

    def _becomes(self, i: int, state: str) -> None:
        self.request = (*self.request[:i], state, *self.request[i + 1 :])

    def _check(self) -> None:
        for write in self.wire:
            if write.lease in self.back:
                raise Violation(
                    f"{write.name} can still land, but the slot of {write.lease} is "
                    f"{'ordinary' if write.lease in self._owned() else 'free or reused'}"
                )

    def _owned(self) -> set[str]:
        return {lease for d in self.decodes.values() for lease in d.slots if lease is not None}

    # -- what can happen ------------------------------------------------------------

    def enabled(self) -> list[str]:
        return [*self.progress(), *self.mishaps()]

    def progress(self) -> list[str]:
        """Events of a world in which nothing goes wrong, and owners giving up."""
        events = [f"deliver {name}" for name, queue in self.channels.items() if queue]
        if any(p.handing for p in self.prefills.values()):
            # The receive thread is busy with the message before.
            events = [e for e in events if not self._receiver_busy(e)]
        events += self._owner_events()
        events += [f"register {d} {p}" for d, p in sorted(self.strange)]
        events += [f"count {d.name}" for d in self.decodes.values() if d.admitted]
        for p in self.prefills.values():
            events += self._sender_events(p) + self._worker_events(p)
        events += [f"land {w.name}" for w in self.wire]
        return events

    def _owner_events(self) -> list[str]:
        """What the owners of the slots do on decode."""
        events = []
        for i, state in enumerate(self.request):
            if state == "new" and self._exposable(i):
                events.append(f"expose r{i}")
            elif state == "exposed":
                events.append(f"give_up r{i}")
                if self._all_success(i):
                    events.append(f"accept r{i}")
            elif state == "accepted":
                events.append(f"free r{i}")
            elif state == "held" and all(
                d.exposure(i).state is ExposureState.PROVEN
                for d in self.decodes.values()
                if i in d.exposures
            ):
                events.append(f"return r{i}")
        return events

    def _receiver_busy(self, event: str) -> bool:
        target = event.rpartition(">")[2]
        return target in self.prefills and self.prefills[target].handing is not None

    def _sender_events(self, p: Prefill) -> list[str]:
        """Prefill's scheduler: requests arrive, queue their chunks and are cleared."""
        events = []
        if p.retiring is not None:
            return [f"retire {p.name}"]  # the scheduler is inside clear
        if p.making is not None:
            return [f"made {p.name}"]
        if self.config.late_arrival:
            events += [f"arrive r{i} {p.name}" for i in self._due(p)]
        for i, n in p.senders.items():
            room = self.config.rooms[i]
            status = p.status.get(room)
            if n < self._chunks(p, i) and status == "waiting" and room in p.infos:
                events.append(f"put r{i} {p.name}")
            reading = p.ledger is not None and p.ledger.busy(i)
            if status in ("success", None) or (status == "failed" and not reading):
                events.append(f"clear r{i} {p.name}")
        return events

    def _due(self, p: Prefill) -> list[int]:
        """Requests that have not reached this prefill rank."""
        rooms = range(len(self.config.rooms))
        return [i for i in rooms if f"r{i} {p.name}" not in self.arrived]

    def _chunks(self, p: Prefill, i: int) -> int:
        return 1 if i in p.placeholders else self.config.chunks

    def _worker_events(self, p: Prefill) -> list[str]:
        """Prefill's transfer worker and receive thread."""
        events = []
        if p.hand is None:
            if p.queue:
                events.append(f"take {p.name}")
        elif not p.hand.posted:
            events.append(f"post {p.name}")
        elif p.hand.reported:
            events.append(f"end {p.name}")
        elif self._hand_over(p):
            events.append(f"{'report' if self.config.split_end else 'end'} {p.name}")
        if not p.handing and p.ledger is not None and p.ledger.kept.due:
            events.append(f"retry {p.name}")
        if p.handing:
            events.append(f"store {p.name}")
        if p.failing:
            events.append(f"apply {p.name}")
        return events

    def mishaps(self) -> list[str]:
        return [
            *self._on_the_way(),
            *self._asked_again(),
            *self._at_prefills(),
            *self._at_decodes(),
        ]

    def _on_the_way(self) -> list[str]:
        events = []
        for name, queue in self.channels.items():
            if queue:
                events += [f"{kind} {name}" for kind in ("lose", "dup") if self.left[kind]]
                if len(queue) > 1 and queue[0] != queue[1] and self.left["swap"]:
                    events.append(f"swap {name}")
        return events

    def _asked_again(self) -> list[str]:
        holding = any(d.ledger.holding for d in self.decodes.values())
        return ["tick"] if self.left["tick"] and holding else []

    def _at_prefills(self) -> list[str]:
        events = []
        if self.left["fail"]:
            events += [f"fail {w.name}" for w in self.wire if self._watched(w)]
        for p in self.prefills.values():
            if self.left["crash"]:
                events.append(f"crash {p.name}")
            if self.left["abort"]:
                events += [f"abort r{i} {p.name}" for i in p.senders]
            if self.left["drop"]:
                events += [f"drop r{i} {p.name}" for i in p.senders]
            if self.left["short"]:
                events += [f"short r{i} {p.name}" for i, n in p.senders.items() if not n]
            if self.left["reject"] and self.config.late_arrival and p.making is None:
                events += [f"reject r{i} {p.name}" for i in self._due(p)]
            if self.left["skip"] and p.hand is None and p.queue and not p.queue[0].last:
                events.append(f"skip {p.name}")
        return events

    def _at_decodes(self) -> list[str]:
        events = []
        for name, d in self.decodes.items():
            if d.engine > d.epoch:
                events.append(f"close {name}")
            elif self.left["fence"]:
                events.append(f"fence {name}")
        if self.left["restart"] and len(self.decodes) == 1:
            events += [f"restart {d}" for d in self.decodes]
        return events

    def _exposable(self, i: int) -> bool:
        """Requests of a room follow one another; its receiver must be gone on decode."""
        earlier = [
            self.request[j] for j in range(i) if self.config.rooms[j] == self.config.rooms[i]
        ]
        return all(s not in ("new", "exposed") for s in earlier) and (
            i in self.config.bare or all(None in d.slots for d in self.decodes.values())
        )

    def _all_success(self, i: int) -> bool:
        if i in self.config.bare:
            return False  # what it does with it is its own affair
        room = self.config.rooms[i]
        return all(
            room in d.receivers
            and room not in d.failed
            and d.receivers[room][1] == set(self.prefills)
            and (d.ledger.complete(d.exposure(i)) or not self.config.masks)
            for d in self.decodes.values()
        )

    def _watched(self, w: Write) -> bool:
        """Somebody at prefill still waits for this write's result."""
        return not w.failed and w.life == self.prefills[w.prefill].life

    def _hand_over(self, p: Prefill) -> bool:
        assert p.hand is not None
        mine = [w for w in self.wire if self._watched(w) and w.prefill == p.name]
        return not mine or (self.config.helpers and p.hand.failed)

    # -- decode -----------------------------------------------------------------------

    def do_expose(self, r: str) -> None:
        i = int(r[1:])
        room = self.config.rooms[i]
        self._becomes(i, "exposed")
        if i in self.config.bare:
            lease = f"{WITHOUT_PLUGIN}-{i}"
            self.leases = {**self.leases, lease: i}
            for p in self.prefills:
                self._send(WITHOUT_PLUGIN, p, Msg("meta", lease, room))
        for d in map(self._decode, self.decodes if i not in self.config.bare else ()):
            exposure = d.ledger.expose(room, list(self.prefills))
            slot = d.slots.index(None)
            d.slots[slot] = exposure.lease
            d.exposures[i] = exposure.lease
            d.receivers[room] = (i, set())
            self.leases = {**self.leases, exposure.lease: i}
            self.say(f"{d.name}: slot {slot} exposed as {exposure.lease}, room {room}")
            for p in self.prefills:
                d.ledger.sent(exposure, p)
                life = self.prefills[p].life
                self.exposed_in = {**self.exposed_in, (exposure.lease, p): life}
                meta = Msg(
                    "meta",
                    exposure.lease,
                    room,
                    exposure.writers[p].incarnation or "",
                    slot=slot,
                    epoch=d.engine,
                    attempt=exposure.attempt_id,
                )
                self._send(d.name, p, meta)
        if not self.config.late_arrival:
            for p in self.prefills:
                self._arrive(i, self._prefill(p))

    def do_give_up(self, r: str) -> None:
        i = int(r[1:])
        room = self.config.rooms[i]
        if i in self.config.bare:
            self._becomes(i, "done")
            return
        self._becomes(i, "held" if self.config.gate else "done")
        for d in map(self._decode, self.decodes):
            exposure = d.exposure(i)
            reported = d.receivers.pop(room)[1]
            d.failed -= {room}
            seen = reported == set(self.prefills)
            d.ledger.end(exposure, 0.0, committed=False, success_seen=seen)
            d.ledger.counted(exposure, reported)
            if not self.config.gate:
                self._free(d, i)
                continue
            self.say(f"{d.name}: {exposure.lease} {exposure.state.value}")
        self._ask(0.0)

    def do_accept(self, r: str) -> None:
        i = int(r[1:])
        self._becomes(i, "accepted")
        for d in map(self._decode, self.decodes):
            exposure = d.exposure(i)
            d.receivers.pop(self.config.rooms[i])
            self._check_landed(exposure)
            d.ledger.end(exposure, 0.0, committed=True)
            self.back |= {exposure.lease}
            self.say(f"{d.name}: {exposure.lease} landed")

    def _check_landed(self, exposure: Exposure) -> None:
        if not (self.config.short or self.config.skip):
            return
        for p in self.prefills:
            for n in range(self.config.chunks):
                if (exposure.lease, p, n) not in self.landed:
                    raise Violation(
                        f"{exposure.lease} is used, and {p} never wrote chunk {n} of it"
                    )

    def do_free(self, r: str) -> None:
        self._becomes(int(r[1:]), "done")
        for d in map(self._decode, self.decodes):
            self._free(d, int(r[1:]))

    def do_return(self, r: str) -> None:
        i = int(r[1:])
        self._becomes(i, "done")
        for d in map(self._decode, self.decodes):
            if i in d.exposures:
                exposure = d.exposure(i)
                d.ledger.returned(exposure)
                proofs = " ".join(f"{w.rank}:{w.proof}" for w in exposure.writers.values())
                self.say(f"{d.name}: {exposure.lease} returned, proofs {proofs}")
                self._free(d, i)

    def _free(self, d: Decode, i: int) -> None:
        lease = d.exposures.pop(i)
        d.slots[d.slots.index(lease)] = None
        self.back |= {lease}

    def do_tick(self) -> None:
        self._ask(LATER)

    def _ask(self, now: float) -> None:
        for d in map(self._decode, self.decodes):
            # How often each was asked decides the order of the questions and is not told apart.
            held = {exposure.lease: n for n, exposure in enumerate(d.ledger.held)}
            for ask in sorted(d.ledger.tick(now), key=lambda ask: held[ask.lease]):
                self._send(d.name, ask.rank, Msg("abort", ask.lease, ask.room))
                self.say(f"{d.name}: abort({ask.lease}) to {ask.rank}")
                # Time stands still, so that worlds which differ in it alone are one.
                exposure = d.ledger.find(ask.lease)
                assert exposure is not None
                exposure.writers[ask.rank].next_abort = LATER / 2

    def do_restart(self, name: str) -> None:
        """Decode dies and returns at its address with memory nothing can reach."""
        old = self.decodes[name]
        for i in old.exposures:
            self._becomes(i, "done")
        d = self.decodes[name] = self._new_decode(name, old.life + 1)
        self.wire = tuple(w for w in self.wire if w.decode != name)
        d.epoch = d.base = old.engine + 1
        for p in self.prefills:
            self.channels[f"{name}>{p}"] = ()
            self._hello(name, p)
        self.say(f"{name}: restarted")

    def do_register(self, name: str, p: str) -> None:
        self.strange -= {(name, p)}
        self._hello(name, p)

    def do_fence(self, name: str) -> None:
        """Another engine receives what is sent from now on; the old one still receives."""
        self._decode(name).ledger.engine_made()
        for p in self.prefills:
            self._hello(name, p)

    def do_close(self, name: str) -> None:
        """Every address that names an older engine dies, and with it what is posted there.

        Here it comes at any time; the adapter waits for those that may still complete.
        """
        d = self._decode(name)
        if self.config.stops:
            d.epoch += 1
            self._cut_off(name)
        else:
            d.base -= 1
        for exposure in d.ledger.engines_closed():
            self.say(f"{name}: {exposure.lease} cannot complete")
        for exposure in d.ledger.held:
            self.say(f"{name}: {exposure.lease} {exposure.state.value}")

    def _cut_off(self, name: str) -> None:
        """What is posted to an engine of this decode rank that is closed can no longer land."""
        oldest = self.decodes[name].epoch
        for write in [w for w in self.wire if w.decode == name and w.epoch < oldest]:
            if self._watched(write):
                self._fails(write)
            self.wire = tuple(w for w in self.wire if w.name != write.name)

    # -- messages ---------------------------------------------------------------------

    def do_lose(self, channel: str) -> None:
        first, *rest = self.channels[channel]
        self.channels[channel] = tuple(rest)
        self.lost |= {first.kind}
        self.say(f"lost: {first}")

    def do_dup(self, channel: str) -> None:
        queue = self.channels[channel]
        self.channels[channel] = (queue[0], *queue)
        self.say(f"twice: {queue[0]}")

    def do_swap(self, channel: str) -> None:
        first, second, *rest = self.channels[channel]
        self.channels[channel] = (second, first, *rest)
        self.say(f"overtakes: {second} before {first}")

    def do_deliver(self, channel: str) -> None:
        message, *rest = self.channels[channel]
        self.channels[channel] = tuple(rest)
        source, target = channel.replace("*", ">").split(">")
        self.say(f"{target}: {message} from {source}")
        if target in self.prefills:
            self._at_prefill(self._prefill(target), source, message)
        else:
            self._at_decode(self._decode(target), source, message)

    def _at_decode(self, d: Decode, p: str, m: Msg) -> None:
        if m.kind == "hello_ack":
            d.ledger.hello_acked(p, m.incarnation, m.lease or None, m.seq or None)
        elif m.kind == "abort_ack":
            for lease in self._meant(d, m):
                d.ledger.ack(p, m.incarnation, lease, m.verdict, "a write failed")
                for e in d.ledger.held:
                    if e.lease == lease:
                        self.say(f"{d.name}: {lease} {e.state.value}")
        elif m.kind == "attempt_ended":
            self._ended(d, p, m)
        else:
            self._success(d, p, m)

    def _ended(self, d: Decode, p: str, m: Msg) -> None:
        """Prefill ended a request: its owner is failed, or the slots of one that gave up proven."""
        exposure = d.ledger.find(m.lease)
        one_life = not (self.config.crash or self.config.restart)
        told_in_order = one_life and self.config.patient and self.config.tombstones
        if exposure is not None and told_in_order and exposure.writers[p].reported:
            raise Violation(f"{p} ended {m.lease}, which it had reported a success of")
        found = d.ledger.endings.told(p, m.incarnation, m.lease, m.verdict, "a write failed")
        if found is not None and not found.given_up and d.ledger.endings.fails(found):
            d.failed |= {found.room}
            self.say(f"{d.name}: room {found.room} failed")
        elif found is not None:
            self.say(f"{d.name}: {m.lease} {found.state.value}")

    def _success(self, d: Decode, p: str, m: Msg) -> None:
        """What the ledger, and then stock, makes of a success."""
        lease = m.lease or None
        unproven = {e.lease for e in d.ledger.held if e.unproven}
        admitted = d.ledger.successes.reports(m.room, lease, p, p)
        proven = [e for e in d.ledger.held if e.lease in unproven and not e.unproven]
        if lease is not None and any(e.lease == lease and not e.unproven for e in d.ledger.held):
            self.say(f"{d.name}: {lease} proven")
        elif lease is None and proven:
            self.say(f"{d.name}: room {m.room} proven by stock's success")
        if self.config.marks and not admitted:
            self.say(f"{d.name}: kept from stock")
            return
        d.admitted += ((p, m.room),)
        if not self.config.split_admit:
            self.do_count(d.name)

    def do_count(self, name: str) -> None:
        d = self._decode(name)
        (p, room), *rest = d.admitted
        d.admitted = tuple(rest)
        if room in d.receivers:
            d.receivers[room][1].add(p)

    def _meant(self, d: Decode, m: Msg) -> list[str]:
        if self.config.leases:
            return [m.lease]
        # Negative control: an answer names a room and no lease.
        return [e.lease for e in d.ledger.held if e.room == m.room]

    def _at_prefill(self, p: Prefill, d: str, m: Msg) -> None:
        if p.ledger is None:
            if m.kind == "abort":
                raise Violation(f"{p.name} runs without the plugin: an Abort kills its thread")
            if m.kind == "meta":
                self._store(p, d, m)
            return
        if m.kind == "hello":
            self._send(p.name, d, Msg("hello_ack", incarnation=p.incarnation, seq=m.seq))
        elif m.kind == "abort":
            self._act(p, p.ledger.abort(m.room, m.lease, d, p.name))
            for kept in [k for k in p.deferred if k[1].lease == m.lease]:
                p.deferred.remove(kept)
                self._bind(p, *kept)  # to be dropped
        else:
            self._bind(p, d, m)

    def _bind(self, p: Prefill, d: str, m: Msg) -> None:
        assert p.ledger is not None
        p.deferred = [kept for kept in p.deferred if kept != (d, m)]
        if d == WITHOUT_PLUGIN:
            delivery, actions = p.ledger.bind_without_plugin(
                m.room, d, Extent(d, self.config.chunks)
            )
        else:
            extent = Extent(d, self.config.chunks, (), TOKENS)
            # As old as any request that may have ended here: the most there is to believe.
            came = 0.0 if self.config.tells else None
            delivery, actions = p.ledger.bind(
                m.room, m.attempt, m.lease, d, p.name, extent=extent, came=came
            )
        self.say(f"{p.name}: bind {m.lease}: {delivery.name.lower()}")
        if delivery is Delivery.DELIVER:
            if not self.config.split_forget:
                self._act(p, actions)
                actions = []
            p.handing = (d, m, actions)
            if not self.config.split_bind:
                self.do_store(p.name)
            return
        self._act(p, actions)
        if delivery is Delivery.DEFER:
            p.deferred.append((d, m))
        else:
            self._send_hello_ack(p, d, m)

    def _send_hello_ack(self, p: Prefill, d: str, m: Msg) -> None:
        if d != WITHOUT_PLUGIN and m.incarnation != p.incarnation:
            self._send(p.name, d, Msg("hello_ack", m.lease, m.room, p.incarnation))

    def do_retry(self, name: str) -> None:
        p = self._prefill(name)
        assert p.ledger is not None
        key = p.ledger.kept.next()
        kept = next(k for k in p.deferred if key in (k[1].lease, (k[1].room, k[0])))
        p.deferred.remove(kept)
        self._bind(p, *kept)

    def do_store(self, name: str) -> None:
        p = self._prefill(name)
        assert p.handing is not None
        d, m, actions = p.handing
        p.handing = None
        self._act(p, actions)
        self._send_hello_ack(p, d, m)
        self._store(p, d, m)

    def _store(self, p: Prefill, d: str, m: Msg) -> None:
        """Stock's receive thread keeps the destinations, by room and decode session."""
        infos = p.infos.setdefault(m.room, {})
        infos[d] = m
        if len(infos) == self.config.decodes:
            self._status(p, m.room, "waiting")

    # -- prefill ------------------------------------------------------------------------

    def _status(self, p: Prefill, room: int, status: str) -> None:
        """Stock's `update_status`."""
        current = p.status.get(room)
        if current is None:
            if status in ("bootstrapping", "waiting") or (
                status == "success" and not self.config.failed_is_final
            ):
                p.status[room] = status
        elif status == "failed":
            p.status[room] = status
        elif current != "failed" or not self.config.failed_is_final:
            p.status[room] = max(current, status, key=lambda s: ORDER.get(s, 0))

    def _act(self, p: Prefill, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, FailRoom):
                p.failing += (action.room,)
                if not self.config.split_fail:
                    self.do_apply(p.name)
            elif isinstance(action, ForgetRoom):
                if p.infos.pop(action.room, None):
                    self.say(f"{p.name}: room {action.room}: old destinations forgotten")
            elif action.verdict != "writing":  # proves nothing, and changes only whom decode blames
                kind = "attempt_ended" if isinstance(action, SendEnded) else "abort_ack"
                room = self.config.rooms[self.leases[action.lease]]
                self.say(f"{p.name}: {kind}({action.lease} {action.verdict})")
                self._send(
                    p.name,
                    action.reply_to,
                    Msg(kind, action.lease, room, p.incarnation, action.verdict),
                )

    def do_apply(self, name: str) -> None:
        p = self._prefill(name)
        room, *rest = p.failing
        p.failing = tuple(rest)
        status = p.status.get(room)
        if ends_room(known=status is not None, succeeded=status == "success"):
            self._status(p, room, "failed")
            self.say(f"{p.name}: room {room} failed")

    def do_arrive(self, r: str, name: str) -> None:
        self._arrive(int(r[1:]), self._prefill(name))

    def do_reject(self, r: str, name: str) -> None:
        i, p = int(r[1:]), self._prefill(name)
        self.arrived |= {f"{r} {name}"}
        self.say(f"{name}: {r} rejected")
        if p.ledger is not None:
            self._act(p, p.ledger.rejected(self.config.rooms[i], 0.0, "rejected"))

    def _arrive(self, i: int, p: Prefill) -> None:
        self.arrived |= {f"r{i} {p.name}"}
        p.senders[i] = 0
        self._status(p, self.config.rooms[i], "bootstrapping")
        p.making = i
        if not self.config.split_made:
            self.do_made(p.name)

    def do_made(self, name: str) -> None:
        p = self._prefill(name)
        i, p.making = p.making, None
        assert i is not None
        if p.ledger is not None:
            self._act(p, p.ledger.sender_made(i, self.config.rooms[i]))

    def do_put(self, r: str, name: str) -> None:
        i, p = int(r[1:]), self._prefill(name)
        room = self.config.rooms[i]
        n = p.senders[i]
        p.senders[i] = n + 1
        attempt = None
        if p.ledger is not None:
            p.ledger.offer(i, 1, None, 1 if i in p.placeholders else TOKENS)
            attempt = p.ledger.put(i)
        if p.ledger is not None and attempt is None:
            self.say(f"{name}: chunk {n} of r{i} dropped")
            return
        p.queue.append(Chunk(i, room, n, n + 1 == self._chunks(p, i), attempt))

    def _taken(self, p: Prefill) -> Chunk | None:
        chunk = p.queue.pop(0)
        if (
            p.ledger is not None
            and chunk.attempt is not None
            and not p.ledger.take(chunk.attempt, 1, chunk.last)
        ):
            self.say(f"{p.name}: chunk {chunk.n} of r{chunk.request} dropped")
            return None
        p.hand = chunk
        return chunk

    def do_short(self, r: str, name: str) -> None:
        p = self._prefill(name)
        p.placeholders |= {int(r[1:])}
        self.say(f"{name}: {r} is rejected, a placeholder takes its place")

    def do_skip(self, name: str) -> None:
        if (chunk := self._taken(self._prefill(name))) is not None:
            chunk.posted = True
            self.say(f"{name}: chunk {chunk.n} of r{chunk.request} passed over")

    def do_take(self, name: str) -> None:
        p = self._prefill(name)
        if (chunk := self._taken(p)) is None:
            return
        if self.config.failed_is_final and p.status.get(chunk.room) in (None, "failed"):
            chunk.posted = chunk.failed = True  # stock looks at the status here since 0.5.13
        elif not self.config.split_take:
            self.do_post(name)

    def do_post(self, name: str) -> None:
        p = self._prefill(name)
        chunk = p.hand
        assert chunk is not None
        chunk.posted = True
        for d, m in sorted(p.infos.get(chunk.room, {}).items()):
            if d in p.dead:
                chunk.failed = True
                self._status(p, chunk.room, "failed")
                return
            write = Write(d, m.lease, m.slot, m.epoch, name, p.life, chunk.request, chunk.n)
            write = write._replace(whole=chunk.request not in p.placeholders)
            self.wire = (*self.wire, write)
            self.say(f"{name}: posts {write.name}")
            if self.config.helpers and p.ledger is not None and chunk.attempt is not None:
                p.ledger.opened(chunk.attempt)
                p.helpers[write.name] = chunk.attempt
            if d in self.decodes and m.epoch < self.decodes[d].epoch:
                self._fails(write)  # the address is dead, and nothing stays on the wire
                self.wire = self.wire[:-1]

    def _find(self, name: str) -> Write:
        return next(w for w in self.wire if w.name == name)

    def do_land(self, name: str) -> None:
        write = self._find(name)
        self.wire = tuple(w for w in self.wire if w is not write)
        owner = self._owner(write)
        if owner != write.lease:
            raise Violation(f"{name} landed in the slot of {owner}")
        if (
            self.config.foreign
            and write.decode != WITHOUT_PLUGIN
            and self.leases[write.lease] != write.request
        ):
            raise Violation(f"KV of r{write.request} landed in the slot of {write.lease}")
        slot = "its slot" if write.decode == WITHOUT_PLUGIN else f"slot {write.slot}"
        self.say(f"{write.decode}: {slot} written for {write.lease}")
        if write.whole and (self.config.short or self.config.skip):
            self.landed |= {(write.lease, write.prefill, write.chunk)}
        if self._watched(write):
            self._wrote(write)
            self._helper_done(write)

    def _owner(self, write: Write) -> str:
        """The lease whose slot it is, by now."""
        if write.decode == WITHOUT_PLUGIN:
            return write.lease
        return self.decodes[write.decode].slots[write.slot] or "nobody"

    def do_fail(self, name: str) -> None:
        """The engine reports failure; the bytes stay on the wire."""
        write = self._find(name)
        self._fails(write)
        self.wire = tuple(w._replace(failed=True) if w is write else w for w in self.wire)

    def _fails(self, write: Write) -> None:
        p = self._prefill(write.prefill)
        attempt = p.helpers.get(write.name) or (p.hand.attempt if p.hand is not None else None)
        if p.ledger is not None and attempt is not None:
            self._act(p, p.ledger.failed(attempt, "write returned -1"))
        if not self.config.shrugs:
            if p.hand is not None:
                p.hand.failed = True
                self._status(p, p.hand.room, "failed")
            p.dead.add(write.decode)
        self._helper_done(write)

    def _wrote(self, write: Write) -> None:
        p = self._prefill(write.prefill)
        attempt = p.helpers.get(write.name) or (p.hand.attempt if p.hand is not None else None)
        if attempt is not None:
            attempt.coverage.writes.append(write.decode)

    def _helper_done(self, write: Write) -> None:
        if write.name in self.prefills[write.prefill].helpers:
            p = self._prefill(write.prefill)
            assert p.ledger is not None
            self._act(p, p.ledger.done(p.helpers.pop(write.name)))

    def do_report(self, name: str) -> None:
        p = self._prefill(name)
        chunk = p.hand
        assert chunk is not None
        chunk.reported = True
        if not chunk.last or chunk.failed:
            return
        self._status(p, chunk.room, "success")
        for d in sorted(p.infos.get(chunk.room, {})):
            if chunk.attempt is not None and not self._leaves(p, chunk.attempt, d):
                self.say(f"{name}: success leaves as failed")  # `StatusInterposer`
            elif d != WITHOUT_PLUGIN:
                mark = None
                if p.ledger is not None and chunk.attempt is not None:
                    mark = chunk.attempt.bound_at(d)
                lease = mark[0] if mark is not None else ""
                self._send(name, d, Msg("success", lease, chunk.room), stock=True)

    def _leaves(self, p: Prefill, attempt: Attempt, d: str) -> bool:
        """`StatusInterposer`, after the metadata slot was written."""
        assert p.ledger is not None
        attempt.coverage.writes.append(d)
        leaves = p.ledger.success_leaves(attempt, d, lambda _: True)
        if leaves or self.config.covers or attempt.poisoned:
            return leaves
        attempt.reports(d)
        return True

    def do_end(self, name: str) -> None:
        p = self._prefill(name)
        assert p.hand is not None
        if not p.hand.reported:
            self.do_report(name)
        chunk, p.hand = p.hand, None
        if p.status.get(chunk.room) in (None, "success"):
            p.infos.pop(chunk.room, None)
        if p.ledger is not None and chunk.attempt is not None:
            self._act(p, p.ledger.done(chunk.attempt))

    def do_abort(self, r: str, name: str) -> None:
        """A client's abort reaches prefill first: stock fails the room there."""
        p, i = self._prefill(name), int(r[1:])
        self._status(p, self.config.rooms[i], "failed")
        self._stopped(p, i)

    def _stopped(self, p: Prefill, i: int) -> None:
        if p.ledger is not None:
            self._act(p, p.ledger.stopped(i, self.config.rooms[i], 0.0, "failed on prefill"))

    def do_clear(self, r: str, name: str) -> None:
        p = self._prefill(name)
        i = int(r[1:])
        room = self.config.rooms[i]
        if p.status.get(room) == "failed":
            self._stopped(p, i)
        del p.senders[i]
        p.status.pop(room, None)
        p.infos.pop(room, None)
        p.retiring = i
        if not self.config.split_clear:
            self.do_retire(name)

    def do_retire(self, name: str) -> None:
        p = self._prefill(name)
        i, p.retiring = p.retiring, None
        assert i is not None
        if p.ledger is not None:
            self._act(p, p.ledger.retire(i, self.config.rooms[i]))

    def do_drop(self, r: str, name: str) -> None:
        """A sender that stock never clears, as after some aborts; its room stays as it is."""
        p = self._prefill(name)
        del p.senders[int(r[1:])]
        p.retiring = int(r[1:])
        if not self.config.split_clear:
            self.do_retire(name)

    def do_crash(self, name: str) -> None:
        """The process dies and comes back empty; what it posted stays on the wire."""
        old = self.prefills[name]
        self.prefills[name] = self._new_prefill(name, old.life + 1)
        self.strange |= {(d, name) for d in self.decodes}
        self.say(f"{name}: restarted as {self.prefills[name].incarnation}")

    # -- the end --------------------------------------------------------------------------

    def settle(self) -> None:
        """Fair continuation: nothing more goes wrong and everything is delivered."""
        ticks = 0
        for _ in range(1000):
            if event := next(filter(self._fair, self.progress()), None):
                self.step(event)
            elif ticks < 3 and any(d.ledger.holding for d in self.decodes.values()):
                ticks += 1
                self.do_tick()
            else:
                return
        raise AssertionError("no rest after 1000 steps")

    def _fair(self, event: str) -> bool:
        """Owners decide nothing new, and a failed or orphaned write need not land."""
        name, *args = event.split()
        if name == "land":
            return self._watched(self._find(args[0]))
        return name not in ("expose", "give_up", "arrive")

    def overdue(self) -> list[str]:
        """After `settle`: holds that should have ended, and holds without a reason."""
        late = []
        for d in self.decodes.values():
            for exposure in d.ledger.held:
                why = why_held(exposure, d.ledger.peers)
                unproven = exposure.unproven
                if not why or all(self._hopeless(d, exposure, w.rank) is None for w in unproven):
                    others = [x.ledger.held for x in self.decodes.values() if x is not d]
                    if not unproven and any(
                        e.lease != exposure.lease and e.room == exposure.room and e.unproven
                        for x in others
                        for e in x
                    ):
                        continue  # proven here; another TP rank is not
                    late.append(f"{exposure.lease} is held: {why or 'no reason given'}")
        return late

    def in_vain(self) -> list[str]:
        """Exposures whose owners wait for what has ended, in a world that will not move by itself.

        Only of worlds in which everything that was said has arrived.
        """
        waiting = () if self.lost else self.decodes.values()
        found = [
            f"{exposure.lease} waits in vain for {writer.rank}"
            for d in waiting
            for i, lease in d.exposures.items()
            if self.request[i] == "exposed" and (exposure := d.ledger.find(lease)) is not None
            for writer in exposure.writers.values()
            if self._over(exposure.lease, writer.rank) and not writer.reported and not writer.ended
        ]
        return found if found and not any(map(self._fair, self.progress())) else []

    def _over(self, lease: str, rank: str) -> bool:
        """The process that had these destinations has closed their attempt."""
        p = self.prefills[rank]
        if p.ledger is None or p.life != self.exposed_in[lease, rank]:
            return False
        attempt = p.ledger.attempt_of(lease)
        return attempt is not None and attempt.closed

    def _hopeless(self, d: Decode, exposure: Exposure, rank: str) -> str | None:
        """Why this writer will never prove anything without a fence."""
        p = self.prefills[rank]
        if p.ledger is None:
            return "no plugin"
        more = d.ledger.hellos(rank) > 1 or self.left["lose"] < self.config.lose - 1
        if rank not in d.ledger.peers and self.lost & {"hello", "hello_ack"} and more:
            return "its words were lost; the next exposure heals it"
        if exposure.writers[rank].disputed:
            return "two processes have them"
        known = exposure.writers[rank].incarnation
        if p.life != self.exposed_in[exposure.lease, rank] or known not in (None, p.incarnation):
            return "replaced"
        attempt = p.ledger.attempt_of(exposure.lease)
        if attempt is None and known is None and (p.life or self.lost & {"hello", "hello_ack"}):
            return "nobody knows which process would have had them"
        return "poisoned" if p.ledger.poisoned(exposure.lease) else None

    def key(self, met: Met) -> Any:
        """Equal for worlds that behave alike. How often was asked does not matter."""
        for d in self.decodes:
            self.decodes[d] = canonical(self.decodes[d], decode_key, met)
        for p in self.prefills:
            self.prefills[p] = canonical(self.prefills[p], prefill_key, met)
        return (
            self.request,
            *self.left.values(),
            *self.channels.values(),
            frozenset(self.wire),
            self.landed,
            self.arrived,
            self.strange,
            self.lost,
            frozenset(self.leases.items()),
            frozenset(self.exposed_in.items()),
            *(d.number for d in self.decodes.values()),
            *(p.number for p in self.prefills.values()),
        )


Met = dict[Any, Any]
"""key -> the first rank met in that state. It stands in for all its equals, so that
worlds compare by its `number` and it is pickled (to `blob`) only once."""


def copied(rank: Any) -> Any:
    rank.blob = rank.blob or pickle.dumps(rank, pickle.HIGHEST_PROTOCOL)
    twin = pickle.loads(rank.blob)
    twin.number = 0
    return twin


def canonical(rank: Any, key: Any, met: Met) -> Any:
    if rank.number:
        return rank
    first = met.setdefault(key(rank), rank)
    first.number = first.number or len(met)
    return first


def decode_key(d: Decode) -> Any:
    return (
        d.name,
        d.life,
        tuple(d.slots),
        tuple(sorted(d.exposures.items())),
        d.ledger.snapshot(now=0.0),
        d.admitted,
        d.failed,
        tuple(sorted((r, i, tuple(sorted(s))) for r, (i, s) in d.receivers.items())),
        d.epoch,
        d.base,
    )


def attempt_key(a: Attempt) -> Any:
    return (
        a.room,
        a.attempt_id,
        tuple(a.bindings.items()),
        tuple(sorted(a.awaiting_ack)),
        a.untold,
        bool(a.ended),
        a.reported,
        a.sender,
        a.phase,
        a.active,
        bool(a.poisoned),
        tuple(a.exposed.items()),
        coverage_key(a.coverage) if a.active or not a.closed else None,
    )


def coverage_key(c: Coverage) -> Any:
    """Only while its success may still leave; what it was short of, `short`, nobody asks."""
    writes = tuple(sorted(c.writes)) if c.in_hand is not None else ()
    return (c.pages, c.states, c.tokens, writes, tuple(sorted(c.unwritten)), c.unqueued, c.in_hand)


def prefill_key(p: Prefill) -> Any:
    ids: dict[int, int] = {}

    def ref(a: Attempt | None) -> int | None:
        return None if a is None else ids.setdefault(id(a), len(ids))

    ledger: Any = ()
    if p.ledger is not None:
        ledger = p.ledger.snapshot(lambda a: (ref(a), attempt_key(a)))

    def chunk(c: Chunk | None) -> Any:
        if c is None:
            return None
        attempt = None if c.attempt is None else (ref(c.attempt), attempt_key(c.attempt))
        return (c.request, c.n, c.posted, c.failed, c.reported, attempt)

    return (
        p.name,
        p.life,
        ledger,
        tuple(sorted(p.status.items())),
        tuple(
            (r, tuple(sorted(i.items(), key=lambda x: x[0]))) for r, i in sorted(p.infos.items())
        ),
        tuple(sorted(p.senders.items())),
        p.placeholders,
        tuple(chunk(c) for c in p.queue),
        chunk(p.hand),
        tuple(p.deferred),
        p.handing and (*p.handing[:2], tuple(p.handing[2])),
        p.making,
        p.retiring,
        p.failing,
        tuple((name, ref(a)) for name, a in sorted(p.helpers.items())),
        tuple(sorted(p.dead)),
    )
