"""Readers of training logs, compared with the libraries that wrote them."""

import itertools
import os
import pickle
import re
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from damage import Payload, reads_only
from logs import DTYPES, TENSORS, random_walk, write_log, write_step
from natgrad.schema.errors import InputError
from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import STATES
from natgrad.sources.completion import complete
from natgrad.sources.formats import FORMATS
from opened import open_source

# A log is written once for all examples of a property, and only read.


def savez_fortran(path, state):
    np.savez(path, **{key: np.asarray(value, order="F") for key, value in state.items()})


def savez_big_endian(path, state):
    np.savez(
        path,
        **{
            key: np.asarray(value).astype(np.asarray(value).dtype.newbyteorder(">")) for key, value in state.items()
        },
    )


WRITERS = {
    "safetensors": lambda path, state: write_step(path.parent, 7, state),
    "npz": lambda path, state: np.savez(path, **state),
    "npz, compressed": lambda path, state: np.savez_compressed(path, **state),
    "npz, Fortran order": savez_fortran,
    "npz, big endian": savez_big_endian,
}
CASES = [
    (writer, dtype)
    for writer, dtype in itertools.product(WRITERS, DTYPES)
    if writer == "safetensors" or dtype != "bfloat16"
]


def the_state(dtype, tensors=TENSORS):
    (state,) = random_walk(1, tensors, dtype=dtype)
    state |= {f"hvp/{name}": state[f"gradient/{name}"] * np.asarray(2, DTYPES[dtype]) for name in tensors}
    return state


