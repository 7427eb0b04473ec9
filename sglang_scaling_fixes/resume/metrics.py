"""What resume counts."""

from __future__ import annotations

from sglang_scaling_fixes.metrics import PREFIX, Family, Metric

RESUME = Family(
    PREFIX + "resume_",
    "the scheduler",
    (
        Metric("requests", "counter", "Requests that went on after tokens they were given."),
        Metric("tokens", "counter", "Tokens that these were given."),
        Metric("refused", "counter", "Requests whose given tokens could not be taken up."),
    ),
)
