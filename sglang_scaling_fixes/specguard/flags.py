"""The settings of the anomaly guard."""

from __future__ import annotations

from sglang_scaling_fixes.config import Setting

ACTION = Setting(
    "--spec-guard",
    "guard",
    "What to do with a request whose speculative decoding betrays a corrupted KV cache. "
    "observe: count and log it. abort: end it with 503 (kv_anomaly), and let no later request "
    "read its KV. Arms spec-guard if --plugin does not name it.",
    choices=("observe", "abort"),
    arms=True,
)
SETTINGS = (
    ACTION,
    Setting(
        "--spec-guard-rules",
        "guard_rules",
        "Which rules find an anomaly. windowed: over the request and a sliding window, and a loop "
        "must repeat itself. persistent: those, but broken for 512 tokens unless from the "
        "beginning; for servers without a retry proxy. published: as with GLM-5.1's deployment.",
        choices=("windowed", "persistent", "published"),
    ),
    Setting(
        "--spec-guard-secret-file",
        "guard_secret_file",
        "File with the secret shared with the retry proxy and the servers of a pair. Without it "
        "no word of the proxy counts, and no suspicion can be withdrawn.",
        metavar="FILE",
    ),
    Setting(
        "--spec-guard-after",
        "guard_after",
        "Generated tokens before a request is judged.",
        low=1,
        high=1_000_000,
        unit="whole number of tokens",
    ),
    Setting(
        "--spec-guard-min-length",
        "guard_min_length",
        "Accept length (tokens per verification) below which a request is anomalous. 1: never.",
        low=1.0,
        high=64.0,
        unit="number of tokens",
    ),
    Setting(
        "--spec-guard-max-rate",
        "guard_max_rate",
        "Accept rate (accepted share of the drafts that could be accepted) above which a request "
        "that also repeats itself is anomalous. 1: never.",
        low=0.0,
        high=1.0,
        unit="share of drafts",
    ),
    Setting(
        "--spec-guard-window",
        "guard_window",
        "Tokens of the sliding window that is judged beside the whole request. 0: none.",
        low=0,
        high=65536,
        unit="whole number of tokens",
    ),
    Setting(
        "--spec-guard-repetition",
        "guard_repetition",
        "Share of the last 256 tokens' 8-grams that must have stood there before for "
        "--spec-guard-max-rate to count. 0: judge by the rate alone.",
        low=0.0,
        high=1.0,
        unit="share of n-grams",
    ),
    Setting(
        "--spec-guard-overrides",
        "guard_overrides",
        "JSON file with other thresholds for models whose name (--served-model-name, or else "
        '--model-path) matches a pattern: {"*GLM-5*": {"min_length": 1.3}}. The last match wins; '
        "keys: after, min_length, max_rate, window, repetition, persistence.",
        metavar="FILE",
    ),
)
