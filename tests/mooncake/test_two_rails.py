"""P3 with several RDMA devices, on the real Mooncake: when status 0 says that all has landed.

Mooncake posts a failed slice again by itself, over another device if there is one, and nobody
ends the queue pair of the first try. Its packets may still be on the network when the second try
has succeeded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.release import POSTS
from tests.mooncake.processes import Process
from tests.verbs.needs import verbs_in_software

pytestmark = verbs_in_software
LENGTH = 16 << 20
RECEIVER, SENDER = ("127.0.0.11", "127.0.0.12"), ("127.0.0.21", "127.0.0.22")
PATIENCE_MS = "1000"


@contextmanager
def rails(fabric: Path, once: str, **env: str) -> Iterator[tuple[Process, Process]]:
    shared = {"SOFTVERBS_FABRIC": str(fabric), "SOFTVERBS_PATIENCE_MS": PATIENCE_MS}
    receiver = Process("rdma", "receive", "count", addresses=RECEIVER, env=shared)
    sender = Process("rdma", "send", once, addresses=SENDER, env={**shared, **env})
    try:
        yield receiver, sender
    finally:
        sender.end()
        receiver.end()


def written(fabric: Path, once: str, **env: str) -> dict[str, Any]:
    """A write while the network holds what goes to one of the receiver's devices."""
    with rails(fabric, once, **env) as (receiver, sender):
        target = receiver.heard()
        assert sender.heard() == {"ready": True}
        sender.tell({**target, "size": 1 << 20})  # all queue pairs are there
        assert sender.heard()["status"] == 0
        receiver.tell("count")
        assert receiver.heard() == {"count": 1 << 20}
        hold = fabric / f"{RECEIVER[0]}.hold"
        hold.touch()
        sender.tell({**target, "size": LENGTH})
        found: dict[str, Any] = sender.heard()
        receiver.tell("count")  # and a new owner clears the memory
        found["landed"] = receiver.heard()["count"]
        hold.unlink()
        sender.tell({**target, "size": 0})
        sender.heard()
        receiver.tell("count")
        found["late"] = receiver.heard()["count"]
        return found


@pytest.mark.parametrize(
    ("once", "env"),
    [("stock", {}), ("once", {}), ("stock", {POSTS: "1"})],
    ids=["stock", "submitted once", "posted once"],
)
def test_status_0_does_not_say_that_nothing_lands_any_more(
    tmp_path: Path, once: str, env: dict[str, str]
) -> None:
    """The hazard. To submit once does not help alone, since a slice is posted again; nor does to
    post once, since stock's call submits the batch again."""
    found = written(tmp_path, once, **env)
    assert found["status"] == 0
    assert found["landed"] == LENGTH
    assert found["late"] > 0


def test_submitted_and_posted_once_a_held_write_fails(tmp_path: Path) -> None:
    """What an armed prefill does where there may be RDMA devices: it says that bytes may land."""
    found = written(tmp_path, "once", **{POSTS: "1"})
    assert found["status"] != 0 and found["failures"] == 1
    assert 0 < found["landed"] < LENGTH
    assert found["late"] > 0
