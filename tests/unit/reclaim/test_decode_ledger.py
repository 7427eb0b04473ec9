"""The rules of the decode side one by one. Interleavings are in test_races and test_explore."""

from __future__ import annotations

import itertools

import pytest

from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger
from sglang_scaling_fixes.reclaim.rules.exposure import TRANSITIONS, Exposure, ExposureState
from sglang_scaling_fixes.reclaim.rules.reasons import why_held
from sglang_scaling_fixes.reclaim.rules.types import LedgerError, Proof, Verdict
from tests.model.diagram import DOC, PICTURES, in_doc

EVENTS = sorted({event for _, event in TRANSITIONS})
ILLEGAL = [pair for pair in itertools.product(ExposureState, EVENTS) if pair not in TRANSITIONS]


def decode(*peers: str) -> DecodeLedger:
    ledger = DecodeLedger("d", first_wait=0.1, max_wait=5.0)
    for rank in peers:
        ledger.hello_acked(rank, f"{rank}-process")
    return ledger


def exposed(ledger: DecodeLedger, room: int = 7, *ranks: str) -> Exposure:
    exposure = ledger.expose(room, ranks or ("p0",))
    for rank in exposure.writers:
        ledger.sent(exposure, rank)
    return exposure


def fenced(ledger: DecodeLedger) -> list[Exposure]:
    """Another engine takes over, and the one before is closed at once."""
    ledger.engine_made()
    return ledger.engines_closed()


def held(ledger: DecodeLedger, room: int = 7, *ranks: str) -> Exposure:
    exposure = exposed(ledger, room, *ranks)
    ledger.give_up(exposure, now=0.0)
    return exposure


class TestTable:
    @pytest.mark.parametrize(("state", "event"), ILLEGAL)
    def test_what_is_not_in_the_table_raises(self, state: ExposureState, event: str) -> None:
        exposure = Exposure("g", "e", 7, {}, state=state)
        with pytest.raises(LedgerError, match=event):
            exposure.move(event)
        assert exposure.state is state

    @pytest.mark.parametrize(("state", "event"), TRANSITIONS)
    def test_what_is_in_the_table_happens(self, state: ExposureState, event: str) -> None:
        exposure = Exposure("g", "e", 7, {}, state=state)
        exposure.move(event)
        assert exposure.state is TRANSITIONS[state, event]

    def test_every_state_is_reachable_and_returned_and_landed_are_ends(self) -> None:
        assert set(TRANSITIONS.values()) | {ExposureState.EXPOSED} == set(ExposureState)
        assert {s for s, _ in TRANSITIONS}.isdisjoint(
            {ExposureState.LANDED, ExposureState.RETURNED}
        )

    def test_an_adapter_that_ends_an_exposure_twice_is_told(self) -> None:
        ledger = decode("p0")
        landed = exposed(ledger)
        ledger.landed(landed)
        with pytest.raises(LedgerError):
            ledger.landed(landed)
        with pytest.raises(LedgerError):
            ledger.give_up(landed, now=0.0)
        unproven = held(ledger)
        with pytest.raises(LedgerError):
            ledger.returned(unproven)
        with pytest.raises(LedgerError):
            ledger.landed(unproven)

    @pytest.mark.parametrize("name", PICTURES)
    def test_what_is_documented_is_the_table(self, name: str) -> None:
        documented = in_doc(name, DOC.read_text())
        assert documented == PICTURES[name], "run python -m tests.model.diagram"


