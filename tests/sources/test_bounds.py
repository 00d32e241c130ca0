"""Readers finish within bounds of time and memory that follow from the size of the files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hostile

LIMITED = Path(__file__).parents[1] / "limited.py"
SECONDS, SECONDS_PER_BYTE = 2, 20e-9
BYTES, BYTES_PER_BYTE = 512 << 20, 32


@pytest.fixture(scope="module")
def limited():
    """Return a function that opens a log in a child process with limits."""
    with subprocess.Popen(
        [sys.executable, LIMITED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def answer(path):
            paths = path if isinstance(path, list) else [path]
            size = sum(file.stat().st_size for each in paths for file in (each, *each.rglob("*")) if file.is_file())
            job = {
                "path": [str(each) for each in paths],
                "seconds": SECONDS + SECONDS_PER_BYTE * size,
                "bytes": BYTES + BYTES_PER_BYTE * size,
            }
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline()) | {"size": size}

        yield answer
        server.stdin.close()


@pytest.mark.parametrize("name", hostile.LOGS)
def test_a_hostile_log_is_refused_within_the_bounds(tmp_path, limited, name):
    found = limited(hostile.LOGS[name](tmp_path / "log"))
    if name in hostile.HARMLESS:
        (step,) = found["steps"]
        assert not step["tensors"]
        assert hostile.HARMLESS[name] in " ".join(step["notes"])
    else:
        assert found["outcome"] == "refused", found
        assert str(tmp_path) in found["message"]
