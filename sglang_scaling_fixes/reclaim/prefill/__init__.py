"""The prefill side: `side` is the whole; `interposers` stand between stock and its transfers."""
