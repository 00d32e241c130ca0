"""One training run in every format, written by the real writers, gives the same ledger."""

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
from fractions import Fraction

import h5py
import huggingface_hub
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import LENGTHS, Payload, changes, damage, reads_only
from lazy import Lazy
from logs import random_walk, run_writer, write_log
from memory import peak_of
from natgrad.schema.errors import InputError
from natgrad.sources.checkpoints.hdf5_file import Hdf5File
from natgrad.sources.checkpoints.npz_file import NpzStack
from natgrad.sources.completion import complete
from natgrad.sources.container import boxes
from natgrad.sources.formats import FORMATS, find_format
from natgrad.store import open_ledger, open_trajectory
from opened import compute_ledger, ingest, open_source

torch = Lazy("torch")
dcp = Lazy("torch.distributed.checkpoint")
metadata_types = Lazy("torch.distributed.checkpoint.metadata")
safetensors_torch = Lazy("safetensors.torch")

TENSORS = {"layers.10.weight": (40, 30), "layers.9.weight": (7, 5), "layers.9.bias": (7,), "scale": ()}
STEPS = 5


def run_of(dtype):
    return random_walk(STEPS, TENSORS, dtype=dtype)


def arrays_of(state, array):
    """Return the tensors of an array of a state, as torch tensors with the same bits."""
    found = {}
    for key, value in state.items():
        name, _, tensor = key.partition("/")
        if name == array and tensor:
            shape, value = np.shape(value), np.ascontiguousarray(value)
            if value.dtype.name == "bfloat16":
                found[tensor] = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16).reshape(value.shape)
            else:
                found[tensor] = torch.from_numpy(value)
            found[tensor] = found[tensor].reshape(shape)
    return found


def trees_of(states):
    """Write states with torch in the nested form that trainers use."""
    return [
        {
            "model": arrays_of(state, "parameter"),
            "grad": arrays_of(state, "gradient"),
            "loss": float(state["loss"]),
            "optimizer": {"param_groups": [{"lr": float(state["learning_rate"])}]},
            "step": step,
        }
        for step, state in enumerate(states)
    ]


# Writers: folder and states to the SOURCEs of the run ----------------------------------------------------------


def write_native(folder, states):
    return [write_log(folder, states)]


def write_npz(folder, states):
    return [write_log(folder, states, container="npz")]


def write_torch(folder, states):
    folder.mkdir()
    for step, tree in enumerate(trees_of(states)):
        torch.save(tree, folder / f"checkpoint_{step}.pt")
    return [folder]


def write_torch_in_other_strides(folder, states):
    folder.mkdir()
    for step, tree in enumerate(trees_of(states)):
        for array in ("model", "grad"):
            tree[array] = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in tree[array].items()}
        torch.save(tree, folder / f"checkpoint_{step}.pt")
    return [folder]


def save_sharded(folder, states, prefix=""):
    for step, state in enumerate(states):
        (folder / f"step-{step}").mkdir(parents=True)
        for array, stem in (("parameter", "model"), ("gradient", "gradient")):
            huggingface_hub.save_torch_state_dict(
                arrays_of(state, array),
                folder / f"step-{step}",
                filename_pattern=stem + "{suffix}.safetensors",
                max_shard_size="2KB",
            )
        scalars = {name: torch.from_numpy(np.asarray(state[name])) for name in ("loss", "learning_rate")}
        safetensors_torch.save_file(scalars, folder / f"step-{step}" / "adapter_model.safetensors")
    return folder


def write_sharded(folder, states):
    return [save_sharded(folder, states)]


def write_mixed(folder, states):
    """Write parameters and scalars with torch, and gradients with safetensors."""
    folder.mkdir()
    (folder / "checkpoints").mkdir()
    for step, tree in enumerate(trees_of(states)):
        del tree["grad"]
        torch.save(tree, folder / "checkpoints" / f"checkpoint_{step}.pt")
    for step, state in enumerate(states):
        (folder / "gradients" / f"step_{step}").mkdir(parents=True)
        safetensors_torch.save_file(
            arrays_of(state, "gradient"), folder / "gradients" / f"step_{step}" / "gradient.safetensors"
        )
    return [folder / "checkpoints", folder / "gradients"]


def write_run_file(folder, states):
    """Write the same with gradients under bare names, which a run file maps."""
    write_mixed(folder, states)
    for path in (folder / "gradients").glob("*/gradient.safetensors"):
        path.rename(path.with_name("model.safetensors"))
    (folder / "run.toml").write_text(
        '[[source]]\npath = "checkpoints"\nformat = "torch"\n'
        '[[source]]\npath = "gradients"\nmap = { gradient = "." }\n'
    )
    return [folder / "run.toml"]


