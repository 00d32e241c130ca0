"""Test that a log of ledgers is read while it grows, and that no damaged record is used."""

import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import natgrad
from natgrad.recording.ledger_writer import LedgerWriter
from natgrad.schema.errors import InputError
from natgrad.schema.ledger_log import LedgerHeader, RecordedTensor, packed
from natgrad.sources.ledger_log import LedgerLog
from natgrad.sources.steps import NotYet, Unreadable

HEADER = LedgerHeader(
    (RecordedTensor("w", (2, 3), "float32", "float32", 1), RecordedTensor("b", (), "bfloat16", "bfloat16", 0)), 2
)


def write(folder, steps, header=HEADER):
    """Write a file, and return its path and the records."""
    writer = LedgerWriter(folder, header)
    records = np.zeros(len(steps), header.record)
    random = np.random.default_rng(len(steps))
    for record, step in zip(records, steps, strict=True):
        factor = random.standard_normal((len(header.tensors), 4, 4))
        record["step"], record["span"], record["flags"] = step, 1, step % 2
        record["loss"], record["rates"], record["ratio"] = random.standard_normal(), [0.1, 0.2], step
        record["gram"] = packed(factor @ factor.swapaxes(1, 2))
        writer.append(record)
    writer.close()
    return writer.path, records


def steps_of(folder):
    return [(block.attempt, int(step)) for block in LedgerLog(folder).updates() for step in block.steps]


def test_all_values_are_read_back(tmp_path):
    path, records = write(tmp_path, range(5))
    log = LedgerLog(tmp_path)
    assert log.header == HEADER
    assert log.layout.names == ("w", "b")
    assert [tensor.shape for tensor in log.layout.tensors] == [(2, 3), ()]
    (block,) = log.updates()
    assert block.file == path
    assert block.steps.tolist() == [0, 1, 2, 3, 4]
    assert block.skipped.tolist() == [False, True, False, True, False]
    np.testing.assert_array_equal(block.loss, records["loss"])
    np.testing.assert_array_equal(block.rates, [[0.2, 0.1]] * 5)  # by tensor, whose groups are 1 and 0
    np.testing.assert_array_equal(block.ratio, records["ratio"])
    np.testing.assert_array_equal(packed(block.gram), records["gram"])
    np.testing.assert_array_equal(block.gram, block.gram.swapaxes(2, 3))


def test_a_file_of_many_blocks_is_read_in_bounded_parts(tmp_path):
    tensors = tuple(RecordedTensor(f"t{index}", (1,), "float32", "float32", 0) for index in range(3000))
    header = LedgerHeader(tensors, 1)
    writer = LedgerWriter(tmp_path, header)
    for step in range(40):
        record = np.zeros((), header.record)
        record["step"] = step
        writer.append(record)
    writer.close()
    blocks = [block.steps for block in LedgerLog(tmp_path).updates()]
    assert max(map(len, blocks)) * header.record.itemsize <= 1 << 22
    assert np.concatenate(blocks).tolist() == list(range(40))


def test_a_log_is_read_at_every_length_of_its_file(tmp_path):
    path, _ = write(tmp_path, range(3))
    data, size = path.read_bytes(), HEADER.record.itemsize
    start = len(data) - 3 * size
    for length in (*range(0, start), *range(start, len(data) + 1, 7), len(data)):
        path.write_bytes(data[:length])
        if length < start:
            with pytest.raises(NotYet, match="no update yet"):
                LedgerLog(tmp_path)
        else:
            assert steps_of(tmp_path) == [(0, step) for step in range((length - start) // size)]


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_record_is_an_error_unless_it_is_the_last(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("log")
    path, _ = write(folder, range(4))
    content, size = bytearray(path.read_bytes()), HEADER.record.itemsize
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    record = 4 - -(-(len(content) - position) // size)
    if record == 3:
        # It may be damaged, or not complete yet.
        assert steps_of(folder) == [(0, 0), (0, 1), (0, 2)]
        return
    with pytest.raises(Unreadable) as refusal:
        steps_of(folder)
    assert str(folder) in refusal.value.where
    if record > 0:
        assert f"it follows step {record - 1}" in refusal.value.what


def test_zeros_after_a_failure_of_the_computer_end_a_file(tmp_path):
    path, _ = write(tmp_path, range(3))
    path.write_bytes(path.read_bytes()[: -HEADER.record.itemsize] + bytes(5 * HEADER.record.itemsize + 3))
    assert steps_of(tmp_path) == [(0, 0), (0, 1)]


def test_files_continue_the_log_or_begin_an_attempt(tmp_path):
    for steps in (range(4), range(4, 6), range(5, 8), range(8, 9), range(2)):
        write(tmp_path, steps)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"ledger_{number}.log" for number in range(5)]
    expected = [(0, 6), (1, 9), (2, 2)]
    starts = {0: 0, 1: 5, 2: 0}
    assert steps_of(tmp_path) == [(one, step) for one, stop in expected for step in range(starts[one], stop)]


def test_steps_of_a_file_must_increase(tmp_path):
    write(tmp_path, [0, 1, 1])
    with pytest.raises(Unreadable, match="step 1 follows step 1"):
        steps_of(tmp_path)


def test_files_of_different_models_are_refused_by_name(tmp_path):
    write(tmp_path, range(2))
    path, _ = write(tmp_path, range(2, 3), LedgerHeader(HEADER.tensors[:1], 2))
    with pytest.raises(InputError, match="the tensors differ from those before: b") as refusal:
        steps_of(tmp_path)
    assert refusal.value.where == str(path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"vectors": ["hvp"]},
        {"groups": 1},
        {"tensors": 3},
        {"tensors": [{"name": "w"}]},
        {"other": 1},
    ],
)
def test_a_header_of_another_kind_is_refused(tmp_path, change):
    path, _ = write(tmp_path, range(2))
    data = HEADER.to_bytes()
    text = json.dumps(json.loads(data[28:]) | change).encode()
    path.write_bytes(
        data[:16] + np.array([len(text), 2**32 - 1 - len(text), zlib.crc32(text)], "<u4").tobytes() + text
    )
    with pytest.raises(Unreadable, match="cannot read a log of ledgers"):
        LedgerLog(tmp_path)


def test_commands_say_what_the_folder_is_and_name_a_damaged_record(tmp_path):
    path, _ = write(tmp_path, [*range(3)])
    write(tmp_path, [1])
    found = natgrad.inspect(tmp_path)
    assert found.error["what"] == (
        "a log of ledgers contains no states: it has 4 updates, from step 0 to 1 in 2 attempts, of 2 tensors "
        "with 7 elements"
    )
    with pytest.raises(InputError, match="a log of ledgers contains no states"):
        natgrad.process(tmp_path, tmp_path / "out")
    content = bytearray(path.read_bytes())
    content[-HEADER.record.itemsize - 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(Unreadable, match="record 1 has a wrong checksum; it follows step 0"):
        natgrad.process(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
