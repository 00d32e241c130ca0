"""Each changed bit of a store is found, with its array, step and tensors, unless no reader uses it."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec

from logs import append_states, walk_arrays, write_trajectory
from natgrad.app import cli
from natgrad.app.verification import verify_run
from natgrad.schema.errors import InputError
from natgrad.schema.layout import LAYOUT_VERSION, Layout, LedgerChunk
from natgrad.schema.names import VECTORS
from natgrad.storage import LocalStorage
from natgrad.store import Trajectory, open_trajectory
from natgrad.store.journal import Journal
from opened import compute_ledger, prepare_ledger, verify_ledger, verify_trajectory

SHAPES = {"a": (3, 3), "b": (), "c": (3,)}  # 13 elements
MIXED = {"parameter": "float32", "gradient": "bfloat16", "hvp": "float64"}
CHUNK, ROWS = (4, 5), 6  # the last chunks have two states, and those of the last column three elements
ITEMSIZE = {"parameter": 4, "gradient": 2, "hvp": 8}


def make_run(out, compressors=None):
    """Stores of a run in two commits, with a ledger of several ledger chunks."""
    arrays = walk_arrays(ROWS, 13, MIXED)
    path = out / "trajectory.zarr"
    write_trajectory(path, {name: array[:3] for name, array in arrays.items()}, SHAPES, CHUNK, compressors)
    append_states(path, {name: array[3:] for name, array in arrays.items()})
    compute_ledger(path, out / "ledger.zarr")
    return out


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


def is_read_by_nobody(path, before, after):
    """Return True if a change of a file does not change any data that a reader receives."""
    parts = path.parts[path.parts.index(next(part for part in path.parts if part.endswith(".zarr"))) :]
    if path.suffix == ".json":
        if parts[1] == "commits" and path.name != "zarr.json":
            return False
        try:
            then, now = json.loads(before), json.loads(after)
        except ValueError:
            return False
        # A shape may lag behind by one commit; readers do not use it.
        return now == then or (
            parts[0] == "trajectory.zarr" and now == {**then, "shape": [3, *then.get("shape", [])[1:]]}
        )
    (where,) = [offset for offset, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    name, index = parts[1], [int(part) for part in parts[3:]]
    if parts[0] == "trajectory.zarr" and name in ITEMSIZE:
        row, element = divmod(where // ITEMSIZE[name], CHUNK[1])
        return index[0] * CHUNK[0] + row >= ROWS or index[1] * CHUNK[1] + element >= 13
    if name in ("tensor", "vector", "with_vector"):
        return False
    rows = ROWS if parts[0] == "trajectory.zarr" else ROWS - 1
    width = {"gram": 3 * 36, "residual_ratio": 3}.get(name, 1)
    return where // (8 * width) >= rows


@given(data=st.data())
def test_each_flipped_bit_is_found_or_unused(out, data):
    # Each verification without damage writes its own record again.
    path = data.draw(st.sampled_from([path for path in files(out) if path.name != "verified.json"]), "file")
    before = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(before) - 1), "bit")
    after = bytearray(before)
    after[bit // 8] ^= 1 << bit % 8
    path.write_bytes(after)
    try:
        damages = verify_run(out)
    finally:
        path.write_bytes(before)
    assert bool(damages) != is_read_by_nobody(path, before, bytes(after))
    for damage in damages:
        assert path.is_relative_to(Path(damage.path)) or damage.array in path.parts


class Overtaken(LocalStorage):
    """A trajectory to which a writer commits states after a reader has opened it."""

    arrays = None

    def list(self):
        names = super().list()
        if self.name == "commits" and (arrays := type(self).arrays) is not None:
            type(self).arrays = None
            for row in range(3, ROWS):
                append_states(
                    self.local_path.parent, {name: array[row : row + 1] for name, array in arrays.items()}
                )
        return names


def test_concurrent_commits_are_not_damage(tmp_path):
    arrays = walk_arrays(ROWS, 13, MIXED)
    path = tmp_path / "trajectory.zarr"
    write_trajectory(path, {name: array[:3] for name, array in arrays.items()}, SHAPES, CHUNK)
    Overtaken.arrays = arrays
    assert list(verify_trajectory(Overtaken(path))) == []
    assert open_trajectory(path).n_states == ROWS


def test_a_damaged_state_is_named_by_array_step_and_tensors(out, tmp_path):
    run = shutil.copytree(out, tmp_path / "run")
    for name, index, row, element in (("gradient", "0/1", 2, 3), ("hvp", "1/2", 1, 0), ("hvp", "1/2", 0, 1)):
        path = run / "trajectory.zarr" / name / "c" / index
        content = bytearray(path.read_bytes())
        content[(row * CHUNK[1] + element) * ITEMSIZE[name]] ^= 4
        path.write_bytes(content)
    found = [(damage.array, damage.steps, damage.tensors) for damage in verify_run(run)]
    assert found == [
        ("gradient", (2, 2), ("a", "b")),
        ("hvp", (4, 4), ("c", "c")),
        ("hvp", (5, 5), ("c", "c")),
    ]
    assert str(verify_run(run)[0]).startswith("gradient, step 2, tensors a to b: checksum mismatch")


def test_missing_and_short_chunks_are_damage(out, tmp_path):
    run = shutil.copytree(out, tmp_path / "run")
    (run / "trajectory.zarr/parameter/c/0/0").unlink()
    chunk = run / "trajectory.zarr/hvp/c/1/1"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (run / "trajectory.zarr/loss/c/0").unlink()
    (run / "ledger.zarr/gram/c/0/0/0/0").unlink()
    damages = verify_run(run)
    assert {(damage.array, damage.steps) for damage in damages} == {
        ("parameter", (0, 3)),
        ("hvp", (4, 5)),
        ("loss", ()),
        ("gram", (0, 4)),
    }


def test_a_missing_record_is_found(out, tmp_path):
    run = shutil.copytree(out, tmp_path / "run")
    (run / "trajectory.zarr/commits/00000000.json").unlink()
    (damage,) = verify_run(run)
    assert damage.what == "a commit record is missing"
    assert damage.path == str(run / "trajectory.zarr/commits/00000000.json")


def test_a_record_with_the_content_of_another_is_found(tmp_path):
    journal = Journal(LocalStorage(tmp_path))
    journal.write("0", {"start": 0, "stop": 2})
    shutil.copy(tmp_path / "0.json", tmp_path / "1.json")
    assert journal.read("0")["stop"] == 2
    with pytest.raises(InputError, match="checksum mismatch") as caught:
        journal.read("1")
    assert caught.value.where == str(tmp_path / "1.json")


def test_a_missing_newest_record_is_found_because_the_arrays_are_longer(out, tmp_path):
    run = shutil.copytree(out, tmp_path / "run")
    (run / "trajectory.zarr/commits/00000001.json").unlink()
    (damage,) = verify_run(run)
    assert damage.what == "a commit record is missing"
    assert damage.path == str(run / "trajectory.zarr/commits/00000001.json")
    with pytest.raises(InputError, match="a commit record is missing"):
        open_trajectory(run / "trajectory.zarr")


@given(data=st.data())
def test_a_flipped_bit_of_a_compressed_chunk_is_found_or_decodes_to_the_same(packed, data):
    path = data.draw(st.sampled_from(files(packed / "trajectory.zarr/parameter/c")), "file")
    before = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(before) - 1), "bit")
    whole = states_of(packed)
    after = bytearray(before)
    after[bit // 8] ^= 1 << bit % 8
    path.write_bytes(after)
    try:
        damages = verify_run(packed)
        if not damages:
            assert states_of(packed) == whole
    finally:
        path.write_bytes(before)
    assert all(damage.path == str(path) for damage in damages)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("packed"), {"parameter": BloscCodec(cname="lz4")})


def states_of(run):
    trajectory = open_trajectory(run / "trajectory.zarr")
    buffers = [np.zeros((ROWS, CHUNK[1]), np.float32) for _ in range(trajectory.columns)]
    for column, buffer in enumerate(buffers):
        trajectory.read("parameter", 0, ROWS, column, buffer)
    return b"".join(buffer.tobytes() for buffer in buffers)


def test_a_damaged_ledger_chunk_names_the_updates_of_the_checksum(tmp_path):
    layout = Layout.from_shapes({name: (shape, "float32") for name, shape in SHAPES.items()})
    rows, start = 1000, 7
    steps = np.arange(start, start + 2 * rows)
    path = tmp_path / "ledger.zarr"
    gram_ledger = prepare_ledger(path, layout, VECTORS[:5], steps, np.ones_like(steps), rows)
    gram = np.random.default_rng(0).standard_normal((rows, 3, 5, 5))
    for chunk in (LedgerChunk(0, rows), LedgerChunk(rows, 2 * rows)):
        gram_ledger.write(chunk, gram, gram[:, :, 0, 0], "digest")
    assert list(verify_ledger(path)) == []
    # A ledger chunk has nine groups of 110 updates, and one of 10.
    covered = math.ceil(65536 / gram[0].nbytes)
    damages = {"gram": (0, covered - 1, covered, rows - 1), "residual_ratio": (rows - 1,)}
    for name, damaged in damages.items():
        chunk = gram_ledger.chunk_entry(name, rows).local_path
        content = bytearray(chunk.read_bytes())
        for row in damaged:
            content[row * len(content) // rows] ^= 1
        chunk.write_bytes(content)
    first = start + rows
    groups = [(0, covered - 1), (covered, 2 * covered - 1), (9 * covered, rows - 1)]
    found = [(damage.array, damage.steps) for damage in verify_ledger(path)]
    assert found == [
        *(("gram", (first + low, first + high)) for low, high in groups),
        ("residual_ratio", (first, first + rows - 1)),
    ]


@pytest.mark.parametrize("store", ["trajectory.zarr", "ledger.zarr"])
def test_a_store_of_a_newer_version_is_refused_by_verify(out, tmp_path, store):
    run = shutil.copytree(out, tmp_path / "run")
    path = run / store / "zarr.json"
    path.write_text(path.read_text().replace(f'"version": {LAYOUT_VERSION}', f'"version": {LAYOUT_VERSION + 1}'))
    message = f"layout version {LAYOUT_VERSION + 1}, but this version of natgrad reads {LAYOUT_VERSION}"
    with pytest.raises(InputError, match=message) as refusal:
        verify_run(run)
    assert refusal.value.where == str(run / store)
    assert "upgrade natgrad-pipeline" in refusal.value.remedy


# The command -------------------------------------------------------------------------------------------------


def natgrad(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["natgrad", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def test_the_command_lists_all_damage_and_fails_if_there_is_any(out, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(out, tmp_path / "run")
    assert natgrad(monkeypatch, "verify", run) == 0
    assert capsys.readouterr().out == "OK: all checksums match\n"
    for path in ("trajectory.zarr/parameter/c/0/0", "ledger.zarr/gram/c/0/0/0/0"):
        (run / path).unlink()
    assert natgrad(monkeypatch, "verify", run) == 1
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "parameter, steps 0 to 3, tensor a",
        "gram, steps 0 to 4",
    ]
    assert natgrad(monkeypatch, "verify", run, "--json") == 1
    first, _ = json.loads(capsys.readouterr().out)["damages"]
    assert (first["array"], first["steps"], first["tensors"]) == ("parameter", [0, 3], ["a", "a"])
    assert first["path"].endswith("trajectory.zarr/parameter/c/0/0")


def test_a_folder_without_stores_is_refused(tmp_path):
    with pytest.raises(InputError, match="no trajectory here"):
        verify_run(tmp_path)


def test_memory_does_not_grow_with_the_run(tmp_path, monkeypatch):
    """One chunk at a time: no read requests more states than a chunk has."""
    make_run(tmp_path)
    asked, read = [], Trajectory.read
    monkeypatch.setattr(
        Trajectory,
        "read",
        lambda self, name, start, stop, *rest, **options: (
            asked.append(stop - start) or read(self, name, start, stop, *rest, **options)
        ),
    )
    verify_run(tmp_path)
    assert max(asked) == CHUNK[0]
    assert len(asked) == 2 * 3 * len(MIXED)
