"""The retry proxy and its peers before the same workers with the same faults, in one run.

    python -m benchmarks.retry_proxy.peers

One of three workers has the fault, and its health check says nothing of it; `gone` ends it for
health checks as well. Clients ask for streams of ten tokens, a few at a time. What comes before
the workers is started anew for each fault. `client` asks the workers in turn by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.common.reports import machine, table
from tests.retry.fake_worker import DONE, GARBAGE, FakeWorker
from tests.retry.serving import front
from tests.retry.test_requests import free_port

RESULTS = Path(__file__).parent / "results"
TOKENS = 10
AT_ONCE = 6
LIMIT_S = 5.0
"""A client waits no longer, and in their own settings the peers are told to wait half as long."""
HALF = "2"


@dataclass(frozen=True)
class Fault:
    """What the first of the workers does."""

    name: str
    what: str
    plan: dict[str, Any] | None = None  # None: nothing listens there any more


def _after_5(fail: str) -> dict[str, Any]:
    return {"fail": fail, "after": 5, "garbage": 0}


FAULTS = (
    Fault("none", "nothing is wrong", {}),
    Fault("gone", "the worker has ended"),
    Fault("busy", "it answers 503", {"fail": "status", "status": 503}),
    Fault("lost transfer", "it answers 500", {"fail": "status", "status": 500}),
    Fault("resets", "it closes the connection without a byte", {"fail": "close"}),
    Fault("hangs", "it never answers", {"fail": "hang"}),
    Fault("breaks", "it closes the connection after 5 tokens", _after_5("close")),
    Fault("stops", "it says nothing more after 5 tokens", _after_5("hang")),
    Fault(
        "anomaly",
        "its KV is corrupt: 3 wrong tokens, then its guard ends the stream",
        {**_after_5("anomaly"), "garbage": 3, "rule": "length", "suspect_from": 2},
    ),
)


@dataclass(frozen=True)
class Peer:
    """What stands before the workers. `command`: a module and its flags; workers' URLs follow."""

    name: str
    command: tuple[str, ...]
    ready: str = ""
    each: str = ""  # a flag before each worker's URL


_ROUTER = ("sglang_router.launch_router", "--policy", "round_robin")
_ROUTER_LIMITS = ("--request-timeout-secs", HALF, "--retry-initial-backoff-ms", "1")
_PROXY = ("sglang_scaling_fixes.cli", "retry-proxy")
_PROXY_LIMITS = ("--first-token-timeout", HALF, "--token-timeout", HALF)
PEERS = (
    Peer("client", ()),
    Peer("sglang_router", _ROUTER, "/readiness"),
    Peer(
        "sglang_router, one strike",
        (*_ROUTER, *_ROUTER_LIMITS, "--cb-failure-threshold", "1"),
        "/readiness",
    ),
    Peer("retry proxy", (*_PROXY, *_PROXY_LIMITS), "/health", "--worker"),
    Peer(
        "retry proxy, migrations",
        (*_PROXY, *_PROXY_LIMITS, "--migrations", "2", "--trail-tokens", "4"),
        "/health",
        "--worker",
    ),
)


KINDS = ("right", "error", "cut", "slow", "spoiled")


@dataclass
class Ended:
    """How one request ended for its client."""

    kind: str  # one of KINDS
    seconds: float


def judge(status: int, body: bytes, complete: bool) -> str:
    """`spoiled`: the client has text from corrupt KV, whatever came after it."""
    if GARBAGE.encode() in body:
        return "spoiled"
    text = ""
    for line in body.split(b"\n"):
        if line.startswith(b"data: {"):
            text = json.loads(line[6:]).get("text", text)
    numbers = [int(found) for found in re.findall(r"(\d+) ", text)]
    if status == 200 and complete and body.endswith(DONE) and numbers == list(range(TOKENS)):
        return "right"
    return "error" if status != 200 or b'"error"' in body or b'"abort"' in body else "cut"


async def ask(session: aiohttp.ClientSession, url: str, number: int) -> Ended:
    began, status, body, complete = time.monotonic(), 0, b"", True
    said = {"text": f"conversation {number}", "stream": True}
    kind = ""
    try:
        async with asyncio.timeout(LIMIT_S), session.post(f"{url}/generate", json=said) as response:
            status = response.status
            async for piece in response.content.iter_any():
                body += piece
    except TimeoutError:
        kind = "slow"
    except aiohttp.ClientError:
        complete = False
    if GARBAGE.encode() in body or not kind:
        kind = judge(status, body, complete)
    return Ended(kind, time.monotonic() - began)


@contextlib.asynccontextmanager
async def serving(peer: Peer, urls: Sequence[str]) -> AsyncIterator[list[str]]:
    """Where clients of this peer ask."""
    if not peer.command:
        yield list(urls)
        return
    if peer.each:
        where = [word for url in urls for word in (peer.each, url)]
    else:
        where = ["--worker-urls", *urls, "--prometheus-port", str(free_port())]
    async with front(*peer.command, *where, port=free_port(), ready=peer.ready) as url:
        yield [url]


async def measure(peer: Peer, fault: Fault, requests: int) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(FakeWorker(name)) for name in "abc"]
        fronts = await stack.enter_async_context(serving(peer, [one.url for one in workers]))
        if fault.plan is None:
            await workers[0].__aexit__()
        else:
            workers[0].plan = fault.plan
        places = asyncio.Semaphore(AT_ONCE)
        session = await stack.enter_async_context(aiohttp.ClientSession())

        async def one(number: int) -> Ended:
            async with places:
                return await ask(session, fronts[number % len(fronts)], number)

        ended = await asyncio.gather(*(one(number) for number in range(requests)))
        asked = sum(seen.method == "POST" for worker in workers for seen in worker.seen)
    times = [one.seconds for one in ended]
    return {
        "fault": fault.name,
        "peer": peer.name,
        **dict.fromkeys(KINDS, 0),
        **Counter(one.kind for one in ended),
        "median_s": round(statistics.median(times), 3),
        "worst_s": round(max(times), 2),
        "asked": asked,
    }


async def everything(requests: int) -> list[dict[str, Any]]:
    found = []
    for fault in FAULTS:
        for peer in PEERS:
            found.append(await measure(peer, fault, requests))
            print(" ".join(str(value) for value in found[-1].values()), file=sys.stderr, flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 the retry proxy served less than a peer in some fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retry_proxy.peers")
    parser.add_argument("--requests", type=int, default=60, help="of each fault and peer")
    parser.add_argument("--output", type=Path, default=RESULTS / "peers.json", metavar="FILE")
    args = parser.parse_args(argv)
    found = asyncio.run(everything(args.requests))
    result = {
        "machine": machine(),
        "sglang_router": importlib.metadata.version("sglang-router"),
        "requests": args.requests,
        "faults": {fault.name: fault.what for fault in FAULTS},
        "peers": {peer.name: " ".join(peer.command[1:]) for peer in PEERS},
        "found": found,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    rows = [tuple(key.replace("_", " ") for key in found[0])]
    rows += [tuple(str(value) for value in one.values()) for one in found]
    print(table(rows))
    return 0 if all(_never_behind(found, fault.name) for fault in FAULTS) else 1


def _never_behind(found: list[dict[str, Any]], fault: str) -> bool:
    right: dict[str, int] = {one["peer"]: one["right"] for one in found if one["fault"] == fault}
    return right[PEERS[-1].name] >= max(right.values())


if __name__ == "__main__":
    sys.exit(main())
