"""What both ledgers keep in memory over very many requests of every kind: no server, no socket.

    landed            its KV arrives
    aborted           in mid-transfer, and asked about
    early             aborted before its request came to prefill
    poisoned          a write of it failed; decode holds its slots until its next fence
    never came        of a decode without the plugin, whose request never comes to prefill
    died              of a decode with the plugin that dies before it asks
    lost              asked about, and its destinations never came
    refused           decode does not take it, and its request never comes to prefill
    kept back         its room is in use when its destinations come
    crowded           many of one room while it is in use

Messages are calls here, in the order in which the adapters make them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import psutil

from sglang_scaling_fixes.reclaim.rules import attempts, forgotten
from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.reclaim.rules.coverage import Extent
from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.prefill_actions import Action, SendAck
from sglang_scaling_fixes.reclaim.rules.prefill_ledger import Delivery, PrefillLedger
from sglang_scaling_fixes.reclaim.rules.refused_rooms import REFUSED_MEMORY

RANK, TO, SESSION = "10.0.0.1:40001", "tcp://10.0.0.2:40002", "10.0.0.2:40003"
PREFILL = "prefill-process"
EXTENT = Extent(SESSION, 1, (), 1)
SHARES = {
    "landed": 57,
    "aborted": 12,
    "early": 5,
    "poisoned": 5,
    "never_came": 5,
    "died": 5,
    "lost": 3,
    "refused": 3,
    "kept_back": 4,
    "crowded": 1,
}
"""Of a hundred requests."""
FENCE_AFTER = 50
"""Poisoned requests until decode fences its memory."""
LIFE = 2000
"""Requests of `died` until their decode is replaced by another."""
ROOM_0, CROWD = 0, 20
"""The room that `crowded` uses, and how many at a time."""
CHECKPOINTS = 10
GROWTH_MIB = 8.0
"""Between the fourth checkpoint and the last; an interpreter's heap is not smoother."""


class Limits(NamedTuple):
    """As `Attempts` takes them."""

    memory: int = attempts.MEMORY
    unserved: int = attempts.UNSERVED
    kept_back: int = attempts.KEPT_BACK


DEFAULT = Limits()


def measure(
    requests: int, seed: int, say: Callable[[str], None], limits: Limits = DEFAULT
) -> dict[str, Any]:
    """The largest size of each table, and resident memory on the way."""
    traffic = Traffic(seed, limits)
    rss, largest = [], dict[str, int]()
    for part in range(1, CHECKPOINTS + 1):
        while traffic.made < requests * part // CHECKPOINTS:
            traffic.one()
            sizes = traffic.sizes()
            largest = {name: max(size, largest.get(name, 0)) for name, size in sizes.items()}
        traffic.prefill.check_integrity()
        traffic.decode.check_integrity()
        rss.append(round(psutil.Process().memory_info().rss / 2**20, 1))
        say(f"{traffic.made} requests: {rss[-1]} MiB, {sum(sizes.values())} entries")
    return {
        "requests": traffic.made,
        "seed": seed,
        "kinds": traffic.kinds,
        "rss_mib": rss,
        "growth_mib": round(rss[-1] - rss[3], 1),
        "largest": largest,
        "bounds": bounds(limits),
    }


def bounds(limits: Limits) -> dict[str, int]:
    """What each table may hold; here two senders at most are there at a time."""
    memory, unserved, kept_back = limits
    remembered = memory + memory + unserved + 2
    return {
        "prefill rooms": memory + unserved + 2,
        "prefill attempt_ids": remembered,
        "prefill leases": remembered,
        "prefill senders": 2,
        "prefill waiting": 2,
        "prefill finished": memory,
        "prefill unsent": memory,
        "prefill unserved": unserved,
        "prefill rooms_refused": REFUSED_MEMORY,
        "prefill rooms_ended": memory,
        "prefill kept": kept_back,
        "prefill poisoned": memory,
        "prefill refused": memory,
        "prefill horizons": 2 * forgotten.PROCESSES,
        "decode exposed": 1,
        "decode held": FENCE_AFTER,
    }


def exceeded(result: dict[str, Any]) -> list[str]:
    """What is not bounded as it should be, in words."""
    said = [
        f"{name}: {result['largest'][name]} entries, {bound} allowed"
        for name, bound in result["bounds"].items()
        if result["largest"][name] > bound
    ]
    if result["growth_mib"] > GROWTH_MIB:
        said.append(f"memory grew by {result['growth_mib']} MiB")
    return said