class TestProofs:
    def test_p1_a_rank_that_was_never_sent_to_proves_itself(self) -> None:
        ledger = decode("p0", "p1")
        exposure = ledger.expose(7, ["p0", "p1"])
        ledger.sent(exposure, "p1")
        ledger.give_up(exposure, now=0.0)
        assert exposure.state is ExposureState.HELD
        assert exposure.writers["p0"].proof is Proof.NEVER_SENT
        assert [w.rank for w in exposure.unproven] == ["p1"]

    def test_nothing_sent_at_all_still_waits_for_the_other_tp_ranks(self) -> None:
        ledger = decode("p0")
        exposure = ledger.expose(7, ["p0"])
        ledger.give_up(exposure, now=0.0)
        assert exposure.state is ExposureState.PROVEN
        assert ledger.holding
        assert "other TP ranks" in why_held(exposure, ledger.peers)
        ledger.returned(exposure)
        assert not ledger.holding

    def test_p2_needs_every_writer(self) -> None:
        ledger = decode("p0", "p1")
        exposure = held(ledger, 7, "p0", "p1")
        ledger.ack("p0", "p0-process", exposure.lease, "drained")
        assert [w.rank for w in exposure.unproven] == ["p1"]
        ledger.ack("p1", "p1-process", exposure.lease, "drained")
        assert exposure.state is ExposureState.PROVEN

    @pytest.mark.parametrize(
        ("verdict", "who", "bound_by", "proves"),
        [
            ("drained", "p0-process", None, True),
            ("drained", "p0-process", "p0-process", True),
            ("drained", "successor", "p0-process", False),
            ("unknown", "p0-process", None, True),
            ("unknown", "p0-process", "p0-process", True),
            ("unknown", "successor", None, False),
            ("unknown", "successor", "p0-process", False),
            ("poisoned", "p0-process", None, False),
            ("nonsense", "p0-process", None, False),
        ],
    )
    def test_whose_word_counts(
        self, verdict: str, who: str, bound_by: str | None, proves: bool
    ) -> None:
        ledger = decode("p0")
        exposure = exposed(ledger)
        if bound_by:
            ledger.hello_acked("p0", bound_by, exposure.lease)
        ledger.give_up(exposure, now=0.0)
        ledger.ack("p0", who, exposure.lease, verdict)  # type: ignore[arg-type]
        assert (exposure.state is ExposureState.PROVEN) == proves
        assert proves or why_held(exposure, ledger.peers)

    def test_foreign_repeated_and_early_answers_change_nothing(self) -> None:
        ledger = decode("p0", "p1")
        exposure = exposed(ledger)
        ledger.ack("p0", "p0-process", exposure.lease, "drained")
        assert exposure.unproven, "nobody asked"
        ledger.give_up(exposure, now=0.0)
        ledger.ack("p1", "p1-process", exposure.lease, "drained")
        ledger.ack("p0", "p0-process", "other-lease", "drained")
        assert exposure.unproven
        ledger.ack("p0", "p0-process", exposure.lease, "drained")
        ledger.ack("p0", "p0-process", exposure.lease, "poisoned")
        assert exposure.state is ExposureState.PROVEN

    def test_p3_success_before_the_failure(self) -> None:
        ledger = decode("p0")
        exposure = exposed(ledger, 7, "p0", "stock")
        ledger.successes.tagged(exposure.lease, "p0")
        assert ledger.successes.admits(7, None, 1)
        ledger.give_up(exposure, now=0.0, success_seen=True)
        assert exposure.state is ExposureState.PROVEN
        assert exposure.writers["p0"].proof is Proof.LANDED

    def test_p3_a_success_stock_counted_for_the_wrong_attempt_is_no_proof(self) -> None:
        ledger = decode("p0")
        exposure = exposed(ledger)
        ledger.give_up(exposure, now=0.0, success_seen=True)
        assert exposure.unproven

    def test_p3_each_writers_own_word_counts_when_the_owner_gives_up(self) -> None:
        ledger = decode("p0", "p1")
        exposure = exposed(ledger, 7, "p0", "p1")
        ledger.successes.tagged(exposure.lease, "p1")
        ledger.give_up(exposure, now=0.0)
        assert [w.rank for w in exposure.unproven] == ["p0"]

    def test_p3_late_success_of_a_prefill_without_the_plugin(self) -> None:
        ledger = decode()
        exposure = held(ledger, 7, "p0", "p1")
        assert not ledger.successes.stock_success(8, "p1"), "another room"
        assert not ledger.successes.stock_success(7, "p0"), "one of two ranks"
        assert ledger.successes.stock_success(7, "p1")
        assert exposure.state is ExposureState.PROVEN

    def test_p3_late_success_proves_nothing_when_it_could_mean_another_generation(self) -> None:
        ledger = decode()
        held(ledger)
        exposed(ledger)
        assert not ledger.successes.stock_success(7, "p0")

    def test_p3_late_success_of_a_rank_that_can_be_asked_proves_nothing(self) -> None:
        ledger = decode("p0")
        held(ledger)
        assert not ledger.successes.stock_success(7, "p0")

    def test_p3_late_success_proves_nothing_of_a_room_given_up_before(self) -> None:
        ledger = decode()
        first = held(ledger)
        fenced(ledger)
        ledger.returned(first)
        held(ledger)
        assert not ledger.successes.stock_success(7, "p0"), "it may be the first one's"

    def test_p2_stocks_own_acknowledgement_of_an_abort(self) -> None:
        ledger = decode()
        exposure = held(ledger, 7, "p0", "p1")
        assert not ledger.successes.stock_acked(8, 2), "another room"
        assert not ledger.successes.stock_acked(7, 1), "one of two ranks"
        assert ledger.successes.stock_acked(7, 2)
        assert exposure.state is ExposureState.PROVEN
        assert {w.proof for w in exposure.writers.values()} == {Proof.DRAINED}
        assert not ledger.successes.stock_acked(7, 2)

    def test_p2_stocks_acknowledgement_proves_nothing_of_a_room_used_again(self) -> None:
        ledger = decode()
        first = held(ledger)
        second = exposed(ledger)
        assert not ledger.successes.stock_acked(7, 1), "which of the two?"
        ledger.give_up(second, now=0.0)
        assert not ledger.successes.stock_acked(7, 1)
        fenced(ledger)
        ledger.returned(first)
        ledger.returned(second)
        held(ledger)
        assert not ledger.successes.stock_acked(7, 1), "it may be the first one's"

    def test_p2_stocks_acknowledgement_counts_for_nothing_from_a_rank_that_can_be_asked(
        self,
    ) -> None:
        ledger = decode("p0")
        exposure = exposed(ledger, 7, "p0", "stock")
        ledger.hello("p0")
        ledger.give_up(exposure, now=0.0)
        assert not ledger.successes.stock_acked(7, 2), "it spoke when it was sent the destinations"
        ledger.hello_acked("p0", "p0-process", seq=1)
        ledger.ack("p0", "p0-process", exposure.lease, "drained")
        assert ledger.successes.stock_acked(7, 2)

    def test_p2_whoever_answered_the_hello_before_them_would_have_had_them(self) -> None:
        ledger = decode()
        seq = ledger.hello("p0")
        exposure = held(ledger)
        ledger.hello_acked("p0", "first", seq=seq)
        ledger.ack("p0", "successor", exposure.lease, "unknown")
        assert exposure.unproven
        ledger.ack("p0", "first", exposure.lease, "unknown")
        assert exposure.state is ExposureState.PROVEN

    @pytest.mark.parametrize("after_hello", [True, False])
    def test_an_answer_to_another_hello_or_on_another_socket_says_nothing(
        self, after_hello: bool
    ) -> None:
        ledger = decode()
        first = ledger.hello("p0")
        exposure = ledger.expose(7, ["p0"])
        ledger.sent(exposure, "p0", after_hello=after_hello)
        second = ledger.hello("p0")
        assert second == first + 1
        ledger.give_up(exposure, now=0.0)
        ledger.hello_acked("p0", "process", seq=first if not after_hello else second)
        ledger.ack("p0", "process", exposure.lease, "unknown")
        assert exposure.unproven

    def test_a_late_word_from_before_the_last_hello_makes_no_peer(self) -> None:
        ledger = decode()
        first = ledger.hello("p0")
        exposure = exposed(ledger)
        ledger.hello("p0")
        ledger.hello_acked("p0", "process", seq=first)
        ledger.hello_acked("p0", "process", exposure.lease)
        assert ledger.peers == {}
        assert exposure.writers["p0"].bound_by == "process"
        ledger.hello_acked("p0", "process", seq=2)
        assert ledger.peers == {"p0": "process"}

    def test_two_processes_that_claim_one_generation_are_not_believed(self) -> None:
        ledger = decode("p0")
        exposure = exposed(ledger)
        ledger.hello_acked("p0", "p0-process", exposure.lease)
        ledger.hello_acked("p0", "successor", exposure.lease)
        ledger.give_up(exposure, now=0.0)
        for who in ("p0-process", "successor"):
            ledger.ack("p0", who, exposure.lease, "drained")
        assert exposure.state is ExposureState.HELD
        assert "cannot vouch" in why_held(exposure, ledger.peers)

    def test_p4_a_fence_proves_a_poisoned_writer(self) -> None:
        ledger = decode("p0")
        exposure = held(ledger)
        ledger.ack("p0", "p0-process", exposure.lease, "poisoned", "write returned -1")
        assert "write returned -1" in why_held(exposure, ledger.peers)
        assert fenced(ledger) == []
        assert exposure.writers["p0"].proof is Proof.FENCED
        assert exposure.state is ExposureState.PROVEN
        assert fenced(ledger) == []
        ledger.ack("p0", "p0-process", exposure.lease, "poisoned", "late")
        ledger.returned(exposure)

    def test_p4_a_fence_is_for_what_was_sent_before_it(self) -> None:
        ledger = decode("p0", "p1")
        landed, waits = exposed(ledger, 7), ledger.expose(8, ["p0", "p1"])
        ledger.landed(landed)
        ledger.sent(waits, "p0")
        assert fenced(ledger) == [waits]
        assert waits.state is ExposureState.EXPOSED
        ledger.sent(waits, "p1")
        after = exposed(ledger, 9)
        ledger.give_up(waits, now=0.0)
        ledger.give_up(after, now=0.0)
        assert [w.rank for w in waits.unproven] == ["p1"], "sent after the fence"
        assert after.unproven

    def test_p4_closes_older_engines_only(self) -> None:
        ledger = decode("p0")
        before = held(ledger, 7)
        ledger.engine_made()
        after = held(ledger, 8)
        assert ledger.receiving_elsewhere() == []
        assert ledger.engines_closed() == []
        assert before.state is ExposureState.PROVEN
        assert after.state is ExposureState.HELD

    def test_p4_no_proof_of_what_is_sent_again_behind_it(self) -> None:
        ledger = decode("p0")
        exposure = exposed(ledger)
        assert fenced(ledger) == [exposure]
        ledger.sent(exposure, "p0")
        ledger.give_up(exposure, now=0.0)
        assert exposure.unproven and exposure.state is ExposureState.HELD

    def test_who_still_waits_for_an_older_engine(self) -> None:
        ledger = decode("p0")
        lands, gives_up = exposed(ledger, 7), exposed(ledger, 8)
        ledger.engine_made()
        exposed(ledger, 9)
        assert ledger.receiving_elsewhere() == [lands, gives_up]
        ledger.landed(lands)
        ledger.give_up(gives_up, now=0.0)
        assert ledger.receiving_elsewhere() == []

    def test_a_write_that_goes_on_proves_nothing_and_is_known(self) -> None:
        ledger = decode("p0")
        exposure = held(ledger)
        before = ledger.snapshot(now=0.0)
        ledger.ack("p0", "p0-process", exposure.lease, "writing", now=5.0)
        assert ledger.snapshot(now=0.0) == before
        assert exposure.writers["p0"].writes_at == 5.0
        ledger.ack("p0", "p0-process", exposure.lease, "drained")
        assert exposure.state is ExposureState.PROVEN

    def test_p4_a_fenced_exposure_given_up_later_is_proven_at_once(self) -> None:
        ledger = decode("p0")
        exposure = exposed(ledger)
        fenced(ledger)
        ledger.give_up(exposure, now=0.0)
        assert exposure.state is ExposureState.PROVEN
        assert exposure.writers["p0"].proof is Proof.FENCED

    def test_p4_a_success_on_its_way_during_a_fence_may_be_taken(self) -> None:
        ledger = decode("p0")
        exposure = exposed(ledger)
        fenced(ledger)
        ledger.successes.tagged(exposure.lease, "p0")
        assert ledger.complete(exposure)
        ledger.landed(exposure)

    def test_generations_are_never_reused(self) -> None:
        ledger = decode("p0")
        leases = set()
        for _ in range(100):
            exposure = exposed(ledger)
            leases.add(exposure.lease)
            ledger.landed(exposure)
        assert len(leases) == 100
        assert ledger.exposures() == []

    def test_tp_ranks_share_the_epoch_and_not_the_generation(self) -> None:
        first, second = DecodeLedger("d0"), DecodeLedger("d1")
        first.group = second.group = "d"
        for _ in range(3):
            ours, theirs = exposed(first), exposed(second)
            assert ours.attempt_id == theirs.attempt_id
            assert ours.lease != theirs.lease


