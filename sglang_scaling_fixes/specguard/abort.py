"""How the guard ends a request, in stock's terms."""

from __future__ import annotations

import functools
from http import HTTPStatus
from typing import Any

from sglang_scaling_fixes.specguard.detector import Anomaly

ERROR_TYPE = "kv_anomaly"


def reason(anomaly: Anomaly, name: str, generated: int) -> Any:
    """The finish reason of a request with so many generated tokens.

    `name`: by which the accusation may be withdrawn. The message is all that reaches every client,
    so what the retry proxy needs stands at its end.
    """
    measure = "accept length" if anomaly.kind == "low_accept_length" else "accept rate"
    begin = anomaly.suspect_from and generated - (anomaly.tokens - anomaly.suspect_from)
    facts = {"rule": anomaly.kind, "suspicion": name, "suspect_from": max(begin, 0)}
    said = " ".join(f"{fact}={value}" for fact, value in facts.items())
    # The enum, not the number: stock's OpenAI streams drop the error of a bare number.
    return _finish_reason()(
        f"{ERROR_TYPE}: {measure} {anomaly.value:.3f} after {anomaly.tokens} tokens; the request's"
        f" KV cache is suspect, retry it on another worker [{said}]",
        HTTPStatus.SERVICE_UNAVAILABLE,
        facts,
    )


@functools.cache
def _finish_reason() -> Any:
    """Stock's abort, with the facts among what `/generate` shows of it."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    class Anomalous(FINISH_ABORT):  # type: ignore[misc]
        def __init__(self, message: str, status: HTTPStatus, facts: dict[str, Any]) -> None:
            super().__init__(message, status, ERROR_TYPE)
            self._facts = facts

        def to_json(self) -> dict[str, Any]:
            return {**super().to_json(), **self._facts}

    return Anomalous
