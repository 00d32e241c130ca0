"""Test the notice about the cost of copying a large log."""

import json
import re
import struct

import pytest

from commands import natgrad
from natgrad.app.copying import copy_notice
from natgrad.storage import open_storage


def sparse_log(folder, states, elements):
    """Write states of one float32 tensor, whose zeros take no space on the disk."""
    folder.mkdir(parents=True)
    tensor = {"dtype": "F32", "shape": [elements]}
    header = {
        f"{array}/w": tensor | {"data_offsets": [index * 4 * elements, (index + 1) * 4 * elements]}
        for index, array in enumerate(("parameter", "gradient"))
    }
    text = json.dumps(header).encode()
    for state in range(states):
        with (folder / f"step_{state}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(file.tell() + 8 * elements)
    return folder


@pytest.mark.parametrize(("elements", "is_large"), [(63_000_000, True), (62_000_000, False)])
def test_a_log_of_more_than_a_gigabyte_is_announced_with_bytes_seconds_and_the_option(tmp_path, elements, is_large):
    log = sparse_log(tmp_path / "log", 2, elements)
    # The memory limit is refused after the notice, so nothing is copied.
    done = natgrad("process", log, tmp_path / "out", "--memory-limit", "321MiB")
    assert done.returncode == 2
    assert "memory" in done.stderr
    notice = re.search(
        r"1\.0 GB of states are copied into \S+/out/trajectory.zarr, which takes about (\d+) s at ([\d.e+-]+) GB/s "
        r"\(measured with a small copy\); --in-place reads them",
        done.stderr,
    )
    assert (notice is not None) == is_large
    if is_large:
        # The seconds follow from the rate. They are rounded to whole ones, and the rate to two digits (5 %).
        seconds = 1.008 / float(notice[2])
        assert abs(float(notice[1]) - seconds) <= 0.5 + 0.06 * seconds
    assert not (tmp_path / "out" / "trajectory.zarr").exists()


def test_the_probe_leaves_nothing_and_needs_no_folder(tmp_path):
    log = sparse_log(tmp_path / "log", 1, 100)
    out = tmp_path / "new" / "out" / "trajectory.zarr"
    notice = copy_notice([open_storage(log)], open_storage(out), 5 * 10**9)
    assert "5.0 GB of states" in notice
    assert " s at " in notice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_without_a_file_or_permission_the_notice_has_no_seconds(tmp_path):
    (tmp_path / "log").mkdir()
    notice = copy_notice([open_storage(tmp_path / "log")], open_storage(tmp_path / "out"), 5 * 10**9)
    assert " s at " not in notice
    assert "--in-place" in notice
