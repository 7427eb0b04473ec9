"""The rules of the prefill side one by one. Interleavings are in test_races and test_explore."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.reclaim.rules import forgotten
from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.reclaim.rules.coverage import Extent
from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger
from sglang_scaling_fixes.reclaim.rules.ended_rooms import SKEW_S, EndedRooms
from sglang_scaling_fixes.reclaim.rules.prefill_actions import (
    Action,
    FailRoom,
    ForgetRoom,
    SendAck,
    SendEnded,
)
from sglang_scaling_fixes.reclaim.rules.prefill_ledger import NO_ROOM, Delivery, PrefillLedger
from sglang_scaling_fixes.reclaim.rules.refused_rooms import REFUSED, REFUSED_MEMORY, REFUSED_S
from sglang_scaling_fixes.reclaim.rules.types import LedgerError, lease_parts


def answers(actions: list[Action]) -> list[tuple[str, str]]:
    return [(a.lease, a.verdict) for a in actions if isinstance(a, SendAck)]


def prefill(memory: int = 100) -> PrefillLedger:
    return PrefillLedger("process", memory=memory)


EXTENT = Extent("d0:1", 1, ())


def bind(ledger: PrefillLedger, n: int = 1, room: int = 7) -> tuple[Delivery, list[Action]]:
    return ledger.bind(room, f"e{n}", f"g{n}", "d0", "p0", extent=EXTENT)


def bound(ledger: PrefillLedger, n: int = 1, room: int = 7) -> str:
    """A delivered attempt with its sender; the sender's name."""
    assert bind(ledger, n, room)[0] is Delivery.DELIVER
    assert ledger.sender_made(f"s{n}", room) == []
    return f"s{n}"


def taken(ledger: PrefillLedger, n: int = 1, room: int = 7) -> Attempt:
    """The same with a chunk in hand."""
    attempt = ledger.put(bound(ledger, n, room))
    assert attempt is not None and ledger.take(attempt)
    return attempt