class TestWhatStockMaySee:
    """A success names a room; the next request of the room must not be credited with it."""

    def test_a_marked_success_is_its_generations(self) -> None:
        ledger = decode("p0")
        first = held(ledger)
        second = exposed(ledger)
        assert not ledger.successes.admits(7, first.lease)
        assert ledger.successes.admits(7, second.lease)
        assert not ledger.successes.admits(8, second.lease + "0")
        ledger.landed(second)
        assert not ledger.successes.admits(7, second.lease)

    def test_an_unmarked_one_counts_unless_the_room_was_given_up(self) -> None:
        ledger = decode()
        assert ledger.successes.admits(7, None), "no exposure: stock knows the room or not"
        exposed(ledger)
        assert ledger.successes.admits(7, None)
        held(ledger, 8)
        exposed(ledger, 8)
        assert not ledger.successes.admits(8, None)

    def test_an_unmarked_one_counts_for_nothing_where_every_writer_marks(self) -> None:
        ledger = decode("p0")
        exposed(ledger)
        assert not ledger.successes.admits(7, None)
        exposed(ledger, 8, "p0", "stock")
        assert ledger.successes.admits(8, None)

    def test_complete_when_every_writer_reported_this_generation(self) -> None:
        ledger = decode("p0", "p1")
        held(ledger, 7, "p0", "p1")
        exposure = exposed(ledger, 7, "p0", "p1")
        assert not ledger.complete(exposure)
        ledger.successes.tagged(exposure.lease, "p0")
        ledger.successes.tagged(exposure.lease, "stranger")
        ledger.successes.tagged("other", "p1")
        assert not ledger.complete(exposure)
        ledger.successes.tagged(exposure.lease, "p1")
        assert ledger.complete(exposure)

    def test_complete_with_one_unmarked_success_per_rank_without_safe_reclaim(self) -> None:
        ledger = decode("p0")
        exposure = exposed(ledger, 7, "p0", "stock", "stock2")
        ledger.successes.tagged(exposure.lease, "p0")
        for reporter, complete in ((1, False), (1, False), (2, True)):
            assert ledger.successes.admits(7, None, reporter)
            assert ledger.complete(exposure) == complete

    def test_given_up_rooms_are_remembered_within_bounds(self) -> None:
        ledger = DecodeLedger("d", memory=10)
        for room in range(100):
            held(ledger, room)
        assert len(ledger._given_up_rooms) == 10
        assert not ledger.successes.admits(99, None)


