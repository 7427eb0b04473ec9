"""Does the guard hold on this release? Asked of stock's own request, after attaching.

Nothing here reads a version number. A stock request whose counters say that its drafts are
never accepted must finish with our 503 and be barred from the prefix cache; one whose counters
are sound must not; and a new request with the same beginning must get a namespace of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.specguard import attach
from sglang_scaling_fixes.specguard.detector import Rules
from sglang_scaling_fixes.specguard.guard import ERROR_TYPE, SpecGuard
from sglang_scaling_fixes.specguard.taint import Taint

_PAGE = 4
_PROMPT = [11, 12, 13, 14, 15]
_TOKENS = 256


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AttachError(f"probe: {what}")


def run() -> None:
    """Raises `AttachError` with what did not hold. Leaves the process as it was."""
    saved = SpecGuard.current
    try:
        field = attach.accepted_field()
        SpecGuard.current = SpecGuard(Rules(), "abort", Taint(_PAGE), 3, field, speaks=False)
        _prove(field)
    finally:
        SpecGuard.current = saved


def _prove(field: str) -> None:
    sound, corrupt = _request(_PROMPT), _request(_PROMPT)
    _verified(sound, field, _TOKENS // 3, _TOKENS - _TOKENS // 3)
    _verified(corrupt, field, _TOKENS, 0)
    check(not _aborted(sound), "a sound request was aborted")
    reason = corrupt.finished_reason
    check(_aborted(corrupt), "a request without an accepted draft was not aborted")
    check(
        reason.status_code is HTTPStatus.SERVICE_UNAVAILABLE and reason.err_type == ERROR_TYPE,
        "the abort does not carry status 503 and its type",
    )
    check(bool(corrupt.skip_radix_cache_insert), "an aborted request may enter the prefix cache")
    later, other = _request(_PROMPT), _request([*reversed(_PROMPT)])
    check(later.extra_key not in (None, sound.extra_key), "a later request may read suspect KV")
    check(other.extra_key is None, "a request with another beginning was moved")


def _request(prompt: Sequence[int]) -> Any:
    """A stock request, as the scheduler makes it."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    ids = _tokens(prompt)
    sampling = SamplingParams(max_new_tokens=1 << 20)
    sampling.normalize(None)
    return Req("probe", "", ids, sampling, vocab_size=1 << 20, eos_token_ids=set())


def _tokens(ids: Sequence[int]) -> Any:
    """As this release keeps tokens: a list, or an array since 0.5.13."""
    from array import array

    from sglang.srt.managers import schedule_batch

    return array("q", ids) if hasattr(schedule_batch, "array") else list(ids)


def _verified(req: Any, field: str, verifications: int, accepted: int) -> None:
    """What a request looks like after so many verifications; and stock asks if it is finished."""
    req.output_ids.extend(range(100, 100 + verifications + accepted))
    req.spec_verify_ct = verifications
    setattr(req, field, accepted)
    getattr(req, attach.finish_target().rpartition(".")[2])(1)


def _aborted(req: Any) -> bool:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return isinstance(req.finished_reason, FINISH_ABORT)
