"""A closed loop of short requests through one prefill and one decode server.

The client shares two cores with the servers, so it does as little as it can: bodies
are encoded before the loop begins, each client is one thread with one kept
connection per server, and nothing is looked at until the loop is over.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_scaling_fixes.lab.servers import checkpoints
from sglang_scaling_fixes.lab.servers.server import ANSWER_S

PROMPTS = 64
"""Distinct prompts: each is answered many times, so that answers can be compared."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """What is asked; lengths in tokens, `abort_within` in seconds after the sending."""

    requests: int
    concurrency: int
    prompt_tokens: int
    new_tokens: int
    seed: int
    abort_share: float = 0.0
    abort_within: float = 0.0


@dataclass(frozen=True)
class Request:
    """One entry of a schedule: which prompt, and when it is aborted, if it is."""

    prompt: int
    abort_after: float | None = None


@dataclass(frozen=True)
class Reply:
    """`ids` is None for a request without an answer; `error` says why, unless it was aborted."""

    prompt: int
    ids: Ids | None
    aborted: bool
    error: str


@dataclass(frozen=True)
class End:
    """Where a server listens."""

    name: str
    address: str
    port: int


@dataclass(frozen=True)
class Ends:
    """The two servers a request goes to, and the port at which decode finds prefill."""

    prefill: End
    decode: End
    bootstrap_port: int


def each_prompt_once() -> list[Request]:
    """The warm-up: also the answers that later ones are compared with."""
    return [Request(prompt) for prompt in range(PROMPTS)]


def schedule(shape: Shape) -> list[Request]:
    """The same requests in the same order, with the same aborts, for every run of a shape."""
    draw = random.Random(f"schedule-{shape.seed}")
    order = [Request(i % PROMPTS) for i in range(shape.requests)]
    draw.shuffle(order)
    chosen = draw.sample(range(shape.requests), round(shape.abort_share * shape.requests))
    for i in chosen:
        order[i] = Request(order[i].prompt, draw.uniform(0.0, shape.abort_within))
    return order


class Load:
    """Runs schedules on one pair of servers."""

    def __init__(self, ends: Ends, shape: Shape, first_room: int = 1) -> None:
        draw = random.Random(f"prompts-{shape.seed}")
        self._ends = ends
        self._shape = shape
        self._prompts = [
            [draw.randrange(3, checkpoints.VOCAB) for _ in range(shape.prompt_tokens)]
            for _ in range(PROMPTS)
        ]
        self._rooms = itertools.count(first_room)

    def run(
        self,
        requests: Sequence[Request],
        ended: Callable[[Reply], bool] = lambda reply: True,
    ) -> list[Reply]:
        """Send `requests` in order, `concurrency` at a time, each once its slot is free.

        `ended` is called with each reply, by any thread; False: no more requests.
        """
        items = [(request, *self._body(request)) for request in requests]
        replies: list[Reply | None] = [None] * len(items)
        turn = itertools.count()
        clients = [_Client(self._ends) for _ in range(self._shape.concurrency)]

        def work(client: _Client) -> None:
            while (i := next(turn)) < len(items):
                replies[i] = reply = client.ask(*items[i])
                if not ended(reply):
                    return

        threads = [threading.Thread(target=work, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            client.close()
        return [reply for reply in replies if reply is not None]

    def _body(self, request: Request) -> tuple[str, bytes]:
        room = next(self._rooms)
        rid = f"bench-{room}"
        payload = {
            "input_ids": self._prompts[request.prompt],
            "sampling_params": {
                "max_new_tokens": self._shape.new_tokens,
                "temperature": 0,
                "ignore_eos": True,
            },
            "rid": rid,
            "bootstrap_host": self._ends.prefill.address,
            "bootstrap_port": self._ends.bootstrap_port,
            "bootstrap_room": room,
        }
        return rid, json.dumps(payload).encode()


@dataclass
class _Client:
    """One thread's connections; both servers must answer before it goes on."""

    ends: Ends
    _kept: dict[str, http.client.HTTPConnection] = field(default_factory=dict)

    def ask(self, request: Request, rid: str, body: bytes) -> Reply:
        servers = (self.ends.prefill, self.ends.decode)
        try:
            for server in servers:
                self._send(server, "/generate", body)
            if request.abort_after is not None:
                time.sleep(request.abort_after)
                self._abort(rid)
            status, answer = self._receive(self.ends.decode)
            self._receive(self.ends.prefill)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            return Reply(request.prompt, None, False, f"{rid}: {type(error).__name__}: {error}")
        ids, aborted = _judge(status, answer)
        if request.abort_after is not None and status >= 400:
            # Prefill may act on the abort first, and decode then says that the transfer failed.
            aborted = True
        expected = ids is not None or (aborted and request.abort_after is not None)
        problem = "" if expected else f"{rid}: {status}: {str(answer)[:200]}"
        return Reply(request.prompt, ids, aborted, problem)

    def close(self) -> None:
        for connection in self._kept.values():
            connection.close()
        self._kept.clear()

    def _abort(self, rid: str) -> None:
        """On both servers, as a router does that passes an abort on."""
        for server in (self.ends.decode, self.ends.prefill):
            name = f"{server.name} abort"
            self._send(server, "/abort_request", json.dumps({"rid": rid}).encode(), name)
            self._receive(server, name)

    def _send(self, server: End, path: str, body: bytes, name: str = "") -> None:
        connection = self._kept.get(name or server.name)
        if connection is None:
            connection = self._kept[name or server.name] = http.client.HTTPConnection(
                server.address, server.port, timeout=ANSWER_S
            )
        connection.request("POST", path, body, {"Content-Type": "application/json"})

    def _receive(self, server: End, name: str = "") -> tuple[int, Any]:
        response = self._kept[name or server.name].getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None


def _judge(status: int, answer: Any) -> tuple[Ids | None, bool]:
    """Generated ids (None without), and whether the request ended as aborted."""
    body = answer if isinstance(answer, dict) else {}
    reason = ((body.get("meta_info") or {}).get("finish_reason") or {}).get("type")
    if reason == "abort" or (status >= 400 and "bort" in str(answer)):
        return None, True
    ids = body.get("output_ids") if status == 200 else None
    return (tuple(ids) if ids else None), False


class Answers:
    """Whether every answer is one that stock gives when nothing is aborted.

    A float32 sum depends on what else is in the batch, so stock may now and then
    disagree with itself; such prompts are counted, and each of stock's answers is right.
    """

    def __init__(self) -> None:
        self._right: dict[int, set[Ids]] = {}
        self._given: dict[str, list[tuple[int, Ids]]] = {"stock": [], "fixed": []}

    def learn(self, replies: Sequence[Reply]) -> None:
        """Replies of stock without aborts."""
        for reply in replies:
            if reply.ids is not None:
                self._right.setdefault(reply.prompt, set()).add(reply.ids)

    def given(self, half: str, replies: Sequence[Reply]) -> None:
        self._given[half] += [(r.prompt, r.ids) for r in replies if r.ids is not None]

    def verdict(self) -> dict[str, Any]:
        """Compared and wrong answers of both halves, and prompts stock is not sure about."""
        return {
            "compared": {half: len(given) for half, given in self._given.items()},
            "wrong": {
                half: sum(ids not in self._right.get(prompt, ()) for prompt, ids in given)
                for half, given in self._given.items()
            },
            "prompts_stock_answers_in_two_ways": sum(len(s) > 1 for s in self._right.values()),
        }