class TestPrefill:
    def test_a_request_that_decode_does_not_take_ends(self) -> None:
        ledger = prefill()
        ledger.sender_made("s1", 7)
        assert ledger.refused(7, now=0.0) == [FailRoom(7, REFUSED)]
        # Or as soon as it comes, once.
        assert ledger.refused(8, now=0.0) == []
        assert ledger.sender_made("s2", 8, now=1.0) == [FailRoom(8, REFUSED)]
        assert ledger.sender_made("s3", 8, now=1.0) == []

    def test_a_refusal_ends_no_request_but_the_one_that_it_is_about(self) -> None:
        ledger = prefill()
        taken(ledger)
        assert ledger.refused(7, now=0.0) == [], "another decode takes it"
        ledger.refused(8, now=0.0)
        assert ledger.sender_made("s2", 8, now=REFUSED_S) == [], "a later one"
        ledger.refused(9, now=0.0)
        ledger.bind(9, "e9", "g9", "d0", "p0", extent=Extent("s", 0))
        assert ledger.sender_made("s3", 9, now=1.0) == [], "decode tried again and takes it"

    def test_refusals_are_bounded(self) -> None:
        ledger = prefill()
        for room in range(REFUSED_MEMORY + 1):
            ledger.refused(room, now=0.0)
        assert ledger.sender_made("s1", 0, now=1.0) == []
        assert ledger.sender_made("s2", 1, now=1.0) == [FailRoom(1, REFUSED)]

    def test_an_answer_waits_for_the_chunk_in_hand_and_its_helpers(self) -> None:
        ledger = prefill()
        attempt = taken(ledger)
        ledger.opened(attempt)
        assert ledger.busy("s1")
        closed, *rest = ledger.abort(7, "g1", "d0", "p0")
        assert closed == FailRoom(7, "aborted by the decode side")
        assert answers(rest) == [("g1", "writing")]
        assert answers(ledger.abort(7, "g1", "d0", "p0")) == [("g1", "writing")], "asked again"
        assert ledger.done(attempt) == []
        assert answers(ledger.done(attempt)) == [("g1", "drained")]
        assert not ledger.busy("s1")

    def test_a_closed_attempt_takes_nothing(self) -> None:
        ledger = prefill()
        sender = bound(ledger)
        queued = ledger.put(sender)
        ledger.abort(7, "g1", "d0", "p0")
        assert queued is not None and not ledger.take(queued)
        assert ledger.put(sender) is None

    def test_repeated_questions_are_answered_and_fail_the_room_once(self) -> None:
        ledger = prefill()
        bound(ledger)
        first, second = ledger.abort(7, "g1", "d0", "p0"), ledger.abort(7, "g1", "d0", "p0")
        assert [type(a) for a in first] == [FailRoom, SendAck]
        assert [type(a) for a in second] == [SendAck]

    def test_destinations_whose_question_came_first_are_dropped(self) -> None:
        ledger = prefill()
        assert answers(ledger.abort(7, "g1", "d0", "p0")) == [("g1", "unknown")]
        assert bind(ledger) == (Delivery.DROP, [])

    def test_a_duplicate_is_dropped(self) -> None:
        ledger = prefill()
        assert bind(ledger) == (Delivery.DELIVER, [ForgetRoom(7)])
        assert bind(ledger) == (Delivery.DROP, [])

    def test_all_of_a_fan_in_share_an_attempt_and_are_answered_when_it_is_quiet(self) -> None:
        ledger = prefill()
        forget: list[Action] = [ForgetRoom(7)]
        assert ledger.bind(7, "e", "g-d0", "d0", "p0", extent=EXTENT) == (Delivery.DELIVER, forget)
        assert ledger.bind(7, "e", "g-d1", "d1", "p0", extent=EXTENT) == (Delivery.DELIVER, [])
        ledger.sender_made("s", 7)
        attempt = ledger.put("s")
        assert attempt is not None and ledger.take(attempt)
        ledger.abort(7, "g-d1", "d1", "p0")
        ledger.abort(7, "g-d0", "d0", "p0")
        replies = ledger.done(attempt)
        assert [a.reply_to for a in replies if isinstance(a, SendAck)] == ["d0", "d1"]

    def test_destinations_that_come_after_their_attempt_was_closed_are_dropped(self) -> None:
        ledger = prefill()
        ledger.bind(7, "e", "g-d0", "d0", "p0", extent=EXTENT)
        ledger.abort(7, "g-d0", "d0", "p0")
        assert ledger.bind(7, "e", "g-d1", "d1", "p0", extent=EXTENT) == (Delivery.DROP, [])
        assert answers(ledger.abort(7, "g-d1", "d1", "p0")) == [("g-d1", "drained")]

    def test_poison_stays_and_ends_the_attempt(self) -> None:
        ledger = prefill(memory=1)
        attempt = taken(ledger)
        queued = ledger.put("s1")
        (failed,) = ledger.failed(attempt, "write returned -1")
        assert isinstance(failed, FailRoom) and "write returned -1" in failed.reason
        assert ledger.failed(attempt, "another reason") == []
        assert ledger.put("s1") is None
        assert queued is not None and not ledger.take(queued)
        ledger.done(attempt)
        ledger.retire("s1", 7)
        for n in range(100, 110):
            ledger.retire(bound(ledger, n, room=n), n)
        (answer,) = ledger.abort(7, "g1", "d0", "p0")
        assert isinstance(answer, SendAck)
        assert (answer.verdict, answer.reason) == ("poisoned", "write returned -1")

    def test_more_ends_than_beginnings_raise(self) -> None:
        ledger = prefill()
        attempt = ledger.put(bound(ledger))
        assert attempt is not None
        with pytest.raises(LedgerError, match="room 7"):
            ledger.done(attempt)

    def test_memory_is_bounded(self) -> None:
        ledger = prefill(memory=10)
        for i in range(100):
            ledger.retire(bound(ledger, i, room=i), i)
            ledger.abort(i, f"never-{i}", "d0", "p0")
            unsent = 1000 + i
            bind(ledger, unsent, room=unsent)
            ledger.abort(unsent, f"g{unsent}", "d0", "p0")
        sizes = ledger.sizes()
        assert sizes["rooms"] == sizes["unsent"] == 10, "their request never came"
        assert sizes["finished"] == sizes["refused"] == 10
        assert sizes["leases"] == sizes["attempt_ids"] == 20
        assert sizes["senders"] == sizes["waiting"] == sizes["unserved"] == 0
        # The forgotten are answered truthfully, the remembered precisely.
        assert answers(ledger.abort(0, "g0", "d0", "p0")) == [("g0", "unknown")]
        assert answers(ledger.abort(99, "g99", "d0", "p0")) == [("g99", "drained")]


