"""Which worker is asked next, what the flags may say, and what the proxy knows of stock."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from sglang_scaling_fixes import cli
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.retry import request as request_module
from sglang_scaling_fixes.retry.budget import Budget
from sglang_scaling_fixes.retry.rendezvous import LAST_ROOM, with_rendezvous
from sglang_scaling_fixes.retry.request import BodyFacts, ClientRequest
from sglang_scaling_fixes.retry.routes import CHANGING_GETS, INFERENCE, READ, route
from sglang_scaling_fixes.retry.settings import Pair, Target, checked_settings
from sglang_scaling_fixes.retry.workers import LONGEST_BACKOFF_S, Worker, Workers, WorkerState


def some(count: int) -> Workers:
    return Workers(Target(f"http://w{i}:1") for i in range(count))


def pick(workers: Workers, tried: list[Worker] | None = None, now: float = 0.0) -> Worker:
    worker = workers.pick(tried or [], now)
    assert worker is not None
    return worker


def test_ties_rotate_and_fewer_in_flight_go_first() -> None:
    workers = some(3)
    assert [pick(workers) for _ in range(6)] == workers.all * 2
    workers.all[0].in_flight = workers.all[1].in_flight = 1
    assert {pick(workers) for _ in range(3)} == {workers.all[2]}


def test_a_request_never_comes_to_the_same_worker_twice() -> None:
    workers = some(3)
    tried: list[Worker] = []
    while (worker := workers.pick(tried, 0.0)) is not None:
        tried.append(worker)
    assert sorted(tried, key=workers.all.index) == workers.all


def test_an_avoided_worker_is_the_last_resort_until_its_time_is_over() -> None:
    workers = some(2)
    bad, good = workers.all
    workers.avoid(bad, until=30.0)
    workers.avoid(bad, until=5.0)  # the longer one counts
    good.in_flight = 100
    assert pick(workers, now=29.9) is good and bad.state(29.9) is WorkerState.AVOIDED
    assert pick(workers, [good], now=29.9) is bad
    assert pick(workers, now=30.0) is bad and bad.state(30.0) is WorkerState.UP


def test_a_broken_worker_is_probed_with_a_back_off_that_doubles() -> None:
    workers = some(1)
    (worker,) = workers.all
    assert workers.broke(worker, 0.0) and not workers.broke(worker, 0.1)  # one reason, not two
    assert workers.pick([], 100.0) is None and not workers.live(100.0)
    assert workers.due(0.4) == [] and workers.due(0.5) == [worker]
    assert workers.due(100.0) == []  # it is being probed
    waits, now = [], 0.5
    for _ in range(9):
        workers.probed(worker, False, now)
        assert worker.probe_at is not None
        waits.append(worker.probe_at - now)
        now = worker.probe_at
        assert workers.due(now) == [worker]
    assert waits == [1, 2, 4, 8, 16, *[LONGEST_BACKOFF_S] * 4]
    workers.probed(worker, True, now)
    assert workers.live(now) and pick(workers, now=now) is worker


def test_only_a_good_answer_forgets_what_broke() -> None:
    workers = some(1)
    (worker,) = workers.all
    for wait in (0.5, 1.0, 2.0):
        workers.broke(worker, 0.0)
        assert worker.probe_at == wait
        workers.answered(worker)  # one that was still running says nothing
        workers.probed(worker, True, wait)
    workers.answered(worker)
    workers.broke(worker, 0.0)
    assert worker.probe_at == 0.5


def test_what_a_pair_cannot_serve_goes_to_no_pair() -> None:
    pair = Target("http://d:1", Pair("http://p:1", "p", 8998))
    workers = Workers([pair, Target("http://w:1")])
    assert workers.pick([], 0.0, no_pairs=True) is workers.all[1]
    assert workers.pick([workers.all[1]], 0.0, no_pairs=True) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("bapf"), st.integers(0, 40))))
def test_whoever_is_picked_is_live_and_untried(steps: list[tuple[int, str, int]]) -> None:
    workers, now = some(4), 0.0
    for index, what, seconds in steps:
        worker = workers.all[index]
        now += seconds
        if what == "b":
            workers.broke(worker, now)
        elif what == "a":
            workers.avoid(worker, now + seconds)
        else:
            for due in workers.due(now):
                workers.probed(due, what == "p", now)
        tried: list[Worker] = []
        while (picked := workers.pick(tried, now)) is not None:
            assert picked.state(now) is not WorkerState.DOWN and picked not in tried
            tried.append(picked)
        up = [w for w in workers.all if w.state(now) is WorkerState.UP]
        assert set(tried[: len(up)]) == set(up)
        assert bool(tried) == workers.live(now)


def test_a_budget_is_never_exceeded_and_comes_back() -> None:
    budget = Budget(10)
    one, other = budget.lease(), budget.lease()
    assert one.resize(6) and not other.resize(5) and other.resize(4) and not one.resize(7)
    assert one.resize(6) and budget.held == 10
    one.resize(0)
    other.resize(0)
    assert budget.held == 0


# Requests


def asked(path: str, body: bytes, headers: dict[str, str] | None = None) -> ClientRequest:
    found = route("POST", path) or READ
    return ClientRequest("POST", path, path, CIMultiDict(headers or {}), body, found)


def facts(path: str, said: dict[str, Any]) -> BodyFacts:
    found = asked(path, json.dumps(said).encode()).facts
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("path", "said", "batch", "count"),
    [
        ("/generate", {"text": "x"}, None, 1),
        ("/generate", {"text": ["x"]}, 1, 1),
        ("/generate", {"text": ["x", "y"], "sampling_params": {"n": 3}}, 2, 6),
        ("/generate", {"text": ["x", "y"], "sampling_params": [{"n": 3}, {}]}, 2, 6),
        ("/generate", {"input_ids": [1, 2]}, None, 1),
        ("/generate", {"input_ids": [[1], [2]]}, 2, 2),
        ("/generate", {"input_embeds": [[0.1], [0.2]]}, None, 1),
        ("/generate", {"input_embeds": [[[0.1]], [[0.2]]]}, 2, 2),
        ("/v1/completions", {"prompt": ["x", "y"], "n": 2}, 2, 4),
        ("/v1/completions", {"prompt": [1, 2]}, None, 1),
        ("/v1/chat/completions", {"messages": [], "n": 2}, None, 2),
        ("/v1/chat/completions", {"n": "many"}, None, 1),
        ("/v1/responses", {"input": ["x", "y"]}, None, 1),
        ("/generate", {}, None, 1),
        ("/generate", {"text": []}, None, 1),
        ("/vertex_generate", {"instances": []}, None, 1),
    ],
)
def test_how_many_prompts_and_generations(
    path: str, said: dict[str, Any], batch: int | None, count: int
) -> None:
    assert (facts(path, said).batch_size, facts(path, said).generations) == (batch, count)


def test_instances_are_prompts() -> None:
    said = {"instances": [{"text": "x"}] * 3, "parameters": {"sampling_params": {"n": 2}}}
    assert facts("/vertex_generate", said).generations == 6
    assert facts("/vertex_generate", {"parameters": 7}).generations == 1


@pytest.mark.parametrize("body", [b"", b"[1]", b"7", b"\xff", b'{"text": '])
def test_what_is_no_json_object_has_no_facts(body: bytes) -> None:
    request = asked("/generate", body)
    assert request.facts is None and request.generations == 1 and request.name is None


def test_a_body_is_parsed_once_and_only_if_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []

    def counting(path: str, body: bytes) -> BodyFacts | None:
        parsed.append(body)
        return body_facts(path, body)

    body_facts = request_module.body_facts
    monkeypatch.setattr(request_module, "body_facts", counting)
    body = b'{"rid": "r", "n": 2}'
    request = asked("/v1/chat/completions", body, {"X-Request-Id": "h"})
    assert request.name == "h" and parsed == []
    request = asked("/v1/chat/completions", body)
    assert (request.generations, request.name) == (2, "r") and request.facts is not None
    assert parsed == [body]
    request = asked("/v1/chat/completions", b"no JSON")
    assert request.facts is None and request.name is None
    assert parsed == [body, b"no JSON"]


@pytest.mark.parametrize(
    "body",
    [b"{}", b' {"text": "x"} \n', b'{"bootstrap_room": 3, "text":"x", "a": 12345678901234567890}'],
)
def test_a_room_is_added_and_nothing_else_changed(body: bytes) -> None:
    pair = Pair("http://p:1", "p", 9000)
    said = json.loads(body)
    known = asked("/generate", body).facts
    assert known is not None
    rooms = set()
    for _ in range(20):
        sent = with_rendezvous(body, known, pair)
        assert sent.startswith(body.rstrip()[:-1])
        got = json.loads(sent)
        rooms.add(got["bootstrap_room"])
        added = {"bootstrap_host": "p", "bootstrap_port": 9000}
        assert got == {**said, **added, "bootstrap_room": got["bootstrap_room"]}
    assert len(rooms) == 20 and all(0 <= room < LAST_ROOM for room in rooms)


def test_the_clients_name_of_a_request() -> None:
    assert asked("/generate", b'{"rid": "r"}', {"x-request-id": "h"}).name == "h"
    assert asked("/generate", b'{"rid": "r"}').name == "r"
    assert asked("/generate", b'{"rid": ["r", "s"]}').name == "r"
    assert asked("/generate", b"{}").name is None and asked("/generate", b"\xff").name is None


# Flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--worker"),
        (["--worker", "http://a:1/", "--worker", "http://a:1"], "twice"),
        (["--worker", "http://A:1", "--pd", "prefill=http://a:1,decode=http://b:1"], "twice"),
        (["--pd", "prefill=http://a:1,decode=http://a:1"], "twice"),
        (["--worker", "http://a:1/v1"], "path"),
        (["--worker", "http://a:1?x=y"], "path"),
        (["--worker", "a:1"], "http://HOST:PORT"),
        (["--worker", "ftp://a:1"], "http://HOST:PORT"),
        (["--worker", "http://a:x"], "http://HOST:PORT"),
        (["--worker", "http://"], "http://HOST:PORT"),
        (["--worker", "http://a b:1"], "http://HOST:PORT"),
        (["--worker", "http://me:secret@a:1"], "user"),
        (["--pd", "prefill=http://a:1"], "decode=URL"),
        (["--pd", "prefill=http://a:1,decode=http://b:1,room=3"], "room=3"),
        (["--pd", "prefill=http://a:1,decode=http://b:1,decode=http://c:1"], "decode is given"),
        (["--pd", "prefill=http://a:1,decode=http://b:1,bootstrap-port=0"], "1 to 65535"),
        (["--pd", "http://a:1"], "prefill=URL"),
        (["--worker", "http://a:1", "--attempts", "0"], "--attempts '0'"),
        (["--worker", "http://a:1", "--hold-tokens", "-1"], "--hold-tokens '-1'"),
        (["--worker", "http://a:1", "--hold-tokens", "many"], "--hold-tokens 'many'"),
        (["--worker", "http://a:1", "--idle-timeout", "0"], "--idle-timeout '0'"),
        (["--worker", "http://a:1", "--idle-timeout", "nan"], "--idle-timeout 'nan'"),
        (["--worker", "http://a:1", "--max-body-bytes", "0"], "--max-body-bytes '0'"),
        (["--worker", "http://a:1", "--host", "192.0.2.1"], "--host 192.0.2.1"),
    ],
)
def test_a_bad_flag_is_named_with_its_value_and_the_remedy(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["retry-proxy", *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_good_flags() -> None:
    chosen = checked_settings(
        ["http://[::1]:30000", "https://w"],
        ["prefill=http://[fe80::1]:1,decode=http://d:2,bootstrap-port=9"],
        attempts="5",
        idle_timeout=2.5,
    )
    assert [target.name for target in chosen.targets] == [
        "http://[::1]:30000",
        "https://w:443",
        "http://[fe80::1]:1+http://d:2",
    ]
    pair = chosen.targets[2].pair
    assert pair is not None and (pair.host, pair.port) == ("[fe80::1]", 9)
    assert (chosen.attempts, chosen.idle_timeout) == (5, 2.5)
    with pytest.raises(ConfigError):
        checked_settings(["http://a:1"], [], port=70_000)


def test_the_command_line_imports_no_server() -> None:
    code = "import sys, sglang_scaling_fixes.cli as c; c._parser(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"aiohttp", "uvicorn", "orjson"} & set(found.stdout.split())


# Stock's paths


def stock_routes() -> list[tuple[str, str]]:
    """Of every route of the installed SGLang: its function's decorators, and its path."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    tree = ast.parse((folder / "srt/entrypoints/http_server.py").read_text())
    found = []
    for function in ast.walk(tree):
        decorators = getattr(function, "decorator_list", [])
        words = " ".join(ast.unparse(one) for one in decorators)
        for one in decorators:
            first = one.args[0] if isinstance(one, ast.Call) and one.args else None
            if isinstance(first, ast.Constant) and str(first.value).startswith("/"):
                found.append((words, first.value))
    assert len(found) > 60
    return found


NOT_SPREAD = {
    # of one worker's state, and open to everyone in stock
    "/open_session",
    "/close_session",
    "/v1/responses/{response_id}/cancel",
}


def test_every_open_path_of_stock_is_known() -> None:
    """What stock guards as administration is nobody's inference; the rest is decided here."""
    for how, path in stock_routes():
        posts = "app.post" in how or "'POST'" in how
        if "ADMIN" in how or "{method}" in path:
            assert path not in INFERENCE, path
            if "'GET'" in how and "'POST'" in how:
                assert path in CHANGING_GETS, path
        elif posts and path not in NOT_SPREAD:
            assert path in INFERENCE, path


def test_paths_of_the_proxy_are_stocks() -> None:
    stock = {path for _, path in stock_routes()} | {"/invocations", "/vertex_generate"}
    assert set(INFERENCE) | CHANGING_GETS <= stock


def test_reading_and_changing() -> None:
    assert route("GET", "/v1/models") is READ and route("GET", "/flush_cache") is None
    assert route("POST", "/generate") is route("PUT", "/generate") is INFERENCE["/generate"]
    assert route("POST", "/flush_cache") is None and route("DELETE", "/generate") is None
