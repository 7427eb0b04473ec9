"""Every interleaving of worlds with several prefill ranks, without multiplying them out.

Prefill ranks share nothing with each other: each meets decode alone, through its own
channels. So once it is fixed what decode and the network did (who was told what, which
message was taken when, what went wrong), what one rank can have done by itself meanwhile
does not depend on what another has. A *node* here is

    core       decode and all there is one of: requests, slots, what may still go wrong
    per rank   the set of all the states (process, channels, writes on the wire) it can
               be in, after what decode and the network did

and stands for every combination. All worlds of a node can be reached, and every world
that can is in some node: this leaves nothing out and adds nothing. Nodes are visited
breadth first. A set depends on one rank and on what it met, so there are few of them,
and each step of a rank is computed once however many worlds it is a step of.

`World` does everything: a core is a world whose prefill ranks are away, a side a world
with one prefill rank, to which decode is away. What is away has no attributes, so a rule
that looked there would not go unnoticed.

Requests with a room of their own are alike until they are exposed, and no part of the
world names one before: of those only the first may be exposed. Leases, slots and
rooms of what follows are the same with the requests renamed.

python -m tests.model.factored [--big] [NAME ...]
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tests.model.world import (
    BUDGETED,
    Config,
    Met,
    Msg,
    Prefill,
    World,
    canonical,
    decode_key,
    prefill_key,
)

Label = tuple[Any, ...]
"""What a side does with the core's part in it: `("deliver", channel, message)`, or the
kind of a mishap, which comes out of the budget; with "lose", of which message too."""


class Away(NamedTuple):
    """All that decode's part of the world sees of a prefill rank."""

    name: str
    life: int = 0


class Reachable(NamedTuple):
    """All that a prefill rank's part of the world sees of a decode rank."""

    epoch: int = 0
    admitted: tuple[()] = ()


class Told(NamedTuple):
    """What a step of the core means to one side, in this order."""

    cut: tuple[str, ...] = ()
    leases: tuple[tuple[str, int], ...] = ()
    messages: tuple[tuple[str, Msg], ...] = ()
    arrivals: tuple[int, ...] = ()


NOTHING = Told()


class Core(World):
    """Decode, its requests, and the budgets."""

    prefills: dict[str, Away]  # type: ignore[assignment]
    told: dict[str, Told]
    symmetric: bool

    def event(self, event: str) -> Core:
        """The core after `event`; `told` says what of it the sides have to learn."""
        twin = self._twin()
        twin.step(event)
        new = tuple((g, i) for g, i in twin.leases.items() if g not in self.leases)
        if new:
            twin.told = {p: told._replace(leases=new) for p, told in twin.told.items()}
        return twin

    def shared(self, p: str, label: Label) -> Core | None:
        """The core after `p` did something with its part in it. None: not any more."""
        kind, *args = label
        if kind == "deliver":
            channel, message = args
            twin = self._twin()
            twin.channels = {channel: (message,)}
            twin.step(f"deliver {channel}")
            twin.channels = {}
            return twin
        if not self.left[kind]:
            return None
        twin = self._twin()
        twin.left = {**self.left, kind: self.left[kind] - 1}
        twin.lost |= set(args)
        if kind == "crash":
            twin.prefills[p] = Away(p, self.prefills[p].life + 1)
            twin.strange |= {(d, p) for d in twin.decodes}
        return twin

    def events(self) -> Iterator[str]:
        """What it can do without a side."""
        yield from self.rest()
        yield from self._asked_again()
        yield from self._at_decodes()

    def rest(self) -> Iterator[str]:
        """Its part of `progress`."""
        yield from self._owner_events()
        yield from (f"register {d} {p}" for d, p in sorted(self.strange))
        yield from (f"count {d.name}" for d in self.decodes.values() if d.admitted)

    def identity(self, met: Met) -> Any:
        for d in self.decodes:
            self.decodes[d] = canonical(self.decodes[d], decode_key, met)
        return (
            self.request,
            *self.left.values(),
            *(d.number for d in self.decodes.values()),
            self.strange,
            self.lost,
            self.back,
            frozenset(self.leases.items()),
            frozenset(self.exposed_in.items()),
            *self.prefills.values(),
        )

    def _twin(self) -> Core:
        twin = self.clone()
        assert isinstance(twin, Core)
        twin.told = dict.fromkeys(self.prefills, NOTHING)
        return twin

    def _exposable(self, i: int) -> bool:
        earlier = range(i) if self.symmetric and self._alone(i) else ()
        return super()._exposable(i) and not any(
            self.request[j] == "new" and self._alone(j) for j in earlier
        )

    def _alone(self, i: int) -> bool:
        """A request like any other of its kind, until it is exposed."""
        rooms = self.config.rooms
        named = self.config.late_arrival or i in self.config.bare
        return rooms.count(rooms[i]) == 1 and not named

    def _send(self, source: str, target: str, message: Msg, stock: bool = False) -> None:
        told = self.told[target]
        sent = (*told.messages, (f"{source}>{target}", message))
        self.told[target] = told._replace(messages=sent)

    def _prefill(self, name: str) -> Any:
        return self.prefills[name]

    def _arrive(self, i: int, p: Any) -> None:
        told = self.told[p.name]
        self.told[p.name] = told._replace(arrivals=(*told.arrivals, i))

    def _cut_off(self, name: str) -> None:
        self.told = {p: told._replace(cut=(*told.cut, name)) for p, told in self.told.items()}


