"""Shared by all tests: folders as markers, property tests that do not flake, the releases."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from sglang_scaling_fixes.lab import install
from sglang_scaling_fixes.lab.servers import checkpoints

from .releases import NEW, OLD

# Same examples every run in CI; no deadline anywhere, since shared machines pause.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

_TESTS = Path(__file__).parent
_MARKED = {"contract", "e2e", "gpu"}


@pytest.fixture(scope="session")
def old() -> install.Environment:
    """The release without any ABORT message."""
    return install.install(OLD)


@pytest.fixture(scope="session")
def new() -> install.Environment:
    """The newest release, which is also the one of `.venv`."""
    return install.install(NEW)


@pytest.fixture(scope="session")
def checkpoint(new: install.Environment) -> checkpoints.Model:
    return checkpoints.llama(new)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder in _MARKED:
            item.add_marker(folder)
