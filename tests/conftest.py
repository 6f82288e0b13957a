"""One thread in every test: the same sums in a process and in its forks, and no crowd on two cores. No test leaves a
group of processes behind, which forks of later tests would find. And the table of layouts, at the end of a run that
tried any."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_group_is_left() -> Iterator[None]:
    yield
    assert not dist.is_initialized()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-layouts", action="store_true", help="every layout of test_layouts.py, not a cover of pairs")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    rows = [value for report in calls for name, value in report.user_properties if name == "layout"]
    if rows:
        terminalreporter.section("largest relative error of losses and norms, and of parameters, to one process")
        for row in sorted(rows):
            terminalreporter.line(row)