class Side(World):
    """One prefill rank, its channels and its writes on the wire."""

    decodes: dict[str, Reachable]  # type: ignore[assignment]
    rank: str
    broken: str = ""
    """What went wrong on the way here. Nothing follows."""

    def hear(self, told: Told) -> Side:
        twin = self._twin()
        for d in told.cut:
            twin.decodes[d] = Reachable(twin.decodes[d].epoch + 1)
            twin._cut_off(d)
        twin.leases = {**twin.leases, **dict(told.leases)}
        for channel, message in told.messages:
            twin.channels[channel] = (*twin.channels[channel], message)
        for i in told.arrivals:
            twin._arrive(i, twin._prefill(twin.rank))
        return twin

    def event(self, event: str) -> Side:
        twin = self._twin()
        if (channel := self._given(event)) is not None:
            twin.channels[channel] = self.channels[channel][1:]
            return twin
        try:
            twin.step(event)
        except AssertionError as error:
            twin.broken = f"{type(error).__name__}: {event}: {error}"
        twin.strange, twin.lost, twin.left = self.strange, self.lost, self.left  # the core's
        return twin

    def own(self) -> list[str]:
        """Events nobody else has a part in."""
        return [e for e in self.progress() if self._given(e) is None] if not self.broken else []

    def given(self) -> Iterator[tuple[Label, str]]:
        """Events that decode or the budget has a part in."""
        if self.broken:
            return
        for event in self.progress():
            if (channel := self._given(event)) is not None:
                yield ("deliver", channel, self.channels[channel][0]), event
        for event in [*self._on_the_way(), *self._at_prefills()]:
            kind, at, *_ = event.split()
            yield (kind, self.channels[at][0].kind) if kind == "lose" else (kind,), event

    def identity(self, met: Met) -> Any:
        self.prefills[self.rank] = canonical(self.prefills[self.rank], prefill_key, met)
        return (
            self.prefills[self.rank].number,
            *self.channels.values(),
            frozenset(self.wire),
            frozenset(self.leases.items()),
            self.arrived,
            *self.decodes.values(),
            self.broken,
        )

    def _given(self, event: str) -> str | None:
        """The channel to decode whose message it delivers, if it does."""
        name, *args = event.split()
        at_decode = name == "deliver" and args[0].replace("*", ">").split(">")[1] in self.decodes
        return args[0] if at_decode else None

    def _twin(self) -> Side:
        twin = self.clone()
        assert isinstance(twin, Side)
        return twin

    def _owner_events(self) -> list[str]:
        return []

    def _owner(self, write: Any) -> str:
        return str(write.lease)  # decode knows; `Nodes.wrong` looks before it can land


# Splitting a world and putting it together again.


def core_of(world: World, symmetric: bool) -> Core:
    core = object.__new__(Core)
    core.__dict__.update(world.clone().__dict__)
    core.prefills = {name: Away(name) for name in world.prefills}
    core.channels, core.wire = {}, ()
    del core.arrived  # the sides'
    core.symmetric = symmetric
    core.told = dict.fromkeys(world.prefills, NOTHING)
    return core


def side_of(world: World, rank: str) -> Side:
    side = object.__new__(Side)
    side.__dict__.update(world.clone().__dict__)
    side.rank = rank
    side.prefills = {rank: world.prefills[rank]}
    side.decodes = {d: Reachable() for d in world.decodes}
    side.channels = {c: q for c, q in world.channels.items() if rank in c}
    del side.request, side.exposed_in  # the core's
    side.left = {name: getattr(world.config, name) for name in BUDGETED}
    return side


