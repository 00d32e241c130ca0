"""Define the marker ``slow``, which `make quick` omits, by the processor time of tests.

``slow.txt`` lists the slow tests: a function, or a file whose shared fixtures or libraries are slow.
``--slow-after SECONDS`` fails a session in which another test took more processor time, including that of the
processes that it waited for, and prints the lines to add.
"""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LIST = TESTS / "slow.txt"

PROPERTY = "processor seconds"


def names(nodeid):
    """Return the name of a test in the list: its file and function."""
    function = nodeid.removeprefix(f"{TESTS.name}/").partition("[")[0]
    return function, function.partition("::")[0]


def processor_seconds():
    return sum(os.times()[:4])


def pytest_addoption(parser):
    parser.addoption(
        "--slow-after",
        type=float,
        metavar="SECONDS",
        help="processor time in seconds that a test may take if it is not slow",
    )


def pytest_collection_modifyitems(items):
    slow = set(LIST.read_text().split())
    partly = {name.partition("::")[0] for name in slow}
    for item in items:
        if slow.intersection(names(item.nodeid)):
            item.add_marker(pytest.mark.slow)

    def order(item):
        _, file = names(item.nodeid)
        return 0 if file in slow else 1 if file in partly else 2

    # The processes of a session take one file after another: short files last keep all of them busy to its end.
    items.sort(key=order)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    start = processor_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append((PROPERTY, processor_seconds() - start))


class Limit:
    """Compare the processor time of all tests with the limit, in the process that reports."""

    def __init__(self, seconds):
        self.seconds, self.slower = seconds, {}

    def pytest_runtest_logreport(self, report):
        spent = dict(report.user_properties).get(PROPERTY, 0.0)
        if report.when == "call" and spent > self.seconds and "slow" not in report.keywords:
            self.slower[report.nodeid] = spent

    def pytest_sessionfinish(self, session):
        if self.slower and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.slower:
            terminalreporter.section(
                f"more than {self.seconds:g} s of processor time: add these to tests/{LIST.name}"
            )
            for nodeid, spent in sorted(self.slower.items(), key=lambda pair: -pair[1]):
                terminalreporter.write_line(f"{names(nodeid)[0]}  # {spent:.1f} s")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more processor time than `make quick` allows (tests/slow.txt)")
    if config.getoption("--slow-after") is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Limit(config.getoption("--slow-after")))