class Traffic:
    """One prefill rank, one decode rank that lives, and others that do not."""

    def __init__(self, seed: int, limits: Limits) -> None:
        self.prefill = PrefillLedger(PREFILL, **limits._asdict())
        self.decode = DecodeLedger("decode-process")
        self.decode.hello_acked(RANK, PREFILL)
        self.made = 0
        self.kinds = dict.fromkeys(SHARES, 0)
        self._chance = random.Random(seed)
        self._mortal = DecodeLedger("mortal-0")
        self._poisoned = self._crowd = 0
        self._waiting: dict[Hashable, Exposure] = {}

    def sizes(self) -> dict[str, int]:
        prefill = {f"prefill {name}": size for name, size in self.prefill.sizes().items()}
        held = len(self.decode.held)
        return {
            **prefill,
            "decode exposed": len(self.decode.exposures()) - held,
            "decode held": held,
        }

    def one(self) -> None:
        """One more request, of any kind."""
        (kind,) = self._chance.choices(list(SHARES), list(SHARES.values()))
        self.made += 1
        self.kinds[kind] += 1
        getattr(self, kind)(self.made)

    # -- the kinds ------------------------------------------------------------------------

    def landed(self, room: int) -> None:
        exposure = self._expose(room)
        self._bind(exposure)
        attempt = self._taken(room)
        self._write(attempt)
        self._lands(exposure, room)

    def aborted(self, room: int) -> None:
        exposure = self._expose(room)
        self._bind(exposure)
        attempt = self._taken(room)
        self.decode.give_up(exposure, float(self.made))
        self._abort(exposure)
        self._act(self.prefill.done(attempt))
        self._retire(room)
        self._return(exposure)

    def early(self, room: int) -> None:
        exposure = self._expose(room)
        self._bind(exposure)
        self.decode.give_up(exposure, float(self.made))
        self._abort(exposure)
        self._return(exposure)

    def poisoned(self, room: int) -> None:
        exposure = self._expose(room)
        self._bind(exposure)
        attempt = self._taken(room)
        self._act(self.prefill.failed(attempt, f"a write returned {-self._chance.randint(1, 9)}"))
        self._act(self.prefill.done(attempt))
        self._retire(room)
        self.decode.give_up(exposure, float(self.made))
        self._abort(exposure)
        assert exposure.unproven, "nothing but a fence ends it"
        self._poisoned += 1
        if self._poisoned % FENCE_AFTER == 0:
            self.decode.engine_made()
            self.decode.engines_closed()
            for held in self.decode.held:
                self._return(held)

    def never_came(self, room: int) -> None:
        source = f"tcp://10.0.0.3:{self._chance.randint(1024, 1032)}"
        self._act(self.prefill.bind_without_plugin(room, source, EXTENT)[1])

    def died(self, room: int) -> None:
        if self.kinds["died"] % LIFE == 0:
            self._mortal = DecodeLedger(f"mortal-{self.made}")
        self._bind(self._dies(room))
        if self._chance.random() < 0.5:  # its request comes all the same, and its write fails
            attempt = self._taken(room)
            self._act(self.prefill.failed(attempt, "a write returned -1"))
            self._act(self.prefill.done(attempt))
            self._retire(room)

    def lost(self, room: int) -> None:
        exposure = self._expose(room)
        self.decode.give_up(exposure, float(self.made))
        self._abort(exposure)
        self._return(exposure)

    def refused(self, room: int) -> None:
        self._act(self.prefill.refused(room, float(self.made)))

    def kept_back(self, room: int) -> None:
        first = self._expose(room)
        self._bind(first)
        attempt = self._taken(room)
        self.decode.give_up(first, float(self.made))
        second = self._expose(room)
        self._bind(second)
        refused = second.lease not in self._waiting
        self._abort(first)
        self._act(self.prefill.done(attempt))
        self._retire(room)
        self._return(first)
        self._let_in()
        assert second.lease not in self._waiting
        if refused:
            self.decode.give_up(second, float(self.made))
            self._abort(second)
            self._return(second)
            return
        self._write(self._taken(room))
        self._lands(second, room)

    def crowded(self, room: int) -> None:
        """The decode of all of them is no more. They wait until the next of this kind."""
        self._act(self.prefill.retire(self._crowd, ROOM_0))
        self._let_in()
        self._crowd = room
        self._bind(self._dies(ROOM_0))
        self._let_in()
        self._act(self.prefill.sender_made(room, ROOM_0))
        for _ in range(CROWD):
            self._bind(self._dies(ROOM_0))

    # -- their parts ------------------------------------------------------------------------

    def _expose(self, room: int) -> Exposure:
        exposure = self.decode.expose(room, [RANK])
        self.decode.sent(exposure, RANK)
        return exposure

    def _dies(self, room: int) -> Exposure:
        """Of a decode that is no more: nothing of it is left to be counted."""
        exposure = self._mortal.expose(room, [RANK])
        self._mortal.landed(exposure)
        return exposure

    def _let_in(self) -> None:
        """Those that wait for rooms which came free."""
        while (key := self.prefill.kept.next()) is not None:
            self._bind(self._waiting.pop(key))

    def _bind(self, exposure: Exposure) -> None:
        delivery, actions = self.prefill.bind(
            exposure.room, exposure.attempt_id, exposure.lease, TO, RANK, extent=EXTENT
        )
        self._act(actions)
        if delivery is Delivery.DEFER:
            self._waiting[exposure.lease] = exposure

    def _taken(self, room: int) -> Attempt:
        """The request comes to prefill, and a worker takes its one chunk."""
        self._act(self.prefill.sender_made(room, room))
        self.prefill.offer(room, 1, (), 1)
        attempt = self.prefill.put(room)
        assert attempt is not None and self.prefill.take(attempt, 1, True)
        return attempt

    def _write(self, attempt: Attempt) -> None:
        attempt.coverage.writes += [SESSION, SESSION]
        assert self.prefill.success_leaves(attempt, TO, bool)
        self._act(self.prefill.done(attempt))

    def _lands(self, exposure: Exposure, room: int) -> None:
        self._retire(room)
        self.decode.successes.tagged(exposure.lease, RANK)
        assert self.decode.successes.admits(exposure.room, exposure.lease)
        self.decode.landed(exposure)

    def _retire(self, room: int) -> None:
        self._act(self.prefill.retire(room, room))

    def _abort(self, exposure: Exposure) -> None:
        self._act(self.prefill.abort(exposure.room, exposure.lease, TO, RANK))

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, SendAck):
                self.decode.ack(action.rank, PREFILL, action.lease, action.verdict, action.reason)

    def _return(self, exposure: Exposure) -> None:
        assert not exposure.unproven
        self.decode.returned(exposure)