def whole(start: World, core: Core, sides: Iterable[Side]) -> World:
    """The world they are the parts of, as `start` is one."""
    world = object.__new__(World)
    world.__dict__.update(core.clone().__dict__)
    world.arrived = frozenset()
    prefills: dict[str, Prefill] = {}
    channels = dict(start.channels)
    for side in sides:
        prefills |= side.prefills
        channels |= side.channels
        world.wire += side.wire
        world.arrived |= side.arrived
    world.prefills, world.channels = prefills, channels
    return world


class Ranks:
    """Everything a prefill rank can be, and the sets of it. All are numbers here."""

    def __init__(self, start: Side, met: Met) -> None:
        self._met = met
        self.labels: list[Label] = []
        self._label_numbers: dict[Label, int] = {}
        self.told: list[Told] = [NOTHING]
        self._told_numbers = {NOTHING: 0}
        self.states: list[Side] = []
        self._numbers: dict[Any, int] = {}
        self.sets: list[frozenset[int]] = []
        self._set_numbers: dict[frozenset[int], int] = {}
        self._own: dict[int, tuple[int, ...]] = {}
        self._gives: dict[int, dict[int, tuple[int, ...]]] = {}
        self._hears: dict[tuple[int, int], int] = {}
        self._given: dict[int, dict[int, int]] = {}
        self._after: dict[tuple[int, int], int] = {}
        self._watched: dict[int, tuple[frozenset[str], str]] = {}
        self._resting: dict[int, tuple[int, ...]] = {}
        self.start = self._closed({self._number(start)})

    def word(self, told: Told) -> int:
        """The number of what the core told it."""
        return numbered(self._told_numbers, self.told, told)

    def _number(self, side: Side) -> int:
        return numbered(self._numbers, self.states, side.identity(self._met), side)

    def _closed(self, states: Iterable[int]) -> int:
        """The set of all it can get to by itself from `states`."""
        found = set(states)
        waiting = list(found)
        while waiting:
            for state in self._follow(waiting.pop()):
                if state not in found:
                    found.add(state)
                    waiting.append(state)
        return numbered(self._set_numbers, self.sets, frozenset(found))

    def _follow(self, state: int) -> tuple[int, ...]:
        """The states one event of its own away."""
        if (found := self._own.get(state)) is None:
            side = self.states[state]
            found = self._own[state] = tuple(self._number(side.event(e)) for e in side.own())
        return found

    def given(self, members: int) -> dict[int, int]:
        """Label -> the set after it, for all that one of `members` can do."""
        if (found := self._given.get(members)) is None:
            targets: dict[int, set[int]] = {}
            for state in self.sets[members]:
                for label, after in self._give(state).items():
                    targets.setdefault(label, set()).update(after)
            found = {label: self._closed(after) for label, after in targets.items()}
            self._given[members] = found
        return found

    def _give(self, state: int) -> dict[int, tuple[int, ...]]:
        if (found := self._gives.get(state)) is None:
            found = self._gives[state] = {}
            side = self.states[state]
            for label, event in side.given():
                number = numbered(self._label_numbers, self.labels, label)
                found[number] = (*found.get(number, ()), self._number(side.event(event)))
        return found

    def after(self, members: int, word: int) -> int:
        """The set after the core told it something."""
        if not word:
            return members
        if (found := self._after.get((members, word))) is None:
            found = self._closed({self._take(state, word) for state in self.sets[members]})
            self._after[members, word] = found
        return found

    def _take(self, state: int, word: int) -> int:
        if (found := self._hears.get((state, word))) is None:
            found = self._number(self.states[state].hear(self.told[word]))
            self._hears[state, word] = found
        return found

    def watched(self, members: int) -> tuple[frozenset[str], str]:
        """In any of them: leases something on the wire is for, and what is wrong."""
        if (found := self._watched.get(members)) is None:
            states = [self.states[state] for state in self.sets[members]]
            found = self._watched[members] = (
                frozenset(write.lease for side in states for write in side.wire),
                next((side.broken for side in states if side.broken), ""),
            )
        return found

    def resting(self, members: int) -> tuple[int, ...]:
        """Those in which nothing is left to happen."""
        if (found := self._resting.get(members)) is None:
            at_rest = (s for s in self.sets[members] if not self.states[s].progress())
            found = self._resting[members] = tuple(at_rest)
        return found


