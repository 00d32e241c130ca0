"""Test that a log of ledgers is read while it grows, and that no damaged record is used."""

import json
import re
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
from natgrad.sources.opening import open_source
from natgrad.sources.steps import LoggedTensor, NotYet, Unreadable

HEADER = LedgerHeader(
    (RecordedTensor("w", (2, 3), "float32", "float32", 1), RecordedTensor("b", (), "bfloat16", "bfloat16", 0)), 2
)


def write(folder, steps, header=HEADER):
    """Write a file, and return its path and the records."""
    writer = LedgerWriter(folder, header)
    records = np.zeros(len(steps), header.record)
    random = np.random.default_rng([*steps])
    for record, step in zip(records, steps, strict=True):
        factor = random.standard_normal((len(header.tensors), 4, 4))
        record["step"], record["span"], record["flags"] = step, 1, step % 2
        record["loss"], record["rates"], record["ratio"] = (
            random.standard_normal(),
            [0.1, 0.2][: header.groups],
            step,
        )
        record["gram"] = packed(factor @ factor.swapaxes(1, 2))
        writer.append(record)
    writer.close()
    return writer.path, records


def read(folder):
    """Return the content and the products of each step, with the tensors in reverse order."""
    log, found = LedgerLog(folder), {}
    for step in log.steps():
        with log.open(step) as reader:
            found[step.number] = reader.content(), *reader.products(["b", "w"])
    return found


def losses_of(folder):
    """Return the losses of each file, read from its bytes."""
    start = len(HEADER.to_bytes())
    files = [folder / f"ledger_{number}.log" for number in range(len([*folder.iterdir()]))]
    return [{*np.frombuffer(path.read_bytes()[start:], HEADER.record)["loss"].tolist()} for path in files]


def steps_of(folder):
    """Return the steps with an update. All records are read."""
    return [step for step, (content, *_) in read(folder).items() if "skipped" in content.scalars]


def test_all_values_are_read_back(tmp_path):
    _, records = write(tmp_path, range(5))
    assert LedgerLog(tmp_path).header == HEADER
    found = read(tmp_path)
    assert [*found] == [*range(6)]
    last, *products = found.pop(5)
    assert not last.scalars
    assert {*last.arrays} == {"parameter"}
    assert all(np.isnan(values).all() for values in products)
    for (step, (content, gram, ratio)), record in zip(found.items(), records, strict=True):
        assert content.recorded
        assert content.arrays["parameter"]["w"] == LoggedTensor((2, 3), "float32")
        assert content.arrays["gradient"]["b"] == LoggedTensor((), "bfloat16")
        assert content.scalars == {"loss": record["loss"], "skipped": step % 2}
        assert content.optimizer.rates == {"w": 0.2, "b": 0.1}  # their groups are 1 and 0
        np.testing.assert_array_equal(ratio, record["ratio"][::-1])
        np.testing.assert_array_equal(packed(gram), record["gram"][::-1])
        np.testing.assert_array_equal(gram, gram.swapaxes(1, 2))


def test_the_rate_of_a_single_group_is_that_of_the_model(tmp_path):
    write(tmp_path, [0], LedgerHeader((RecordedTensor("w", (2,), "float32", "float32", 0),), 1, "batch"))
    log = LedgerLog(tmp_path)
    with log.open(log.steps()[0]) as reader:
        content = reader.content()
    assert content.optimizer is None
    assert content.scalars["learning_rate"] == 0.1
    assert content.evaluation == "batch"


def test_elements_cannot_be_read(tmp_path):
    write(tmp_path, [0])
    log = LedgerLog(tmp_path)
    with log.open(log.steps()[0]) as reader, pytest.raises(InputError, match="contains no states") as refusal:
        reader.read("gradient", "w", 0, np.empty(1, np.float32))
    assert "gradient of tensor 'w'" in refusal.value.where


def test_names_cannot_be_mapped(tmp_path):
    write(tmp_path, [0])
    with pytest.raises(InputError, match="no keys to map"):
        LedgerLog(tmp_path, {"loss": "train_loss"})


def test_updates_with_a_gap_between_them_end_in_states_without_an_update(tmp_path):
    write(tmp_path, [0, 1, 4])
    found = read(tmp_path)
    assert [*found] == [0, 1, 2, 4, 5]
    content, gram, _ = found[2]
    assert {*content.arrays} == {"parameter", "gradient"}  # only the last state of a run may lack its gradient
    assert not content.scalars
    assert np.isnan(gram).all()


