"""What may happen between a decode rank and its prefill ranks, in any order, for Hypothesis.

The oracle knows what the sides cannot: every request's slots, and every write that may land.
After each step no such write reaches a slot that is free, another's or in use; a request is
used only with all of its KV; and whatever happens, the records agree with each other.

Left out as the rules' known limits (see `tests.model.explore.OPEN`): whether the request that
prefill computes is the one whose destinations it has, where a client uses a room twice.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sglang_scaling_fixes import release
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.kv_poll import FAILED, SUCCESS
from sglang_scaling_fixes.reclaim.decode import fence, holds, inbox, peers, pressure, side
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide
from sglang_scaling_fixes.reclaim.prefill import ends
from sglang_scaling_fixes.reclaim.prefill import side as prefill_side
from sglang_scaling_fixes.reclaim.prefill.interposers import IN_HAND
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide
from sglang_scaling_fixes.reclaim.stock_wire import is_success

from .decode import Decode
from .prefill import Prefill, Served
from .wire import Harm, Link, Network, Request, Write, greets

ROOMS = (7, 2**64 - 1)
"""The larger is the largest that stock takes."""

Event = tuple[str, str, Callable[[], object]]
"""What may happen now: its kind, which one of that kind, and how it is done."""
CRITICAL = ("give up", "retry", "tick", "poll", "abort", "fail", "fail, and may land", "die")
"""Kinds of events that matter most while a chunk or a success is under way."""


class Adapters(RuleBasedStateMachine):
    """One decode rank and one or two prefill ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 1000.0
        self.network = Network()
        self.requests: list[Request] = []
        self.arrived: set[tuple[int, int]] = set()
        """(request, rank)"""
        self.excused = ""
        """Why slots may stay withheld: no proof can come."""
        self.lost = False
        """A message was."""
        self.restored = ExitStack()
        here = SimpleNamespace(monotonic=lambda: self.clock)
        for module in (side, peers, pressure, holds, inbox, prefill_side, ends):
            self.restored.enter_context(mock.patch.object(module, "time", here))
        self.restored.enter_context(mock.patch.object(release, "mooncake_retries", lambda: False))
        found = (DecodeSide, "current"), (PrefillSide, "current"), (IN_HAND, "attempt")
        for owner, name in found:
            self.restored.enter_context(mock.patch.object(owner, name, None))
        self.restored.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)

    @initialize(ranks=st.integers(1, 2), looks=st.booleans(), greeted=st.booleans())
    def begin(self, ranks: int, looks: bool, greeted: bool) -> None:
        self.looks = looks
        self.prefills: list[Prefill] = []
        targets: list[Any] = [lambda rank=rank: self.prefills[rank] for rank in range(ranks)]
        self.decode = Decode(self.network, targets, Config(max_held=0.3))
        for name in ("switch", "retire"):
            self.restored.enter_context(mock.patch.object(fence, name, getattr(self.decode, name)))
        self.prefills += [self._prefill(rank) for rank in range(ranks)]
        for rank in range(ranks):
            self.decode.register(rank, anew=True)
        while greeted and self.network.busy:
            self.network.busy[0].deliver()

    def _prefill(self, rank: int) -> Prefill:
        return Prefill(self.network, rank, lambda: self.decode, self.requests, looks=self.looks)

    # -- who there is -----------------------------------------------------------------------

    def _in(self, state: str) -> list[Request]:
        return [request for request in self.requests if request.state == state]

    @property
    def _served(self) -> list[tuple[Prefill, Served]]:
        return [(p, served) for p in self.prefills for served in p.served]

    @property
    def _under_way(self) -> bool:
        """A chunk waits or is written, or its success has not come to decode's stock yet."""
        messages = (frames for link in self.network.busy for frames in link.queue)
        return (
            any(p.waits or p.chunks for p in self.prefills)
            or any(is_success(frames) for frames in messages)
            or bool(self.decode.read)
        )

    @property
    def _ended(self) -> list[Request]:
        """Open requests whose transfers have ended for stock."""
        return [request for request in self._in("open") if self.decode.ends(request)]

    @property
    def _due(self) -> list[tuple[Prefill, Request]]:
        """Requests that have not reached a prefill rank yet."""
        return [
            (prefill, request)
            for prefill in self.prefills
            for request in self.requests
            if (request.number, prefill.rank) not in self.arrived
        ]

    @property
    def _sending(self) -> list[tuple[Prefill, Served]]:
        return [(p, served) for p, served in self._served if p.may_send(served)]

    @property
    def _working(self) -> list[Prefill]:
        """Workers that can go on: none waits for the end of its write."""
        return [p for p in self.prefills if p.waits is None and (p.chunks or p.hand)]

    # -- what may happen --------------------------------------------------------------------

    @rule(data=st.data())
    def happens(self, data: st.DataObject) -> None:
        """Something that is in order: owners come, change their minds and go; things move."""
        self._one_of(lambda options: data.draw(st.sampled_from(options)), self._in_order)

    @rule(data=st.data())
    def goes_wrong(self, data: st.DataObject) -> None:
        self._one_of(lambda options: data.draw(st.sampled_from(options)), list(self._mishaps()))

    @rule(steps=st.integers(1, 6))
    def goes_on(self, steps: int) -> None:
        """For a while there is something to do, and all of it goes well."""
        if not self._in("open") and self._room_for(2):
            self._expose(ROOMS[0], 2)
        for _ in range(steps):
            if not self._next():
                return

    @rule(steps=st.integers(0, 6))
    def two_of_a_room(self, steps: int) -> None:
        """A running request comes back to its room, which another has taken by then."""
        if self._in("open") or not self._room_for(2):
            return
        self._expose(ROOMS[0], 1)
        self._go_on()
        if self._in("used") and self._room_for(2):
            self._expose(ROOMS[0], 1)
            for _ in range(steps):
                self._next()
            if self._room_for(0):
                self._come_back(self._in("used")[-1])

    @rule(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 40), calm=st.booleans())
    def much_happens(self, seed: int, steps: int, calm: bool) -> None:
        """All of the above by chance, which gets further than single events do."""
        chance = random.Random(seed)
        for _ in range(steps):
            kind = chance.choices(("on", "critical", "order", "wrong"), (35, 25, 30, 10))[0]
            if kind == "on":
                note(f"goes on: {(going := chance.randint(1, 6))}")
                self.goes_on(going)
            elif kind == "critical" and self._under_way:
                events = [*self._at_decode(), *(() if calm else self._mishaps())]
                self._one_of(chance.choice, [event for event in events if event[0] in CRITICAL])
            else:
                wrong = kind == "wrong" and not calm
                self._one_of(chance.choice, list(self._mishaps()) if wrong else self._in_order)
            self.only_its_own_slots_can_be_written_for_a_request()
            self.the_records_agree()

    @property
    def _in_order(self) -> list[Event]:
        return [*self._at_decode(), *self._at_prefills(), *self._on_the_way()]

    def _one_of(self, pick: Callable[[list[str]], str], events: list[Event]) -> None:
        """Any kind of event, however many there are of another."""
        if kinds := sorted({kind for kind, _, _ in events}):
            kind = pick(kinds)
            found = {which: do for of, which, do in events if of == kind}
            which = pick(list(found))
            note(f"{kind} {which}")
            found[which]()

    def _at_decode(self) -> Iterator[Event]:
        for room in ROOMS:
            for pages in range(1, 4):
                if self._room_for(pages):
                    which = f"r{len(self.requests)}, {pages} pages, room {room}"
                    yield "expose", which, partial(self._expose, room, pages)
                    yield "expose early", which, partial(self._expose, room, pages, arrives=False)
        for request in self._in("open"):
            yield "give up", f"r{request.number}", partial(self.decode.give_up, request)
            if self._room_for(request.pages):
                yield "retry", f"r{request.number}", partial(self._retry, request)
        for request in self._in("used"):
            if self._room_for(request.pages):
                yield "come back", f"r{request.number}", partial(self._come_back, request)
            yield "finish", f"r{request.number}", partial(self.decode.finish, request)
        if self._ended:
            yield "poll", "", self._poll
        if self.decode.guard.ledger.holding:
            for seconds in (0.0, 0.2, 6.0, 40.0):
                yield "tick", f"after {seconds} s", partial(self._tick, seconds)
        if self.decode.read:
            yield "count", "", self.decode.count

    def _at_prefills(self) -> Iterator[Event]:
        for prefill, request in self._due:
            which = f"r{request.number} at p{prefill.rank}"
            yield "arrive", which, partial(self._arrive, prefill, request)
        for prefill, served in self._sending:
            for pages in (1, 3):
                which = f"{pages} pages of r{served.request.number} at p{prefill.rank}"
                yield "send", which, partial(prefill.send, served, pages)
        for prefill in self._working:
            yield "work", f"p{prefill.rank}", prefill.run
        for prefill, served in self._served:
            if prefill.over(served):
                which = f"r{served.request.number} at p{prefill.rank}"
                yield "end", which, partial(prefill.end, served)
        for prefill in self.prefills:
            if prefill.guard._deferred:
                yield "listen", f"p{prefill.rank}", prefill.listen

    def _on_the_way(self) -> Iterator[Event]:
        for n, link in enumerate(self.network.links):
            if link.queue:
                yield "deliver", f"on {n}", partial(self._deliver, link)
                yield "deliver, and stock lags", f"on {n}", link.deliver
        for n, write in enumerate(self.network.writes):
            which = f"write {n} of p{write.rank} for r{write.request.number}"
            yield "land", which, partial(self._land, write)

    def _mishaps(self) -> Iterator[Event]:
        for n, link in enumerate(self.network.links):
            if link.queue:
                yield "lose", f"on {n}", partial(self._lose, link)
                yield "twice", f"on {n}", partial(link.queue.appendleft, list(link.queue[0]))
        for prefill, request in self._due:
            which = f"r{request.number} at p{prefill.rank}"
            yield "reject", which, partial(self._reject, prefill, request)
        for prefill in self.prefills:
            at = f"p{prefill.rank}"
            if prefill.waits is not None:
                yield "fail", at, partial(self._fail, prefill, lands=False)
                yield "fail, and may land", at, partial(self._fail, prefill, lands=True)
            if prefill.served:
                yield "die", at, partial(self._restart, prefill.rank)
            for served in prefill.served:
                which = f"r{served.request.number} at {at}"
                yield "time out", which, partial(prefill.fail, served.request.room)
                yield "abort", which, partial(prefill.abort, served)
                yield "abort, clear no sender", which, partial(prefill.drop, served)
                if not served.sent:
                    yield "reject", which, partial(setattr, served, "whole", False)
            for anew in (False, True):
                which = f"at {at}{' anew' * anew}"
                yield "register", which, partial(self.decode.register, prefill.rank, anew=anew)

    # -- how ----------------------------------------------------------------------------------

    def _room_for(self, pages: int) -> bool:
        tokens, metadata = self.decode.free
        return pages <= tokens and metadata > 0

    def _expose(self, room: int, pages: int, *, arrives: bool = True) -> None:
        """A request; `arrives`: it is at prefill before its destinations are sent.

        A client may name a room that is in use. Then decode refuses, and nothing is exposed.
        """
        if self.decode.guard.rooms.taken(room):
            return
        self._serve(room, pages, arrives=arrives)

    def _come_back(self, request: Request) -> None:
        """Stock retracts a running request and asks for its KV again, at its own room."""
        self.decode.finish(request)
        self._serve(request.room, request.pages)

    def _serve(self, room: int, pages: int, *, arrives: bool = True) -> None:
        request = Request(len(self.requests), room, pages)
        self.requests.append(request)
        if arrives:
            for prefill in self.prefills:
                self._arrive(prefill, request)
        self.decode.expose(request)

    def _retry(self, request: Request) -> None:
        """Its owner gives it up and makes it again, at the same room."""
        self.decode.give_up(request)
        self._expose(request.room, request.pages)

    def _arrive(self, prefill: Prefill, request: Request) -> None:
        self.arrived.add((request.number, prefill.rank))
        prefill.arrive(request)

    def _reject(self, prefill: Prefill, request: Request) -> None:
        self.arrived.add((request.number, prefill.rank))
        prefill.reject(request)

    def _poll(self) -> None:
        """Stock looks at its transfers, and ends those that have ended."""
        for request in self._in("open"):
            status = self.decode.poll(request)
            if status == SUCCESS:
                self.decode.commit(request)
            elif status == FAILED:
                self.decode.give_up(request)

    def _tick(self, seconds: float) -> None:
        self.clock += seconds
        self.decode.guard.tick()

    def _deliver(self, link: Link) -> None:
        link.deliver()
        while self.decode.read:
            self.decode.count()

    def _lose(self, link: Link) -> None:
        self.lost = True
        if greets(link.queue.popleft()):
            self.excused = "decode may not know who had its destinations"

    def _land(self, write: Write) -> None:
        prefill = next((p for p in self.prefills if p.waits is write), None)
        self.network.writes.remove(write)
        landed = self.decode.lands(write)
        if prefill is not None:
            prefill.run(0 if landed else -1)

    def _fail(self, prefill: Prefill, *, lands: bool) -> None:
        """A write is reported to have failed; it may still land."""
        if not lands:
            assert prefill.waits is not None, "offered only to one that waits"
            self.network.writes.remove(prefill.waits)
        prefill.run(-1)
        self.excused = "a write of unknown end"

    def _restart(self, rank: int) -> None:
        """A prefill dies and comes back at its address. What it posted is on the wire.

        What decode sent to it waits in the connection that is open, and in no other.
        """
        self.prefills[rank] = self._prefill(rank)
        for link in self.network.links:
            if link.target is self.decode.targets[rank] and link is not self.decode.links[rank]:
                link.queue.clear()
        self.excused = "the process that had the destinations is gone"

    # -- the oracle -------------------------------------------------------------------------

    @invariant()
    def only_its_own_slots_can_be_written_for_a_request(self) -> None:
        for write in self.network.writes:
            self.decode.check(write)

    @invariant()
    def the_records_agree(self) -> None:
        self.decode.guard.check_integrity()
        for prefill in self.prefills:
            prefill.guard._ledger.check_integrity()

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self._settle()
        finally:
            self.restored.close()

    def _settle(self) -> None:
        """Nothing more goes wrong: all that can end does, and every slot comes back."""
        self._go_on()
        self._nobody_waits_in_vain()
        for request in self._in("open"):
            if self.decode.landed(request):
                raise Harm(f"request {request.number} has its KV, and stock is not shown it")
            self.decode.give_up(request)
        for request in self._in("used"):
            self.decode.finish(request)
        if self.excused:
            for rank in range(len(self.prefills)):
                self.decode.register(rank, anew=False)
        for _ in range(5):
            for prefill, served in self._served:
                prefill.fail(served.request.room)
            self._go_on()
            self._tick(6.0)
            self.only_its_own_slots_can_be_written_for_a_request()
        self.the_records_agree()
        while self.network.writes:
            self._land(self.network.writes[0])
        if not self.excused and self.decode.free != (self.decode.tokens.size, self.decode.aux.size):
            raise Harm(f"free: {self.decode.free}; held: {self.decode.guard.report()['held']}")

    def _nobody_waits_in_vain(self) -> None:
        """An owner waits for what is still served, or has never come to prefill.

        Of one room's requests prefill may serve another than decode waits for (see above).
        """
        if self.lost or self.excused:
            return
        for request in self._in("open"):
            alone = [one.room for one in self.requests].count(request.room) == 1
            here = [p for p in self.prefills if (request.number, p.rank) in self.arrived]
            served = [one.request for p in here for one in p.served]
            if alone and served.count(request) < len(here):
                raise Harm(f"request {request.number} waits for what has ended")

    def _go_on(self) -> None:
        """A fair time without mishaps."""
        for _ in range(1000):
            if not self._next():
                return
        raise Harm("no rest")

    def _next(self) -> bool:
        """One thing happens that must happen some time. False: there is none."""
        if self.network.busy:
            self._deliver(self.network.busy[0])
        elif self.decode.read:
            self.decode.count()
        elif self._ended:
            self._poll()
        elif waiting := [p.waits for p in self.prefills if p.waits]:
            self._land(waiting[0])
        elif working := self._working:
            working[0].run()
        elif sending := self._sending:
            sending[0][0].send(sending[0][1], 2)
        elif due := self._due:
            self._arrive(*due[0])
        elif over := [(p, served) for p, served in self._served if p.over(served)]:
            over[0][0].end(over[0][1])
        else:
            return self._listened()
        return True

    def _listened(self) -> bool:
        """Whether any receive thread had something that may go on by now."""
        before = [len(p.guard._deferred) for p in self.prefills]
        for prefill in self.prefills:
            prefill.listen()
        return before != [len(p.guard._deferred) for p in self.prefills]
