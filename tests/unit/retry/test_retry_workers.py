"""Which servers are asked next."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.retry.servers import Role, Server, from_flags
from sglang_scaling_fixes.retry.workers import (
    CONVICTED,
    LONGEST_BACKOFF_S,
    SUSPECT_S,
    Serves,
    Team,
    Tried,
    Worker,
    Workers,
    WorkerState,
)

NOW = 100.0


def some(count: int, role: Role = Role.WORKER) -> Workers:
    """All of them have answered."""
    return known(Server(f"http://w{i}:1", role) for i in range(count))


def known(servers: Iterable[Server]) -> Workers:
    workers = Workers(servers)
    for worker in workers.all:
        workers.served(worker)
    return workers


def pick(
    workers: Workers, tried: Tried | None = None, now: float = NOW, key: bytes = b""
) -> Worker:
    team = workers.pick(tried or Tried(), now, key=key)
    assert team is not None and team.prefill is None
    return team.answering


def after(*workers: Worker) -> Tried:
    return Tried([Team(worker) for worker in workers])


def test_ties_rotate_and_fewer_in_flight_go_first() -> None:
    workers = some(3)
    assert [pick(workers) for _ in range(6)] == workers.all * 2
    workers.all[0].in_flight = workers.all[1].in_flight = 1
    assert {pick(workers) for _ in range(3)} == {workers.all[2]}


def test_a_request_never_comes_to_the_same_worker_twice() -> None:
    workers = some(3)
    asked: list[Worker] = []
    while (team := workers.pick(after(*asked), NOW)) is not None:
        asked.append(team.answering)
    assert sorted(asked, key=workers.all.index) == workers.all


def test_an_avoided_worker_is_the_last_resort_until_its_time_is_over() -> None:
    workers = some(2)
    bad, good = workers.all
    workers.avoid(bad, until=30.0)
    workers.avoid(bad, until=5.0)  # the longer one counts
    good.in_flight = 1
    assert pick(workers, now=29.9) is good and bad.state(29.9) is WorkerState.AVOIDED
    assert pick(workers, after(good), now=29.9) is bad
    assert pick(workers, now=30.0) is bad and bad.state(30.0) is WorkerState.UP


@pytest.mark.parametrize("key", [b"", b"k"])
def test_one_that_is_only_doubted_is_asked_before_one_that_is_full(key: bytes) -> None:
    """Else whoever makes the others doubted sends everybody to the last one."""
    workers = some(3)
    good = workers.all[2]
    for worker in workers.all[:2]:
        workers.avoid(worker, until=NOW + 30)
    asked = []
    for _ in range(30):
        worker = pick(workers, key=key)
        worker.in_flight += 1
        asked.append(worker)
    assert asked.count(good) <= 15 and len(set(asked)) == 3


def test_one_that_never_answered_comes_after_those_that_did_and_is_not_live() -> None:
    workers = Workers([Server("http://a:1"), Server("http://b:1")])
    assert not workers.live(NOW) and pick(workers)
    workers.probed(workers.all[1], True, NOW, 5.0)
    assert workers.live(NOW) and [pick(workers) for _ in range(3)] == [workers.all[1]] * 3


def test_every_worker_is_probed_from_the_start_and_all_the_time() -> None:
    workers = Workers([Server("http://a:1"), Server("http://b:1")])
    assert workers.due(0.0) == workers.all and workers.due(0.0) == []  # they are being probed
    for worker in workers.all:
        assert workers.probed(worker, True, 1.0, 5.0) is False
    assert workers.due(5.9) == [] and workers.due(6.0) == workers.all


def test_a_failed_probe_takes_a_worker_down_with_a_back_off_that_doubles() -> None:
    workers = some(2)
    worker, other = workers.all
    now, waits = 0.0, []
    for _ in range(9):
        assert worker in workers.due(now)
        workers.probed(worker, False, now, 5.0)
        waits.append(worker.probe_at - now)
        now = worker.probe_at
    assert waits == [0.5, 1, 2, 4, 8, 16, *[LONGEST_BACKOFF_S] * 3]
    assert worker.down and {pick(workers, now=now) for _ in range(4)} == {other}
    workers.due(now)
    assert workers.probed(worker, True, now, 5.0) and not worker.down
    # Probes alone forget nothing: it may answer them and still break every request.
    workers.due(now + 5)
    workers.probed(worker, False, now + 5, 5.0)
    assert worker.probe_at == now + 5 + LONGEST_BACKOFF_S
    workers.probed(worker, True, now, 5.0)
    workers.served(worker)
    workers.probed(worker, False, now, 5.0)
    assert worker.probe_at == now + 0.5


def test_a_broken_connection_is_a_reason_to_probe_and_no_verdict() -> None:
    workers = some(2)
    worker, other = workers.all
    for each in workers.due(0.0):
        workers.probed(each, True, 0.0, 1000.0)
    for _ in range(50):  # one bad request after the other, and nobody served any
        workers.broke(worker, NOW)
    assert not worker.down and worker.state(NOW) is WorkerState.AVOIDED
    assert pick(workers) is other and workers.due(NOW) == [worker]
    assert pick(workers, now=NOW + SUSPECT_S) and worker.state(NOW + SUSPECT_S) is WorkerState.UP


def test_what_others_served_convicts_and_the_last_one_is_kept() -> None:
    workers = some(2)
    worker, other = workers.all
    found = [workers.convicted(worker, NOW) for _ in range(CONVICTED)]
    assert found == [*[False] * (CONVICTED - 1), True] and worker.down
    assert not any(workers.convicted(other, NOW) for _ in range(50)) and not other.down
    assert workers.probed(worker, True, NOW, 5.0) and not worker.down
    assert workers.convicted(other, NOW) and other.down


def test_a_few_convictions_among_good_answers_are_forgiven() -> None:
    workers = some(2)
    worker = workers.all[0]
    for _ in range(100):
        assert not workers.convicted(worker, NOW)
        workers.served(worker)
        workers.served(worker)


def test_if_all_are_down_the_request_is_still_asked_of_one() -> None:
    workers = some(2)
    for worker in workers.all:
        workers.probed(worker, False, NOW, 5.0)
    assert pick(workers) in workers.all and not workers.live(NOW)


# Pairs and pools


def halves(prefills: int, decodes: int) -> Workers:
    servers = [Server(f"http://p{i}:1", Role.PREFILL) for i in range(prefills)]
    return known([*servers, *(Server(f"http://d{i}:1", Role.DECODE) for i in range(decodes))])


def name(team: Team | None) -> str:
    assert team is not None
    return team.name.replace("http://", "").replace(":1", "")


def teams_of(workers: Workers, tried: Tried) -> list[str]:
    """All that one request could be asked of, in order."""
    found: list[str] = []
    while (team := workers.pick(tried, NOW)) is not None:
        found.append(name(team))
        tried.teams.append(team)
    return found


@pytest.mark.parametrize(("prefills", "decodes"), [(1, 1), (3, 2), (2, 1), (8, 2)])
def test_every_attempt_of_a_pool_pairs_what_it_has_not_tried(prefills: int, decodes: int) -> None:
    found = teams_of(halves(prefills, decodes), Tried())
    assert len(set(found)) == len(found) == prefills * decodes
    first = found[: min(prefills, decodes)]
    names = [name for team in first for name in team.split("+")]
    assert len(set(names)) == len(names)


def test_equal_halves_and_equal_pairs_take_turns() -> None:
    for workers, found in (
        (halves(2, 2), {"p0+d0", "p1+d1"}),
        (known(two_pairs()), {"a+b", "c+d"}),
    ):
        names = [name(workers.pick(Tried(), NOW)) for _ in range(4)]
        assert names[:2] == names[2:] and set(names) == found


def two_pairs() -> list[Server]:
    return from_flags({"pd": [f"prefill=http://{x}:1,decode=http://{y}:1" for x, y in PAIRS]})


PAIRS = (("a", "b"), ("c", "d"))


def test_a_half_that_failed_for_certain_is_not_asked_again() -> None:
    workers = halves(2, 1)
    team = workers.pick(Tried(), NOW)
    assert team is not None and team.prefill is not None
    tried = Tried([team], {team.prefill})
    other = workers.pick(tried, NOW)
    assert other is not None and other.answering is team.answering
    assert other.prefill is not team.prefill
    assert workers.pick(Tried([team], {team.answering}), NOW) is None


def test_halves_of_a_pair_serve_with_each_other_only() -> None:
    assert sorted(teams_of(known(two_pairs()), Tried())) == ["a+b", "c+d"]


def test_what_a_half_cannot_serve_goes_to_no_half() -> None:
    workers = halves(1, 1)
    assert workers.pick(Tried(), NOW, serves=Serves.WORKERS) is None
    team = workers.pick(Tried(), NOW, serves=Serves.ALONE)
    assert team is not None and team.answering.server.role is Role.DECODE and team.prefill is None


def test_a_pool_is_live_with_a_half_of_each_kind() -> None:
    workers = halves(2, 1)
    assert workers.live(NOW)
    workers.probed(workers.all[0], False, NOW, 5.0)
    assert workers.live(NOW)
    workers.probed(workers.all[1], False, NOW, 5.0)
    assert not workers.live(NOW)


# The prefix cache


def test_a_conversation_stays_with_its_worker_and_one_that_leaves_moves_its_own_only() -> None:
    workers = some(4)
    keys = [bytes([i]) for i in range(64)]
    before = {key: pick(workers, key=key) for key in keys}
    assert before == {key: pick(workers, key=key) for key in keys}
    assert len(set(before.values())) == 4
    gone = workers.all[1]
    workers.replace([w.server for w in workers.all if w is not gone])
    after_it = {key: pick(workers, key=key) for key in keys}
    assert all(after_it[key] is was for key, was in before.items() if was is not gone)


def test_a_conversation_moves_when_its_worker_is_much_busier_than_the_others() -> None:
    workers = some(4)
    home = pick(workers, key=b"k")
    home.in_flight = 1
    assert pick(workers, key=b"k") is not home  # 2 of 2, where the mean is 0.5
    for worker in workers.all:
        worker.in_flight = 10
    assert pick(workers, key=b"k") is home
    home.in_flight = 15
    assert pick(workers, key=b"k") is not home


# The list


def test_a_new_list_keeps_the_state_of_those_that_stay() -> None:
    workers = some(3)
    stays = workers.all[1]
    stays.in_flight = 7
    came, went = workers.replace([Server("http://new:1"), stays.server, stays.server])
    assert [s.url for s in came] == ["http://new:1"]
    assert [s.url for s in went] == ["http://w0:1", "http://w2:1"]
    assert workers.all[1] is stays and len(workers.all) == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("bcasf"), st.integers(0, 40))))
def test_whoever_is_picked_is_untried_and_up_comes_first(
    steps: list[tuple[int, str, int]],
) -> None:
    workers, now = some(4), 0.0
    for index, what, seconds in steps:
        worker = workers.all[index]
        now += seconds
        if what == "b":
            workers.broke(worker, now)
        elif what == "c":
            workers.convicted(worker, now)
        elif what == "a":
            workers.avoid(worker, now + seconds)
        else:
            for due in workers.due(now):
                workers.probed(due, what == "s", now, 5.0)
        order = [WorkerState.UP, WorkerState.AVOIDED, WorkerState.DOWN]
        tried = Tried()
        while (team := workers.pick(tried, now)) is not None:
            assert team not in tried.teams
            tried.teams.append(team)
        ranks = [order.index(team.answering.state(now)) for team in tried.teams]
        assert ranks == sorted(ranks) and len(ranks) == 4  # none is busy