def test_a_log_is_read_at_every_length_of_its_file(tmp_path):
    path, _ = write(tmp_path, range(3))
    data, size = path.read_bytes(), HEADER.record.itemsize
    start = len(data) - 3 * size
    for length in (*range(0, start), *range(start, len(data) + 1, 7), len(data)):
        path.write_bytes(data[:length])
        if length < start:
            with pytest.raises(NotYet, match="no update yet"):
                LedgerLog(tmp_path)
        elif length < start + size:
            with pytest.raises(NotYet, match="no update yet"):
                LedgerLog(tmp_path).steps()
        else:
            assert steps_of(tmp_path) == [*range((length - start) // size)]


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
        assert steps_of(folder) == [0, 1, 2]
        return
    with pytest.raises(Unreadable) as refusal:
        steps_of(folder)
    assert str(folder) in refusal.value.where
    if record >= 0:
        assert re.search("wrong checksum|follows step|takes", refusal.value.what)


def test_zeros_after_a_failure_of_the_computer_end_a_file(tmp_path):
    path, _ = write(tmp_path, range(3))
    path.write_bytes(path.read_bytes()[: -HEADER.record.itemsize] + bytes(5 * HEADER.record.itemsize + 3))
    assert steps_of(tmp_path) == [0, 1]


def test_files_continue_the_log_or_replace_its_end(tmp_path):
    for steps in (range(4), range(4, 6), range(5, 9), range(8, 9)):
        write(tmp_path, steps)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"ledger_{number}.log" for number in range(4)]
    found = read(tmp_path)
    assert steps_of(tmp_path) == [*range(9)]
    # Each file has other random values; its losses identify it.
    of_files = [
        {content.scalars.get("loss") for content, *_ in found.values()} & losses for losses in losses_of(tmp_path)
    ]
    assert [len(one) for one in of_files] == [4, 1, 3, 1]
    # Before the third file, step 5 had another update, and before the last one, step 8.
    assert [[step.number for step in log.steps()] for log in LedgerLog(tmp_path).earlier()] == [
        [*range(7)],
        [*range(10)],
    ]
    for log, losses in zip(LedgerLog(tmp_path).earlier(), losses_of(tmp_path)[1:3], strict=True):
        *_, last, _ = log.steps()
        with log.open(last) as reader:
            assert reader.content().scalars["loss"] in losses
            assert np.isfinite(reader.products(["w"])[0]).all()


def test_updates_that_are_repeated_bit_for_bit_replace_nothing(tmp_path):
    _, records = write(tmp_path, range(6))
    writer = LedgerWriter(tmp_path, HEADER)
    for record in records[2:4]:
        writer.append(record)
    assert steps_of(tmp_path) == [*range(6)]
    assert not LedgerLog(tmp_path).earlier()
    changed = records[4].copy()
    changed["loss"] += 1
    writer.append(changed)
    writer.close()
    assert steps_of(tmp_path) == [*range(5)]
    assert read(tmp_path)[4][0].scalars["loss"] == changed["loss"]


def test_a_log_in_an_object_store_is_read_like_a_local_one_while_it_grows(tmp_path, url):
    path, records = write(tmp_path, range(3))
    for count in (2, 3):
        (url / path.name).put(path.read_bytes()[: len(HEADER.to_bytes()) + count * HEADER.record.itemsize + 5])
        log = open_source(url)
        assert [step.number for step in log.steps()] == [*range(count + 1)]
        for step, record in zip(log.steps(), records[:count], strict=False):
            with log.open(step) as reader:
                np.testing.assert_array_equal(packed(reader.products(["w", "b"])[0]), record["gram"])
    with pytest.raises(InputError, match="contains no states"), log.open(log.steps()[0]) as reader:
        reader.read("parameter", "w", 0, np.empty(1, np.float32))


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


def test_a_damaged_record_is_named_and_nothing_is_stored(tmp_path):
    (tmp_path / "log").mkdir()
    path, _ = write(tmp_path / "log", [*range(3)])
    content = bytearray(path.read_bytes())
    content[-HEADER.record.itemsize - 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(Unreadable, match="the record of step 1 has a wrong checksum") as refusal:
        natgrad.process(tmp_path / "log", tmp_path / "out")
    assert refusal.value.where == str(path)
    assert not (tmp_path / "out").exists()