class TestRoomReuse:
    """A room serves one attempt, with one sender, at a time."""

    def test_the_next_waits_until_the_one_before_is_over(self) -> None:
        ledger = prefill()
        attempt = taken(ledger)
        assert ledger.sender_made("s2", 7) == []
        assert bind(ledger, 2) == (Delivery.DEFER, [FailRoom(7, "its room is used again")])
        assert bind(ledger, 2) == (Delivery.DEFER, [])
        ledger.done(attempt)
        assert bind(ledger, 2)[0] is Delivery.DEFER, "stock still looks at the old one"
        ledger.retire("s1", 7)
        assert bind(ledger, 2) == (Delivery.DELIVER, [ForgetRoom(7)])
        assert not ledger.take(attempt)
        assert ledger.put("s1") is None
        assert ledger.put("s2") not in (None, attempt)

    def test_a_sender_cleared_with_a_chunk_in_hand_keeps_its_room(self) -> None:
        ledger = prefill()
        attempt = taken(ledger)
        ledger.retire("s1", 7)
        assert bind(ledger, 2)[0] is Delivery.DEFER
        ledger.done(attempt)
        assert bind(ledger, 2)[0] is Delivery.DELIVER

    def test_retiring_a_sender_leaves_the_next_attempt_alone(self) -> None:
        ledger = prefill()
        bound(ledger)
        ledger.sender_made("s2", 7)
        ledger.retire("s1", 7)
        bind(ledger, 2)
        ledger.retire("s1", 7)
        assert ledger.put("s2") is not None

    def test_one_that_never_had_a_sender_is_over_when_closed(self) -> None:
        ledger = prefill()
        bind(ledger)
        ledger.abort(7, "g1", "d0", "p0")
        assert bind(ledger, 2)[0] is Delivery.DELIVER

    def test_a_request_that_comes_after_its_attempt_was_closed_is_failed(self) -> None:
        ledger = prefill()
        bind(ledger)
        ledger.abort(7, "g1", "d0", "p0")
        (failed,) = ledger.sender_made("s1", 7)
        assert isinstance(failed, FailRoom)
        assert ledger.put("s1") is None
        assert bind(ledger, 2)[0] is Delivery.DEFER

    def test_a_question_is_not_kept_waiting_with_its_destinations(self) -> None:
        ledger = prefill()
        taken(ledger)
        assert bind(ledger, 2)[0] is Delivery.DEFER
        assert answers(ledger.abort(7, "g2", "d0", "p0")) == [("g2", "unknown")]
        assert bind(ledger, 2) == (Delivery.DROP, [])

    def test_a_sender_that_waits_may_be_retired(self) -> None:
        ledger = prefill()
        assert ledger.put("s1") is None
        ledger.sender_made("s1", 7)
        assert ledger.put("s1") is None, "no destinations yet"
        assert not ledger.busy("s1")
        assert ledger.retire("s1", 7) == []
        assert ledger.retire("s1", 7) == []
        assert not ledger._waiting


class TestDecodeWithoutThePlugin:
    def test_it_is_accounted_for_and_its_success_is_not_marked(self) -> None:
        ledger = prefill()
        assert ledger.bind_without_plugin(7, "x0", EXTENT) == (Delivery.DELIVER, [ForgetRoom(7)])
        assert ledger.bind_without_plugin(7, "x1", EXTENT) == (Delivery.DELIVER, []), (
            "a second TP rank"
        )
        ledger.sender_made("s1", 7)
        attempt = ledger.put("s1")
        assert attempt is not None and ledger.take(attempt)
        assert attempt.bound_at("x0") is None
        assert ledger.retire("s1", 7) == []
        assert ledger.busy("s1") is False, "nobody asks for a sender that is gone"
        assert ledger.bind_without_plugin(7, "x2", EXTENT)[0] is Delivery.DEFER
        assert ledger.done(attempt) == []
        assert ledger.bind_without_plugin(7, "x2", EXTENT)[0] is Delivery.DELIVER

    def test_its_second_attempt_and_a_protected_one_wait_for_the_first(self) -> None:
        ledger = prefill()
        ledger.bind_without_plugin(7, "x0", EXTENT)
        ledger.sender_made("s1", 7)
        assert ledger.bind(7, "e1", "g1", "d0", "p0", extent=EXTENT)[0] is Delivery.DEFER
        assert ledger.bind_without_plugin(7, "x0", EXTENT)[0] is Delivery.DEFER
        ledger.retire("s1", 7)
        assert ledger.bind(7, "e1", "g1", "d0", "p0", extent=EXTENT)[0] is Delivery.DELIVER
        assert ledger.bind_without_plugin(7, "x0", EXTENT)[0] is Delivery.DEFER

    def test_the_mark_is_the_generation_of_who_listens(self) -> None:
        ledger = prefill()
        for rank in ("d0", "d1"):
            ledger.bind(7, "e", f"g-{rank}", rank, "p0", extent=EXTENT)
        ledger.sender_made("s", 7)
        attempt = ledger.put("s")
        assert attempt is not None
        assert attempt.bound_at("d1") == ("g-d1", "p0")
        assert attempt.bound_at("elsewhere") is None