class TestAsking:
    def test_backoff_doubles_up_to_the_longest_wait(self) -> None:
        ledger = DecodeLedger("d", first_wait=1.0, max_wait=50.0)
        ledger.hello_acked("p0", "p0-process")
        held(ledger)
        asked = [second for second in range(300) if ledger.tick(float(second))]
        waits = [later - earlier for earlier, later in itertools.pairwise(asked)]
        assert asked[0] == 0
        assert waits == [1, 2, 4, 8, 16, 32, 50, 50, 50, 50]

    def test_only_unproven_ranks_that_speak_the_protocol_are_asked(self) -> None:
        ledger = decode("p0", "p1")
        exposure = held(ledger, 7, "p0", "p1", "stock")
        assert [a.rank for a in ledger.tick(0.0)] == ["p0", "p1"]
        assert "stock: runs without safe-reclaim" in why_held(exposure, ledger.peers)
        ledger.ack("p0", "p0-process", exposure.lease, "drained")
        assert [a.rank for a in ledger.tick(100.0)] == ["p1"]
        assert "p1: asked 2 times" in why_held(exposure, ledger.peers)

    def test_a_rank_is_asked_as_soon_as_it_is_known(self) -> None:
        ledger = decode()
        exposure = held(ledger)
        assert ledger.tick(100.0) == []
        ledger.hello_acked("p0", "p0-process", exposure.lease)
        assert [(a.rank, a.room, a.lease) for a in ledger.tick(100.0)] == [
            ("p0", 7, exposure.lease)
        ]

    def test_the_exposed_and_the_landed_are_not_asked_about(self) -> None:
        ledger = decode("p0")
        exposed(ledger)
        ledger.landed(exposed(ledger, 8))
        assert ledger.tick(100.0) == []
        assert not ledger.holding

    def test_held_is_in_the_order_of_giving_up(self) -> None:
        ledger = decode("p0")
        first, second, third = (exposed(ledger, room) for room in (1, 2, 3))
        for exposure in (second, third, first):
            ledger.give_up(exposure, now=0.0)
        assert ledger.held == [second, third, first]
        ledger.ack("p0", "p0-process", third.lease, "drained")
        ledger.returned(third)
        assert ledger.held == [second, first]
        assert {e.lease for e in ledger.exposures()} == {first.lease, second.lease}


