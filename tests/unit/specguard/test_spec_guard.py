"""The guard on requests with stock's fields: what it does to whom, and what it refuses."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes.specguard import attach, baseline, settings, tellings, words
from sglang_scaling_fixes.specguard.detector import Rules
from sglang_scaling_fixes.specguard.guard import (
    CAPS,
    DraftCounters,
    Sharing,
    SpecGuard,
    holds_kv,
    offered_drafts,
    tainted,
)
from sglang_scaling_fixes.specguard.reporting import Reporting
from sglang_scaling_fixes.specguard.rooms import Rooms
from sglang_scaling_fixes.specguard.taint import Taint
from sglang_scaling_fixes.specguard.tellings import Telling
from sglang_scaling_fixes.vouch import FRESH, UNGUARDED, vouch

PROMPT = list(range(100))
SECRET = b"a secret that both of them know"


class Request:
    """The fields of a stock request that the guard knows."""

    def __init__(self, prompt: list[int], extra_key: str | None = None) -> None:
        self.rid = "r1"
        self.origin_input_ids = self.origin_input_ids_unpadded = prompt
        self.output_ids: list[int] = []
        self.spec_verify_ct = 0
        self.accepted = 0
        self.finished_reason = None
        self.to_finish: Any = None
        self.skip_radix_cache_insert = False
        self.extra_key = extra_key
        self.kv = SimpleNamespace(req_pool_idx=None)
        self.bootstrap_room = 77


def guard(action: str = "abort", sharing: Sharing | None = None, **more: Any) -> SpecGuard:
    drafts = DraftCounters(3, "accepted")
    return SpecGuard(Rules(), action, Taint(4), drafts, Reporting(**more), sharing=sharing)


class Prefill:
    """What the prefill server is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def accuse(self, req: Any, name: int) -> None:
        self.told.append((req.rid, name))

    def withdraw(self, name: int) -> None:
        self.told.append((name,))


def verify(guard: SpecGuard, req: Request, accepted: int, times: int = 400) -> None:
    for _ in range(times):
        req.spec_verify_ct += 1
        req.accepted += accepted
        req.output_ids += [7] * (accepted + 1)
        guard.inspect(req)


def test_abort_ends_the_request_and_makes_its_prompt_suspect() -> None:
    prefill = Prefill()
    watch = guard(prefill=prefill)
    req = Request(PROMPT)
    verify(watch, req, 0)
    assert req.to_finish.status_code.name == "SERVICE_UNAVAILABLE"
    assert req.to_finish.err_type == "kv_anomaly"
    assert req.skip_radix_cache_insert and tainted(req)
    told = req.to_finish.to_json()
    assert told["message"] == (
        "kv_anomaly: accept length 1.000 after 128 tokens; the request's KV cache is suspect, "
        "retry it on another worker [rule=low_accept_length suspicion=0-1 suspect_from=0]"
    )
    assert (told["rule"], told["suspicion"], told["suspect_from"]) == (
        "low_accept_length",
        "0-1",
        0,
    )
    assert prefill.told == [("r1", tellings.number("0-1"))]
    later = Request(PROMPT)
    watch.choose_namespace(later)
    assert later.extra_key == "|kv-anomaly-0-1"
    assert watch.report()["anomalies"] == {"low_accept_length/aborted": 1}


def test_observe_counts_and_changes_nothing() -> None:
    watch = guard("observe")
    req = Request(PROMPT)
    before = {**vars(req)}
    verify(watch, req, 0)
    for field in ("to_finish", "skip_radix_cache_insert", "extra_key", "finished_reason"):
        assert getattr(req, field) == before[field]
    assert not tainted(req)
    assert watch.report()["anomalies"] == {"low_accept_length/observed": 1}


def test_a_request_that_is_ending_anyway_ends_that_way_and_is_suspect_all_the_same() -> None:
    """A client's abort in the same step: stock would insert its KV."""
    watch = guard()
    req = Request(PROMPT)
    req.to_finish = ending = object()
    verify(watch, req, 0)
    assert req.to_finish is ending
    assert req.skip_radix_cache_insert and tainted(req)
    later = Request(PROMPT)
    watch.choose_namespace(later)
    assert later.extra_key is not None


def test_a_short_prompt_is_known_by_what_it_generated() -> None:
    """Retracted, it computes prompt and output again, and both are cached as one prefix."""
    watch = guard()
    req = Request([1, 2])
    verify(watch, req, 0)
    later = Request([1, 2, 7, 7, 99])  # the next turn of the same conversation
    watch.choose_namespace(later)
    assert later.extra_key is not None
    other = Request([1, 2, 8, 8, 99])
    watch.choose_namespace(other)
    assert other.extra_key is None


