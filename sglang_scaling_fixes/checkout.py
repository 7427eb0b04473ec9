"""Where this package lies: in a checkout of the repository, or among installed packages."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds the package: of a checkout, the repository's own."""


def present() -> bool:
    """Whether the package lies in a checkout, with what is not installed (patches, tests)."""
    return (ROOT / "pyproject.toml").is_file()
