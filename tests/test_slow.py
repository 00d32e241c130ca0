"""Test the list of slow tests, and the limit for all others."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from slow import LIST, TESTS, pytest_collection_modifyitems

LINES = LIST.read_text().splitlines()


def test_the_list_is_sorted_and_every_line_names_a_test():
    assert sorted(set(LINES)) == LINES
    for line in LINES:
        file, _, function = line.partition("::")
        assert re.search(rf"^def {function}\b" if function else "", (TESTS / file).read_text(), re.MULTILINE), line


def test_files_without_slow_tests_are_last():
    some, complete = (next(line for line in LINES if ("::" in line) == part) for part in (True, False))
    files = ["test_example.py", some.partition("::")[0], complete]
    items = [
        SimpleNamespace(nodeid=f"tests/{file}::test_{number}", add_marker=lambda marker: None)
        for file in files
        for number in range(2)
    ]
    pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [
        f"tests/{file}::test_{number}" for file in reversed(files) for number in range(2)
    ]


EXAMPLES = """
import subprocess, sys, time

def busy(seconds):
    stop = time.process_time() + seconds
    while time.process_time() < stop:
        pass

def test_waits():
    time.sleep(0.3)

def test_works():
    busy(0.3)

def test_waits_for_a_process_that_works():
    code = "import time\\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
"""


@pytest.mark.parametrize(("workers", "limit", "exit_status"), [(0, "0.15", 1), (1, "0.15", 1), (0, "60", 0)])
def test_a_test_beyond_the_limit_fails_the_session_and_is_printed_as_a_line_of_the_list(
    tmp_path, workers, limit, exit_status
):
    (tmp_path / "test_examples.py").write_text(EXAMPLES)
    command = [sys.executable, "-m", "pytest", "-p", "slow", "--numprocesses", str(workers), "--rootdir", tmp_path]
    done = subprocess.run(
        [*command, "--slow-after", limit, tmp_path], cwd=TESTS, capture_output=True, text=True, check=False
    )
    assert done.returncode == exit_status, done.stdout + done.stderr
    printed = re.findall(r"^test_examples.py::(\w+)  # 0.\d s$", done.stdout, re.MULTILINE)
    assert sorted(printed) == (["test_waits_for_a_process_that_works", "test_works"] if exit_status else [])
