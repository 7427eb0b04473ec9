"""Races as text: a script of events with what each of them leads to, in one file.

    # Comments tell the story.
    world rooms=7,7 tick=2        the first command: fields of `Config`
    ----

    expose r0                     events of `World`, one per line, and
    deliver d0>p0                 `settle` (fair delivery until nothing moves),
    ----                          `why` (what holds wait for), `can` EVENT
    what happened, then `=` and where everything stands

The output follows `----` up to an empty line. `pytest tests/unit/reclaim/test_races.py
--rewrite-races` writes it anew; read the diff.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sglang_scaling_fixes.reclaim.rules.reasons import why_held
from tests.model.world import BUDGETED, Config, Prefill, World


def config_of(line: str) -> Config:
    """`world key=value ...`; mishaps are not limited, the script decides."""
    types = {f.name: f.default for f in dataclasses.fields(Config)}
    values: dict[str, object] = dict.fromkeys(BUDGETED, 9)
    for word in line.split()[1:]:
        key, _, text = word.partition("=")
        if key == "rooms":
            values[key] = tuple(int(room) for room in text.split(","))
        elif key == "bare":
            values[key] = tuple(int(request) for request in text.split(","))
        elif key == "plugged":
            values[key] = tuple(part == "yes" for part in text.split(","))
        elif isinstance(types[key], bool):
            values[key] = {"yes": True, "no": False}[text]
        else:
            values[key] = int(text)
    return Config(**values)  # type: ignore[arg-type]


def state(world: World) -> str:
    """Where everything stands, on one line."""
    parts = []
    for d in world.decodes.values():
        slots = []
        for lease in d.slots:
            exposure = d.ledger.find(lease) if lease else None
            slots.append(f"{lease} {exposure.state.value}" if exposure else lease or "-")
        parts.append(f"{d.name} [{', '.join(slots)}]")
    parts += [_prefill_state(p) for p in world.prefills.values()]
    if world.wire:
        names = (f"{w.name}{' failed' if w.failed else ''}" for w in world.wire)
        parts.append(f"wire [{', '.join(names)}]")
    return "= " + "  ".join(parts)


def _prefill_state(p: Prefill) -> str:
    if p.ledger is None:
        return f"{p.name} [stock]"
    rooms = []
    for a in p.ledger.attempts():
        owner = "" if a.sender is None else f" (r{a.sender}{' gone' if a.sender_gone else ''})"
        words = [f"room {a.room}{owner}:", "closed" if a.closed else "open"]
        words += [f"{a.active} active"] * bool(a.active) + ["poisoned"] * bool(a.poisoned)
        rooms.append(" ".join(words))
    rooms += [f"r{i} waits" for i in p.ledger.waiting_senders()]
    rooms += [f"deferred {m.lease}" for _, m in p.deferred]
    return f"{p.incarnation} [{', '.join(rooms)}]"


def perform(world: World, command: str) -> list[str]:
    if command == "settle":
        world.settle()
        return [f"overdue: {late}" for late in world.overdue()]
    if command == "why":
        return [
            f"{exposure.lease}: {why_held(exposure, d.ledger.peers)}"
            for d in world.decodes.values()
            for exposure in d.ledger.held
        ]
    if command.startswith("can "):
        possible = [e for e in world.enabled() if e.startswith(command[4:])]
        return [f"possible: {', '.join(possible) or 'nothing'}"]
    if command not in world.enabled():
        raise ValueError(f"{command!r} cannot happen here; what can: {world.enabled()}")
    return world.step(command)


def run(text: str) -> str:
    """The script with its output written anew."""
    world: World | None = None
    result: list[str] = []
    block: list[str] = []
    skipping = False
    for line in text.splitlines():
        if skipping:
            skipping = bool(line.strip())
            if skipping:
                continue
        if line == "----":
            if world is None:
                world = World(config_of(block[0]))
                output = []
            else:
                output = run_block(world, block)
            result += [line, *output]
            block, skipping = [], True
            continue
        if line.strip() and not line.startswith("#"):
            block.append(line)
        result.append(line)
    return "\n".join(result).rstrip() + "\n"


def run_block(world: World, commands: list[str]) -> list[str]:
    output: list[str] = []
    for command in commands:
        try:
            output += perform(world, command)
        except AssertionError as error:
            return [*output, *world.said, f"!!! {error}"]
    return output if commands == ["why"] else [*output, state(world)]


def races() -> list[Path]:
    return sorted((Path(__file__).parents[1] / "races").glob("*.txt"))
