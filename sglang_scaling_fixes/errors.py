"""The errors a user can meet. Each message is one line: what, which value, what to do."""

from __future__ import annotations


class ScalingFixesError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(ScalingFixesError):
    """A flag or environment variable has a value that cannot be used."""


class AttachError(ScalingFixesError):
    """A place in stock SGLang that a fix needs is missing or behaves differently."""