def test_a_short_prompt_is_suspect_whatever_it_generated() -> None:
    watch = guard()
    verify(watch, Request([1, 2, 3, 4, 5]), 0)
    again = Request([1, 2, 3, 4, 5])
    watch.choose_namespace(again)
    assert again.extra_key is not None


def test_a_prompt_with_placeholders_is_known_with_and_without_them() -> None:
    watch = guard()
    req = Request(PROMPT)
    req.origin_input_ids = [900, 901, 902, 903, *PROMPT]
    verify(watch, req, 0)
    later = Request([5] * 100)
    later.origin_input_ids = [900, 901, 902, 903, *PROMPT[:60], 1]
    watch.choose_namespace(later)
    assert later.extra_key is not None


def suspect(watch: SpecGuard, req: Request, name: int = 1) -> None:
    """`req` was anomalous."""
    path = watch._path(req)
    assert path is not None
    watch._accuse(name, path)


def test_a_namespace_of_the_users_own_is_kept() -> None:
    watch = guard()
    req = Request(PROMPT, extra_key="tenant")
    suspect(watch, req)
    watch.choose_namespace(req)
    assert req.extra_key == "tenant|kv-anomaly-0-1"
    req.extra_key += "|elastic"  # stock adds one of its own, later
    assert watch._stripped(req) == "tenant|elastic"
    for other in (Request(PROMPT), Request(PROMPT, extra_key="another tenant")):
        before = other.extra_key
        watch.choose_namespace(other)
        assert other.extra_key == before


def test_where_a_store_keeps_kv_by_tokens_alone_every_namespace_is_moved() -> None:
    watch = guard(sharing=Sharing(by_namespace=False))
    suspect(watch, Request(PROMPT, extra_key="tenant"))
    other = Request(PROMPT)
    watch.choose_namespace(other)
    assert other.extra_key == "|kv-anomaly-0-1" and watch.avoids_storage(other)


def test_a_request_that_holds_kv_is_not_moved() -> None:
    """Its pages are locked in the old namespace; it is watched like any other."""
    watch = guard()
    req = Request(PROMPT)
    req.kv.req_pool_idx = 5
    suspect(watch, req)
    watch.choose_namespace(req)
    assert req.extra_key is None
    req.kv.req_pool_idx = None  # retracted: it begins anew
    watch.choose_namespace(req)
    assert req.extra_key == "|kv-anomaly-0-1"


@pytest.mark.parametrize(
    ("req", "held"),
    [
        (SimpleNamespace(req_pool_idx=None), False),
        (SimpleNamespace(req_pool_idx=0), True),
        (SimpleNamespace(kv=SimpleNamespace(req_pool_idx=-1)), False),
        (SimpleNamespace(kv=SimpleNamespace(req_pool_idx=0)), True),
        (SimpleNamespace(kv=None), False),
    ],
)
def test_where_releases_keep_a_requests_row(req: Any, held: bool) -> None:
    assert holds_kv(req) == held


def test_the_log_line_is_json_with_what_an_operator_needs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = guard(worker="10.0.0.1:30000")
    with caplog.at_level(logging.WARNING):
        verify(watch, Request(PROMPT), 0)
    (message,) = (record.getMessage() for record in caplog.records)
    said = json.loads(message.removeprefix("sglang-scaling-fixes: "))
    assert said["rid"] == "r1" and said["room"] == 77 and said["worker"] == "10.0.0.1:30000"
    assert (said["kind"], said["action"], said["tokens"]) == ("low_accept_length", "aborted", 128)
    assert said["verifications"] == 128 and said["accepted"] == 0


def test_other_ranks_act_alike_and_stay_silent(caplog: pytest.LogCaptureFixture) -> None:
    prefill = Prefill()
    watch = guard(is_reporting_rank=False, prefill=prefill)
    req = Request(PROMPT)
    verify(watch, req, 0)
    assert req.to_finish is not None and len(watch.taint) == 1
    assert not caplog.records and not prefill.told
    assert watch.report()["requests"] == 0


def test_the_error_says_where_the_failing_window_begins() -> None:
    watch = guard()
    req = Request(PROMPT)
    verify(watch, req, 2, 200)  # 600 good tokens
    verify(watch, req, 0)
    told = req.to_finish.to_json()
    window = told["suspect_from"]
    assert 600 - Rules().window < window <= 600
    assert told["message"].endswith(f" suspect_from={window}]")


# -- the proxy's words ---------------------------------------------------------------------------


def word(kind: str, secret: bytes = SECRET, expires: int = 1000) -> str:
    return vouch(secret, kind, "nonce", expires)


def ended(watch: SpecGuard, extra_key: str) -> bool:
    req = Request(PROMPT, extra_key)
    verify(watch, req, 0)
    return req.to_finish is not None


