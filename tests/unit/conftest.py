"""Options of the unit tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-races",
        action="store_true",
        help="write the outputs in tests/races anew (then read the diff)",
    )
