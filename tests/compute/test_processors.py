"""Test the count of usable processors, with and without the calls that only some platforms have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from natgrad.compute.processors import usable_processors


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this platform")
def test_the_affinity_of_the_process_counts():
    code = """
import os
from natgrad.compute.processors import usable_processors
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
print(usable_processors())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"1\n"


def test_without_an_affinity_all_processors_count(monkeypatch):
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usable_processors() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_processors() == 1


def test_newer_versions_of_python_provide_the_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 5, raising=False)
    assert usable_processors() == 5


COMMAND = """
import os, sys
for name in ("sched_getaffinity", "sched_setaffinity", "process_cpu_count"):
    if hasattr(os, name):
        delattr(os, name)
sys.argv = ["natgrad", "process", *sys.argv[1:]]
from natgrad_flows.cli import main
main()
"""


def test_the_command_line_needs_no_affinity(tmp_path):
    log = Path(__file__).parents[2] / "data" / "linear_system"
    subprocess.run([sys.executable, "-c", COMMAND, log, tmp_path / "out"], check=True, capture_output=True)
    assert (tmp_path / "out" / "report.html").exists()
