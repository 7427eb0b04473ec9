"""Proves on stock's own request class that the guard works on this release, after attaching.

Nothing here reads a version number. A stock request whose counters say that no draft is accepted
must finish with our 503 and stay out of the prefix cache. A request with sound counters must not.
A later request with the same beginning must get a namespace of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.specguard import attach
from sglang_scaling_fixes.specguard.detector import Rules
from sglang_scaling_fixes.specguard.guard import ERROR_TYPE, DraftCounters, SpecGuard
from sglang_scaling_fixes.specguard.reporting import Reporting
from sglang_scaling_fixes.specguard.taint import Taint

_PAGE = 4
_PROMPT = [11, 12, 13, 14, 15]
_TOKENS = 256


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AttachError(f"probe: {what}")


def run() -> None:
    """Raises `AttachError` that names what failed. Leaves the process as it was."""
    saved = SpecGuard.current
    try:
        field = attach.accepted_field()
        silent = Reporting(is_reporting_rank=False)
        drafts = DraftCounters(3, field)
        SpecGuard.current = SpecGuard(Rules(), "abort", Taint(_PAGE), drafts, silent)
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
    told = reason.to_json()
    check(
        told["message"].startswith(f"{ERROR_TYPE}: ")
        and told["message"].endswith(f" suspicion={told['suspicion']} suspect_from=0]"),
        "the abort does not name its suspicion",
    )
    check(bool(corrupt.skip_radix_cache_insert), "an aborted request may enter the prefix cache")
    later, other = _request(_PROMPT), _request([*reversed(_PROMPT)])
    check(later.extra_key not in (None, sound.extra_key), "a later request may read suspect KV")
    check(other.extra_key is None, "a request with another beginning was moved")


def _request(prompt: Sequence[int]) -> Any:
    """A stock request, made as the scheduler makes it."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    ids = _tokens(prompt)
    sampling = SamplingParams(max_new_tokens=1 << 20)
    sampling.normalize(None)
    return Req("probe", "", ids, sampling, vocab_size=1 << 20, eos_token_ids=set())


def _tokens(ids: Sequence[int]) -> Any:
    """Tokens in this release's type: a list, or an array since 0.5.13."""
    from array import array

    from sglang.srt.managers import schedule_batch

    return array("q", ids) if hasattr(schedule_batch, "array") else list(ids)


def _verified(req: Any, field: str, verifications: int, accepted: int) -> None:
    """Set the counters that so many verifications leave; let stock decide if it is finished."""
    req.output_ids.extend(range(100, 100 + verifications + accepted))
    req.spec_verify_ct = verifications
    setattr(req, field, accepted)
    getattr(req, attach.finish_target().rpartition(".")[2])(1)


def _aborted(req: Any) -> bool:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return isinstance(req.finished_reason, FINISH_ABORT)
