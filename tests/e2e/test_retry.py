"""Two workers, one of which corrupts KV, behind the retry proxy: clients notice nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers import tokenizer
from sglang_scaling_fixes.lab.servers.client import Answer, call
from sglang_scaling_fixes.lab.servers.link import LOCAL
from sglang_scaling_fixes.lab.servers.pending import greedy
from sglang_scaling_fixes.lab.servers.serve import Served, prompt

from .servers import resting
from .test_spec_guard import ABORT, ANOMALOUS, PROMPT, TOKENS, corrupted, events, guard

pytestmark = pytest.mark.e2e

CLIENTS = 6
MANY, MANY_TOKENS = 100, 32
TRAIL = "288"
JUDGED_WITHIN = 340
"""Tokens in which a corruption is found, and some more."""
AS_GOOD = 0.01  # of log-probabilities
HOLD = 96  # the guard's first verdict comes at the 64th token here, the next one 16 later


class Proxy:
    """A retry proxy before some workers, in a process of its own."""

    def __init__(self, workers: list[str], *flags: str) -> None:
        (self.port,) = LOCAL.free_ports(1)
        named = [part for url in workers for part in ("--worker", url)]
        command = Path(sys.executable).with_name("sglang-scaling-fixes")
        self._process = subprocess.Popen(
            [command, "retry-proxy", *named, "--port", str(self.port), *flags],
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(300):
            if self.get("/health").status == 200:
                return
            time.sleep(0.1)
        raise AssertionError(self.end())

    def get(self, path: str) -> Answer:
        return call(LOCAL, "127.0.0.1", self.port, path)

    def post(self, path: str, payload: object, session: str = "") -> Answer:
        """`session`: the conversation that it belongs to, if it says so."""
        headers = {"X-Session-Id": session} if session else {}
        return call(
            LOCAL, "127.0.0.1", self.port, path, payload=payload, timeout_s=180, headers=headers
        )

    def end(self) -> str:
        """End it, and return what it logged."""
        self._process.terminate()
        return self._process.communicate(timeout=60)[1]


def failures(log: str) -> list[dict[str, Any]]:
    """What the proxy said of each attempt that failed."""
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def workers(
    new: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, Served]]:
    """One whose requests named `corrupt:` are corrupted, and one that takes them as any other."""
    bad = replace(ABORT, hicache=False, tokens=8192)
    sound = replace(bad, env={})
    with (
        resting(bad, new, tmp_path_factory.mktemp("bad")) as one,
        resting(sound, new, tmp_path_factory.mktemp("sound")) as other,
    ):
        yield one, other


@pytest.fixture(scope="module")
def right(workers: tuple[Served, Served]) -> list[int]:
    return workers[1].ask(PROMPT, TOKENS).ids


def test_every_request_gets_the_sound_workers_answer(
    workers: tuple[Served, Served], right: list[int]
) -> None:
    """Whole answers and streams, in both APIs, at once; each begins on either worker."""
    proxy = Proxy([w.servers[0].url for w in workers], "--hold-tokens", str(HOLD))
    completion = {
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "model": workers[0].servers[0].get("/v1/models").body["data"][0]["id"],
    }

    def generated(name: str) -> list[int]:
        body = {**greedy(PROMPT, TOKENS), "rid": corrupted("noise", name)}
        return list(proxy.post("/generate", body).body["output_ids"])

    def streamed(name: str) -> list[int]:
        body = {**greedy(PROMPT, TOKENS), "rid": corrupted("zero", name), "stream": True}
        chunks = events(proxy.post("/generate", body).body)
        assert all("error" not in chunk for chunk in chunks)
        return list(chunks[-1]["output_ids"])

    def completed(name: str) -> list[int]:
        body = {**completion, "rid": corrupted("mixed", name)}
        return tokenizer.ids(proxy.post("/v1/completions", body).body["choices"][0]["text"])

    def completed_stream(name: str) -> list[int]:
        body = {**completion, "rid": corrupted("noise", name), "stream": True}
        chunks = events(proxy.post("/v1/completions", body).body)
        assert all("error" not in chunk for chunk in chunks)
        return tokenizer.ids("".join(chunk["choices"][0]["text"] for chunk in chunks))

    kinds = (generated, streamed, completed, completed_stream)
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(lambda n: kinds[n % 4](f"many-{n}"), range(12)))
        metrics = str(proxy.get("/metrics").body)
    finally:
        log = proxy.end()
    assert answers == [right] * 12
    # It was not luck: the bad worker had requests, and its guard ended them.
    ended = guard(workers[0])["anomalies"]["low_accept_length/aborted"]
    assert ended >= 2
    assert 'sglang_scaling_fixes_retry_proxy_requests_total{outcome="recovered"}' in metrics
    retries = failures(log)
    assert {retry["reason"] for retry in retries} == {"anomaly"}
    assert len(retries) == ended


def test_without_the_proxy_clients_of_the_bad_worker_see_it(
    workers: tuple[Served, Served], right: list[int]
) -> None:
    """The control: the same request, sent straight to the worker that corrupts."""
    body = {**greedy(PROMPT, TOKENS), "rid": corrupted("noise", "direct"), "stream": True}
    chunks = events(workers[0].servers[0].post("/generate", body).body)
    assert chunks[-1]["meta_info"]["finish_reason"]["err_type"] == "kv_anomaly"
    seen = chunks[-1]["output_ids"]
    assert seen != right[: len(seen)]  # garbage had reached the client


def last_event(proxy: Proxy, asked: list[int], name: str, session: str = "") -> dict[str, Any]:
    """Of a stream that may be corrupted. It goes on, and never begins again."""
    body = {**greedy(asked, TOKENS), "rid": corrupted("noise", name), "stream": True}
    chunks = events(proxy.post("/generate", body, session).body)
    counts = [c["meta_info"]["completion_tokens"] for c in chunks if "meta_info" in c]
    assert counts == sorted(set(counts))
    return dict(chunks[-1])


CHATS, TURNS = 6, 4


def test_a_conversation_finds_its_prefix_cached(workers: tuple[Served, Served]) -> None:
    """Its turns come to one worker. The control: a new session for every turn."""
    proxy = Proxy([w.servers[0].url for w in workers])
    try:
        kept = cached_share(proxy, 100, lambda chat, turn: None)
        spread = cached_share(proxy, 200, lambda chat, turn: f"{chat}.{turn}.{turn * chat}")
    finally:
        proxy.end()
    assert kept > 0.8 and spread < kept - 0.2, (kept, spread)


def cached_share(proxy: Proxy, seed: int, session: Callable[[int, int], str | None]) -> float:
    """Of the tokens that a turn repeats, those that its worker had cached. Chats take turns."""
    said = {chat: prompt(192, seed=seed + chat) for chat in range(CHATS)}
    repeated = cached = 0
    for turn in range(TURNS):
        for chat, tokens in said.items():
            body = json.dumps({**greedy(tokens, 16), "rid": f"chat-{seed}-{chat}-{turn}"}).encode()
            named = session(chat, turn)
            headers = {"Content-Type": "application/json"}
            headers |= {} if named is None else {"X-Session-Id": named}
            url = f"http://127.0.0.1:{proxy.port}/generate"
            with urlopen(Request(url, body, headers), timeout=180) as response:
                answer = json.load(response)
            if turn:
                repeated += len(tokens) - 64
                cached += answer["meta_info"]["cached_tokens"]
            said[chat] = [*tokens, *answer["output_ids"], *prompt(48, seed=7000 + turn)]
    return cached / repeated


def until_spoiled(proxy: Proxy, ask: Callable[[int, str], None]) -> None:
    """Ask as one conversation after the other: the worker that corrupts gets one of two."""
    for number in range(20):
        ask(number, f"conversation {number}")
        if 'reason="anomaly"' in str(proxy.get("/metrics").body):
            return
    raise AssertionError("every conversation came to the sound worker")


def test_what_has_begun_ends_with_an_error_and_no_second_beginning(
    workers: tuple[Served, Served], right: list[int]
) -> None:
    """Nothing held back: what the client has cannot be taken back, and it is told."""
    proxy = Proxy([w.servers[0].url for w in workers])
    errors: list[dict[str, Any]] = []

    def ask(number: int, session: str) -> None:
        asked = prompt(450, seed=ANOMALOUS[number % len(ANOMALOUS)])
        end = last_event(proxy, asked, f"begun-{number}", session)
        errors.extend([end["error"]] if "error" in end else [])

    try:
        until_spoiled(proxy, ask)
        again = last_event(proxy, PROMPT, "after")
    finally:
        proxy.end()
    assert [(e["type"], e["retryable"]) for e in errors] == [("kv_anomaly", True)]
    assert again["output_ids"] == right


GOOD = 100  # tokens before a corruption
APIS = {"/generate": ANOMALOUS[0], "/v1/completions": ANOMALOUS[1]}


@pytest.mark.parametrize("api", APIS)
def test_what_an_anomaly_spoiled_is_written_again(workers: tuple[Served, Served], api: str) -> None:
    """The corruption begins after good tokens. The client gets a sound answer.

    This model's own text becomes a loop after some 400 tokens, so later corruption is not tried.
    """
    proxy = Proxy([w.servers[0].url for w in workers], "--migrations", "1", "--trail-tokens", TRAIL)
    model = workers[0].servers[0].get("/v1/models").body["data"][0]["id"]
    asked, count = prompt(450, seed=APIS[api]), GOOD + JUDGED_WITHIN

    def ask(number: int, session: str) -> None:
        rid = f"corrupt:noise:1.0:{GOOD}:{api}-{number}"
        if api == "/generate":
            post = partial(proxy.post, session=session)
            ids, spoilt = streamed_ids(post, asked, count, rid)
            assert not spoilt
        else:
            body = {"model": model, "prompt": asked, "max_tokens": count, "temperature": 0}
            body |= {"ignore_eos": True, "stream": True, "rid": rid}
            chunks = events(proxy.post(api, body, session).body)
            assert all("error" not in chunk for chunk in chunks)
            assert len({chunk["id"] for chunk in chunks}) == 1
            ids = tokenizer.ids("".join(chunk["choices"][0]["text"] for chunk in chunks))
        assert_best(workers[1], asked, ids, count)

    try:
        until_spoiled(proxy, ask)
    finally:
        proxy.end()


def test_control_without_a_trail_it_ends_with_an_error(workers: tuple[Served, Served]) -> None:
    post = workers[0].servers[0].post
    ends = []
    for number, seed in enumerate(ANOMALOUS[2:]):
        rid = f"corrupt:noise:1.0:{GOOD}:plain-{number}"
        ends.append(streamed_ids(post, prompt(450, seed=seed), GOOD + JUDGED_WITHIN, rid)[1])
    assert any(ends)


def assert_best(worker: Served, asked: list[int], ids: list[int], count: int) -> None:
    """Each token is the worker's best, or as good: of two that are, it depends on where an answer
    was cut which one comes. KV is rounded to bf16, in a prefill and in decode steps not alike."""
    assert len(ids) == count
    body = {**greedy([*asked, *ids], 1), "return_logprob": True, "top_logprobs_num": 1}
    meta = worker.servers[0].post("/generate", {**body, "logprob_start_len": 0}).body["meta_info"]
    said, best = (meta[key][len(asked) :] for key in ("input_token_logprobs", "input_top_logprobs"))
    assert [token for _, token, *_ in said] == ids
    behind = [top[0][0] - mine[0] for mine, top in zip(said, best, strict=True)]
    assert max(behind) < AS_GOOD


def streamed_ids(
    post: Callable[[str, object], Answer], asked: list[int], count: int, rid: str
) -> tuple[list[int], bool]:
    """The tokens of a stream, and whether it ended with an anomaly."""
    body = {**greedy(asked, count), "stream": True, "rid": rid}
    chunks = events(post("/generate", body).body)
    counts = [c["meta_info"]["completion_tokens"] for c in chunks if "meta_info" in c]
    assert counts == sorted(set(counts))  # it goes on, and never begins again
    last = chunks[-1]
    if "error" in last or last["meta_info"]["finish_reason"].get("err_type") == "kv_anomaly":
        return [], True
    return list(last["output_ids"]), False


def kill_once_answers_flow(proxy: Proxy, worker: Served) -> None:
    while 'retry_proxy_requests_total{outcome="ok"} 0.0' in str(proxy.get("/metrics").body):
        time.sleep(0.1)
    worker.servers[0].signal(signal.SIGKILL)


def test_a_worker_is_killed_under_a_hundred_clients(workers: tuple[Served, Served]) -> None:
    """Nothing is lost: each answer is whole and right, or a right beginning and one clear error.

    Clients of a proxy that migrates streams notice nothing at all.
    """
    # Each comes to one worker, by the servers' ports: of so many some come to each.
    prompts = [prompt(60, seed=number) for number in range(16)]
    right = [workers[1].ask(asked, MANY_TOKENS).ids for asked in prompts]
    urls = [w.servers[0].url for w in workers]
    plain, migrating = Proxy(urls), Proxy(urls, "--migrations", "1")

    def one(number: int) -> str:
        asked, wanted = prompts[number // 2 % 16], right[number // 2 % 16]
        proxy, stream = (plain, migrating)[number % 2], number % 4 < 2
        body = {**greedy(asked, MANY_TOKENS), "rid": f"many:{number}", "stream": stream}
        answer = proxy.post("/generate", body)
        assert answer.status == 200
        if not stream:
            assert answer.body["output_ids"] == wanted
            return "whole"
        said = events(answer.body)
        for chunk in said:
            if "error" not in chunk:
                assert chunk["output_ids"] == wanted[: len(chunk["output_ids"])]
                assert chunk["meta_info"]["id"] == f"many:{number}"
        errors = [chunk["error"] for chunk in said if "error" in chunk]
        if not errors:
            assert said[-1]["output_ids"] == wanted
            return "whole"
        assert proxy is plain, errors
        assert len(errors) == 1 and said[-1].get("error") == errors[0]
        assert errors[0]["type"] == "worker_lost" and errors[0]["retryable"]
        return "broken"

    try:
        with ThreadPoolExecutor(MANY + 1) as pool:
            killed = pool.submit(kill_once_answers_flow, plain, workers[0])
            ends = list(pool.map(one, range(MANY)))
            killed.result()
        metrics = str(plain.get("/metrics").body)
    finally:
        log = plain.end() + migrating.end()
    assert len(ends) == MANY
    # The kill did strike: somebody's answer was lost, and told or begun again elsewhere.
    assert {failed["reason"] for failed in failures(log)} & {"lost", "refused"}
    assert f'outcome="broken"}} {float(ends.count("broken"))}' in metrics
