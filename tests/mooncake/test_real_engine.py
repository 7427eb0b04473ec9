"""P4 and P3 against the real Mooncake, over TCP: what a fence stops, and what nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import install
from sglang_scaling_fixes.release import sglang_version
from tests.mooncake.engines import SIZE, SMALL

ROOT = Path(__file__).resolve().parents[2]
TRIES = 3


class Process:
    """One of `engines`' roles."""

    def __init__(self, *argv: str) -> None:
        release = sglang_version()
        assert release is not None
        environment = install(release, progress=lambda _: None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mooncake.engines", *argv],
            cwd=ROOT,
            env={**os.environ, **environment.env, "MC_FORCE_TCP": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def heard(self) -> Any:
        """What it says next; Mooncake's own lines are passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"ended with status {self._process.wait()}")

    def tell(self, what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def processes(mode: str, once: str) -> Iterator[tuple[Process, Process]]:
    receiver, sender = Process("receive", mode), Process("send", once)
    try:
        yield receiver, sender
    finally:
        sender.end()
        receiver.end()


def interrupted(mode: str, once: str = "stock") -> dict[str, Any]:
    """A long write, interrupted by `mode`; then a small one to where the receiver is now."""
    with processes(mode, once) as (receiver, sender):
        target = receiver.heard()
        assert sender.heard() == {"ready": True}
        receiver.tell("go")
        sender.tell({**target, "size": SIZE})
        found: dict[str, Any] = receiver.heard()
        found["long"] = sender.heard()
        sender.tell({**target, "size": SMALL})
        found["old session"] = sender.heard()
        sender.tell({"session": found["session"], "address": found["address"], "size": SMALL})
        found["new session"] = sender.heard()
        receiver.tell("count")
        return found | receiver.heard()


def test_an_unregistered_buffer_is_still_written() -> None:
    """The control: a registration is looked at when a write begins, not while it lands."""
    # A write that was over before the receiver came to it shows nothing: once is enough.
    assert any(interrupted("unregister")["late"] for _ in range(TRIES))


def test_nothing_lands_behind_a_fence_and_the_new_session_works() -> None:
    found = interrupted("fence")
    assert found["late"] == 0
    assert found["long"]["status"] != 0
    assert found["old session"]["status"] != 0
    assert found["new session"]["status"] == 0
    assert found["small"] == SMALL


def test_a_transfer_under_way_lands_whole_while_another_engine_takes_over() -> None:
    """Nobody in flight is ended; then the old session is gone, and the new one works."""
    with processes("switch", "stock") as (receiver, sender):
        target = receiver.heard()
        assert sender.heard() == {"ready": True}
        receiver.tell("go")
        sender.tell({**target, "size": SIZE})
        new = receiver.heard()
        assert new["session"] != target["session"]
        assert sender.heard()["status"] == 0, "the long write"
        sender.tell({**new, "size": SMALL})
        assert sender.heard()["status"] == 0
        receiver.tell("retire")
        assert receiver.heard() == {"long": SIZE}
        assert receiver.heard() == {"retired": True}


def test_one_submission_says_the_same_as_stocks_call() -> None:
    """What a prefill with RDMA devices uses, so that 0 is never a second try's."""
    found = interrupted("fence", once="once")
    assert found["long"] == {"status": -1, "failures": 1}
    assert found["old session"]["status"] == -1
    assert found["new session"] == {"status": 0, "failures": 2}
    assert found["small"] == SMALL


@pytest.mark.parametrize("door", ["open", "shut"])
def test_a_fence_sees_everything_closed_that_the_engine_had_opened(door: str) -> None:
    process = Process("leave", door)
    try:
        found = process.heard()
    finally:
        process.end()
    assert found["opened"] >= 2  # over TCP: one for handshakes, one for data
    if door == "open":
        assert "not closed whole" in found["error"]
    else:
        assert found["again"] == found["opened"]