@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("salt", ""), ("", "0" * 32), ("ssf.", "|elastic_ep_size=8")]
)
def test_a_request_that_two_servers_have_judged_is_not_ended(before: str, after: str) -> None:
    """Whatever stock puts around the word."""
    watch = guard(sharing=Sharing(SECRET))
    assert not ended(watch, before + word(UNGUARDED) + after)
    assert watch.report()["anomalies"] == {"low_accept_length/false_alarm": 1}
    assert len(watch.taint) == 0


@pytest.mark.parametrize(
    "forged",
    [
        word(UNGUARDED, b"another secret, not that one"),
        word(UNGUARDED)[:-1] + "x",
        word(UNGUARDED).replace("nonce", "other"),
        word(FRESH).replace(FRESH, UNGUARDED),
        "ssf.unguarded.nonce.9999999999." + "0" * 32,
        "ssf.unguarded.",
    ],
)
def test_nobody_else_can_leave_the_guard(forged: str) -> None:
    assert ended(guard(sharing=Sharing(SECRET)), forged)


def test_without_a_secret_no_word_counts() -> None:
    assert ended(guard(), word(UNGUARDED))


def test_who_computed_afresh_in_a_namespace_of_its_own_makes_nobody_suspect() -> None:
    """Vouched for: a client that writes the same text twice shares that namespace with itself."""
    prefill = Prefill()
    watch = guard(sharing=Sharing(SECRET), prefill=prefill)
    assert ended(watch, word(FRESH))
    assert len(watch.taint) == 0 and not prefill.told
    assert watch.report()["accusations"] == {"unshared": 1}
    assert ended(watch, word(FRESH, b"a secret that is not known"))
    assert len(watch.taint) == 1
    by_tokens = guard(sharing=Sharing(SECRET, by_namespace=False))
    assert ended(by_tokens, word(FRESH))  # what it stored is read by others
    assert len(by_tokens.taint) == 1


def test_whoever_asks_for_it_does_not_read_the_store() -> None:
    watch = guard(sharing=Sharing(SECRET))
    for key in (word(FRESH), word(UNGUARDED), word(FRESH, b"a secret that is not known")):
        assert watch.avoids_storage(Request(PROMPT, key))
    assert not watch.avoids_storage(Request(PROMPT, "ssf.fresh"))
    assert not watch.avoids_storage(Request(PROMPT))


def test_a_word_that_is_over_is_worth_nothing_behind_the_process_with_the_clock() -> None:
    """The schedulers look at no clock: theirs differ."""
    said = "salt" + word(UNGUARDED, expires=1000) + "lora"
    assert words.settled(SECRET, said, 1000) == said
    late = words.settled(SECRET, said, 1001)
    assert words.find(SECRET, said) is not None and words.find(SECRET, late) is None
    assert words.is_fresh(late) and len(late) == len(said) - len(UNGUARDED) + len(FRESH)
    both = word(UNGUARDED, expires=1) + word(FRESH, expires=1000)
    found = words.find(SECRET, words.settled(SECRET, both, 500))
    assert found is not None and found.kind == FRESH
    assert words.settled(SECRET, "ssf.fresh.x", 1) == "ssf.fresh.x"


@pytest.mark.parametrize("namespaced", [False, True])
def test_a_store_that_keeps_kv_by_tokens_alone_is_not_read(
    monkeypatch: pytest.MonkeyPatch, namespaced: bool
) -> None:
    monkeypatch.setattr(SpecGuard, "current", guard("observe"))
    monkeypatch.setattr(settings, "storage_is_namespaced", lambda: namespaced)

    def prefetched(key: str | None) -> bool:
        return attach._prefetch(lambda *_: "read", None, Request(PROMPT, key)) == "read"

    assert prefetched(None) and prefetched("tenant")  # the control
    assert prefetched(word(FRESH)) == prefetched(word(UNGUARDED)) == namespaced


def test_the_main_process_settles_words_before_the_schedulers_see_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tokenized(key: str | None) -> Any:
        made = SimpleNamespace(extra_key=key)
        return attach._tokenized(lambda *_: made, None, "the request").extra_key

    late, valid = word(UNGUARDED, expires=1), word(UNGUARDED, expires=2**33)
    assert tokenized(late) == late  # without a secret no word counts anyway
    monkeypatch.setattr(attach, "_secret", SECRET)
    assert tokenized(late) == late.replace(UNGUARDED, FRESH)
    assert (tokenized(valid), tokenized(None), tokenized("x")) == (valid, None, "x")
    embedding = SimpleNamespace()
    assert attach._tokenized(lambda *_: embedding, None) is embedding


# -- tellings ------------------------------------------------------------------------------------