def poisoned(ledger: PrefillLedger, number: int, process: str = "d") -> str:
    """A lease with a failed write, whose attempt is over."""
    lease = f"{process}-{number}"
    ledger.bind(number, lease, lease, "d0", "p0", extent=EXTENT)
    ledger.sender_made(lease, number)
    attempt = ledger.put(lease)
    assert attempt is not None and ledger.take(attempt)
    ledger.failed(attempt, "write returned -1")
    ledger.done(attempt)
    ledger.retire(lease, number)
    return lease


def verdict(ledger: PrefillLedger, lease: str) -> str:
    ((_, said),) = answers(ledger.abort(7, lease, "d0", "p0"))
    return said


class TestForgetting:
    """What may still be said of what is not remembered: see `forgotten`."""

    def test_leases_are_told_apart_as_decode_names_them(self) -> None:
        ledger = DecodeLedger("0123-abc")
        leases = [ledger.expose(7, ["p0"]).lease for _ in range(3)]
        assert [lease_parts(lease) for lease in leases] == [("0123-abc", n) for n in (1, 2, 3)]
        assert [lease_parts(odd) for odd in ("g", "", "a-", "a-x", "-7")] == [
            *((odd, 0) for odd in ("g", "", "a-", "a-x")),
            ("", 7),
        ]

    def test_a_failed_write_is_never_forgotten_into_unknown(self) -> None:
        """Decode believes "unknown": a slot would come back under a write that may still land."""
        ledger = prefill(memory=4)
        leases = [poisoned(ledger, n) for n in range(1, 60)]
        sizes = ledger.sizes()
        assert sizes["leases"] == sizes["finished"] == sizes["poisoned"] == 4
        assert sizes["horizons"] == 1
        assert {verdict(ledger, lease) for lease in leases} == {"poisoned"}
        assert all(ledger.poisoned(lease) for lease in leases)

    def test_others_are_unknown_as_ever(self) -> None:
        ledger = prefill(memory=4)
        for n in range(1, 60):
            poisoned(ledger, n)
        assert verdict(ledger, "d-60") == verdict(ledger, "another-1") == "unknown"

    def test_more_decode_processes_than_horizons(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forgotten, "PROCESSES", 3)
        ledger = prefill(memory=1)
        leases = [poisoned(ledger, n, f"decode{n}") for n in range(1, 20)]
        assert ledger.sizes()["horizons"] == 3
        assert {verdict(ledger, lease) for lease in leases} == {"poisoned"}
        assert verdict(ledger, "another-1") == "poisoned", "it may be one of those forgotten"

    def test_what_is_forgotten_is_not_accepted_again(self) -> None:
        """Destinations that come twice: the slots are somebody else's by now."""
        ledger = prefill(memory=2)
        for n in range(1, 30):
            ledger.bind(n, f"d-{n}", f"d-{n}", "d0", "p0", extent=EXTENT)
            ledger.sender_made(n, n)
            ledger.retire(n, n)
            assert verdict(ledger, f"never-{n}") == "unknown"
        for lease in (*(f"d-{n}" for n in range(1, 30)), *(f"never-{n}" for n in range(1, 30))):
            late = ledger.bind(99, lease, lease, "d0", "p0", extent=EXTENT)
            assert late == (Delivery.DROP, [])
        assert ledger.bind(99, "d-30", "d-30", "d0", "p0", extent=EXTENT)[0] is Delivery.DELIVER

    def test_destinations_that_wait_are_not_strangers(self) -> None:
        """They came long ago, and their number lies below what has been forgotten since."""
        ledger = prefill(memory=2)
        ledger.bind(7, "e1", "d-1", "d0", "p0", extent=EXTENT)
        ledger.sender_made("s1", 7)
        assert ledger.bind(7, "e2", "d-2", "d0", "p0", extent=EXTENT)[0] is Delivery.DEFER
        for n in range(3, 30):
            verdict(ledger, f"d-{n}")
        ledger.retire("s1", 7)
        assert ledger.kept.next() == "d-2"
        assert ledger.bind(7, "e2", "d-2", "d0", "p0", extent=EXTENT)[0] is Delivery.DELIVER


