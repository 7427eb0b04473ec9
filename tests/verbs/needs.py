"""Which machines can run RDMA verbs in software, and which tests run over them, too."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.lab.verbs import build

_PROBLEM = build.obstacle()
verbs_in_software = pytest.mark.skipif(_PROBLEM is not None, reason=_PROBLEM or "")
LONG_OVER_RDMA = ("tcp", pytest.param("rdma", marks=[pytest.mark.long, verbs_in_software]))
"""Parameters of a test that runs over TCP in `make test`, and over RDMA in `make test-long`."""