def test_prefill_moves_what_the_request_of_that_room_computed() -> None:
    watch = guard(sharing=Sharing(rooms=Rooms()))
    req = Request(PROMPT, "tenant")
    watch.note(req)
    watch.told(Telling(5, 78))
    assert len(watch.taint) == 0
    watch.told(Telling(5, req.bootstrap_room))
    watch.told(Telling(5, req.bootstrap_room))
    later, other = Request(PROMPT, "tenant"), Request(PROMPT)
    for placed in (later, other):
        watch.choose_namespace(placed)
    assert (later.extra_key, other.extra_key) == ("tenant|kv-anomaly-0-1", None)
    assert watch.report()["notifications_received"] == {"taken": 2, "unknown": 1}
    assert watch.taint.namespaces == 1


def test_observing_a_prefill_that_is_told_changes_nothing() -> None:
    watch = guard("observe", sharing=Sharing(rooms=Rooms()))
    watch.note(Request(PROMPT))
    watch.told(Telling(5, 77))
    assert len(watch.taint) == 0
    assert watch.report()["notifications_received"] == {"taken": 1}


def test_a_false_alarm_is_withdrawn_here_and_at_prefill() -> None:
    prefill = Prefill()
    watch = guard(prefill=prefill)
    watch.taint._ended = lambda reason: watch._reporting.increment("suspicions_ended", reason)
    req = Request(PROMPT)
    verify(watch, req, 0)
    name = tellings.number(req.to_finish.to_json()["suspicion"])
    moved, later = Request(PROMPT), Request(PROMPT)
    watch.choose_namespace(moved)
    watch.told(Telling(name))
    watch.choose_namespace(later)
    assert later.extra_key is None
    watch.choose_namespace(moved)  # it waits still, and holds no KV
    assert moved.extra_key is None
    assert prefill.told == [("r1", name), (name,)]
    assert watch.report()["suspicions_ended"] == {"false_alarm": 1}


def test_what_is_not_signed_is_counted() -> None:
    watch = guard()
    watch.told(None)
    assert watch.report()["notifications_received"] == {"refused": 1}


# -- what was offered ----------------------------------------------------------------------------


@pytest.mark.parametrize("caps", [True, False])
def test_drafts_that_were_not_offered_are_not_missed(caps: bool) -> None:
    """Nine verifications of ten carry no draft; each draft that is offered is accepted."""
    watch, req = guard(), Request(PROMPT)
    for number in range(1, 600):
        offered = number % 10 == 0
        req.spec_verify_ct += 1
        req.accepted += offered
        req.output_ids += range(number * 2, number * 2 + 1 + offered)
        if caps:
            req.__dict__.setdefault(CAPS, [0, 0, 0])[1 + offered] += 1
        watch.inspect(req)
    assert (req.to_finish is None) == caps  # the control: counted by their depth


def test_what_stock_counts_of_ragged_verifications() -> None:
    assert offered_drafts([], 10, 3) == (10, 30)
    assert offered_drafts([1, 4, 2, 0, 1], 10, 3) == (2 + 3, 2 * 3 + 2 * 1 + 1 * 3)


# -- the server's own accept length ----------------------------------------------------------------


def fall(*lengths: float, block: int = 100) -> baseline.Baseline:
    """Blocks of requests with these accept lengths, `BLOCKS` of each."""
    found = baseline.Baseline(block)
    for length in lengths:
        for _ in range(baseline.BLOCKS * block):
            found.add(10, round(10 * (length - 1)))
    return found


def test_a_slow_decline_is_seen_against_the_servers_own_traffic() -> None:
    steps = [3.4, 3.2, 3.0, 2.8]
    assert not fall(*steps).declined
    found = fall(*steps, 2.5, 2.2, 1.9)
    assert found.declined and found.reference == 3.4 and found.recent == 1.9
    assert not fall(1.9, 1.9).declined  # sound for another model
    assert fall(3.4, 2.4, 2.8).declined and not fall(3.4, 2.4, 3.2).declined  # it has recovered


def test_too_little_traffic_says_nothing_and_odd_requests_are_no_decline() -> None:
    found = fall(3.0)
    assert found.recent == 3.0
    for length in (1.0, 1.0, 3.0, 3.0, 3.0):
        found.add(100, round(100 * (length - 1)))
        assert not found.declined
    few = baseline.Baseline()
    few.add(100, 10)
    assert few.recent is None


def test_a_decline_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = guard("observe", worker="10.0.0.1:30000")
    watch.baseline = baseline.Baseline(100)
    for accepted in (2, 1):
        for number in range(60):
            req = Request(PROMPT)
            req.output_ids = [number]
            verify(watch, req, accepted, 50)
    (line,) = (r.getMessage() for r in caplog.records if "accept_length_declined" in r.getMessage())
    assert json.loads(line.removeprefix("sglang-scaling-fixes: "))["reference"] == 3.0
    assert watch.report()["accept_length_declines"] == 1