class TestRequestsThatNeverCome:
    """Of a decode that died, or runs without the plugin: nobody will ask for these."""

    def fill(self, ledger: PrefillLedger, count: int) -> list[Action]:
        actions: list[Action] = []
        for n in range(count):
            if n % 2:
                actions += ledger.bind_without_plugin(n, "x0", EXTENT)[1]
            else:
                actions += ledger.bind(n, f"e-{n}", f"d-{n}", "d0", "p0", extent=EXTENT)[1]
        return [action for action in actions if action not in {ForgetRoom(n) for n in range(5, 99)}]

    def test_the_oldest_are_closed_and_stock_forgets_their_destinations(self) -> None:
        ledger = PrefillLedger("process", memory=10, unserved=5)
        closed = self.fill(ledger, 8)
        assert closed[-2:] == [FailRoom(2, closed[-2].reason), ForgetRoom(2)]  # type: ignore[union-attr]
        assert "while 5 others waited" in closed[-2].reason  # type: ignore[union-attr]
        assert (ledger.sizes()["unserved"], ledger.sizes()["unsent"]) == (5, 3)
        for n in range(1000):
            ledger.bind_without_plugin(100 + n, "x0", EXTENT)
        ledger.check_integrity()
        sizes = ledger.sizes()
        assert (sizes["rooms"], sizes["unserved"], sizes["unsent"]) == (15, 5, 10)
        assert sizes["finished"] == 10

    @pytest.mark.parametrize("later", [0, 1000])
    def test_a_request_that_comes_after_all_fails_and_writes_nothing(self, later: int) -> None:
        ledger = PrefillLedger("process", memory=10, unserved=5)
        self.fill(ledger, 8)
        for n in range(later):
            ledger.bind_without_plugin(100 + n, "x0", EXTENT)
        late = ledger.sender_made("late", 0)
        assert ledger.put("late") is None
        if not later:
            (failed,) = late
            assert isinstance(failed, FailRoom) and "while 5 others waited" in failed.reason
        assert verdict(ledger, "d-0") == ("unknown" if later else "drained")
        assert ledger.retire("late", 0) == []
        ledger.check_integrity()

    def test_one_with_a_sender_is_not_counted(self) -> None:
        ledger = PrefillLedger("process", unserved=3)
        for n in range(50):
            bound(ledger, n, room=n)
        assert ledger.sizes()["unserved"] == 0
        assert all(ledger.put(f"s{n}") is not None for n in range(50))


