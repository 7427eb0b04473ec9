"""Fixes that keep a stock SGLang's KV cache intact under production load."""

__version__ = "0.1.0"
