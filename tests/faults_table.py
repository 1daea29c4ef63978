"""The figures of the fault tests, printed as one table when the tests are over.

A test that injects faults by the dozen hands in its figures with the fixture ``figures``::

    def test_a_killed_run_ends_as_the_unbroken_one(figures: Figures) -> None:
        ...
        figures("kill -9 at a random instant", count, lost)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

Figures: TypeAlias = Callable[[str, int, int], None]


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Figures:
    """Takes the name of a fault, how often it was injected, and how often something was lost by it."""

    def take(name: str, count: int, lost: int) -> None:
        record_property("figures", [name, count, lost])
        assert not lost, f"{name}: {lost} of {count} lost"

    return take


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, where the full number of faults was asked for."""
    if config.option.markexpr != "faults":
        return
    reports = [report for found in terminalreporter.stats.values() for report in found]
    rows = [
        value
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, value in report.user_properties
        if name == "figures" and isinstance(value, list)
    ]
    width = max((len(str(row[0])) for row in rows), default=0)
    terminalreporter.section("what was lost")
    terminalreporter.write_line(f"{'fault':{width}}  {'injected':>8}  {'lost':>5}")
    for name, count, lost in sorted(rows):
        terminalreporter.write_line(f"{name:{width}}  {count:8}  {lost:5}")