class TestKeptBack:
    def test_a_room_that_comes_free_is_tried_and_no_other(self) -> None:
        ledger = prefill()
        for room in range(50):
            bound(ledger, 2 * room, room)
            assert bind(ledger, 2 * room + 1, room)[0] is Delivery.DEFER
        assert ledger.kept.next() is None
        ledger.retire("s14", 7)
        assert ledger.kept.next() == "g15"
        assert bind(ledger, 15, 7)[0] is Delivery.DELIVER
        assert ledger.kept.next() is None
        assert len(ledger.kept) == 49
        ledger.check_integrity()

    def test_the_next_of_a_room_ends_the_one_before_it(self) -> None:
        ledger = prefill()
        bound(ledger, 1)
        for n in (2, 3, 4):
            ledger.sender_made(f"s{n}", 7)
            assert bind(ledger, n)[0] is Delivery.DEFER
        ledger.retire("s1", 7)
        assert ledger.kept.next() == "g2"
        assert bind(ledger, 2)[0] is Delivery.DELIVER
        assert ledger.kept.next() == "g3"
        assert bind(ledger, 3) == (Delivery.DEFER, [FailRoom(7, "its room is used again")])
        assert ledger.kept.next() is None, "the first of its room has to wait, so all do"
        ledger.retire("s2", 7)
        assert ledger.kept.next() == "g3", "in the order they came"
        assert bind(ledger, 3)[0] is Delivery.DELIVER
        ledger.check_integrity()

    def test_all_decode_ranks_of_an_attempt_are_let_in_together(self) -> None:
        ledger = prefill()
        bound(ledger, 1)
        for rank in ("d0", "d1"):
            ledger.bind(7, "e2", f"g2-{rank}", rank, "p0", extent=EXTENT)
        ledger.retire("s1", 7)
        for rank in ("d0", "d1"):
            assert ledger.kept.next() == f"g2-{rank}"
            delivery, _ = ledger.bind(7, "e2", f"g2-{rank}", rank, "p0", extent=EXTENT)
            assert delivery is Delivery.DELIVER
        assert ledger.kept.next() is None

    def test_past_the_bound_they_are_refused_for_good(self) -> None:
        ledger = PrefillLedger("process", kept_back=3)
        bound(ledger, 1)
        assert [bind(ledger, n)[0] for n in range(2, 5)] == [Delivery.DEFER] * 3
        assert bind(ledger, 5) == (Delivery.REFUSE, [])
        assert ledger.bind_without_plugin(7, "x0", EXTENT)[0] is Delivery.REFUSE
        assert verdict(ledger, "g5") == "unknown"
        assert bind(ledger, 5) == (Delivery.DROP, []), "as was said"
        assert len(ledger.kept) == 3
        ledger.check_integrity()

    def test_those_of_a_decode_without_the_plugin_wait_once_for_each_rank(self) -> None:
        ledger = prefill()
        bound(ledger, 1)
        for _ in range(5):
            assert ledger.bind_without_plugin(7, "x0", EXTENT)[0] is Delivery.DEFER
        assert len(ledger.kept) == 1, "stock, too, keeps the last of a rank"


def listening(ledger: PrefillLedger, n: int = 1, room: int = 7, came: float = 0.0) -> list[Action]:
    """Destinations of a decode that is to be told of endings."""
    return ledger.bind(room, f"e{n}", f"g{n}", "d0", "p0", extent=EXTENT, came=came)[1]


def ended(actions: list[Action]) -> list[tuple[str, str, str]]:
    return [(a.lease, a.verdict, a.reason) for a in actions if isinstance(a, SendEnded)]


def yes(session: str) -> bool:
    del session
    return True


