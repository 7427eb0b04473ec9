"""The broadcast of a layer ahead waits for HiCache's load of that layer."""

import unittest
from contextlib import nullcontext
from unittest.mock import MagicMock

from sglang.srt.managers.cache_controller import LayerDoneCounter
from sglang.srt.mem_cache.dsa_cache_layer_split import LayerSplitDSATokenToKVPool
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="base-a-test-cpu")

START_LAYER, LAYER = 4, 7


class RecordingCounter(LayerDoneCounter):
    """HiCache's counter, without streams: notes whom it was asked to wait for."""

    def __init__(self, history):
        self.history = history

    def wait_until(self, threshold):
        self.history.append(("wait", threshold))


class OtherCounter:
    """A counter of another connector, which does more than wait."""

    def __init__(self, history):
        self.history = history

    def wait_until(self, threshold):
        self.history.append(("other", threshold))


class Pool(LayerSplitDSATokenToKVPool):
    """Only what prefetch_kv_buffer asks for; there are no other ranks and no device."""

    def __init__(self, counter, communicator, history):
        self.history = history
        self.layer_transfer_counter = counter
        self.layer_broadcast_comm = communicator
        self.start_layer = START_LAYER
        self.kv_buffer = [None] * 8
        self.remote_kv_buffer = None
        self.remote_kv_layer_id = self.pending_remote_kv_layer_id = None
        self.pending_remote_kv_broadcast = False
        self.kv_broadcast_stream = MagicMock()
        self.device_module = MagicMock(stream=lambda stream: nullcontext())

    def _local_layer_idx(self, layer_id):
        return 0

    def _is_layer_owned(self, layer_id):
        return True

    def _broadcast_tensor_from_owner(self, *args, **kwargs):
        self.history.append(("broadcast", args[1]))


def prefetched(counter_class, communicator):
    history = []
    counter = counter_class(history) if counter_class else None
    Pool(counter, communicator, history).prefetch_kv_buffer(LAYER)
    return history


class TestLayerSplitPrefetchWait(CustomTestCase):
    def test_waits_for_the_load_before_it_broadcasts(self):
        for communicator in (MagicMock(), None):
            with self.subTest(communicator=communicator is not None):
                self.assertEqual(
                    prefetched(RecordingCounter, communicator),
                    [("wait", LAYER - START_LAYER), ("broadcast", LAYER)],
                )

    def test_other_counters_are_not_asked_ahead(self):
        for counter in (OtherCounter, None):
            for communicator in (MagicMock(), None):
                self.assertEqual(
                    prefetched(counter, communicator), [("broadcast", LAYER)]
                )

    def test_a_counter_that_is_named_is_the_one_that_is_asked(self):
        history = []
        pool = Pool(OtherCounter(history), None, history)
        pool.prefetch_kv_buffer(LAYER, RecordingCounter(history), 2)
        self.assertEqual(history, [("wait", 2), ("broadcast", LAYER)])


if __name__ == "__main__":
    unittest.main()