def write_dcp(folder, states):
    """Save with four ranks, and with two ranks from step 3 on."""
    folder.mkdir()
    torch.save(trees_of(states), folder / "states")
    run_writer("write_dcp.py", folder / "states", folder / "log", "4:0:2", f"2:3:{len(states)}")
    return [folder / "log"]


def write_dcp_alone(folder, states):
    for step, tree in enumerate(trees_of(states)):
        dcp.save(tree, checkpoint_id=folder / f"step-{step}", no_dist=True)
    return [folder]


def save_hdf5(path, state):
    with h5py.File(path, "w") as file:
        for key, value in state.items():
            value = np.asarray(value)
            options = {"compression": "gzip"} if value.ndim else {}
            if value.dtype.name == "bfloat16":
                file.create_dataset(key, data=value.view(np.uint16), **options).attrs["ml_dtype"] = "bfloat16"
            else:
                file.create_dataset(key, data=value, **options)


def stacked(states):
    return {key: np.stack([state[key] for state in states]) for key in states[0]}


def write_hdf5(folder, states):
    folder.mkdir()
    for step, state in enumerate(states):
        save_hdf5(folder / f"step_{step}.h5", state)
    return [folder]


def write_hdf5_stack(folder, states):
    folder.mkdir()
    save_hdf5(folder / "run.h5", stacked(states) | {"step": np.arange(len(states))})
    return [folder / "run.h5"]


def write_npz_stack(folder, states):
    folder.mkdir()
    np.savez(folder / "run.npz", **stacked(states))
    return [folder / "run.npz"]


