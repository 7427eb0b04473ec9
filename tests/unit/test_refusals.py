"""Headers and error types of our 503s, over a real ASGI application."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient

from sglang_scaling_fixes.reclaim import retry_after
from sglang_scaling_fixes.reclaim.retry_after import ENDED, REASON_HEADER, REFUSAL
from sglang_scaling_fixes.reclaim.rules.quarantine import RETRY_AFTER_S
from sglang_scaling_fixes.refusals import Refusals
from sglang_scaling_fixes.specguard import error_type

ANOMALY = "kv_anomaly: accept length 1.1 after 128 tokens"


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    @app.get("/refused")
    def refused() -> None:
        raise HTTPException(503, f"{REFUSAL}; retry here later")

    @app.get("/ended")
    def ended() -> None:
        raise HTTPException(503, f"{ENDED} (aborted): retry the request")

    @app.get("/queue-full")
    def queue_full() -> None:
        raise HTTPException(503, "The queue is full.")

    @app.get("/anomaly")
    def anomaly() -> JSONResponse:
        return JSONResponse({"object": "error", "message": ANOMALY, "type": "503"}, 503)

    @app.get("/nested")
    def nested() -> JSONResponse:
        return JSONResponse({"error": {"message": ANOMALY, "type": "503", "code": 503}}, 503)

    @app.get("/quoted")
    def quoted() -> JSONResponse:
        return JSONResponse({"message": f'not one: "{ANOMALY}', "type": "503"}, 503)

    @app.get("/in-parts")
    def in_parts() -> StreamingResponse:
        body = json.dumps({"error": {"message": ANOMALY, "type": "503"}})
        return StreamingResponse(iter([body[:20], body[20:]]), 503)

    @app.get("/stream")
    def stream() -> StreamingResponse:
        def parts() -> Iterator[bytes]:
            yield b"one "
            yield b"two"

        return StreamingResponse(parts())

    app.add_middleware(Refusals, edits=[retry_after.edit, error_type.edit])
    return TestClient(app)


def test_our_refusal_says_when_to_come_back(client: TestClient) -> None:
    answer = client.get("/refused")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == str(RETRY_AFTER_S)
    assert REFUSAL in answer.text


def test_so_does_a_request_that_prefill_ended(client: TestClient) -> None:
    answer = client.get("/ended")
    assert answer.headers["retry-after"] == "1"
    assert answer.headers[REASON_HEADER.decode()] == "prefill-ended"


def test_stocks_own_503_and_everything_else_stay_as_they_are(client: TestClient) -> None:
    assert "retry-after" not in client.get("/queue-full").headers
    assert client.get("/queue-full").json() == {"detail": "The queue is full."}
    assert client.get("/stream").content == b"one two"


def test_the_guards_abort_names_its_type(client: TestClient) -> None:
    assert client.get("/anomaly").json() == {
        "object": "error",
        "message": ANOMALY,
        "type": "kv_anomaly",
    }
    assert client.get("/nested").json()["error"]["type"] == "kv_anomaly"
    assert client.get("/in-parts").json()["error"]["type"] == "kv_anomaly"
    assert client.get("/quoted").json()["type"] == "503"
