"""PD multiplexing with the hierarchical cache does not start."""

import unittest

from sglang.srt.arg_groups.validation_hook import check_server_args
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="base-a-test-cpu")


def server_args(**flags):
    """What PD multiplexing asks for, and these flags."""
    return ServerArgs(
        model_path="dummy",
        served_model_name="dummy",
        chunked_prefill_size=-1,
        page_size=1,
        disable_overlap_schedule=True,
        **flags,
    )


class TestPdmuxHiCache(CustomTestCase):
    def test_both_are_refused(self):
        both = server_args(enable_pdmux=True, enable_hierarchical_cache=True)
        with self.assertRaisesRegex(
            ValueError, "enable-pdmux.*enable-hierarchical-cache"
        ):
            check_server_args(both)

    def test_each_alone_is_not(self):
        check_server_args(server_args(enable_pdmux=True))
        check_server_args(server_args(enable_hierarchical_cache=True))


if __name__ == "__main__":
    unittest.main()
