"""NIXL's worker waits for the event of an early send before it reads the pages."""

import collections
import contextlib
import unittest
from types import SimpleNamespace

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.nixl.conn import NixlKVManager
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="base-a-test-cpu")

ROOM = 1


class Ended(BaseException):
    """Ends the worker's loop, which survives every Exception."""


class Queue(list):
    put = list.append

    def get(self):
        if not self:
            raise Ended
        return self.pop(0)


class Manager(NixlKVManager):
    """One room, no agent: what is left of a transfer is its order."""

    def __init__(self, status=KVPoll.WaitingForInput):
        self.history = []
        self.disaggregation_mode = DisaggregationMode.PREFILL
        self.enable_staging = self.enable_deferred_decode_kv_release = False
        self.transfer_infos = {ROOM: {"agent": SimpleNamespace(dst_port=1)}}
        self.transfer_queues = [Queue()]
        self.request_status = {ROOM: status}
        self._staging_outstanding = collections.defaultdict(int)

    def check_status(self, room):
        return self.request_status[room]

    def update_status(self, room, status):
        self.history.append("transfer")
        raise Ended  # the pages would be read from here on

    def send_early(self, event):
        self.add_transfer_request(ROOM, [1], slice(0, 1), False, wait_event=event)
        with contextlib.suppress(Ended):
            self.transfer_worker(self.transfer_queues[0])
        return self.history


def event_of(manager, then=lambda: None):
    def synchronize():
        manager.history.append("wait")
        then()

    return SimpleNamespace(synchronize=synchronize)


class TestNixlEarlySendWait(CustomTestCase):
    def test_waits_before_the_pages_are_read(self):
        manager = Manager()
        self.assertEqual(manager.send_early(event_of(manager)), ["wait", "transfer"])

    def test_without_an_event_nothing_is_waited_for(self):
        self.assertEqual(Manager().send_early(None), ["transfer"])

    def test_an_abort_during_the_wait_is_seen(self):
        manager = Manager()

        def abort():
            manager.request_status[ROOM] = KVPoll.Failed

        self.assertEqual(manager.send_early(event_of(manager, abort)), ["wait"])

    def test_a_room_that_failed_does_not_wait(self):
        manager = Manager(KVPoll.Failed)
        self.assertEqual(manager.send_early(event_of(manager)), [])


if __name__ == "__main__":
    unittest.main()
