"""Real servers on this CPU. One cluster at a time; everything a test starts it also ends."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.lab import install
from sglang_scaling_fixes.lab import model as lab_model

OLD, NEW = "0.5.12", "0.5.23"


@pytest.fixture(scope="session")
def old() -> install.Environment:
    """The release without any ABORT message."""
    return install.install(OLD)


@pytest.fixture(scope="session")
def new() -> install.Environment:
    """The newest release, which is also the one of `.venv`."""
    return install.install(NEW)


@pytest.fixture(scope="session")
def checkpoint(new: install.Environment) -> lab_model.Model:
    return lab_model.llama(new)
