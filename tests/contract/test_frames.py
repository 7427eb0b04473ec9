"""A trailer never lands on a frame that a stock prefill reads, whatever the pair of releases.

A decode of one release may talk to a stock prefill of another. Ours rides at a fixed
index with empty frames before it, so two things must hold in every wheel: no frame
index that far is read, and frames past the first eight are read only where empty
means absent. Destinations for a rank that is known to have the plugin ride nearer; it
may be replaced by one without.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from sglang_scaling_fixes.reclaim.messages import KNOWN_TRAILER_AT, TRAILER_AT
from sglang_scaling_fixes.reclaim.stock_wire import PAGE_BYTES, PAGES_FRAME, SESSION_FRAME
from tests.contract import wheels

READ = re.compile(r"\b(?:msg|waiting_req_bytes)\[(\d+)\]")
SESSION = re.compile(r"mooncake_session_id ?= ?(?:msg|waiting_req_bytes)\[(\d+)\]")
PAGES = re.compile(r"\bdst_kv_indices = np\.frombuffer\(msg\[(\d+)\], dtype=np\.int(\d+)\)")
FIELDS_FROM = re.compile(r"from_zmq_fields\(msg, (\d+)\)")


def conn(release: str) -> Path:
    return wheels.source(release) / "sglang/srt/disaggregation/mooncake/conn.py"


@pytest.mark.parametrize("release", wheels.ARMED)
def test_no_stock_release_reads_as_far_as_the_trailer(release: str) -> None:
    text = conn(release).read_text()
    read = [int(index) for index in READ.findall(text)]
    # Staging fields start at the named index; there are two of them.
    read += [int(index) + 2 for index in FIELDS_FROM.findall(text)]
    assert max(read) >= 7  # the pattern still matches what stock reads
    assert max(read) < TRAILER_AT


@pytest.mark.parametrize("release", wheels.ARMED)
def test_no_stock_release_reads_destinations_as_far_as_a_known_ranks_trailer(release: str) -> None:
    tree = ast.parse(conn(release).read_text())
    (info,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TransferInfo"]
    text = ast.unparse(info)
    read = [int(index) for index in READ.findall(text)]
    assert max(read) >= 7
    assert max(read) < KNOWN_TRAILER_AT
    assert not FIELDS_FROM.findall(text) and "msg[:" not in text and "*msg" not in text


@pytest.mark.parametrize("release", wheels.ARMED)
def test_both_messages_name_decodes_session_in_the_same_frame(release: str) -> None:
    """What a fence changes: prefill reads it from registration and destinations alike."""
    named = SESSION.findall(conn(release).read_text())
    assert len(named) >= 2 and set(named) == {str(SESSION_FRAME)}


@pytest.mark.parametrize("release", wheels.ARMED)
def test_destinations_name_the_pages_in_the_same_frame(release: str) -> None:
    """From there a decode without the plugin tells how many pages are to be written."""
    (index, bits), *more = PAGES.findall(conn(release).read_text())
    assert not more
    assert (int(index), int(bits) // 8) == (PAGES_FRAME, PAGE_BYTES)


def test_the_pattern_would_notice() -> None:
    assert READ.findall("x = msg[32]; y = waiting_req_bytes[7]") == ["32", "7"]
