"""A worker that misbehaves exactly as a request tells it to. `python -m tests.retry.fake_worker`.

The request's body says what to do: `tokens` (10), `prompt`, `size` (bytes of padding per
event), `delay` (seconds before each event), and `plans`: by worker name, how that worker
fails (`fail`) and after how many tokens (`after`), or that its end waits for `may_end`
(`late`). A worker without a plan does well. With `mark` (true) every token begins with its name.

An anomaly's `rule` is said in its message. With `listens` there is none if the request is vouched
for with `SECRET`. `comments` sends nothing else from then on. `reused` closes a connection that
has served a request before.

It resumes streams unless `resumes` is None (it knows nothing of that) or False (it refuses). Then
its events have names of its own, and token i has the id 1000 + i.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from sglang_scaling_fixes import vouch
from sglang_scaling_fixes.retry.trail import FIELD
from tests.retry.progress import moves

ANOMALY = "kv_anomaly: accept length 1.02 of 3.1 expected"
SECRET = b"the secret of the fake workers"
GARBAGE = "GARBAGE"
DONE = b"data: [DONE]\n\n"
PIECE = 1 << 18
"""Bytes written at once."""


@dataclass
class Seen:
    """One request as it arrived, and whether its connection was closed under it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    @cached_property
    def said(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.body))
        except (ValueError, TypeError):
            return {}


