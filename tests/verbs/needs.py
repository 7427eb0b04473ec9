"""Which machines can run RDMA verbs in software."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.lab.verbs import build

_PROBLEM = build.obstacle()
verbs_in_software = pytest.mark.skipif(_PROBLEM is not None, reason=_PROBLEM or "")
