"""The count of usable processors, with and without the calls that only some platforms have."""

import os
import subprocess
import sys

import pytest

from natgrad.app.run import Analysis
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


def test_newer_versions_of_python_count_themselves(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 5, raising=False)
    assert usable_processors() == 5


def test_an_analysis_needs_no_call_that_macos_lacks(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    with Analysis().executor() as execute:
        assert execute is not None