def numbered(numbers: dict[Any, int], things: list[Any], key: Any, thing: Any = None) -> int:
    """Where in `things` the one with this key is. It is put there if it is new."""
    number = numbers.setdefault(key, len(things))
    if number == len(things):
        things.append(key if thing is None else thing)
    return number


@dataclass
class Factored:
    """What an exploration saw."""

    nodes: int = 0
    moves: int = 0
    worlds: int = 0
    """All the combinations in all the nodes; one that is in two nodes counts twice."""
    terminal: int = 0
    seconds: float = 0.0
    complete: bool = True
    trace: list[str] = field(default_factory=list)
    """What decode and the network did up to the first violation, the shortest there is."""
    violation: str = ""

    def __str__(self) -> str:
        return (
            f"{self.nodes} nodes for {self.worlds} worlds, {self.moves} moves, "
            f"{self.terminal} terminal, {self.seconds:.1f} s{'' if self.complete else ' (cut off)'}"
        )


Node = tuple[int, ...]
"""Core, then a set of each prefill rank."""
Move = str | tuple[int, int]
"""An event of the core; or which rank, and the number of its label."""
Step = tuple[int, tuple[int, ...] | None]
"""The core after it and the word to each rank, None: nothing to any."""


class Nodes:
    """The nodes of one world."""

    def __init__(self, config: Config, *, symmetric: bool = True, met: Met | None = None) -> None:
        assert not config.restart, "a decode that restarts takes its channels with it"
        start = self.origin = World(config)
        self.met: Met = {}
        self.cores: list[Core] = []
        self._numbers: dict[Any, int] = {}
        self._events: dict[int, list[tuple[str, Step]]] = {}
        self._shared: dict[int, list[dict[int, Step | None]]] = {}
        self._at_rest: dict[int, bool] = {}
        self.names = tuple(start.prefills)
        self.ranks = [Ranks(side_of(start, name), self.met) for name in self.names]
        core = self._number(core_of(start, symmetric))
        self.start: Node = (core, *(ranks.start for ranks in self.ranks))

    def _number(self, core: Core) -> int:
        return numbered(self._numbers, self.cores, core.identity(self.met), core)

    def _step(self, core: Core) -> Step:
        told = zip(self.ranks, self.names, strict=True)
        words = tuple(ranks.word(core.told[name]) for ranks, name in told)
        return self._number(core), words if any(words) else None

    def moves(self, node: Node) -> Iterator[tuple[Move, Node]]:
        """What decode or the network can do next. Raises `AssertionError` as the ledgers do."""
        core, *sets = node
        if (events := self._events.get(core)) is None:
            world = self.cores[core]
            events = [(event, self._step(world.event(event))) for event in world.events()]
            self._events[core], self._shared[core] = events, [{} for _ in self.ranks]
        for event, step in events:
            yield event, self._stepped(step, sets)
        for at, shared in enumerate(self._shared[core]):
            for number, members in self.ranks[at].given(sets[at]).items():
                if number not in shared:
                    shared[number] = self._share(core, at, number)
                if (found := shared[number]) is not None:
                    given = [*sets[:at], members, *sets[at + 1 :]]
                    yield (at, number), self._stepped(found, given)

    def _share(self, core: int, at: int, number: int) -> Step | None:
        after = self.cores[core].shared(self.names[at], self.ranks[at].labels[number])
        return None if after is None else self._step(after)

    def _stepped(self, step: Step, sets: list[int]) -> Node:
        core, words = step
        if words is None:
            return core, *sets
        parts = zip(self.ranks, sets, words, strict=True)
        return core, *[ranks.after(members, word) for ranks, members, word in parts]

    def story(self, move: Move) -> str:
        """A move in words."""
        if isinstance(move, str):
            return move
        at, number = move
        return f"{self.names[at]}: {' '.join(map(str, self.ranks[at].labels[number]))}"

    def wrong(self, node: Node) -> str:
        """The invariant, in all worlds of `node`."""
        core, *sets = node
        back = self.cores[core].back
        for ranks, members in zip(self.ranks, sets, strict=True):
            writing, why = ranks.watched(members)
            if not back.isdisjoint(writing):
                late = ", ".join(sorted(back & writing))
                return f"Violation: a write for {late} can still land, but its slot is back"
            if why:
                return why
        return ""

    def worlds(self, node: Node, *, resting: bool = False) -> Iterator[Node]:
        """(core, state, state) of all the worlds of `node`, or of those where nothing is left."""
        core, *sets = node
        if resting and not self._rests(core):
            return
        combined: list[Node] = [(core,)]
        for ranks, members in zip(self.ranks, sets, strict=True):
            states = ranks.resting(members) if resting else ranks.sets[members]
            combined = [(*some, state) for some in combined for state in states]
        yield from combined

    def _rests(self, core: int) -> bool:
        if (found := self._at_rest.get(core)) is None:
            found = self._at_rest[core] = not any(self.cores[core].rest())
        return found

    def world(self, parts: Node) -> World:
        core, *states = parts
        sides = [ranks.states[s] for ranks, s in zip(self.ranks, states, strict=True)]
        return whole(self.origin, self.cores[core], sides)

    def size(self, node: Node) -> int:
        """How many worlds it stands for."""
        size = 1
        for ranks, members in zip(self.ranks, node[1:], strict=True):
            size *= len(ranks.sets[members])
        return size


