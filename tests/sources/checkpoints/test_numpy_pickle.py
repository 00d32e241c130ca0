"""Pickles with arrays of NumPy are read bit by bit, and nothing else in them is executed."""

import gzip
import os
import pickle
from collections import OrderedDict, defaultdict

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from natgrad.schema.errors import InputError
from natgrad.sources.checkpoints.numpy_pickle import PickleFile
from natgrad.sources.opening import open_source
from natgrad.sources.steps import LoggedStep
from natgrad.storage import LocalStorage, open_storage

DTYPES = ["<f4", ">f8", "<f2", "<i4", ">i8", "|u1", "|b1"]


def read(path):
    with PickleFile(LoggedStep(0, LocalStorage(path))) as container:
        found = {}
        for key, logged in container.tensors.items():
            dtype = np.dtype(np.uint16 if logged.dtype == "bfloat16" else logged.dtype)
            whole = np.zeros(int(np.prod(logged.shape)), dtype)
            container.read(key, 0, whole)
            part = np.zeros(whole.size // 2, dtype)
            container.read(key, whole.size - part.size, part)
            assert part.tobytes() == whole[whole.size - part.size :].tobytes()
            found[key] = whole.reshape(logged.shape)
        return found, dict(container.numbers), dict(container.objects)


@settings(max_examples=60, deadline=None)
@given(
    value=st.sampled_from(DTYPES).flatmap(
        lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=3))
    ),
    protocol=st.sampled_from([3, 4, 5]),
    fortran=st.booleans(),
)
def test_arrays_of_every_protocol_dtype_and_order(tmp_path_factory, value, protocol, fortran):
    path = tmp_path_factory.mktemp("pickle") / "a.pkl"
    saved = value.copy(order="F" if fortran else "C")
    path.write_bytes(pickle.dumps({"a": saved, "b": saved.T, "n": 2, "x": np.float32(0.5)}, protocol=protocol))
    found, numbers, objects = read(path)
    assert numbers == {"n": 2.0, "x": 0.5}
    assert objects == {}
    for key, expected in (("a", value), ("b", value.T)):
        assert found[key].shape == expected.shape
        assert found[key].tobytes() == expected.astype(expected.dtype.newbyteorder("=")).tobytes()


def test_bfloat16_and_containers(tmp_path):
    value = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3)
    tree = OrderedDict(a=[value, (value[0], {"b": 1})], c=defaultdict(dict, {"d": value[:, :1]}), e={1, 2}, f=None)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree))
    found, numbers, _ = read(tmp_path / "a.pkl")
    assert {key: words.tobytes() for key, words in found.items()} == {
        "a/0": value.tobytes(),
        "a/1/0": value[0].tobytes(),
        "c/d": value[:, :1].tobytes(),
    }
    assert numbers == {"a/1/1/b": 1.0}


def test_arrays_of_jax(tmp_path):
    import jax

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": jax.numpy.arange(3.0), "loss": jax.numpy.float32(0.5)}))
    found, _, objects = read(tmp_path / "a.pkl")
    np.testing.assert_array_equal(found["w"], [0, 1, 2])
    assert found["loss"] == 0.5
    assert objects == {}


class Unknown:
    """Writes a file if it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def step_log(folder, tree, content=None):
    folder.mkdir()
    for step in range(2):
        (folder / f"step_{step}.pkl").write_bytes(pickle.dumps(tree) if content is None else content)
    return folder


def content_of(folder):
    log = open_source(open_storage(folder))
    with log.open(log.steps()[0]) as reader:
        return reader.content()


def test_nothing_is_executed_and_unknown_objects_are_reported(tmp_path):
    tree = {"params": {"w": np.ones(3)}, "grads": {"w": np.ones(3)}, "model": Unknown(tmp_path / "executed")}
    content = content_of(step_log(tmp_path / "log", tree))
    assert not (tmp_path / "executed").exists()
    assert any("posix.mkdir" in note and "not imported" in note for note in content.notes)
    assert content.arrays["parameter"].keys() == content.arrays["gradient"].keys() == {"w"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(pickle.dumps({"params": {"w": np.ones(3)}})), r"compressed with gzip(.|\n)*pickle\.dump"),
        (pickle.dumps({"params": {"w": np.ones(300)}}, protocol=2), "protocol 2 or older"),
        (pickle.dumps({"params": {"w": np.ones(3)}}, protocol=0), "opcode"),
        (b"PK\x03\x04", r"zip archive(.|\n)*rename the files to \.pt or \.npz"),
        (b"\x80\x04\x95cjoblib.numpy_pickle\nNumpyArrayWrapper\n", "written by joblib"),
        (pickle.dumps({"params": {"w": np.ones(3)}})[:-20], "cannot read a pickle"),
    ],
)
def test_other_pickles_are_refused_with_the_reason(tmp_path, content, reason):
    with pytest.raises(InputError, match=reason):
        content_of(step_log(tmp_path / "log", None, content))


def test_arrays_of_objects_are_not_parameters(tmp_path):
    with pytest.raises(InputError, match=r"object of 'numpy\.ndarray of objects'"):
        content_of(step_log(tmp_path / "log", {"params": {"w": np.array([1, None], object)}}))


def test_objects_of_several_calls_of_dump_are_the_steps_of_a_run(tmp_path):
    with (tmp_path / "log.pkl").open("wb") as file:
        for step in range(3):
            arrays = {"params": {"w": np.full(2, step)}, "grads": {"w": np.ones(2)}}
            pickle.dump({"step": 10 * step, "loss": step / 4, **arrays}, file)
    log = open_source(open_storage(tmp_path))
    assert [step.number for step in log.steps()] == [0, 10, 20]
    with log.open(log.steps()[2]) as reader:
        assert reader.content().scalars == {"loss": 0.5}
    content = (tmp_path / "log.pkl").read_bytes()
    (tmp_path / "log.pkl").write_bytes(content[:-5])
    with pytest.raises(InputError, match="truncated"):
        open_source(open_storage(tmp_path / "log.pkl")).steps()