class TestEndings:
    """What ends here without success is told once, when nothing of it is written any more."""

    def served(self, ledger: PrefillLedger) -> Attempt:
        """With a chunk in hand."""
        listening(ledger)
        ledger.sender_made("s", 7)
        attempt = ledger.put("s")
        assert attempt is not None and ledger.take(attempt, 1, True)
        return attempt

    def test_it_is_told_when_the_chunk_in_hand_has_ended_and_once(self) -> None:
        ledger = prefill()
        attempt = self.served(ledger)
        assert ledger.stopped("s", 7, 0.0, "aborted") == []
        assert ended(ledger.done(attempt)) == [("g1", "drained", "aborted")]
        assert ledger.stopped("s", 7, 0.0, "aborted") == [] == ledger.retire("s", 7)

    def test_a_failed_write_is_told_as_poisoned(self) -> None:
        ledger = prefill()
        attempt = self.served(ledger)
        assert ended(ledger.failed(attempt, "returned -1")) == []
        assert ended(ledger.done(attempt)) == [("g1", "poisoned", "returned -1")]

    def test_a_sender_that_is_gone_ends_it(self) -> None:
        ledger = prefill()
        listening(ledger)
        ledger.sender_made("s", 7)
        assert ended(ledger.retire("s", 7)) == [("g1", "drained", "its request ended on prefill")]

    def test_the_next_request_of_its_room_ends_it(self) -> None:
        ledger = prefill()
        listening(ledger)
        assert ended(listening(ledger, 2)) == [("g1", "drained", "its room is used again")]

    def test_a_success_that_covers_its_lease_is_its_end(self) -> None:
        ledger = prefill()
        attempt = self.served(ledger)
        ledger.offer("s", 1, (), None)
        attempt.coverage.writes += ["d0:1", "d0:1"]
        assert ledger.success_leaves(attempt, "d0", yes)
        assert ledger.done(attempt) == [] == ledger.retire("s", 7)

    def test_a_success_that_is_short_is_none(self) -> None:
        ledger = prefill()
        attempt = self.served(ledger)
        assert not ledger.success_leaves(attempt, "d0", yes)
        assert ended(ledger.done(attempt)) == []
        assert [lease for lease, _, _ in ended(ledger.retire("s", 7))] == ["g1"]

    def test_what_decode_ends_itself_it_is_not_told(self) -> None:
        ledger = prefill()
        attempt = self.served(ledger)
        ledger.stopped("s", 7, 0.0, "aborted")
        ledger.abort(7, "g1", "d0", "p0")
        actions = ledger.done(attempt)
        assert answers(actions) == [("g1", "drained")] and ended(actions) == []

    def test_who_is_bound_later_is_told_at_once(self) -> None:
        ledger = prefill()
        listening(ledger)
        ledger.sender_made("s", 7)
        ledger.retire("s", 7)
        late = ledger.bind(7, "e1", "g1-d1", "d1", "p0", extent=EXTENT, came=0.0)
        assert late[0] is Delivery.DROP
        assert ended(late[1]) == [("g1-d1", "drained", "its request ended on prefill")]

    def test_a_decode_that_does_not_listen_is_told_nothing(self) -> None:
        ledger = prefill()
        bound(ledger)
        assert ledger.stopped("s1", 7, 0.0, "aborted") == [] == ledger.retire("s1", 7)

    def test_a_rejected_request_ends_its_attempt_and_no_other(self) -> None:
        ledger = prefill()
        listening(ledger)
        assert ended(ledger.rejected(7, 0.0, "too long")) == [("g1", "drained", "too long")]
        assert ledger.sender_made("s", 7) == [], "the next request of the room is not failed"
        assert ended(listening(ledger, 2)) == []
        assert ledger.rejected(7, 0.0, "a third one") == [], "the room is another request's"
        assert ledger.put("s") is not None

    @pytest.mark.parametrize("how", ["stopped", "rejected"])
    def test_destinations_of_a_request_that_has_ended_are_told_so(self, how: str) -> None:
        ledger = prefill()
        if how == "stopped":
            ledger.sender_made("s", 7)
            ledger.stopped("s", 7, 100.0, "aborted")
        else:
            ledger.rejected(7, 100.0, "aborted")
        for decode in ("d0", "d1"):
            delivery, actions = ledger.bind(
                7, "e1", f"g-{decode}", decode, "p0", extent=EXTENT, came=90.0
            )
            assert delivery is Delivery.DROP
            assert ended(actions) == [(f"g-{decode}", "drained", "aborted")]
        assert ended(listening(ledger, 2, came=90.0)) == [], "these are another request's"

    @pytest.mark.parametrize("doubt", ["newer request", "came after it", "given up", "cleared"])
    def test_in_doubt_destinations_wait(self, doubt: str) -> None:
        ledger = prefill()
        ledger.sender_made("s", 7)
        if doubt == "cleared":  # perhaps after a success: stock did not say
            ledger.retire("s", 7)
        else:
            ledger.stopped("s", 7, 100.0, "aborted")
        if doubt == "newer request":
            ledger.sender_made("newer", 7)
        if doubt == "given up":
            ledger.ended_rooms.forget(7)
        came = 100.0 + SKEW_S + 0.1 if doubt == "came after it" else 0.0
        assert listening(ledger, came=came) == [ForgetRoom(7)]
        assert bind(ledger, 2, room=8)[0] is Delivery.DELIVER

    def test_destinations_that_are_not_even_kept_back_are_told_so(self) -> None:
        ledger = PrefillLedger("process", kept_back=0)
        bound(ledger)
        (end,) = ended(listening(ledger, 2))
        assert end == ("g2", "drained", NO_ROOM)
        assert ledger.bind(7, "e3", "g3", "d0", "p0", extent=EXTENT) == (Delivery.REFUSE, [])

    def test_so_many_ended_requests_are_remembered(self) -> None:
        rooms = EndedRooms(memory=2)
        for room in (1, 2, 3):
            rooms.remember(room, 0.0, "aborted")
        assert [rooms.take(room, 0.0) for room in (1, 2, 3, 3)] == ["", "aborted", "aborted", ""]
