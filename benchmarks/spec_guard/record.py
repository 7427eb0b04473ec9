"""Sends the requests to one stock lab server, many at a time, and records each of them.

Every request has a namespace of its own in the prefix cache (SGLang's `extra_key`): overwritten
KV stays in the radix tree, and no other request may be served from it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import aiohttp

from benchmarks.spec_guard import plan, recording, texts
from benchmarks.spec_guard.plan import Request
from benchmarks.spec_guard.recording import Record
from sglang_scaling_fixes.console import say
from sglang_scaling_fixes.lab import runtime
from sglang_scaling_fixes.lab.install import install
from sglang_scaling_fixes.lab.servers.pending import greedy
from sglang_scaling_fixes.lab.servers.serve import RELEASE, Options, serving

CONCURRENCY = 64
"""Requests at a time: a step takes as long as its batch is large, from 16 requests on."""
SCHEDULERS = 2
"""Of the server; each computes on one core."""
# Prompt and answer of the longest requests, for all at a time, in whole pages.
POOL = CONCURRENCY * 2048
TIMEOUT_S = 1800.0
PER_STEP = recording.DRAFTS + 1


def record(path: Path, clean: int, each: int, tokens: int) -> recording.Recording:
    documents = texts.documents()
    sources = {name: len(found) for name, found in documents.items()}
    say(f"documents: {sources}")
    prompts = plan.Prompts(documents)
    late, early = plan.long(prompts), plan.twins(prompts)
    requests = [
        *plan.clean(prompts, clean, tokens),
        *plan.quotes(clean // 4, tokens),
        *late,
        *early,
        *plan.corrupt(early, late, each),
        *plan.again(early),
    ]
    # The long ones come first, so that none of them is left alone at the end; then all sorts.
    random.Random(1).shuffle(requests)
    requests.sort(key=lambda request: request.tokens < 1000)
    began = time.monotonic()
    journal = path.with_name(path.name + ".part")
    records = send(requests, journal)
    about = {
        "release": RELEASE,
        "cores": os.cpu_count(),
        "concurrency": CONCURRENCY,
        "seconds": round(time.monotonic() - began),
        "documents": sources,
    }
    recording.write(path, about, records)
    journal.unlink()
    return recording.read(path)


def send(requests: Sequence[Request], journal: Path) -> list[Record]:
    """One record per request, in their order; `journal` gets each as it comes."""
    with journal.open("a") as lines:
        return _send(requests, lines)


def _send(requests: Sequence[Request], journal: TextIO) -> list[Record]:
    environment = install(RELEASE, say)
    options = Options(
        spec=True,
        tokens=POOL,
        flags=(
            "--max-running-requests",
            str(CONCURRENCY),
            "--dp",
            str(SCHEDULERS),
            "--incremental-streaming-output",
        ),
        env={runtime.CORRUPT: "1"},
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(options, environment, Path(folder)) as served,
    ):
        return asyncio.run(_send_all(served.servers[0].url, requests, journal))


async def _send_all(
    url: str, requests: Sequence[Request], journal: TextIO, concurrency: int = CONCURRENCY
) -> list[Record]:
    waiting = iter(requests)
    records: list[Record] = []
    began = time.monotonic()
    tokens = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal tokens
        for request in waiting:
            records.append(await _ask(session, url, request))
            print(json.dumps(asdict(records[-1])), file=journal, flush=True)
            tokens += len(records[-1].ids)
            if len(records) % 50 == 0:
                spent = time.monotonic() - began
                print(
                    f"{len(records)} of {len(requests)} requests, {spent:.0f} s,"
                    f" {tokens / spent:.0f} tokens/s",
                    file=sys.stderr,
                )

    limits = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(
        timeout=limits, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        await asyncio.gather(*(client(session) for _ in range(concurrency)))
    order = {request.name: n for n, request in enumerate(requests)}
    return sorted(records, key=lambda record: order[record.name])


async def _ask(session: aiohttp.ClientSession, url: str, request: Request) -> Record:
    payload = {
        **greedy(request.prompt, request.tokens),
        "rid": request.rid,
        "extra_key": request.name,
        "stream": True,
    }
    chunks = []
    async with session.post(f"{url}/generate", json=payload) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunks.append(json.loads(line[5:]))
    return parse(request, chunks)


def parse(request: Request, chunks: Sequence[dict[str, Any]]) -> Record:
    """From the chunks of a stream, each with its new tokens and the totals so far.

    ValueError where tokens and totals do not agree, or the answer is not of the length asked for.
    """
    ids: list[int] = []
    steps: list[int] = []  # tokens of each verification
    for number, chunk in enumerate(chunks):
        new = chunk["output_ids"]
        ids += new
        # The first chunk is prefill's token. A chunk of more tokens than a verification can
        # give is several of them, which met in the server.
        if number:
            steps += _split(len(new), -(-len(new) // PER_STEP))
    meta = chunks[-1]["meta_info"]
    verified = meta.get("spec_verify_ct", 0)
    merged = verified - (len(chunks) - 1)
    while len(steps) < verified:  # what met was more verifications than it had to be
        largest = max(range(len(steps)), key=steps.__getitem__)
        steps[largest : largest + 1] = _split(steps[largest], 2)
    # The last verification may go past the limit; what is beyond it is counted, not sent.
    generated = 1 + verified + meta.get("spec_num_correct_drafts", 0)
    if (
        len(ids) != request.tokens
        or len(steps) != verified
        or not (0 <= generated - len(ids) <= recording.DRAFTS)
    ):
        raise ValueError(
            f"{request.rid}: {len(ids)} ids of {request.tokens}, {generated} counted,"
            f" {len(steps)} verifications of {verified}; {meta}"
        )
    accepted = [tokens - 1 for tokens in steps]
    return Record(
        name=request.name,
        group=request.group,
        prompt=len(request.prompt),
        accepted="".join(map(str, accepted)),
        ids=tuple(ids),
        cached=meta["cached_tokens"],
        merged=merged,
        role=request.role,
        corruption=request.corruption,
        twin=request.twin,
    )


def _split(tokens: int, parts: int) -> list[int]:
    return [tokens // parts + (n < tokens % parts) for n in range(parts)]
