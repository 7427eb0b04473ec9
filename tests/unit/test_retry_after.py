"""The header on our refusals, over a real ASGI application."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from sglang_scaling_fixes.reclaim.quarantine import RETRY_AFTER
from sglang_scaling_fixes.reclaim.retry_after import REFUSAL, RetryAfter


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    @app.get("/refused")
    def refused() -> None:
        raise HTTPException(503, f"{REFUSAL}; retry here later")

    @app.get("/queue-full")
    def queue_full() -> None:
        raise HTTPException(503, "The queue is full.")

    @app.get("/stream")
    def stream() -> StreamingResponse:
        def parts() -> Iterator[bytes]:
            yield b"one "
            yield b"two"

        return StreamingResponse(parts())

    app.add_middleware(RetryAfter)
    return TestClient(app)


def test_our_refusal_says_when_to_come_back(client: TestClient) -> None:
    answer = client.get("/refused")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == str(RETRY_AFTER)
    assert REFUSAL in answer.text


def test_stocks_own_503_and_everything_else_stay_as_they_are(client: TestClient) -> None:
    assert "retry-after" not in client.get("/queue-full").headers
    assert client.get("/queue-full").json() == {"detail": "The queue is full."}
    assert client.get("/stream").content == b"one two"