def save_zarr(path, state, version=3, mode="w", **options):
    # This is like a chunk that was never written, which has no value.
    with zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.open_group(path, mode=mode, zarr_format=version)
        for key, value in state.items():
            value = np.asarray(value)
            bits = value.dtype.name == "bfloat16"
            chunks = {"chunks": tuple(-(-length // 2) for length in value.shape)} if value.size else {}
            array = group.create_array(key, data=value.view(np.uint16) if bits else value, **{**chunks, **options})
            if bits:
                array.attrs["ml_dtype"] = "bfloat16"


def write_zarr(folder, states):
    folder.mkdir()
    for step, state in enumerate(states):
        save_zarr(folder / f"step_{step}.zarr", state)
    return [folder]


def write_zarr_stack(folder, states, version=3):
    save_zarr(folder / "run.zarr", stacked(states) | {"step": np.arange(len(states))}, version)
    return [folder / "run.zarr"]


def write_zarr_stack_of_version_2(folder, states):
    return write_zarr_stack(folder, states, version=2)


WRITERS = {
    "npz": (write_npz, "steps"),
    "torch": (write_torch, "torch"),
    "torch, other strides": (write_torch_in_other_strides, "torch"),
    "dcp, one rank": (write_dcp_alone, "dcp"),
    "npz, one file": (write_npz_stack, "npz"),
    "hdf5": (write_hdf5, "hdf5"),
    "hdf5, one file": (write_hdf5_stack, "hdf5"),
    "zarr": (write_zarr, "zarr"),
    "zarr, one group": (write_zarr_stack, "zarr"),
    "zarr, one group of version 2": (write_zarr_stack_of_version_2, "zarr"),
    "safetensors, sharded": (write_sharded, "safetensors"),
    "mixed": (write_mixed, None),
    "run file": (write_run_file, None),
}


def ledger_of(folder, sources, **options):
    """Return the contents of all stores of a run, bit by bit."""
    ingest(sources, folder / "trajectory.zarr", **options)
    compute_ledger(folder / "trajectory.zarr", folder / "ledger.zarr")
    ledger, states = open_ledger(folder / "ledger.zarr"), open_trajectory(folder / "trajectory.zarr")
    gram, ratio = ledger.read()
    scalars = [states.scalar(name).tobytes() for name in ("step", "loss", "learning_rate")]
    return ledger.layout, gram.tobytes(), ratio.tobytes(), scalars


COPIED = (
    "torch, other strides",
    "hdf5",
    "hdf5, one file",
    "zarr",
    "zarr, one group",
    "zarr, one group of version 2",
)
"""Writers of compressed arrays, of other strides, or of several chunks."""


def has_copies(folder):
    """Return True if a trajectory contains states, not only the locations of their bytes in the log."""
    return any((folder / "trajectory.zarr/parameter/c").glob("**/*"))


@pytest.fixture(scope="module")
def native(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    return request.param, ledger_of(folder, write_native(folder / "log", run_of(request.param)))


# Every writer with the dtype that NumPy does not have, and with one of the others.
@pytest.mark.parametrize(
    ("native", "writer"),
    [(dtype, writer) for n, writer in enumerate(WRITERS) for dtype in ("bfloat16", ("float32", "float64")[n % 2])],
    indirect=["native"],
)
def test_every_format_of_a_run_gives_the_same_ledger(tmp_path, native, writer):
    dtype, expected = native
    if writer.startswith("npz") and dtype == "bfloat16":
        dtype, expected = "float16", ledger_of(tmp_path, write_native(tmp_path / "native", run_of("float16")))
    write, name = WRITERS[writer]
    (tmp_path / "out").mkdir()
    sources = write(tmp_path / "log", run_of(dtype))
    assert ledger_of(tmp_path / "out", sources) == expected
    if name is not None:
        assert next(known for known, format in FORMATS.items() if format.find(sources[0])) == name
        assert ledger_of(tmp_path / "again", sources, format=name, in_place=True) == expected
        assert has_copies(tmp_path / "again") == (writer in COPIED)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("stack", [False, True])
def test_uncompressed_chunks_of_complete_rows_stay_in_place(tmp_path, version, stack):
    states = run_of("float32")
    expected = ledger_of(tmp_path / "native", write_native(tmp_path / "log", states))
    plain = {"version": version, "compressors": None}
    if stack:
        save_zarr(tmp_path / "run.zarr", stacked(states), chunks="auto", **plain)
        source = tmp_path / "run.zarr"
    else:
        for step, state in enumerate(states):
            for key, value in state.items():
                chunks = tuple(max(1, n // 2 if axis == 0 else n) for axis, n in enumerate(np.shape(value)))
                save_zarr(
                    tmp_path / "many" / f"step_{step}.zarr",
                    {key: value},
                    chunks=chunks or "auto",
                    mode="a",
                    **plain,
                )
        source = tmp_path / "many"
    assert ledger_of(tmp_path / "in place", [source], in_place=True) == expected
    assert not has_copies(tmp_path / "in place")


@pytest.fixture(scope="module")
def dcp_log(tmp_path_factory):
    (folder,) = write_dcp(tmp_path_factory.mktemp("dcp") / "job", run_of("float32"))
    return folder


def test_a_run_started_by_four_ranks_and_continued_by_two_is_one_run(tmp_path, dcp_log):
    expected = ledger_of(tmp_path / "native", write_native(tmp_path / "log", run_of("float32")))
    assert len(list((dcp_log / "step-0").glob("*.distcp"))) == 4
    assert len(list((dcp_log / "step-4").glob("*.distcp"))) == 2
    assert ledger_of(tmp_path / "dcp", [dcp_log]) == expected
    assert ledger_of(tmp_path / "in place", [dcp_log], in_place=True) == expected
    assert not has_copies(tmp_path / "in place")


@given(step=st.sampled_from([0, 4]), tensor=st.sampled_from(list(TENSORS)), a=st.integers(0), b=st.integers(0))
@reads_only
def test_slices_across_the_chunks_of_ranks_equal_the_tensor(dcp_log, step, tensor, a, b):
    expected = run_of("float32")[step][f"gradient/{tensor}"].ravel()
    start, stop = sorted((a % (expected.size + 1), b % (expected.size + 1)))
    out = np.zeros(stop - start, np.float32)
    log = open_source(dcp_log)
    with log.open(log.steps()[step]) as reader:
        reader.read("gradient", tensor, start, out)
    np.testing.assert_array_equal(out, expected[start:stop])


def metadata_of(tmp_path):
    """A checkpoint of one rank, and its metadata as unpickled by torch."""
    (folder,) = write_dcp_alone(tmp_path / "log", run_of("float32")[:1])
    return folder, pickle.loads((folder / "step-0" / ".metadata").read_bytes())


def entry(metadata, key):
    return metadata.state_dict_metadata[key]


def storage(metadata, key):
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


WEIGHT = "model.layers.10.weight"


def set_chunk(metadata, offsets, sizes):
    entry(metadata, WEIGHT).chunks[0] = metadata_types.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: setattr(entry(m, WEIGHT), "size", torch.Size((1 << 30, 1 << 20))), "do not add up"),
        (lambda m: setattr(entry(m, WEIGHT), "size", torch.Size((39, 30))), "outside of its shape"),
        (lambda m: set_chunk(m, (0, 0), (40, 31)), "outside of its shape"),
        (lambda m: set_chunk(m, (1, 0), (39, 30)), "no file contains"),
        (lambda m: set_chunk(m, (0, 0), (30,)), "outside of its shape"),
        (lambda m: set_chunk(m, (0, 0), (39, 30)), "do not add up"),
        (lambda m: entry(m, WEIGHT).chunks.clear(), "do not add up"),
        (lambda m: setattr(entry(m, WEIGHT), "chunks", None), "malformed"),
        (lambda m: setattr(entry(m, WEIGHT), "size", None), "is None, not a list"),
        (lambda m: setattr(entry(m, WEIGHT).properties, "dtype", "float32"), "no dtype"),
        (lambda m: setattr(storage(m, WEIGHT), "relative_path", "../../secret.distcp"), "outside of the folder"),
        (lambda m: setattr(storage(m, WEIGHT), "relative_path", "/etc/passwd"), "outside of the folder"),
        (lambda m: setattr(storage(m, WEIGHT), "relative_path", 3), "outside of the folder"),
        (lambda m: setattr(storage(m, WEIGHT), "length", 9), "exceeds its 9 bytes"),
        (lambda m: setattr(storage(m, WEIGHT), "length", -1), "is -1, which is not an integer"),
        (lambda m: setattr(storage(m, WEIGHT), "transform_descriptors", ["zstd"]), "encoded by an extension"),
        (lambda m: setattr(m, "storage_data", None), "instead of a dict"),
        (lambda m: m.state_dict_metadata.update(x=3), "has an unknown type"),
        (lambda m: m.planner_data.update({WEIGHT: ("grad", "layers.10.weight")}), "twice"),
    ],
)
def test_metadata_that_contradict_the_files_are_refused(tmp_path, change, what):
    folder, metadata = metadata_of(tmp_path)
    change(metadata)
    (folder / "step-0" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert what in refusal(folder).what


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(storage(m, WEIGHT), "relative_path", "__9_0.distcp"),
        lambda m: setattr(storage(m, WEIGHT), "offset", 1 << 50),
        lambda m: setattr(storage(m, WEIGHT), "length", 1 << 50),
        lambda m: setattr(storage(m, WEIGHT), "offset", storage(m, "grad.layers.9.weight").offset),
        lambda m: m.storage_data.update(
            {index: storage(m, "grad.layers.9.weight") for index in m.storage_data if index.fqn == WEIGHT}
        ),
    ],
)
def test_chunks_that_contradict_the_metadata_are_refused(tmp_path, change):
    folder, metadata = metadata_of(tmp_path)
    change(metadata)
    (folder / "step-0" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError) as caught:
        ingest(folder, tmp_path / "trajectory.zarr")
    assert str(folder) in caught.value.where


def test_chunks_that_overlap_are_refused(tmp_path):
    folder, metadata = metadata_of(tmp_path)
    whole = entry(metadata, WEIGHT).chunks[0]
    info = storage(metadata, WEIGHT)
    entry(metadata, WEIGHT).size = torch.Size((80, 30))
    entry(metadata, WEIGHT).chunks.append(metadata_types.ChunkStorageMetadata(torch.Size((20, 0)), whole.sizes))
    metadata.storage_data[metadata_types.MetadataIndex(WEIGHT, torch.Size((20, 0)))] = info
    (folder / "step-0" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "at the same position" in refusal(folder).what
    # The same bytes at another position.
    data = folder / "step-0" / info.relative_path
    content = data.read_bytes()
    data.write_bytes(content + content[info.offset : info.offset + info.length])
    copied = dataclasses.replace(info, offset=len(content))
    metadata.storage_data[metadata_types.MetadataIndex(WEIGHT, torch.Size((20, 0)))] = copied
    (folder / "step-0" / ".metadata").write_bytes(pickle.dumps(metadata))
    log = open_source(folder)
    with log.open(log.steps()[0]) as reader, pytest.raises(InputError, match="overlap"):
        reader.read("parameter", "layers.10.weight", 0, np.zeros(80 * 30, np.float32))


def test_a_payload_in_metadata_never_runs(tmp_path):
    folder, metadata = metadata_of(tmp_path)
    metadata.planner_data["x"] = Payload(tmp_path / "trace")
    body = pickle.dumps(metadata)
    (folder / "step-0" / ".metadata").write_bytes(body)
    log = open_source(folder)
    with log.open(log.steps()[0]) as reader:
        assert any("'posix.mkdir'" in note for note in reader.content().notes)
    assert not (tmp_path / "trace").exists()
    pickle.loads(body)
    assert (tmp_path / "trace").exists()  # the trap works


@given(changes=changes(6))
@settings(reads_only, max_examples=200)
def test_corrupt_metadata_are_either_read_or_refused(tmp_path, dcp_log, changes):
    if not (tmp_path / "step-0").exists():
        shutil.copytree(dcp_log / "step-0", tmp_path / "step-0")
    (tmp_path / "step-0" / ".metadata").write_bytes(
        damage((dcp_log / "step-0" / ".metadata").read_bytes(), changes)
    )
    with contextlib.suppress(InputError):
        log = open_source(tmp_path)
        with log.open(log.steps()[0]) as reader:
            content = complete(log.steps()[0], reader.content())
            for name, logged in content.arrays["parameter"].items():
                reader.read("parameter", name, 0, np.zeros(np.prod(logged.shape, dtype=int), np.float32))


def test_a_checkpoint_without_metadata_is_omitted_with_a_warning(tmp_path, dcp_log, caplog):
    shutil.copytree(dcp_log, tmp_path / "log")
    (tmp_path / "log" / "step-4" / ".metadata").unlink()
    assert [step.number for step in open_source(tmp_path / "log").steps()] == [0, 1, 2, 3]
    assert "step-4 is left for the next pass" in caplog.text


def test_an_object_of_an_unknown_class_is_omitted_with_a_note(tmp_path):
    state = torch.zeros(3)
    tree = {"model": {"weight": state}, "grad": {"weight": state}, "loader": {"rate": Fraction(1, 3)}}
    dcp.save(tree, checkpoint_id=tmp_path / "step-1")
    log = open_source(tmp_path)
    (step,) = log.steps()
    with log.open(step) as reader:
        (note,) = reader.content().notes
    assert note.startswith("'loader/rate' was not read: its class is 'fractions.Fraction'")


def test_a_folder_of_runs_is_not_a_run(tmp_path, dcp_log):
    for run in ("run-1", "run-2"):
        shutil.copytree(dcp_log / "step-0", tmp_path / run / "step-0")
        shutil.copytree(dcp_log / "step-4", tmp_path / run / "4")
    (tmp_path / "run-2" / "4" / ".metadata").unlink()
    assert find_format(tmp_path) is None
    assert [step.number for step in open_source(tmp_path / "run-1").steps()] == [0, 4]


def test_stale_files_of_an_earlier_save_are_not_read(tmp_path, dcp_log):
    shutil.copytree(dcp_log, tmp_path / "log")
    (tmp_path / "log" / "step-0" / "__9_0.distcp").write_bytes(b"stale")
    assert content_of(tmp_path / "log") == content_of(dcp_log)


# Folders of shards -------------------------------------------------------------------------------------------


def content_of(source, **options):
    log = open_source(source, **options)
    step = log.steps()[0]
    with log.open(step) as reader:
        return complete(step, reader.content())


def refusal(source):
    with pytest.raises(InputError) as caught:
        content_of(source)
    assert caught.value.where
    assert caught.value.remedy
    return caught.value


@pytest.fixture
def shards(tmp_path):
    folder = save_sharded(tmp_path / "log", run_of("float32")[:1]) / "step-0"
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def rewritten(path, change):
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", ""])
def test_an_index_that_refers_outside_its_folder_is_refused(shards, name):
    safetensors_torch.save_file({"scale": torch.ones(())}, shards.parent.parent / "secret.safetensors")
    rewritten(shards / "model.safetensors.index.json", lambda index: index["weight_map"].update(scale=name))
    assert "outside of the folder" in refusal(shards.parent).what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda index: index["weight_map"].update(other="model-9.safetensors"), "model-9.safetensors"),
        (lambda index: index["weight_map"].pop("scale"), "contains 'scale'"),
        (
            lambda index: index["weight_map"].update(other=index["weight_map"]["scale"]),
            "does not contain 'other'",
        ),
        (lambda index: index.pop("weight_map"), "not an index of shards"),
        (lambda index: index.update(weight_map=[1]), "not an index of shards"),
    ],
)
def test_an_index_that_contradicts_its_shards_is_refused(shards, change, what):
    rewritten(shards / "model.safetensors.index.json", change)
    assert what in refusal(shards.parent).what


