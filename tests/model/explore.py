"""Every interleaving of a small world, breadth first, so that what is found is shortest.

python -m tests.model.explore [--big] [NAME ...]
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.model.world import Config, Met, Violation, World


@dataclass
class Found:
    """What an exploration saw."""

    states: int = 0
    transitions: int = 0
    terminal: int = 0
    seconds: float = 0.0
    complete: bool = True
    trace: list[str] = field(default_factory=list)
    """Events up to the first violation, the shortest there is. Empty: none."""
    violation: str = ""

    def __str__(self) -> str:
        return (
            f"{self.states} states, {self.transitions} transitions, {self.terminal} terminal, "
            f"{self.seconds:.1f} s{'' if self.complete else ' (cut off)'}"
        )


def explore(config: Config, *, limit: int = 10_000_000) -> Found:
    """Safety in every state, liveness from every terminal one. Stops at the first violation."""
    found = Found()
    began = time.perf_counter()
    start = World(config)
    parents: list[tuple[int, str]] = [(-1, "")]
    met: Met = {}
    seen = {start.key(met)}
    queue: deque[tuple[int, World]] = deque([(0, start)])

    def stop(index: int, event: str, why: str) -> Found:
        trace = [event] if event else []
        while index > 0:
            index, step = parents[index]
            trace.append(step)
        found.trace, found.violation = trace[::-1], why
        found.states, found.seconds = len(seen), time.perf_counter() - began
        return found

    while queue:
        index, world = queue.popleft()
        if vain := world.in_vain():
            return stop(index, "", f"Violation: {'; '.join(vain)}")
        if not world.progress():
            found.terminal += 1
            rest = world.clone()
            rest.settle()
            if late := rest.overdue():
                return stop(index, "", f"liveness: {'; '.join(late)}")
        for event in world.enabled():
            found.transitions += 1
            following = world.clone()
            try:
                following.step(event)
            except (Violation, AssertionError) as error:
                return stop(index, event, f"{type(error).__name__}: {error}")
            key = following.key(met)
            if key not in seen:
                if len(seen) >= limit:
                    found.complete = False
                    continue
                seen.add(key)
                parents.append((index, event))
                queue.append((len(parents) - 1, following))
    found.states, found.seconds = len(seen), time.perf_counter() - began
    return found


def reached(config: Config, met: Met) -> set[Any]:
    """The key of every world there is, and nothing else looked at. It must be safe."""
    start = World(config)
    seen = {start.key(met)}
    queue = deque([start])
    while queue:
        world = queue.popleft()
        for event in world.enabled():
            following = world.clone()
            following.step(event)
            if (key := following.key(met)) not in seen:
                seen.add(key)
                queue.append(following)
    return seen


def story(config: Config, trace: list[str]) -> str:
    """The trace with what each event led to: a counterexample to read."""
    world = World(config)
    lines = []
    for event in trace:
        lines.append(f"  {event}")
        try:
            world.step(event)
        except AssertionError as error:
            lines += [f"      {line}" for line in world.said]
            lines.append(f"      !!! {error}")
            return "\n".join(lines)
        lines += [f"      {line}" for line in world.said]
    return "\n".join(lines)


_REUSE = Config(rooms=(7, 7))

SMALL: dict[str, Config] = {
    "one request": Config(chunks=2, lose=1, swap=1, tick=2),
    "one request, dup": Config(dup=1, swap=1, tick=1),
    "failed write": Config(chunks=2, fail=1, tick=1),
    "failed write, unnoticed": Config(chunks=2, fail=1, shrugs=True),
    "failed write, helpers": Config(decodes=2, helpers=True, fail=1, tick=1),
    "room reuse": replace(_REUSE, tick=1),
    "room reuse, foreign": replace(_REUSE, foreign=True),
    "room reuse, dup": replace(_REUSE, dup=1),
    "room reuse, failed write": replace(_REUSE, fail=1),
    "room reuse, worker": replace(_REUSE, split_take=True, split_end=True, abort=1),
    "room reuse, receiver": replace(_REUSE, split_bind=True, drop=1),
    "room reuse, late failure": replace(_REUSE, split_fail=True),
    "room reuse, scheduler": replace(_REUSE, split_clear=True, drop=1),
    "room reuse, arrival": replace(_REUSE, late_arrival=True, split_made=True),
    "slot reuse": Config(rooms=(7, 8), slots=1, tick=1, lose=1),
    "crash": Config(rooms=(7, 8), slots=1, crash=1),
    "crash and fence": Config(crash=1, fence=1, lose=1),
    "crash, dup": Config(crash=1, dup=1),
    "crash, dup, lost": Config(crash=1, dup=1, lose=1),
    "two writers": Config(prefills=2, tick=1),
    "two writers, one silent": Config(prefills=2, plugged=(True, False), tick=1),
    "fan-in": Config(decodes=2, lose=1, tick=1),
    "prefill without the plugin": Config(rooms=(7, 7), plugged=(False,), fence=1),
    "decode without the plugin": Config(rooms=(7, 7), bare=(0,)),
    "decode without the plugin, later": Config(rooms=(7, 7), bare=(1,)),
    "unknown peer": Config(greeted=False, tick=1, lose=1),
    "decode restart": replace(_REUSE, restart=1),
    "short memory": replace(_REUSE, memory=1),
    "forgetful prefill": replace(_REUSE, forgetful=True, tick=1),
    "forgetful prefill, failed write": Config(chunks=2, forgetful=True, fail=1, tick=1),
    "forgetful prefill, dup": replace(_REUSE, forgetful=True, dup=1),
    "forgetful prefill, late requests": Config(
        rooms=(7, 8), forgetful=True, late_arrival=True, split_made=True
    ),
    "forgetful prefill, fan-in": Config(decodes=2, forgetful=True, lose=1, tick=1),
    "unknown peer, crash": Config(greeted=False, crash=1, tick=1, lose=2),
    "unknown peer, dup": Config(greeted=False, crash=1, dup=1),
    "decode's stock lags behind the verdict on a success": replace(_REUSE, split_admit=True),
    "unknown peer, stock lags": replace(_REUSE, greeted=False, split_admit=True),
    "stock prefill, decode's stock lags": replace(_REUSE, plugged=(False,), split_admit=True),
    "fence, slot reuse": Config(rooms=(7, 8), slots=1, fence=1),
    "short send": Config(chunks=2, short=1, tick=1),
    "short send, within a page": Config(short=1, lose=1, tick=1),
    "short send, one of two writers": Config(prefills=2, short=1),
    "short send, fan-in": Config(decodes=2, short=1),
    "short send, room reuse": replace(_REUSE, short=1),
    "chunk passed over": Config(chunks=2, skip=1, tick=1),
    "chunk passed over, fan-in": Config(chunks=2, decodes=2, skip=1),
    "ends on prefill": Config(chunks=2, abort=1, lose=1, tick=1),
    "ends on prefill, helpers": Config(abort=1, fail=1, helpers=True),
    "ends on prefill, dup": Config(abort=1, dup=1, swap=1),
    "ends on prefill, before its destinations": Config(
        late_arrival=True, abort=1, reject=1, lose=1, tick=1
    ),
    "ends on prefill, fan-in": Config(decodes=2, abort=1, lose=1),
    "ends on prefill, fan-in, before its destinations": Config(
        decodes=2, late_arrival=True, abort=1, reject=1
    ),
    "ends on prefill, one of two writers": Config(prefills=2, abort=1),
    "ends on prefill, crash": Config(abort=1, crash=1, tick=1),
    "ends on prefill, unknown peer, crash": Config(greeted=False, abort=1, crash=1, lose=1),
    "ends on prefill, room reuse": replace(_REUSE, late_arrival=True, abort=1, reject=1),
    "ends on prefill, slot reuse": Config(rooms=(7, 8), slots=1, abort=1, lose=1),
    "ends on prefill, never cleared": Config(chunks=2, drop=1, abort=1, split_clear=True),
}
"""What continuous integration explores completely, one world at a time. Three requests at
two prefill ranks are 2.4 thousand million worlds: `tests.model.factored` explores those."""

BIG: dict[str, Config] = {
    "crash and fence, later": Config(crash=1, fence=1, tick=1, lose=1),
    "fence, stock lags": replace(_REUSE, fence=1, split_admit=True),
    "fence, room reuse": replace(_REUSE, fence=1),
    "room reuse, lost": replace(_REUSE, tick=1, lose=1),
    "room reuse, fan-in": replace(_REUSE, decodes=2),
    "room reuse, everything": replace(_REUSE, tick=1, lose=1, dup=1, swap=1, fail=1),
    "room reuse, all threads": replace(
        _REUSE,
        split_take=True,
        split_end=True,
        split_bind=True,
        split_clear=True,
        split_fail=True,
        split_made=True,
        late_arrival=True,
    ),
    "three requests": Config(rooms=(7, 7, 8), tick=1, lose=1),
    "crash, asked again": Config(rooms=(7, 8), slots=1, crash=1, tick=1),
    "two writers, crash": Config(rooms=(7, 8), prefills=2, crash=1, tick=1, lose=1, slots=1),
}

CONTROLS: dict[str, Config] = {
    "no gate": Config(gate=False),
    "no leases": replace(_REUSE, leases=False, tick=1),
    "no poison": Config(poison=False, fail=1),
    "a forgotten failed write is unknown": Config(forgetful=True, tombstones=False, fail=1, tick=1),
    "forgotten destinations are taken again": replace(
        _REUSE, forgetful=True, tombstones=False, dup=1
    ),
    "no marks": replace(_REUSE, marks=False, masks=False),
    "polls are not masked": replace(_REUSE, split_admit=True, masks=False),
    "Hellos are not numbered": Config(greeted=False, crash=1, lose=2, tick=1, numbered=False),
    "a fence that stops nothing": Config(fence=1, stops=False),
    "old destinations forgotten outside the lock": replace(
        _REUSE, split_bind=True, split_forget=True, drop=1
    ),
    "short sends count as successes": Config(chunks=2, short=1, covers=False),
    "short sends within a page count as successes": Config(short=1, covers=False),
    "chunks passed over count as written": Config(chunks=2, skip=1, covers=False),
    "an ending is told before the last write is over": Config(abort=1, patient=False),
    "an ending is told after a success": Config(remembers=False),
    "a poisoned ending counts as proof": Config(fail=1, weighs=False),
    "no ending is told": Config(abort=1, tells=False),
}
"""One rule off: the exploration must find the corruption, or it proves nothing."""


def is_harm(control: Config, violation: str) -> bool:
    """Whether this is what this one of `CONTROLS` must lead to."""
    return any(words in violation for words in _harms(control))


def _harms(control: Config) -> tuple[str, ...]:
    if not control.tells:
        return ("waits in vain",)
    twice = "which it had reported a success of"
    if not control.remembers:
        return (twice,)
    written = "can still land" if control.covers else "never wrote chunk"
    # Destinations taken again are told, too, that their request has ended.
    return (written, twice) if not control.tombstones else (written,)


OPEN: dict[str, Config] = {
    "a prefill without the plugin sends short": Config(chunks=2, plugged=(False,), short=1),
    "decode restarts, prefill runs without the plugin": replace(
        _REUSE, plugged=(False,), restart=1
    ),
    "a room's requests come in another order than its destinations": replace(
        _REUSE, late_arrival=True, foreign=True
    ),
    "a room's first destinations are lost": replace(_REUSE, lose=1, foreign=True),
    "a question overtakes its destinations into a crash": replace(
        _REUSE, crash=1, swap=1, late_arrival=True
    ),
}
"""What the ledger or its adapters do not withstand today. Each must still be found;
one that is no longer found belongs into SMALL. The last breaks what the ledger assumes
of the transport."""

RANDOM: dict[str, Config] = {
    "one room, four times": Config(
        rooms=(7, 7, 7, 7),
        chunks=2,
        split_take=True,
        split_end=True,
        split_bind=True,
        split_clear=True,
        split_fail=True,
        split_made=True,
        late_arrival=True,
        drop=1,
        lose=2,
        dup=2,
        swap=2,
        tick=4,
        fail=1,
        abort=2,
        reject=1,
    ),
    "one room, two ranks, revived": Config(
        rooms=(7, 7, 7),
        decodes=2,
        slots=3,
        memory=1,
        failed_is_final=False,
        split_bind=True,
        split_clear=True,
        lose=1,
        tick=4,
        abort=1,
        drop=1,
    ),
    "crashes and fences": Config(
        rooms=(7, 7, 8),
        split_admit=True,
        chunks=2,
        lose=2,
        tick=4,
        fail=1,
        crash=2,
        fence=2,
    ),
    "two by two": Config(
        rooms=(7, 8),
        chunks=2,
        decodes=2,
        prefills=2,
        helpers=True,
        lose=2,
        dup=1,
        swap=1,
        tick=4,
        fail=1,
    ),
    "one slot": Config(
        rooms=(7, 8, 9, 10), slots=1, chunks=2, lose=2, dup=2, swap=2, tick=4, fail=1
    ),
    "mixed fleet": Config(
        rooms=(7, 8, 9), prefills=2, plugged=(True, False), chunks=2, tick=4, fail=1
    ),
    "decode restarts": Config(
        rooms=(7, 7, 8, 7),
        restart=2,
        lose=2,
        tick=4,
        abort=1,
    ),
    "unknown peers": Config(
        rooms=(7, 7, 8),
        prefills=2,
        greeted=False,
        split_admit=True,
        late_arrival=True,
        lose=2,
        tick=4,
        abort=1,
        reject=1,
    ),
}
"""Too many states to visit all; random schedules do."""


def schedule(config: Config, pick: Callable[[list[str]], str], steps: int = 120) -> list[str]:
    """One schedule and its fair end. Returns its events; raises on a violation, with them."""
    world = World(config)
    world.private = True
    trace: list[str] = []
    try:
        for _ in range(steps):
            if not (events := world.enabled()):
                break
            trace.append(pick(events))
            world.step(trace[-1])
        world.settle()
    except AssertionError as error:
        raise Violation(f"{error}\n{story(config, trace)}") from error
    if late := world.overdue():
        raise Violation(f"liveness: {'; '.join(late)}\n{story(config, trace)}")
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--big", action="store_true", help="the larger bounds (minutes)")
    parser.add_argument("--limit", type=int, default=3_000_000, help="states per configuration")
    parser.add_argument("names", nargs="*", help="only these")
    args = parser.parse_args()
    chosen = {**SMALL, **CONTROLS, **OPEN, **(BIG if args.big else {})}
    for name, config in chosen.items():
        if args.names and name not in args.names:
            continue
        found = explore(config, limit=args.limit)
        print(f"{name}: {found}", flush=True)
        if found.violation:
            print(f"  {found.violation}\n{story(config, found.trace)}", flush=True)


if __name__ == "__main__":
    main()
