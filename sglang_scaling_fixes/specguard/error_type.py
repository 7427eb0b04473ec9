"""The type of the guard's aborts, `kv_anomaly`, in an answer that is not a stream.

Stock hands on an abort's message and status and puts the status where the type belongs. In
streams the OpenAI error event is given its type where it is made (attach.py); `/generate`'s last
event carries the finish reason as the scheduler wrote it, type and all.
"""

from __future__ import annotations

import json

from sglang_scaling_fixes.refusals import Headers
from sglang_scaling_fixes.specguard.guard import ERROR_TYPE


def edit(headers: Headers, body: bytes) -> tuple[Headers, bytes]:
    """Name the type, if this is the guard's abort."""
    if f'"{ERROR_TYPE}: '.encode() not in body:
        return headers, body
    try:
        answer = json.loads(body)
    except ValueError:
        return headers, body
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    if not isinstance(error, dict) or not str(error.get("message")).startswith(f"{ERROR_TYPE}: "):
        return headers, body
    error["type"] = ERROR_TYPE
    return headers, json.dumps(answer).encode()