class TestEndings:
    """What it is worth that prefill ended a request, told unasked."""

    def test_one_that_comes_first_is_proof_when_the_owner_gives_up(self) -> None:
        """For this writer. The others are asked as ever."""
        ledger = decode("p0", "p1")
        exposure = exposed(ledger, 7, "p0", "p1")
        assert ledger.endings.told("p0", "p0-process", exposure.lease, "drained") is exposure
        assert ledger.endings.fails(exposure)
        assert [w.proof for w in exposure.writers.values()] == [None, None], "its owner waits"
        ledger.give_up(exposure, now=0.0)
        assert exposure.writers["p0"].proof is Proof.DRAINED
        assert [ask.rank for ask in ledger.tick(0.0)] == ["p1"]
        ledger.ack("p1", "p1-process", exposure.lease, "drained")
        assert exposure.state.value == "proven"

    def test_one_that_comes_after_it_gave_up_is_proof_at_once(self) -> None:
        ledger = decode("p0")
        exposure = held(ledger)
        assert ledger.endings.told("p0", "p0-process", exposure.lease, "drained") is exposure
        assert exposure.state is ExposureState.PROVEN

    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize(
        ("process", "verdict", "why"),
        [
            ("p0-process", "poisoned", "a write failed and may still land (returned -1)"),
            ("another", "drained", "it cannot vouch for the process"),
        ],
    )
    def test_it_is_weighed_like_an_answer(
        self, process: str, verdict: Verdict, why: str, first: bool
    ) -> None:
        ledger = decode("p0")
        exposure = exposed(ledger) if first else held(ledger)
        ledger.endings.told("p0", process, exposure.lease, verdict, "returned -1")
        if first:
            ledger.give_up(exposure, now=0.0)
        assert exposure.state is ExposureState.HELD
        assert why in why_held(exposure, ledger.peers)
        assert [ask.rank for ask in ledger.tick(0.0)] == ["p0"], "it is asked all the same"

    def test_a_dispute_that_comes_after_it_counts(self) -> None:
        """It is weighed when the owner gives up, with all that is known by then."""
        ledger = decode("p0")
        exposure = exposed(ledger)
        ledger.endings.told("p0", "p0-process", exposure.lease, "drained")
        ledger.hello_acked("p0", "another", exposure.lease)
        ledger.give_up(exposure, now=0.0)
        assert exposure.state is ExposureState.HELD

    def test_it_is_of_its_lease_and_rank_alone(self) -> None:
        ledger = decode("p0")
        first, second = exposed(ledger, 7), exposed(ledger, 8)
        assert ledger.endings.told("p1", "p1-process", first.lease, "drained") is None
        assert ledger.endings.told("p0", "p0-process", "another lease", "drained") is None
        ledger.endings.told("p0", "p0-process", first.lease, "drained")
        ledger.give_up(second, now=0.0)
        assert second.state is ExposureState.HELD

    def test_what_its_writer_reported_has_landed(self) -> None:
        """Prefill tells of no end after a success. If it did, the KV would be there."""
        ledger = decode("p0")
        exposure = exposed(ledger)
        ledger.successes.tagged(exposure.lease, "p0")
        assert ledger.endings.told("p0", "p0-process", exposure.lease, "drained") is None
        ledger.landed(exposure)
        assert ledger.endings.told("p0", "p0-process", exposure.lease, "drained") is None

    def test_a_success_after_it_is_proof_as_ever(self) -> None:
        ledger = decode("p0")
        exposure = exposed(ledger)
        ledger.endings.told("p0", "another", exposure.lease, "drained")
        ledger.give_up(exposure, now=0.0)
        ledger.successes.tagged(exposure.lease, "p0")
        assert exposure.writers["p0"].proof is Proof.LANDED

    def test_two_owners_in_one_room_are_not_failed_together(self) -> None:
        ledger = decode("p0")
        first, second = exposed(ledger), exposed(ledger)
        assert ledger.endings.told("p0", "p0-process", first.lease, "drained") is first
        assert not ledger.endings.fails(first)
        ledger.give_up(second, now=0.0)
        assert ledger.endings.fails(first)