def write(folder, writer, state):
    """Write step 7 and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[writer](folder / f"step_7.{writer.partition(',')[0]}", state)
    return folder


def only_step(folder, format=None):
    log = open_source(folder, format)
    (step,) = log.steps()
    return log, step


def read(reader, array, tensor, shape, dtype, start=0, stop=None):
    size = int(np.prod(shape))
    out = np.zeros((size if stop is None else stop) - start, storage_dtype(dtype))
    reader.read(array, tensor, start, out)
    return out.view(DTYPES[dtype])


def read_all(folder):
    """Return the contents of a log with one step, by key."""
    log, step = only_step(folder)
    with log.open(step) as reader:
        content = complete(step, reader.content())
        return dict(content.scalars) | {
            f"{array}/{name}": read(reader, array, name, logged.shape, logged.dtype).reshape(logged.shape)
            for array, logged_tensors in content.arrays.items()
            for name, logged in logged_tensors.items()
        }


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert np.asarray(actual[key]).shape == np.shape(value), key
        assert np.asarray(actual[key]).tobytes() == np.asarray(value).tobytes(), key


# Contents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("writer", "dtype"), CASES)
def test_every_container_preserves_every_bit(tmp_path, writer, dtype):
    state = the_state(dtype)
    folder = write(tmp_path, writer, state)
    assert_same_bits(read_all(folder), state)


@pytest.mark.parametrize(("writer", "dtype"), CASES)
@pytest.mark.parametrize("words", ["not finite", "signed zero"])
def test_nan_and_signed_zeros_keep_their_bits(tmp_path, writer, dtype, words):
    special = [np.nan, -np.nan, np.inf, -np.inf] if words == "not finite" else [0.0, -0.0, -0.0, 0.0]
    values = np.array(special, DTYPES[dtype])
    state = {"parameter/w": values, "gradient/w": values}
    assert_same_bits(read_all(write(tmp_path, writer, state)), state)


@pytest.mark.parametrize(("writer", "dtype"), CASES)
def test_a_step_is_described_without_its_tensors(tmp_path, writer, dtype):
    state = the_state(dtype) | {"epoch": np.int64(3), "parameters": np.ones(2, np.float32)}
    log, step = only_step(write(tmp_path, writer, state))
    assert (step.number, step.path.parent) == (7, tmp_path)
    with log.open(step) as reader:
        content = reader.content()
    assert set(content.arrays) == set(STATES)
    for tensors in content.arrays.values():
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
            name: (shape, dtype) for name, shape in TENSORS.items()
        }
    assert content.scalars == {"loss": float(state["loss"]), "learning_rate": 0.1}
    assert sorted(content.unused) == ["epoch", "parameters"]


@pytest.mark.parametrize("container", ["safetensors", "npz"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.int32])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scalar_is_read_from_any_numeric_type(tmp_path, container, dtype, shape):
    state = the_state("float32") | {"loss": np.full(shape, 3, dtype)}
    write_step(tmp_path, 7, state, container)
    log, step = only_step(tmp_path)
    with log.open(step) as reader:
        assert reader.content().scalars["loss"] == 3.0


@pytest.mark.parametrize("container", ["safetensors", "npz"])
def test_a_loss_that_is_not_a_single_number_is_ignored(tmp_path, container):
    write_step(tmp_path, 7, the_state("float32") | {"loss": np.ones(3)}, container)
    log, step = only_step(tmp_path)
    with log.open(step) as reader:
        content = reader.content()
    assert content.unused == ("loss",)
    assert "loss" not in content.scalars


LARGE = {"matrix": (61, 97), "vector": (50,)}


@pytest.fixture(scope="module")
def large_logs(tmp_path_factory):
    """Logs written in all ways, and their state, which is larger than a buffer of the zip reader."""
    state = the_state("float64", LARGE)
    return {writer: write(tmp_path_factory.mktemp("log"), writer, state) for writer in WRITERS}, state


@pytest.mark.parametrize("writer", WRITERS)
@given(
    cuts=st.lists(st.tuples(st.sampled_from(list(LARGE)), st.integers(0), st.integers(0)), min_size=1, max_size=6)
)
def test_slices_at_any_offset_and_in_any_order_equal_the_array(large_logs, writer, cuts):
    folders, state = large_logs
    log, step = only_step(folders[writer])
    with log.open(step) as reader:
        for array, (tensor, a, b) in itertools.product(("parameter", "gradient"), cuts):
            size = int(np.prod(LARGE[tensor]))
            start, stop = sorted((a % (size + 1), b % (size + 1)))
            if start == stop:
                start, stop = (start, start + 1) if start < size else (0, size)
            part = read(reader, array, tensor, LARGE[tensor], "float64", start, stop)
            np.testing.assert_array_equal(part, state[f"{array}/{tensor}"].ravel()[start:stop])


def test_steps_are_sorted_by_number_and_other_files_are_ignored(tmp_path):
    write_log(tmp_path, random_walk(3), numbers=[10, 9, 100])
    write_step(tmp_path, 11, random_walk(1)[0], "npz")
    for name in (
        "step_12.safetensors.tmp",
        "step_x.npz",
        "mystep1.npz",
        "step_13.pt",
        ".step_14.npz",
        "config.json",
    ):
        (tmp_path / name).write_bytes(b"other")
    assert [step.number for step in open_source(tmp_path).steps()] == [9, 10, 11, 100]
    assert [step.number for step in open_source(tmp_path, "npz").steps()] == [11]
    assert [step.number for step in open_source(tmp_path, "safetensors").steps()] == [9, 10, 100]


def test_listing_opens_no_step(tmp_path):
    (tmp_path / "step_1.npz").write_bytes(b"no archive")
    (tmp_path / "step_02.safetensors").write_bytes(b"")
    assert [step.number for step in open_source(tmp_path).steps()] == [1, 2]


# Refused logs ------------------------------------------------------------------------------------------------


def refusal(folder, format=None):
    """Return the error for the only step of a log, which must name it."""
    _, step = only_step(folder, format)
    with pytest.raises(InputError) as caught:
        read_all(folder)
    assert str(step.path) in caught.value.where
    assert f"step {step.number}" in caught.value.where
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("writer", WRITERS)
@given(length=st.integers(0))
@reads_only
def test_a_truncated_file_is_refused_and_named(large_logs, tmp_path, writer, length):
    (path,) = large_logs[0][writer].iterdir()
    whole = path.read_bytes()
    (tmp_path / path.name).write_bytes(whole[: length % len(whole)])
    refusal(tmp_path)


@pytest.mark.parametrize("writer", ["npz", "npz, compressed", "npz, Fortran order", "npz, big endian"])
@given(position=st.integers(0), flip=st.integers(1, 255))
@reads_only
def test_an_archive_with_one_wrong_byte_never_yields_a_wrong_value(tmp_path, writer, position, flip):
    state = the_state("float32")
    (path,) = write(tmp_path, writer, state).iterdir()
    damaged = bytearray(path.read_bytes())
    damaged[position % len(damaged)] ^= flip
    path.write_bytes(damaged)
    try:
        content = read_all(tmp_path)
    except InputError:
        refusal(tmp_path)
    else:
        # This byte contains no data (for example, a date), or it hides entries of the table of the archive.
        assert {key for key in state if key.startswith(("parameter", "gradient"))} <= content.keys()
        assert_same_bits(content, {key: state[key] for key in content})


@pytest.mark.parametrize("container", ["safetensors", "npz"])
def test_a_file_of_another_format_is_refused(tmp_path, container):
    other = {"npz": "safetensors", "safetensors": "npz"}[container]
    write_step(tmp_path, 7, the_state("float32"), other).rename(tmp_path / f"step_7.{container}")
    assert f"not a{'n npz' if container == 'npz' else ' safetensors'} file" in refusal(tmp_path).why


@pytest.mark.parametrize("name", ["step_7.safetensors", "step_7.npz"])
def test_unreadable_files_are_refused(tmp_path, name):
    (tmp_path / "folder" / name).mkdir(parents=True)
    refusal(tmp_path / "folder")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / name).symlink_to("nowhere")
    refusal(tmp_path / "link")


def test_a_step_without_read_permission_is_refused(tmp_path, monkeypatch):
    path = write_step(tmp_path, 7, the_state("float32"), "npz")
    path.chmod(0)
    if os.access(path, os.R_OK):  # the superuser can read everything: simulate the error
        monkeypatch.setattr(
            "zipfile.ZipFile.__init__", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
    assert "Permission denied" in refusal(tmp_path).what


@pytest.mark.parametrize("key", ["parameter/w", "gradient/w", "loss", "other"])
def test_a_pickle_in_an_archive_is_never_loaded(tmp_path, key):
    trace = tmp_path / "trace"
    log = tmp_path / "log"
    state = {"parameter/w": np.ones(2), "gradient/w": np.ones(2), "loss": np.float64(1)}
    state[key] = np.array([Payload(trace), 1], dtype=object)
    write_step(log, 7, state, "npz")
    if "/" in key:
        assert "object" in refusal(log).what
    else:
        assert only_content(log).unused == (key,)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()  # the trap works


def test_a_member_of_an_archive_that_is_not_an_array_is_omitted_with_a_note(tmp_path):
    write_step(tmp_path, 7, {"parameter/w": np.ones(2), "gradient/w": np.ones(2)}, "npz")
    with zipfile.ZipFile(tmp_path / "step_7.npz", "a") as archive:
        archive.writestr("readme.txt", "text")
        archive.writestr("loss", np.float64(1.0).tobytes())
        archive.writestr("folder/", "")
    content = only_content(tmp_path)
    assert set(content.arrays) == {"parameter", "gradient"}
    assert [note.partition(" was not read: it is not an array")[0] for note in content.notes] == [
        "readme.txt",
        "loss",
    ]
    assert not content.scalars


def only_content(folder):
    log, step = only_step(folder)
    with log.open(step) as reader:
        return reader.content()


def test_a_pickle_under_the_name_of_a_step_is_never_loaded(tmp_path):
    trace = tmp_path / "trace"
    log = tmp_path / "log"
    log.mkdir()
    (log / "step_7.npz").write_bytes(pickle.dumps(Payload(trace)))
    refusal(log)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda s: s.pop("gradient/scale"), "tensor 'scale' has no gradient"),
        (lambda s: s.pop("parameter/scale"), "tensor 'scale' has no parameter"),
        (lambda s: s.pop("hvp/scale"), "tensor 'scale' has no hvp"),
        (lambda s: s.update({"gradient/scales": s.pop("gradient/scale")}), "tensor 'scale' has no gradient"),
        (
            lambda s: s.update({"gradient/scale": np.ones(2, np.float32)}),
            "gradient has shape (2,), but its parameter has ()",
        ),
        (lambda s: s.update({"parameter/scale": np.int32(1)}), "is not a float"),
        (lambda s: s.update({"gradient/scale": np.bool_(True)}), "is not a float"),
    ],
)
@pytest.mark.parametrize("container", ["safetensors", "npz"])
def test_an_inconsistent_step_is_refused_and_the_tensor_is_named(tmp_path, container, change, what):
    state = the_state("float32")
    change(state)
    write_step(tmp_path, 7, state, container)
    error = refusal(tmp_path)
    assert what in error.what
    assert "of tensor 'scale'" in error.where


@pytest.mark.parametrize("container", ["safetensors", "npz"])
@pytest.mark.parametrize("lost", ["parameter", "gradient"])
def test_a_step_without_parameters_or_without_gradients_is_refused(tmp_path, container, lost):
    state = {key: value for key, value in the_state("float32").items() if not key.startswith(lost)}
    write_step(tmp_path, 7, state, container)
    assert re.search(f"no {lost}", refusal(tmp_path).what)


def test_bfloat16_in_npz_is_refused_because_numpy_loses_the_dtype(tmp_path):
    write_step(tmp_path, 7, the_state("bfloat16"), "npz")
    assert "is not a float" in refusal(tmp_path).what


def test_an_unsupported_safetensors_dtype_is_refused(tmp_path):
    state = {"parameter/w": np.ones(3, np.float32), "gradient/w": np.ones(3, ml_dtypes.float8_e4m3fn)}
    safetensors.numpy.save_file(state, tmp_path / "step_7.safetensors")
    assert "F8_E4M3" in refusal(tmp_path).what


@pytest.mark.parametrize(
    ("names", "step"),
    [
        (["step_1.npz", "step_1.safetensors"], 1),
        (["step_1.npz", "step_01.npz"], 1),
        (["step_0.npz", "step_00.safetensors"], 0),
    ],
)
def test_a_duplicate_step_is_refused_and_both_files_are_named(tmp_path, names, step):
    for name in [*names, "step_2.npz"]:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError) as caught:
        open_source(tmp_path).steps()
    assert all(name in caught.value.what for name in names)
    assert f"step {step}" in caught.value.where


@pytest.mark.parametrize("format", [name for name, format in FORMATS.items() if format.scalars is None])
def test_a_folder_without_steps_is_refused(tmp_path, format):
    (tmp_path / "notes.txt").write_text("nothing yet")
    with pytest.raises(InputError, match=r"there are no (step files|ledgers)") as caught:
        open_source(tmp_path, format).steps()
    assert caught.value.where == str(tmp_path)


def test_files_and_unknown_formats_are_refused(tmp_path):
    file = write_step(tmp_path, 1, the_state("float32"))
    for path, format, what in [
        (tmp_path / "nowhere", None, "no such file or folder"),
        (file, None, "this is a file"),
        (tmp_path, "lmdb", "unknown format 'lmdb'"),
    ]:
        with pytest.raises(InputError, match=what):
            open_source(path, format)


def test_a_folder_that_was_removed_is_refused(tmp_path):
    log = open_source(write_log(tmp_path / "log", random_walk(1)))
    (tmp_path / "log").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="cannot list the log folder"):
        log.steps()