def test_a_shard_that_is_a_cyclic_link_is_refused(shards):
    shard = next(shards.glob("model-*.safetensors"))
    shard.unlink()
    shard.symlink_to(shard.name)
    assert shard.name in refusal(shards.parent).what


def test_a_cyclic_link_is_not_a_step(tmp_path):
    folder = save_sharded(tmp_path / "log", run_of("float32")[:1])
    (folder / "step-1").symlink_to("step-1")
    assert [step.number for step in open_source(folder).steps()] == [0]


def test_two_files_with_one_key_are_refused(shards):
    safetensors_torch.save_file({"scale": torch.ones(())}, shards / "pytorch_model.safetensors")
    assert "two files contain 'scale'" in refusal(shards.parent).what


def header(text, data=b""):
    return len(text).to_bytes(8, "little") + text.encode() + data


@pytest.mark.parametrize(
    "body",
    [
        (1 << 60).to_bytes(8, "little") + b"{}",
        header('{"w":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,8]}}', b"\0" * 8),
        header('{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4611686018427387904]}}', b"\0" * 8),
        header(
            '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"v":{"dtype":"F32","shape":[2],'
            '"data_offsets":[4,12]}}',
            b"\0" * 12,
        ),
        header('{"w":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', b"\0" * 8),
        header("[" * 100_000),
    ],
)
def test_a_header_that_exceeds_the_file_is_refused(tmp_path, body):
    (tmp_path / "step_0").mkdir()
    (tmp_path / "step_0" / "model.safetensors").write_bytes(body)
    refusal(tmp_path)


