"""Files of offline runs written by wandb itself, read without wandb."""

import json
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_protocol_buffer import field
from test_scalar_log import read_all, run_without_scalars, settled, stored

from natgrad.schema.errors import InputError
from natgrad.sources.configured import configuration_of
from natgrad.sources.opening import format_of, open_log
from natgrad.sources.scalars.columns import each_record
from natgrad.sources.scalars.protocol_buffer import BYTES, FIXED64, VARINT
from natgrad.sources.scalars.wandb_file import WANDB_START, read_wandb, wandb_files
from natgrad.storage import LocalStorage
from opened import ingest

STEPS = 6
WRITE = """
import json, sys
import wandb

settings = wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True)
config = {"optimizer": {"lr": 1e-3}, "seed": 3}
run = wandb.init(mode="offline", project="any", dir=sys.argv[1], settings=settings, config=config)
run.config.update({"late": True})
print(run.settings.sync_file, flush=True)
for line in sys.stdin:
    run.log(json.loads(line))
run.finish()
"""
VALUES = [(step, np.pi / (step + 1), None if step == 3 else 0.1 * 0.9**step) for step in range(STEPS)]


def row(step, loss, rate):
    """Yield scalars under nested keys and other values, one of which has the length of several blocks."""
    values = {"train": {"loss": loss, "global_step": step}, "note": "x" * (40_000 if step == 2 else 3_000)}
    return {**values, "accuracy": 1, "picture": {"_type": "image", "size": [1, 2]}} | ({"lr": rate} if rate else {})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A run logged with wandb."""
    command = [sys.executable, "-W", "ignore", "-c", WRITE, str(tmp_path_factory.mktemp("wandb"))]
    rows = "".join(json.dumps(row(*values)) + "\n" for values in VALUES)
    done = subprocess.run(command, input=rows, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[0])


@pytest.fixture
def copy(file, tmp_path):
    """A file that tests may modify."""
    copied = tmp_path / "run-copy.wandb"
    copied.write_bytes(file.read_bytes())
    return copied


def fragments_of(body):
    """Return the end, type and data of each fragment, from the layout of the file; padding has type 0."""
    found, position = [], len(WANDB_START)
    while position < len(body):
        room = (1 << 15) - position % (1 << 15)
        size, kind = (
            (room, 0) if room < 7 else (7 + int.from_bytes(body[position + 4 : position + 6], "little"), None)
        )
        kind = body[position + 6] if kind is None else kind
        found.append((position + size, kind, body[position + 7 : position + size]))
        position += size
    return found


def ends_of_fragments(body):
    return [end for end, _, _ in fragments_of(body)]


def test_every_number_is_preserved(file, tmp_path):
    assert len(file.read_bytes()) > 2 << 15
    settled(file.parent)
    for name, source in {"file": file, "folder": file.parent}.items():
        assert format_of(LocalStorage(source)) == "wandb"
        ingest([run_without_scalars(tmp_path / name / "log"), source], tmp_path / name / "trajectory.zarr")
        assert stored(tmp_path / name / "trajectory.zarr") == VALUES


def test_nested_keys_are_joined_and_the_wandb_step_is_present(file):
    records, notes = read_all(read_wandb, file)
    assert notes == []
    assert [record["_step"] for record in records] == list(range(STEPS))
    assert [record["train/global_step"] for record in records] == list(range(STEPS))
    assert records[0]["picture/size"] == [1, 2]
    assert records[3].get("lr") is None


def test_the_configuration_of_a_run_is_read(file):
    source = open_log(LocalStorage(file), mapping={"step": "train/global_step"})
    notes = []
    found = configuration_of(source, source.steps()[-1], notes)
    assert (found, notes) == ({"optimizer.lr": 1e-3, "seed": 3, "late": True}, [])


def test_a_growing_file_is_read_up_to_its_last_complete_record(copy, tmp_path):
    log, body = run_without_scalars(tmp_path / "log"), copy.read_bytes()
    for end in ends_of_fragments(body):
        copy.write_bytes(body[:end])
        if len(read_all(read_wandb, copy)[0]) == 3:
            break
    first = ingest([log, copy], tmp_path / "trajectory.zarr")
    assert (first.new_steps, first.last_step_lacks) == (4, ["loss", "learning_rate"])
    copy.write_bytes(body[:-40])
    then = ingest([log, copy], tmp_path / "trajectory.zarr")
    assert (then.new_steps, then.completed_steps) == (2, 1)
    assert stored(tmp_path / "trajectory.zarr") == VALUES


def test_a_truncated_file_yields_the_complete_records(copy):
    body = copy.read_bytes()
    whole, _ = read_all(read_wandb, copy)
    ends = ends_of_fragments(body)
    ends_of_records = {len(WANDB_START), *(end for end, kind, _ in fragments_of(body) if kind in (1, 4))}
    assert not ends_of_records.issuperset(ends)
    near = {end + by for end in ends for by in (-8, -1, 0, 1, 6, 7, 8)}
    for length in sorted({*near, *random.Random(0).sample(range(8, len(body)), 50)}):
        if not len(WANDB_START) <= length < len(body):
            continue
        copy.write_bytes(body[:length])
        found, notes = read_all(read_wandb, copy)
        assert found == whole[: len(found)]
        assert len(notes) <= 1
        assert length in ends_of_records or "is truncated and omitted" in notes[0]


@pytest.mark.parametrize("room", range(8))
def test_padding_at_the_end_of_a_block_is_skipped(file, tmp_path, room):
    """Write the real records after one that leaves this many bytes in the first block, a rare case."""
    whole, _ = read_all(read_wandb, file)
    records, parts = [], []
    for _, kind, data in fragments_of(file.read_bytes()):
        parts.append(data)
        if kind in (1, 4):
            records.append(b"".join(parts))
            parts = []
    # Field 200 of a record has no meaning here; it fills the given number of bytes.
    filler = (1 << 15) - len(WANDB_START) - 7 - room
    filling = b"\xc2\x0c" + bytes([(filler - 5) & 0x7F | 0x80, (filler - 5) >> 7 & 0x7F | 0x80, (filler - 5) >> 14])
    body = bytearray(WANDB_START)
    for record in [filling + bytes(filler - 5), *records]:
        begun = False
        while True:
            left = (1 << 15) - len(body) % (1 << 15)
            body += bytes(left) if left < 7 else b""
            left = (1 << 15) - len(body) % (1 << 15)
            data, record = record[: left - 7], record[left - 7 :]
            kind = (3 if record else 4) if begun else (2 if record else 1)
            body += struct.pack("<IHB", zlib.crc32(bytes([kind]) + data), len(data), kind) + data
            begun = True
            if not record:
                break
    (tmp_path / "laid.wandb").write_bytes(body)
    assert read_all(read_wandb, tmp_path / "laid.wandb") == (whole, [])
    if 0 < room < 7:
        body[(1 << 15) - 1] = 1
        (tmp_path / "laid.wandb").write_bytes(body)
        with pytest.raises(ValueError, match="where no fragment fits"):
            read_all(read_wandb, tmp_path / "laid.wandb")


def test_a_changed_byte_is_detected(copy, tmp_path):
    body = copy.read_bytes()
    ends = ends_of_fragments(body)
    heads = {end + by for end in (len(WANDB_START), *ends[:-1]) for by in range(9)}
    positions = sorted({*heads, *random.Random(0).sample(range(8, len(body)), 100)})
    messages = "checksum|crosses the end|not valid there|no fragment fits|instead of a fragment"
    for position in (p for p in positions if p < len(body)):
        damaged = bytearray(body)
        damaged[position] ^= 4
        copy.write_bytes(damaged)
        try:
            _, notes = read_all(read_wandb, copy)
        except ValueError as error:
            assert any(word in str(error) for word in messages.split("|"))  # noqa: PT017
        else:
            # A length that exceeds the end of the file may be that of a record that is being written.
            assert notes
            assert position > len(body) - (1 << 15)
    damaged = bytearray(body)
    damaged[100] ^= 4
    copy.write_bytes(damaged)
    with pytest.raises(InputError, match="checksum mismatch in the fragment at byte") as refusal:
        ingest([run_without_scalars(tmp_path / "log"), copy], tmp_path / "trajectory.zarr")
    assert refusal.value.where == str(copy)


def test_trailing_zeros_are_allocated_space_but_not_before_a_fragment(copy):
    body = copy.read_bytes()
    copy.write_bytes(body + bytes(1 << 16))
    found, (note,) = read_all(read_wandb, copy)
    assert len(found) == STEPS
    assert "still being written" in note
    copy.write_bytes(body + bytes(1 << 16) + b"x")
    with pytest.raises(ValueError, match="zeros at byte"):
        read_all(read_wandb, copy)
    copy.write_bytes(b":W&B\xe1\xbe\x01" + body[7:])
    with pytest.raises(ValueError, match="supported version"):
        read_all(read_wandb, copy)


@given(data=st.binary(max_size=200))
def test_bytes_that_are_not_a_history_are_read_or_refused(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.wandb"
    path.write_bytes(WANDB_START + data)
    try:
        read_all(read_wandb, path)
    except ValueError as error:
        assert str(error)  # noqa: PT017


def test_a_folder_of_runs_is_read_if_it_has_one_run_and_otherwise_one_is_selected(file, tmp_path):
    folder = tmp_path / "wandb"
    for number, name in enumerate(("run-20260101_120000-abc", "offline-run-20260101_130000-abc")):
        (folder / name).mkdir(parents=True)
        (folder / name / "run-abc.wandb").write_bytes(file.read_bytes())
        assert number or format_of(LocalStorage(folder)) == "wandb"
    (folder / "latest-run").symlink_to("offline-run-20260101_130000-abc")
    settled(folder)
    assert [file.parent.name for file in wandb_files(LocalStorage(folder))] == [
        "run-20260101_120000-abc", "offline-run-20260101_130000-abc"
    ]  # fmt: skip
    log = run_without_scalars(tmp_path / "log")
    ingest([log, folder], tmp_path / "trajectory.zarr")
    assert stored(tmp_path / "trajectory.zarr") == VALUES
    other = folder / "run-20260101_140000-xyz"
    other.mkdir()
    (other / "run-xyz.wandb").write_bytes(file.read_bytes())
    settled(folder)
    with pytest.raises(InputError, match="contains the runs abc, xyz"):
        ingest([log, folder], tmp_path / "other.zarr")
    ingest([log, folder], tmp_path / "other.zarr", mapping={"run": "xyz"})
    assert stored(tmp_path / "other.zarr") == VALUES


def logged(key, value):
    """Return an item with a key and the bytes of its value, or two keys."""
    return field(1, BYTES, b"".join(field(2, BYTES, part.encode()) for part in key.split("/")) + value)


logged_values = st.one_of(
    st.floats().map(lambda value: field(16, BYTES, json.dumps(value).encode())),
    st.integers(-(2**53), 2**53).map(lambda value: field(8, BYTES, json.dumps(value).encode())),
    st.sampled_from([b'"x"', b"null", b"[1, 2]", b"true", b"-0", b'{"a": 1}']).map(
        lambda text: field(16, BYTES, text)
    ),
    st.floats().map(lambda value: field(6, FIXED64, struct.pack("<d", value))),
    st.integers(0, 99).map(lambda value: field(5, VARINT, value)),
    st.just(b""),
)
items = st.dictionaries(st.sampled_from(["_step", "loss", "train/lr", "other"]), logged_values).map(
    lambda values: b"".join(logged(*pair) for pair in values.items())
)
steps = st.one_of(st.just(b""), st.integers(0, 9).map(lambda step: field(2, BYTES, field(1, VARINT, step))))


@given(st.lists(st.one_of(st.builds(lambda item, step: field(2, BYTES, item + step), items, steps)), max_size=8))
def test_histories_are_decoded_together_as_one_by_one(tmp_path_factory, records):
    path, found = tmp_path_factory.mktemp("log") / "run-1.wandb", []
    # A step without its value, because of which records are decoded one by one.
    incomplete = field(2, BYTES, logged("_step", b""))
    for some in (records, [*records, incomplete]):
        fragments = (struct.pack("<IHB", zlib.crc32(data, zlib.crc32(b"\1")), len(data), 1) + data for data in some)
        path.write_bytes(WANDB_START + b"".join(fragments))
        decoded = each_record(read_wandb(LocalStorage(path), lambda key: key != "other", []))
        found.append([{k: float(v) if type(v) is int else v for k, v in each.items()} for each in decoded])
    found = [[{k: v for k, v in each.items() if v is not None} for each in some[: len(records)]] for some in found]
    np.testing.assert_equal(*found)
