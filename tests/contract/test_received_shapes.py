"""What is let through to stock's receive threads never ends them, and nothing of theirs is kept.

Each release's own threads read it (`stock_threads`). Messages are mixed as a socket mixes them
that several threads send on: one frame at a time, and a message ends with the first last frame.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from sglang_scaling_fixes.reclaim.stock_shapes import decode_reads, prefill_reads
from tests.contract import stock_threads
from tests.contract.wheels import ARMED, RELEASES, between, source

Frames = list[bytes]
Reads = Callable[[Any, Frames], bool]
READS: dict[str, Reads] = {"decode": decode_reads, "prefill": prefill_reads}
ROOMS = (b"0", b"7", b"8", b"%d" % (2**64 - 1))
KINDS = {"AUX_DATA", "CHUNK_READY", "STAGING_REQ", "ABORT_ACK"}
KINDS |= {"WATERMARK", "STAGING_RSP", "ABORT", "BOOTSTRAP", "None"}

TO_DECODE: list[Frames] = [
    *([room, status, b"0"] for room in ROOMS for status in (b"4", b"0")),
    [b"AUX_DATA", b"7", b"1", b"3", struct.pack(">I", 0), b""],
    [b"CHUNK_READY", b"7", b"0", b"0", b"4", b"s:1"],
    [b"CHUNK_READY", b"7", b"0", b"0", b"4", b"s:1", b"0"],
    [b"STAGING_REQ", b"7", b"0", b"4", b"s:1"],
]
SINCE_0_5_13 = [[b"ABORT_ACK", b"7"], [b"ABORT_ACK", b"7", b"0"], [b"ABORT_ACK", b"7", b"0", b"1"]]
SINCE_0_5_20 = [[b"7", b"0", b"0", b"the reason, in any bytes \xff"]]
SINCE_0_5_22 = [[b"7", b"2", b"0"]]

DESTINATIONS = [b"7", b"192.0.2.2", b"9", b"192.0.2.2:1", b"\0\0\0\0" * 3, b"2", b"", b"1"]
POINTERS = struct.pack("2Q", 1, 2)
REGISTRATION = [b"None", *DESTINATIONS[1:4], POINTERS, POINTERS, b"", b"0", b"1", b"64"]
TO_PREFILL: list[Frames] = [
    *([room, *DESTINATIONS[1:]] for room in ROOMS),
    [*DESTINATIONS[:4], b"", b"", b"", b"1"],
    [*DESTINATIONS, b"5", b""],
    REGISTRATION,
    [*REGISTRATION, *[b""] * 10],
    [b"WATERMARK", b"0", b"0", b"s:1"],
    [b"STAGING_RSP", b"7", b"0", b"-1", b"0", b"-1", b"s:1"],
]
ABORTS = [[b"ABORT", b"7", b"192.0.2.2", b"9"]]


def well_formed(release: str, role: str) -> list[Frames]:
    """What a peer of this release sends."""

    def since(first: str) -> bool:
        return release in between(first, RELEASES[-1])

    if role == "prefill":
        return TO_PREFILL + since("0.5.13") * ABORTS
    more = since("0.5.13") * SINCE_0_5_13 + since("0.5.20") * SINCE_0_5_20
    return TO_DECODE + more + since("0.5.22") * SINCE_0_5_22


def peer(release: str, role: str) -> Any:
    stock = stock_threads.manager(release)
    if role == "decode":
        stock.request_status.update({int(room): 1 for room in ROOMS})
    return stock


def survives(release: str, stock: Any, role: str, messages: list[Frames]) -> bool:
    try:
        stock_threads.receive(release, stock, role, messages)
    except Exception:
        return False
    return True


@st.composite
def mixed(draw: st.DrawFn, role: str) -> list[Frames]:
    """What a socket makes of a few messages that several threads send at once."""
    known = [*TO_DECODE, *SINCE_0_5_13, *SINCE_0_5_20] if role == "decode" else TO_PREFILL + ABORTS
    sending = [list(draw(st.sampled_from(known))) for _ in range(draw(st.integers(2, 4)))]
    arrived: list[Frames] = []
    message: Frames = []
    while sending:
        turn = draw(st.integers(0, len(sending) - 1))
        message.append(sending[turn].pop(0))
        if not sending[turn]:
            del sending[turn]
            arrived.append(message)
            message = []
    return arrived


@st.composite
def broken(draw: st.DrawFn, role: str) -> list[Frames]:
    """A message with frames changed, left out or added."""
    known = [*TO_DECODE, *SINCE_0_5_13] if role == "decode" else TO_PREFILL + ABORTS
    frames = list(draw(st.sampled_from(known)))
    odd = st.sampled_from(
        [b"", b"x", b"\xff", b"-1", b"5", b"1" * 30, b"99999999999999999999", b"1.5", b"None"]
    )
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(frames)))
        how = draw(st.sampled_from(["change", "add", "leave out"]))
        if how == "add":
            frames.insert(at, draw(st.one_of(odd, st.binary(max_size=9))))
        elif at < len(frames) > 1:
            frames[at : at + 1] = [draw(st.one_of(odd, st.binary(max_size=9)))] * (how == "change")
    return [frames]


def arriving(role: str) -> st.SearchStrategy[list[Frames]]:
    return st.one_of(mixed(role), broken(role))


FUZZED = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
ROLES = pytest.mark.parametrize("role", READS)
EACH = pytest.mark.parametrize("release", ARMED)


@ROLES
@EACH
def test_what_is_let_through_ends_no_receive_thread(release: str, role: str) -> None:
    stock = peer(release, role)

    @FUZZED
    @given(arriving(role))
    def all_survive(messages: list[Frames]) -> None:
        passed = [frames for frames in messages if READS[role](stock, frames)]
        stock_threads.receive(release, stock, role, passed)

    all_survive()


@ROLES
@EACH
def test_without_looking_at_shapes_a_message_ends_the_thread(release: str, role: str) -> None:
    stock = peer(release, role)
    quick = settings(FUZZED, phases=[Phase.generate])
    try:
        find(arriving(role), lambda m: not survives(release, stock, role, m), settings=quick)
    except NoSuchExample:
        pytest.fail("the fuzz finds nothing that ends this thread, so it proves nothing above")


@ROLES
@EACH
def test_what_stock_sends_is_let_through_and_read(release: str, role: str) -> None:
    stock = peer(release, role)
    messages = well_formed(release, role)
    assert [m for m in messages if not READS[role](stock, m)] == []
    stock_threads.receive(release, stock, role, messages)
    if role == "decode":
        assert stock.request_status[2**64 - 1] == 0, "the last that was said of that room"
    else:
        assert set(stock.transfer_infos) == {int(room) for room in ROOMS}
        assert list(stock.decode_kv_args_table) == ["192.0.2.2:1"]


@EACH
def test_a_status_of_another_shape_is_no_status(release: str) -> None:
    stock = peer(release, "decode")
    for frames in (
        [b"7", b"4"],
        [b"7", b"4", b"0", b"8"],  # two messages, mixed
        [b"7", b"5", b"0"],
        [b"7", b"1", b"0"],
        [b"7", b"4", b"x"],
        [b"%d" % 2**64, b"4", b"0"],
        [b"4", b"71", b"0"],
    ):
        assert not decode_reads(stock, frames), frames


@EACH
def test_every_kind_of_message_is_known(release: str) -> None:
    """A new kind passes if stock's code names it, but nobody has read what it takes."""
    package = source(release) / "sglang/srt/disaggregation"
    text = "".join((package / f"{part}/conn.py").read_text() for part in ("mooncake", "common"))
    found = set(re.findall(r'\bb"([A-Z_]{3,})"', text)) | set(re.findall(r'room == "(\w+)"', text))
    assert {"AUX_DATA", "None"} <= found <= KINDS