@given(text=st.text(max_size=60) | st.sampled_from(['{"weight_map":{"a":1}}', "[" * 99_999, '{"weight_map":null}']))
@reads_only
def test_any_index_is_either_read_or_refused(tmp_path, text):
    folder = tmp_path / "step_0"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(text)
    refusal(tmp_path)


# Several sources ---------------------------------------------------------------------------------------------


def test_steps_missing_in_one_source_are_omitted_with_a_warning(tmp_path, caplog):
    checkpoints, gradients = write_mixed(tmp_path / "log", run_of("float32"))
    (checkpoints / "checkpoint_3.pt").unlink()
    (checkpoints / "checkpoint_4.pt").unlink()
    ingest([checkpoints, gradients], tmp_path / "trajectory.zarr")
    assert open_trajectory(tmp_path / "trajectory.zarr").n_states == 3
    assert f"2 steps of {gradients} are omitted" in caplog.text


def test_two_sources_with_parameters_are_refused(tmp_path):
    (source,) = write_native(tmp_path / "log", run_of("float32"))
    with pytest.raises(InputError, match="two sources contain the parameters"):
        ingest([source, source], tmp_path / "trajectory.zarr")


def test_sources_without_a_common_step_are_refused(tmp_path):
    states = run_of("float32")
    folders = [write_log(tmp_path / str(n), states[:1], numbers=[n]) for n in range(2)]
    with pytest.raises(InputError, match="no step that all sources have"):
        ingest(folders, tmp_path / "trajectory.zarr")


