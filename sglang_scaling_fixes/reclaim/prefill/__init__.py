"""The prefill side: `side` is the whole, `taps` stand between stock and what it writes with."""
