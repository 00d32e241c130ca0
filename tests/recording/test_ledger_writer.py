"""Test the files that the writer leaves on the disk."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from natgrad.recording.ledger_writer import LedgerWriter, require_folder, require_no_ledgers
from natgrad.schema.errors import InputError
from natgrad.schema.ledger_log import LedgerHeader, RecordedTensor
from watched import updates_of

HEADER = LedgerHeader((RecordedTensor("w", (2,), "float32", "float32", 0),), 1)


def record(step):
    one = np.zeros((), HEADER.record)
    one["step"], one["span"] = step, 1
    return one


def steps(folder):
    return [update["step"] for update in updates_of(folder)]


def test_each_record_can_be_read_as_soon_as_it_is_appended(tmp_path):
    writer = LedgerWriter(tmp_path, HEADER)
    for step in range(5):
        writer.append(record(step))
        assert steps(tmp_path) == [*range(step + 1)]
    # 88 bytes for the tensor, 8 for its rate, and 28 for the update.
    assert writer.path.stat().st_size == len(HEADER.to_bytes()) + 5 * (88 + 8 + 28)
    writer.close()


def test_two_writers_use_different_files(tmp_path):
    first, second = LedgerWriter(tmp_path, HEADER), LedgerWriter(tmp_path, HEADER)
    assert (first.path.name, second.path.name) == ("ledger_0.log", "ledger_1.log")
    (tmp_path / "ledger_7.log").touch()
    third = LedgerWriter(tmp_path, HEADER)
    assert third.path.name == "ledger_8.log"
    for writer in (first, second, third):
        writer.close()


def test_a_full_disk_leaves_the_complete_records(tmp_path):
    writer, size = LedgerWriter(tmp_path, HEADER), HEADER.record.itemsize
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(HEADER.to_bytes()) + 2 * size + 7, limits[1]))
    try:
        writer.append(record(0))
        writer.append(record(1))
        with pytest.raises(OSError, match="File too large"):
            writer.append(record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()
    assert steps(tmp_path) == [0, 1]


def test_a_folder_contains_states_or_ledgers_of_one_run(tmp_path):
    require_folder(tmp_path / "new" / "folder", resume=False)
    assert (tmp_path / "new" / "folder").is_dir()
    LedgerWriter(tmp_path / "new", HEADER).close()
    require_folder(tmp_path / "new", resume=True)
    with pytest.raises(InputError, match="already contains ledgers"):
        require_folder(tmp_path / "new", resume=False)
    with pytest.raises(InputError, match="already contains ledgers"):
        require_no_ledgers(tmp_path / "new")
    (tmp_path / "step_3.safetensors").touch()
    require_no_ledgers(tmp_path)
    with pytest.raises(InputError, match="already contains states"):
        require_folder(tmp_path, resume=True)
    with pytest.raises(InputError, match="cannot be created"):
        require_folder(tmp_path / "step_3.safetensors" / "below", resume=False)


def test_a_file_that_cannot_be_flushed_is_an_error(tmp_path):
    writer = LedgerWriter(tmp_path, HEADER)
    descriptor = next(
        int(entry.name) for entry in Path("/proc/self/fd").iterdir() if os.path.realpath(entry) == str(writer.path)
    )
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        writer.append(record(0))
    with pytest.raises(OSError, match="Bad file descriptor"):
        writer.close()