def test_a_change_in_either_source_is_detected(tmp_path):
    sources = write_mixed(tmp_path / "log", run_of("float32"))
    ingest(sources, tmp_path / "trajectory.zarr")
    assert ingest(sources, tmp_path / "trajectory.zarr").new_steps == 0
    path = sources[1] / "step_2" / "gradient.safetensors"
    tensors = safetensors_torch.load_file(path)
    safetensors_torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
    with pytest.raises(InputError, match="step 2 is already ingested, with a different gradient"):
        ingest(sources, tmp_path / "trajectory.zarr")


@pytest.mark.parametrize(
    "text",
    [
        "[[source]",
        "",
        "source = []",
        "[[sources]]\npath = 'x'",
        "[[source]]\nformat = 'torch'",
        "[[source]]\npath = 'x'\nshift = 1",
        "[[source]]\npath = 'x'\nmap = 'y'",
        "[[source]]\npath = 'run.toml'",
        "[[source]]\npath = '.'\nformat = ['npz']",
        "[[source]]\npath = 'nowhere'",
        "[[source]]\npath = '.'\nformat = 'nothing'",
        "[[source]]\npath = '.'\nmap = { weights = 'x' }",
    ],
)
def test_an_invalid_run_file_is_refused(tmp_path, text):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "run.toml")
    assert caught.value.remedy


# One file of all steps, and HDF5 -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    folder, states = tmp_path_factory.mktemp("stacks"), run_of("float32")
    writers = (write_hdf5_stack, write_npz_stack, write_zarr_stack, write_zarr_stack_of_version_2)
    return [write(folder / str(number), states)[0] for number, write in enumerate(writers)], states


@given(
    which=st.integers(0, 3),
    step=st.integers(0, STEPS - 1),
    tensor=st.sampled_from(list(TENSORS)),
    a=st.integers(0),
    b=st.integers(0),
)
@reads_only
def test_slices_of_a_row_of_one_file_equal_the_tensor(stacks, which, step, tensor, a, b):
    sources, states = stacks
    expected = states[step][f"gradient/{tensor}"].ravel()
    start, stop = sorted((a % (expected.size + 1), b % (expected.size + 1)))
    out = np.zeros(stop - start, np.float32)
    log = open_source(sources[which])
    with log.open(log.steps()[step]) as reader:
        reader.read("gradient", tensor, start, out)
    np.testing.assert_array_equal(out, expected[start:stop])


@given(shape=st.lists(st.integers(1, 5), max_size=4).map(tuple), a=st.integers(0), b=st.integers(0))
def test_boxes_contain_the_elements_in_order(shape, a, b):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    start, stop = sorted((a % (array.size + 1), b % (array.size + 1)))
    parts = [array[box].ravel() for box in boxes(shape, start, stop)]
    np.testing.assert_array_equal(np.concatenate(parts) if parts else [], array.ravel()[start:stop])
    assert len(parts) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("numbers", [[0, 1, 1, 2, 3], [-1, 0, 1, 2, 3], np.zeros((5, 1), int), np.arange(5.0)])
def test_a_file_with_repeated_steps_is_refused(tmp_path, numbers):
    save_hdf5(tmp_path / "run.h5", stacked(run_of("float32")) | {"step": np.asarray(numbers)})
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "run.h5").steps()
    assert caught.value.where == str(tmp_path / "run.h5")