def explore_factored(
    config: Config, *, limit: int = 50_000_000, symmetric: bool = True
) -> Factored:
    """Safety in every world, liveness from every terminal one. Stops at the first violation."""
    began = time.perf_counter()
    gc.disable()  # all that is found is kept; it would be looked through again and again
    try:
        found = _explore(Nodes(config, symmetric=symmetric), limit)
    finally:
        gc.enable()
    found.seconds = time.perf_counter() - began
    return found


def _explore(nodes: Nodes, limit: int) -> Factored:
    found = Factored()
    parents: dict[Node, Node | None] = {nodes.start: None}
    queue: deque[Node] = deque([nodes.start])
    ended: set[Node] = set()

    def finished(node: Node | None = None, why: str = "") -> Factored:
        trace: list[str] = []
        while node is not None and (before := parents[node]) is not None:
            move = next(move for move, after in nodes.moves(before) if after == node)
            trace.append(nodes.story(move))
            node = before
        found.trace, found.violation = trace[::-1], why
        found.nodes, found.terminal = len(parents), len(ended)
        return found

    while queue:
        node = queue.popleft()
        found.worlds += nodes.size(node)
        if why := nodes.wrong(node):
            return finished(node, why)
        for parts in nodes.worlds(node, resting=True):
            if parts not in ended:
                ended.add(parts)
                rest = nodes.world(parts)
                rest.settle()
                if late := rest.overdue():
                    return finished(node, f"liveness: {'; '.join(late)}")
        try:
            for _, following in nodes.moves(node):
                found.moves += 1
                if following not in parents:
                    if len(parents) >= limit:
                        found.complete = False
                        continue
                    parents[following] = node
                    queue.append(following)
        except AssertionError as error:
            return finished(node, f"{type(error).__name__}: {error}")
    return finished()


_REUSE = Config(rooms=(7, 7), prefills=2)
_THREE = Config(rooms=(7, 7, 7), prefills=2)

QUICK_S: dict[str, Config] = {
    "three requests, two ranks": _THREE,
    "two rooms, two ranks": Config(rooms=(7, 8), prefills=2),
    "room reuse, two ranks, a message lost": replace(_REUSE, lose=1),
    "room reuse, two ranks, a message overtaken": replace(_REUSE, swap=1),
    "room reuse, two ranks, asked again": replace(_REUSE, tick=1),
    "room reuse, two ranks, a failed write": replace(_REUSE, fail=1),
}
"""What continuous integration explores completely."""

BIG: dict[str, Config] = {
    "three requests, two ranks, a failed write": replace(_THREE, fail=1),
    "three requests, two ranks, a message lost": replace(_THREE, lose=1),
    "three requests, two ranks, a message overtaken": replace(_THREE, swap=1),
    "three requests, two ranks, asked again": replace(_THREE, tick=1),
    "room reuse, two ranks, a crash": replace(_REUSE, crash=1),
    "room reuse, two ranks, a message twice": replace(_REUSE, dup=1),
    "room reuse, two ranks, a fence": replace(_REUSE, fence=1),
    "three rooms, two ranks": Config(rooms=(7, 8, 9), prefills=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--big", action="store_true", help="the larger bounds (minutes each)")
    parser.add_argument("--limit", type=int, default=20_000_000, help="nodes per world")
    parser.add_argument("names", nargs="*", help="only these")
    args = parser.parse_args()
    for name, config in {**QUICK_S, **(BIG if args.big else {})}.items():
        if not args.names or name in args.names:
            found = explore_factored(config, limit=args.limit)
            print(f"{name}: {found}", flush=True)
            if found.violation:
                print("\n  ".join((f"  {found.violation}", *found.trace)), flush=True)


if __name__ == "__main__":
    main()
