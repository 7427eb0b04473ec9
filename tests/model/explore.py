"""Every interleaving of a small world, breadth first, so that what is found is shortest.

python -m tests.model.explore [--big] [NAME ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import deque
from dataclasses import dataclass, field

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


SMALL: dict[str, Config] = {
    "one request": Config(chunks=2, lose=1, dup=1, swap=1, tick=2),
    "failed write": Config(chunks=2, fail=1, tick=1),
    "failed write, helpers": Config(decodes=2, helpers=True, fail=1, tick=1),
    "room reuse": Config(rooms=(7, 7), tick=1, lose=1, late_success=False),
    "room reuse, dup": Config(rooms=(7, 7), dup=1, late_success=False),
    "slot reuse": Config(rooms=(7, 8), slots=1, tick=1, lose=1),
    "crash": Config(rooms=(7, 8), slots=1, crash=1, tick=1),
    "crash and fence": Config(crash=1, fence=1, tick=1, lose=1),
    "two writers": Config(prefills=2, tick=1, lose=1),
    "two writers, one silent": Config(prefills=2, plugged=(True, False), tick=1),
    "fan-in": Config(decodes=2, lose=1, tick=1),
    "stranger": Config(rooms=(7, 7), plugged=(False,), late_success=False),
    "unknown peer": Config(greeted=False, tick=1, lose=1),
}
"""What continuous integration explores completely."""

BIG: dict[str, Config] = {
    "room reuse, everything": Config(rooms=(7, 7), chunks=2, tick=1, lose=1, dup=1, swap=1),
    "three requests": Config(rooms=(7, 7, 8), tick=1, lose=1, crash=1),
    "fan-in, room reuse": Config(rooms=(7, 7), decodes=2, lose=1, tick=1),
    "two writers, crash": Config(rooms=(7, 8), prefills=2, crash=1, tick=1, lose=1, slots=1),
}


def control(config: Config, **switched_off: bool) -> Config:
    return dataclasses.replace(config, **switched_off)  # type: ignore[arg-type]


CONTROLS: dict[str, Config] = {
    "no gate": Config(gate=False),
    "no generations": Config(rooms=(7, 7), generations=False, tick=1, late_success=False),
    "no poison": Config(poison=False, fail=1),
}
"""One rule off: the exploration must find the corruption, or it proves nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--big", action="store_true", help="the larger bounds (minutes)")
    parser.add_argument("--limit", type=int, default=3_000_000, help="states per configuration")
    parser.add_argument("names", nargs="*", help="only these")
    args = parser.parse_args()
    chosen = {**SMALL, **CONTROLS, **(BIG if args.big else {})}
    for name, config in chosen.items():
        if args.names and name not in args.names:
            continue
        found = explore(config, limit=args.limit)
        print(f"{name}: {found}", flush=True)
        if found.violation:
            print(f"  {found.violation}\n{story(config, found.trace)}", flush=True)


if __name__ == "__main__":
    main()
