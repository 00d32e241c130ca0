"""The types of the public names hold, under mypy's strict rules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_users_see_the_types_of_the_public_names():
    path = os.pathsep.join(str(ROOT / folder) for folder in ("pipeline", "flows"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", ROOT / "tests" / "typing" / "public_api.py"],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