def test_an_array_whose_length_differs_from_the_run_is_refused(tmp_path):
    state = stacked(run_of("float32"))
    state["gradient/layers.9.bias"] = state["gradient/layers.9.bias"][:3]
    save_hdf5(tmp_path / "run.h5", state)
    assert "of (3,) steps, not 5" in refusal(tmp_path / "run.h5").what


def test_a_compressed_file_of_all_steps_is_decompressed_in_order(tmp_path):
    states = run_of("float32")
    np.savez_compressed(tmp_path / "run.npz", **stacked(states))
    expected = ledger_of(tmp_path / "native", write_native(tmp_path / "log", states))
    assert ledger_of(tmp_path / "out", [tmp_path / "run.npz"]) == expected
    log = open_source(tmp_path / "run.npz")
    for number in (3, 0, 4):  # back to an earlier step, too
        with log.open(log.steps()[number]) as reader:
            out = np.zeros(6, np.float32)
            reader.read("gradient", "layers.9.weight", 4, out)
        np.testing.assert_array_equal(out, states[number]["gradient/layers.9.weight"].ravel()[4:10])


def test_a_compressed_array_in_fortran_order_is_refused_as_such(tmp_path):
    state = stacked(run_of("float32"))
    state["gradient/layers.9.weight"] = np.asfortranarray(state["gradient/layers.9.weight"])
    np.savez_compressed(tmp_path / "run.npz", **state)
    with pytest.raises(InputError, match="Fortran order") as refused:
        open_source(tmp_path / "run.npz").steps()
    assert "truncated" not in str(refused.value)


def test_data_in_other_files_are_not_read(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret" * 10)
    folder = tmp_path / "log"
    (folder).mkdir()
    with h5py.File(folder / "step_0.h5", "w") as file:
        file.create_dataset("parameter/w", (4,), "f4", external=[(str(tmp_path / "secret"), 0, 16)])
    assert "other files" in refusal(folder).what
    with h5py.File(folder / "step_0.h5", "w") as file:
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "w", shape=(4,))
        file.create_virtual_dataset("parameter/w", layout)
    assert "other files" in refusal(folder).what
    with h5py.File(folder / "step_0.h5", "w") as file:
        file["parameter/w"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "w")
        file["gradient"] = h5py.SoftLink("/gradient")
    assert "no parameters" in refusal(folder).what


def test_chunks_larger_than_the_memory_limit_are_refused(tmp_path):
    (tmp_path / "log").mkdir()
    with h5py.File(tmp_path / "log" / "step_0.h5", "w") as file:
        file.create_dataset("parameter/w", (1 << 29,), "f4", chunks=(1 << 28,), compression="gzip")
    assert "chunks" in refusal(tmp_path / "log").what


@given(changes=changes())
@reads_only
def test_a_corrupt_hdf5_file_is_either_read_or_refused(tmp_path, stacks, changes):
    (tmp_path / "run.h5").write_bytes(damage(stacks[0][0].read_bytes(), changes))
    with contextlib.suppress(InputError):
        log = open_source(tmp_path / "run.h5")
        step = log.steps()[0]
        with log.open(step) as reader:
            for name, logged in complete(step, reader.content()).arrays["parameter"].items():
                if logged.dtype == "float32" and np.prod(logged.shape, dtype=object) < 10_000:
                    reader.read("parameter", name, 0, np.zeros(np.prod(logged.shape, dtype=int), np.float32))


# One file of all steps: opened once, and reopened after changes ------------------------------------------------


@pytest.fixture(params=["npz, one file", "hdf5, one file"])
def openings(request, monkeypatch):
    """Writer of logs in one file, which counts how many of its files were opened and are open."""
    counted = {"so far": 0, "now": 0}
    kind = NpzStack if request.param.startswith("npz") else Hdf5File
    begin, close = kind.__init__, kind.close

    def counting_begin(self, step):
        begin(self, step)
        counted["so far"] += 1
        counted["now"] += 1

    def counting_close(self):
        close(self)
        counted["now"] -= 1

    monkeypatch.setattr(kind, "__init__", counting_begin)
    monkeypatch.setattr(kind, "close", counting_close)
    return WRITERS[request.param][0], counted


def test_a_file_of_all_steps_is_opened_only_once(tmp_path, openings):
    write, opened = openings
    found = []
    for steps in (4, 12):
        log = tmp_path / f"sweep_{steps}"
        log.mkdir()
        for run in ("a", "b", "c"):
            write(log / run, random_walk(steps, TENSORS))
        before = opened["so far"]
        ingest(log, tmp_path / f"{steps}.zarr", sweep=True)
        found.append(opened["so far"] - before)
        assert opened["now"] == 0
    assert found[0] == found[1] < 3 * 4