class FakeWorker:
    """Serves until closed, or nobody while it is `frozen`.

    `sent` counts the bytes whose sending has ended; `blocked` the answers that wait for their
    client to read. Answers whose plan is `late` wait for `may_end`.
    """

    def __init__(self, name: str, port: int = 0) -> None:
        self.name = name
        self.port = port
        self.sent = 0
        self.blocked = 0
        self.may_end = asyncio.Event()
        self.healthy = True
        self.frozen = False
        self.resumes: bool | None = True
        self.plan: dict[str, Any] = {}
        """For requests that bring no plan: a router drops fields that it does not know."""
        self.seen: list[Seen] = []
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def generations(self) -> list[Seen]:
        return [one for one in self.seen if one.target not in ("/health", vouch.FALSE_ALARM_PATH)]

    @property
    def withdrawn(self) -> list[vouch.Word | None]:
        """The words of the false alarms that it was told of."""
        told = [dict(one.headers) for one in self.seen if one.target == vouch.FALSE_ALARM_PATH]
        return [vouch.vouched(SECRET, said[vouch.HEADER], time.time()) for said in told]

    async def __aenter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", self.port))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        self.port = listener.getsockname()[1]
        self._server = await asyncio.start_server(self._connection, sock=listener)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            served = 0
            while await self._request(reader, writer, served):
                served += 1
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def _request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, served: int
    ) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        pairs = [line.partition(": ")[::2] for line in head[1:] if line]
        length = int({k.lower(): v for k, v in pairs}.get("content-length", 0))
        one = Seen(method, target, pairs, await reader.readexactly(length))
        self.seen.append(one)
        while self.frozen:
            await asyncio.sleep(0.01)
        plan = one.said.get("plans", {}).get(self.name, {})
        if plan.get("fail") == "reused" and served:
            return False
        answer = asyncio.create_task(self._answer(one, writer))
        ended = asyncio.create_task(reader.read(1))
        await asyncio.wait({answer, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            one.hung_up.set()
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            return False
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)
        if isinstance(answer.exception(), OSError):
            one.hung_up.set()
        return answer.result()

    async def _answer(self, one: Seen, writer: asyncio.StreamWriter) -> bool:
        """False closes the connection."""
        path = one.target.partition("?")[0]
        if path == "/health":
            writer.write(whole(b"{}", 200 if self.healthy else 503))
            await writer.drain()  # not `_send`: probes are no progress
            return True
        if one.method == "GET":
            await self._send(writer, whole(json.dumps({"worker": self.name}).encode()))
            return True
        said = one.said
        plan = said.get("plans", {}).get(self.name, self.plan)
        fail, after = plan.get("fail"), plan.get("after", 0)
        if fail in ("status", "not_http"):
            return await self._refuse(fail, plan, writer)
        if fail == "anomaly" and plan.get("listens") and _vouched_for(said):
            plan = {}
        if fail == "hang" and not after:
            await asyncio.Event().wait()
        if fail == "close" and not after:
            return False
        if self.resumes is False and FIELD in said:
            message = f"{FIELD}: this request cannot be resumed; leave the field out"
            await self._send(writer, whole(json.dumps({"error": message}).encode(), 400))
            return True
        answer = self._stream if said.get("stream") else self._whole
        return await answer(path, said, plan, writer)

    async def _refuse(self, fail: str, plan: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if plan.get("late"):
            await self.may_end.wait()
        if fail == "status":
            body = plan.get("body", {"error": {"message": "not now"}})
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            after = plan.get("retry_after")
            headers = [("Retry-After", str(after))] if after else []
            headers += [("Location", plan["location"])] if "location" in plan else []
            await self._send(writer, whole(data, plan.get("status", 503), headers))
            return True
        await self._send(writer, b"hello there\r\n\r\n")
        return False

    async def _whole(
        self, path: str, said: dict[str, Any], plan: dict[str, Any], writer: asyncio.StreamWriter
    ) -> bool:
        await asyncio.sleep(said.get("delay", 0))
        tokens = [self._token(said, i) for i in range(said.get("tokens", 10))]
        finish: dict[str, Any] = {"type": "stop"}
        if plan.get("fail") == "anomaly":
            finish = abort(plan)
        answer: Any = {"text": "".join(tokens), "meta_info": {"finish_reason": finish}}
        if isinstance(said.get("text"), list):
            answer = [{"text": "", "meta_info": {"finish_reason": {"type": "stop"}}}, answer]
        response = whole(json.dumps(answer).encode(), chunked=plan.get("chunked", False))
        if plan.get("fail") == "half_body":
            await self._send(writer, response[: -len(response) // 3])
            return False
        await self._send(writer, response)
        return True

    async def _stream(
        self, path: str, said: dict[str, Any], plan: dict[str, Any], writer: asyncio.StreamWriter
    ) -> bool:
        fail, after, garbage = plan.get("fail"), plan.get("after", 0), plan.get("garbage", 3)
        resume = said.get(FIELD) if self.resumes else None
        begin = len(resume["output_ids"]) if resume else 0
        resumed = f"X-SGLang-Scaling-Fixes-Resumed: {begin}\r\n" if resume else ""
        await self._send(
            writer,
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"X-Worker: "
            + self.name.encode()
            + b"\r\n"
            + resumed.encode()
            + b"Transfer-Encoding: chunked\r\n\r\n",
        )
        count = said.get("tokens", 10)
        if resume:
            said = {**said, "id": f"{self.name}-{len(self.seen)}"}
            assert resume["output_ids"] == [1000 + i for i in range(begin)]
            await self._send(writer, _created(path, said))
        text = "".join(self._token(said, i) for i in range(begin))
        for i in range(begin, count):
            await asyncio.sleep(said.get("delay", 0))
            token = self._token(said, i)
            if fail in ("anomaly", "hang", "close", "truncate") and i >= after - garbage:
                token = GARBAGE
            text += token
            if fail and i == after:
                event = EVENTS[path](text, token, i, said)
                if fail == "truncate":
                    await self._send(writer, chunk(event[: len(event) // 2]))
                    return False
                if fail == "close":
                    return False
                if fail == "hang":
                    await asyncio.Event().wait()
                if fail == "comments":
                    await self._comment(writer)
                if fail == "anomaly":
                    await self._send(writer, chunk(ABORTS[path](text, plan)))
                    await self._send(writer, b"0\r\n\r\n")
                    return True
                if fail == "abort_event":
                    event = f"data: {json.dumps(plan['event'])}\n\n".encode()
                    await self._send(writer, chunk(event + DONE) + b"0\r\n\r\n")
                    return True
                if fail == "no_done":
                    await self._send(writer, b"0\r\n\r\n")
                    return True
            event = EVENTS[path](text, token, i, said)
            comment = _comment_of(range(max(begin, i - 2), i + 1)) if resume else b""
            await self._send(writer, chunk(event + comment))
        if plan.get("late"):
            await self.may_end.wait()
        await self._send(writer, chunk(ENDS[path](text, count, said)) + b"0\r\n\r\n")
        return True

    async def _comment(self, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(chunk(b": still here\n\n"))
            await writer.drain()  # not `_send`: comments are no progress
            await asyncio.sleep(0.02)

    def _token(self, said: dict[str, Any], i: int) -> str:
        mark = f"{self.name}:" if said.get("mark", True) else ""
        return f"{mark}{said.get('prompt', '')}{i} "

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            writer.write(piece)
            self.blocked += 1
            try:
                await writer.drain()
            finally:
                self.blocked -= 1
            self.sent += len(piece)
            moves.note()


def whole(
    body: bytes,
    status: int = 200,
    headers: list[tuple[str, str]] | None = None,
    chunked: bool = False,
) -> bytes:
    framing = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body)))
    given = [("Content-Type", "application/json"), *(headers or []), framing]
    head = "".join(f"{name}: {value}\r\n" for name, value in given)
    data = chunk(body[:5]) + chunk(body[5:]) + b"0\r\n\r\n" if chunked else body
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + data


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def abort(plan: dict[str, Any] | None = None) -> dict[str, Any]:
    rule = (plan or {}).get("rule")
    begin = (plan or {}).get("suspect_from", 7)
    said = f"{ANOMALY} [rule={rule} suspicion={rule}-1 suspect_from={begin}]" if rule else ANOMALY
    return {"type": "abort", "status_code": 503, "err_type": "kv_anomaly", "message": said}


def _created(path: str, said: dict[str, Any]) -> bytes:
    """What comes before the first token, and is not said again by who goes on."""
    if path != "/v1/responses" or said[FIELD]["output_ids"]:
        return b""
    kind = "response.created"
    return chunk(_data({"type": kind, "response": _named(said)}, kind))


def _comment_of(tokens: range) -> bytes:
    """Of three tokens at a time, as when several are generated at once."""
    if tokens[-1] % 3:
        return b""
    return f": {FIELD}_ids [{','.join(str(1000 + i) for i in tokens)}]\n\n".encode()


def _vouched_for(said: dict[str, Any]) -> bool:
    word = vouch.vouched(SECRET, said.get("extra_key", ""), time.time())
    return word is not None and word.kind == vouch.UNGUARDED


def _data(value: Any, name: str = "") -> bytes:
    event = f"event: {name}\n".encode() if name else b""
    return event + b"data: " + json.dumps(value).encode() + b"\n\n"


def _generate(text: str, token: str, i: int, said: dict[str, Any]) -> bytes:
    meta = {"finish_reason": None, "completion_tokens": i + 1, **_named(said)}
    return _data({"text": text, "meta_info": meta, "pad": "x" * said.get("size", 0)})


def _named(said: dict[str, Any]) -> dict[str, Any]:
    return {"id": said["id"]} if "id" in said else {}


def _generate_end(text: str, count: int, said: dict[str, Any]) -> bytes:
    meta = {"finish_reason": {"type": "stop"}, "completion_tokens": count, **_named(said)}
    return _data({"text": text, "meta_info": meta}) + DONE


def _chat(text: str, token: str, i: int, said: dict[str, Any]) -> bytes:
    return _data(
        {"choices": [{"index": 0, "delta": {"content": token}}], "id": "x", **_named(said)}
    )


def _completion(text: str, token: str, i: int, said: dict[str, Any]) -> bytes:
    return _data({"choices": [{"index": 0, "text": token}], "id": "x", **_named(said)})


def _openai_end(text: str, count: int, said: dict[str, Any]) -> bytes:
    return _data({"choices": [{"index": 0, "finish_reason": "stop"}], **_named(said)}) + DONE


def _generate_abort(text: str, plan: dict[str, Any]) -> bytes:
    return _data({"text": text, "meta_info": {"finish_reason": abort(plan)}}) + DONE


def _openai_abort(text: str, plan: dict[str, Any]) -> bytes:
    error = {"object": "error", "type": "SERVICE_UNAVAILABLE", "message": ANOMALY}
    return _data({"error": {**error, "code": 503, "param": None}}) + DONE


def _responses(text: str, token: str, i: int, said: dict[str, Any]) -> bytes:
    kind = "response.output_text.delta"
    item = {"item_id": f"item-{said['id']}", "output_index": 0} if "id" in said else {}
    # A resumed response numbers its own events.
    number = i - len(said[FIELD]["output_ids"]) if "id" in said else i
    return _data({"type": kind, "delta": token, "sequence_number": number, **item}, kind)


def _responses_end(text: str, count: int, said: dict[str, Any]) -> bytes:
    kind = "response.completed"
    number = count - len(said[FIELD]["output_ids"]) if "id" in said else count
    output = [{"id": f"item-{said['id']}"}] if "id" in said else []
    response = {"status": "completed", "output": output, **_named(said)}
    return _data({"type": kind, "response": response, "sequence_number": number}, kind)


def _responses_abort(text: str, plan: dict[str, Any]) -> bytes:
    kind = "response.failed"
    response = {"status": "failed", "error": {"code": "server_error", "message": ANOMALY}}
    return _data({"type": kind, "response": response, "output_text": text}, kind)


def _messages(text: str, token: str, i: int, said: dict[str, Any]) -> bytes:
    kind = "content_block_delta"
    return _data({"type": kind, "delta": {"type": "text_delta", "text": token}}, kind)


def _messages_end(text: str, count: int, said: dict[str, Any]) -> bytes:
    return _data({"type": "message_stop"}, "message_stop")


def _messages_abort(text: str, plan: dict[str, Any]) -> bytes:
    error = {"type": "overloaded_error", "message": ANOMALY}
    return _data({"type": "error", "error": error}, "error") + _messages_end(text, 0, {})


EVENTS = {
    "/generate": _generate,
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": _responses,
    "/v1/messages": _messages,
}
ENDS = {
    "/generate": _generate_end,
    "/v1/chat/completions": _openai_end,
    "/v1/completions": _openai_end,
    "/v1/responses": _responses_end,
    "/v1/messages": _messages_end,
}
ABORTS = {
    "/generate": _generate_abort,
    "/v1/chat/completions": _openai_abort,
    "/v1/completions": _openai_abort,
    "/v1/responses": _responses_abort,
    "/v1/messages": _messages_abort,
}


async def _main(port: int) -> None:
    async with FakeWorker("w", port):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(_main(parser.parse_args().port))
