"""The settings of LayerSplit."""

from __future__ import annotations

from sglang_scaling_fixes.config import Setting

SCRATCH_TOKENS = Setting(
    "--layer-split-scratch-tokens",
    "layer_split_scratch",
    "Tokens of each of the two scratches: the prefixes of a batch, its chunk, and padding. At "
    "least one context and one chunk; 0: two contexts. More takes KV from the pool and lets more "
    "requests with long prefixes into one batch (`sglang-scaling-fixes layersplit plan`).",
    low=0,
    high=1e9,
    unit="number of tokens",
    metavar="TOKENS",
)
SETTINGS = (SCRATCH_TOKENS,)