def test_a_changed_file_of_all_steps_is_reopened_while_a_step_is_open(tmp_path, openings):
    write, opened = openings
    (path,) = write(tmp_path / "log", random_walk(3, TENSORS, seed=1))
    (other,) = write(tmp_path / "other", after := random_walk(3, TENSORS, seed=2))
    log = open_source(path)
    steps = log.steps()
    with log.open(steps[0]):
        other.replace(path)
        with log.open(steps[1]) as reader:
            reader.read("gradient", "layers.9.bias", 0, out := np.zeros(7, np.float32))
    np.testing.assert_array_equal(out, after[1]["gradient/layers.9.bias"])
    assert opened["now"] == 0


def test_a_truncated_file_error_names_the_step_being_read(tmp_path):
    (path,) = write_npz_stack(tmp_path / "log", random_walk(3, TENSORS))
    log = open_source(path)
    steps = log.steps()
    with log.open(steps[0]), log.open(steps[2]) as reader:
        os.truncate(path, 100)
        with pytest.raises(InputError) as caught:
            reader.read("gradient", "layers.9.bias", 0, np.zeros(7, np.float32))
    assert "step 2" in caught.value.where


# Zarr groups of other tools ----------------------------------------------------------------------------------


@pytest.fixture
def zarr_log(tmp_path):
    (path,) = write_zarr_stack(tmp_path / "log", run_of("float32"))
    return path


WEIGHT_ARRAY = "parameter/layers.10.weight"


def changed_array(path, **changes):
    file = path / WEIGHT_ARRAY / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_missing_chunk_is_not_read_as_zeros(tmp_path, zarr_log):
    (zarr_log / WEIGHT_ARRAY / "c" / "0" / "0" / "0").unlink()
    with pytest.raises(InputError, match="missing"):
        ingest(zarr_log, tmp_path / "trajectory.zarr")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"shape": [1 << 58, 40, 30]}, "the number of elements"),
        ({"shape": [1 << 30, 40, 30]}, "its tensors would have more than"),
        ({"shape": [6, 40, 30]}, "steps, not 5"),
        ({"shape": [5]}, "no parameter"),
        ({"codecs": [{"name": "pickle"}]}, "no parameter"),
        ({"data_type": "string"}, "no parameter"),
        ({"node_type": 3}, "no parameter"),
        (
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [5, 1 << 30, 30]}}},
            "has chunks of shape",
        ),
    ],
)
def test_a_zarr_array_that_exceeds_its_data_is_refused(zarr_log, changes, what):
    changed_array(zarr_log, **changes)
    assert what in refusal(zarr_log).what


def test_a_group_with_too_many_steps_is_refused(tmp_path):
    group = zarr.open_group(tmp_path / "run.zarr", mode="w")
    group.create_array("parameter/w", shape=(1 << 25, 2), chunks=(1, 2), dtype="i1")
    with pytest.raises(InputError, match="would have 33554432 steps"):
        open_source(tmp_path / "run.zarr").steps()


def test_a_chunk_larger_than_its_declared_size_is_refused(zarr_log):
    bomb = numcodecs.Zstd(level=1).encode(np.zeros(1 << 28, np.uint8))
    (zarr_log / "parameter" / "layers.9.bias" / "c" / "0" / "0").write_bytes(bomb)
    log = open_source(zarr_log)

    def read():
        with log.open(log.steps()[0]) as reader, pytest.raises(InputError, match="End of data expected"):
            reader.read("parameter", "layers.9.bias", 0, np.zeros(2, np.float32))

    assert max(peak_of(read)) < 1 << 25


def test_links_out_of_a_group_are_not_followed(tmp_path, zarr_log):
    (zarr_log / "gradient").rename(tmp_path / "gradient")
    (zarr_log / "gradient").symlink_to(tmp_path / "gradient")
    (zarr_log / "again").symlink_to(zarr_log)
    assert "no gradients" in refusal(zarr_log).what


@given(
    file=st.integers(0),
    changes=changes(),
    length=LENGTHS,
)
@reads_only
def test_a_corrupt_zarr_group_is_either_read_or_refused(tmp_path, file, changes, length):
    folder = tmp_path / "run.zarr"
    if not folder.exists():
        write_zarr_stack(tmp_path, run_of("float32")[:2])
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = paths[file % len(paths)]
    whole = path.read_bytes()
    path.write_bytes(damage(whole, changes, length))
    with contextlib.suppress(InputError):
        log = open_source(folder)
        step = log.steps()[0]
        with log.open(step) as reader:
            for name, logged in complete(step, reader.content()).arrays["parameter"].items():
                if logged.dtype == "float32":
                    reader.read(
                        "parameter", name, 0, np.zeros(min(np.prod(logged.shape, dtype=int), 9), np.float32)
                    )
    path.write_bytes(whole)
