"""Where this copy of the package lies on the disk."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
"""The folder to put on PYTHONPATH to import this copy: a checkout, or `site-packages`."""
