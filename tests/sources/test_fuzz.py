"""A fixed number of damaged logs of every format. ``make fuzz`` runs more; tests/fuzz.py states what is checked."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz

CASES = 10


@pytest.mark.timeout(900)  # a minute on two free cores
def test_damaged_logs_of_every_format_are_read_or_refused():
    command = [sys.executable, Path(__file__).parents[1] / "fuzz.py", "--cases", str(CASES), "--jobs", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"(\d+) cases: (\d+) read, (\d+) refused", done.stdout)
    assert len(counts) == len(fuzz.PARSERS)
    assert all(int(cases) >= CASES / 2 for cases, _, _ in counts)
