"""Options of the unit tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-races",
        action="store_true",
        help="write the outputs in tests/races anew (then read the diff)",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much was explored, whoever of the workers did it."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    explored = [
        text
        for report in reports
        if report.when == "call"
        for name, text in report.user_properties
        if name == "explored"
    ]
    if explored:
        terminalreporter.section("explored")
    for text in sorted(explored):
        terminalreporter.line(text)
