"""A server that takes no request says so at /health, over a real ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from sglang_scaling_fixes import readiness
from sglang_scaling_fixes.readiness import PATHS, Ask, Readiness, Report
from sglang_scaling_fixes.reclaim import FIX
from sglang_scaling_fixes.reclaim.retry_after import REFUSAL

FULL: Report = {"safe_reclaim_decode": {"refusing": True}}
WELL: Report = {"safe_reclaim_decode": {"refusing": False}}


def application(ask: Ask) -> FastAPI:
    app = FastAPI()
    for path in (*PATHS, "/generate"):
        app.add_api_route(path, lambda: "stock's answer")
    app.add_middleware(Readiness, ask=ask, judges=[FIX.unready])
    return app


def statuses(ask: Ask, *paths: str) -> list[tuple[int, str]]:
    async def get() -> list[tuple[int, str]]:
        transport = httpx.ASGITransport(app=application(ask))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            found = [await client.get(path) for path in paths]
        return [(answer.status_code, answer.text) for answer in found]

    return asyncio.run(get())


def told(*reports: Report) -> Ask:
    async def ask() -> Sequence[Report]:
        return reports

    return ask


def test_one_scheduler_that_refuses_everybody_is_enough() -> None:
    for status, text in statuses(told(WELL, FULL), *sorted(PATHS)):
        assert status == 503 and REFUSAL in text


@pytest.mark.parametrize("reports", [(), (WELL, WELL), ({},), ({"safe_reclaim_prefill": {}},)])
def test_stock_answers_otherwise(reports: tuple[Report, ...]) -> None:
    for status, text in statuses(told(*reports), *sorted(PATHS)):
        assert status == 200 and "stock's answer" in text


def test_nobody_is_asked_for_anything_else() -> None:
    async def ask() -> Any:
        raise AssertionError

    assert statuses(ask, "/generate")[0][0] == 200


def test_a_scheduler_that_does_not_answer_leaves_the_word_to_stock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And is asked once: stock's question must not be asked again before it is answered."""
    monkeypatch.setattr(readiness, "WAIT_S", 0.01)
    asked = []

    async def ask() -> Sequence[Report]:
        asked.append(1)
        await asyncio.Event().wait()
        return []

    assert [status for status, _ in statuses(ask, "/health", "/health")] == [200, 200]
    assert len(asked) == 1


def test_a_question_that_fails_leaves_the_word_to_stock() -> None:
    async def ask() -> Sequence[Report]:
        raise RuntimeError("no")

    assert statuses(ask, "/health")[0][0] == 200
