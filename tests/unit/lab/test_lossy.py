"""Lost messages: only those that say stop, and so many per room and kind."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from sglang_scaling_fixes.lab.faults import lossy
from sglang_scaling_fixes.reclaim import messages

ASK = messages.encode(messages.Abort("tcp://10.0.0.1:1", "10.0.0.2:2", 7, "g1"))
BIND = messages.encode(messages.Bind("tcp://10.0.0.1:1", "10.0.0.2:2", "g1", "e1", 3))


@pytest.mark.parametrize(
    ("frames", "stop"),
    [
        ([b"ABORT", b"12", b"10.0.0.1", b"4000"], ("ABORT", 12)),
        ([ASK], ("Abort", 7)),
        ([b"12", b"10.0.0.1", BIND], None),
        ([BIND], None),
        ([b"None", b"10.0.0.1"], None),
        ([b"\x00noise"], None),
    ],
)
def test_only_messages_that_say_stop_are_lost(
    frames: list[bytes], stop: tuple[str, int] | None
) -> None:
    assert lossy.stop_message(frames) == stop


def test_so_many_are_lost_per_room_and_kind() -> None:
    sent: list[bytes] = []
    lost: list[int] = []

    class Socket:
        def send_multipart(self, frames: list[bytes]) -> None:
            sent.append(frames[0])

    module: Any = ModuleType("zmq")
    module.Socket = Socket
    lossy.attacher(2, lost.append)(module)
    for _ in range(3):
        Socket().send_multipart([b"ABORT", b"12"])
        Socket().send_multipart([ASK])
    Socket().send_multipart([b"ABORT", b"13"])
    assert sorted(sent) == sorted([b"ABORT", ASK])
    assert lost == [12, 7, 12, 7, 13]
