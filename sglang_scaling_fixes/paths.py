"""Where this copy of the package lies on the disk."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
"""The folder to put on PYTHONPATH to import this copy: a checkout, or `site-packages`."""


def in_checkout() -> bool:
    """Whether this copy lies in a checkout, with what is not installed (patches, tests)."""
    return (ROOT / "pyproject.toml").is_file()
