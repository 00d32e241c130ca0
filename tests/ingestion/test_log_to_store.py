"""Ingest of logs into a trajectory: each step exactly once, or an error that leaves no files."""

import functools
import itertools
import os
import shutil

import numpy as np
import pytest

from logs import DTYPES, TENSORS, random_walk, write_log, write_step
from natgrad.recording.recorder import Recorder
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits, storage_dtype
from natgrad.sources.checkpoints.safetensors_file import SafetensorsFile
from natgrad.sources.checkpoints.step_folder import StepFolder
from natgrad.store import open_trajectory
from opened import ingest

ELEMENTS = 17  # of `logs.TENSORS`
WIDE = 8  # elements of a chunk: three columns of one step, the last with an element of padding
DEEP = 3 * ELEMENTS  # elements of a chunk: one column of three steps


def small(chunk_elements):
    """Limits with which a short run has several chunks and commits."""
    return IngestLimits(chunk_elements=chunk_elements, commit_bytes=1)


@pytest.fixture(name="ingest", params=[WIDE, DEEP], ids=["wide", "deep"])
def small_ingest(request):
    """`ingest` with small limits."""
    return functools.partial(ingest, limits=small(request.param))


def read(trajectory, name):
    """All committed states of an array, as words."""
    parts = []
    for column in range(trajectory.columns):
        out = np.zeros((trajectory.n_states, trajectory.chunk[1]), storage_dtype(trajectory.dtypes[name]))
        trajectory.read(name, 0, trajectory.n_states, column, out)
        first, last = trajectory.column(column)
        parts.append(out[:, : last - first])
    return np.concatenate(parts, axis=1)


def stored(store, row, key):
    """A tensor of a state by its key in the log, in the dtype of the store."""
    array, _, name = key.partition("/")
    trajectory = open_trajectory(store)
    (tensor,) = (tensor for tensor in trajectory.layout.tensors if tensor.name == name)
    values = read(trajectory, array)[row, tensor.offset : tensor.stop]
    return values.view(DTYPES[trajectory.dtypes[array]]).reshape(tensor.shape)


def assert_holds(store, states, numbers=None):
    """Assert that a trajectory contains exactly these states, bit for bit."""
    trajectory = open_trajectory(store)
    numbers = list(range(len(states))) if numbers is None else numbers
    assert trajectory.scalar("step").tolist() == numbers
    for row, state in enumerate(states):
        for key, value in state.items():
            if "/" in key:
                assert stored(store, row, key).tobytes() == value.tobytes(), (row, key)
            else:
                assert trajectory.scalar(key)[row] == value


def content(store, commits=True):
    """Files of a store, without temporary files of a killed writer."""
    return {
        path.relative_to(store): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.suffix not in (".partial", ".tmp") and (commits or path.parent.name != "commits")
    }


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def random_bits(steps, dtype, tensors=TENSORS, seed=0):
    """States with arbitrary bits: NaNs of every payload, infinities, subnormals."""
    rng = np.random.default_rng(seed)
    words = np.dtype(DTYPES[dtype])
    return [
        {
            f"{array}/{name}": np.frombuffer(rng.bytes(int(np.prod(shape)) * words.itemsize), words).reshape(shape)
            for array in ("parameter", "gradient", "hvp")
            for name, shape in tensors.items()
        }
        | {"loss": np.float64(step), "learning_rate": np.float64(0.1)}
        for step in range(steps)
    ]


# Stored data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "container"),
    [case for case in itertools.product(DTYPES, ["safetensors", "npz"]) if case != ("bfloat16", "npz")],
)
def test_each_dtype_is_stored_bit_for_bit(ingest, log, store, dtype, container):
    states = random_bits(5, dtype)
    summary = ingest(write_log(log, states, container=container), store)
    assert_holds(store, states)
    assert summary.dtypes == dict.fromkeys(("parameter", "gradient", "hvp"), dtype)
    assert (summary.new_steps, summary.steps, summary.first_step, summary.last_step) == (5, 5, 0, 4)
    assert (summary.tensors, summary.elements) == (len(TENSORS), ELEMENTS)
    assert len(open_trajectory(store).records()) > 1


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)))
def test_a_model_of_mixed_dtypes_is_stored_exactly(ingest, log, store, dtypes):
    with np.errstate(over="ignore", under="ignore"):
        states = random_walk(4)
        for state, (index, name) in itertools.product(states, enumerate(TENSORS)):
            special = np.resize([np.inf, -0.0, np.nan, 1e-42, 65504.0, 3.3895314e38], TENSORS[name])
            state[f"parameter/{name}"] = state[f"parameter/{name}"].astype(DTYPES[dtypes[index % 2]])
            state[f"gradient/{name}"] = special.astype(DTYPES[dtypes[index % 2]])
    ingest(write_log(log, states), store)
    assert {tensor.name: tensor.dtype for tensor in open_trajectory(store).layout.tensors} == {
        name: dtypes[index % 2] for index, name in enumerate(TENSORS)
    }
    for row, state in enumerate(states):
        for key in state:
            if "/" in key:
                wide = np.asarray(state[key], np.float64)
                assert np.asarray(stored(store, row, key), np.float64).tobytes() == wide.tobytes(), key


def test_progress_ends_at_the_number_of_new_steps(log, store):
    calls = []
    write_log(log, random_walk(7))
    ingest(log, store, limits=small(DEEP), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 7), (6, 7), (7, 7)]


# Repeated ingests --------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """Numbers of the steps whose files are opened, in order."""
    numbers, open_step = [], StepFolder.open

    def counted(self, step):
        numbers.append(step.number)
        return open_step(self, step)

    monkeypatch.setattr(StepFolder, "open", counted)
    return numbers


@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_two_ingests_give_the_same_bytes_as_one(ingest, tmp_path, log, store, opened, first):
    states = random_walk(8)
    write_log(log, states[:first])
    ingest(log, store)
    for number in range(first, 8):
        write_step(log, number, states[number])
    opened.clear()
    summary = ingest(log, store)
    assert (summary.new_steps, summary.steps) == (8 - first, 8)
    assert set(opened) == set(range(first, 8))
    assert_holds(store, states)
    ingest(log, tmp_path / "once" / "trajectory.zarr")
    once = open_trajectory(tmp_path / "once" / "trajectory.zarr")
    assert open_trajectory(store).fingerprint() == once.fingerprint()
    assert content(store, commits=False) == content(once.storage.local_path, commits=False)


def test_an_ingest_of_nothing_new_opens_no_step_and_changes_no_file(log, store, opened):
    ingest(write_log(log, random_walk(4)), store)
    before = content(store)
    opened.clear()
    summary = ingest(log, store)
    assert (summary.new_steps, summary.steps) == (0, 4)
    assert opened == []
    assert content(store) == before


def test_steps_deleted_from_the_log_remain_ingested(log, store):
    states = random_walk(6)
    ingest(write_log(log, states[:3]), store)
    shutil.rmtree(log)
    ingest(write_log(log, states[3:], numbers=[3, 4, 5]), store)
    assert_holds(store, states)


def test_a_touched_file_with_the_same_content_is_accepted(ingest, log, store, opened):
    states = random_walk(5)
    ingest(write_log(log, states[:4]), store)
    before = content(store, commits=False)
    os.utime(log / "step_2.safetensors", ns=(1, 1))
    opened.clear()
    assert ingest(log, store).new_steps == 0
    assert set(opened) == {2, 3}
    opened.clear()
    assert ingest(log, store).new_steps == 0
    assert opened == []
    assert content(store, commits=False) == before
    write_step(log, 4, states[4])
    assert ingest(log, store).new_steps == 1
    assert_holds(store, states)


def next_after(value):
    return np.nextafter(value, np.inf, dtype=value.dtype)


CHANGES = {
    "a different parameter": lambda s: s.update({"parameter/scale": next_after(s["parameter/scale"])}),
    "a different gradient": lambda s: s.update({"gradient/layer.weight": -s["gradient/layer.weight"]}),
    "loss": lambda s: s.update({"loss": s["loss"] + 1}),
    "learning_rate": lambda s: s.pop("learning_rate"),
    "different tensors": lambda s: s.update({"parameter/more": np.ones(1), "gradient/more": np.ones(1)}),
    # The stored float32 values are these values rounded, so the content is different.
    "dtypes": lambda s: s.update({"gradient/scale": s["gradient/scale"].astype(np.float64) * (1 + 1e-12)}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_step_that_changed_after_it_was_ingested_is_refused(ingest, log, store, what):
    states = random_walk(5)
    ingest(write_log(log, states), store)
    before = content(store)
    CHANGES[what](states[3])
    os.utime(write_step(log, 3, states[3]), ns=(1, 1))
    with pytest.raises(InputError, match=f"step 3 is already ingested, with .*{what}") as caught:
        ingest(log, store)
    assert caught.value.where == f"{log / 'step_3.safetensors'}, step 3"
    assert content(store) == before
    new_states = random_walk(5, seed=1)
    ingest(write_log(log, new_states), store, overwrite=True)
    assert_holds(store, new_states)


def test_a_step_before_the_last_ingested_one_is_refused(log, store):
    states = random_walk(5)
    write_log(log, [*states[:2], *states[3:]], numbers=[0, 1, 3, 4])
    ingest(log, store, allow_gaps=True)
    write_step(log, 2, states[2])
    with pytest.raises(InputError, match="step 2 is new, but steps up to 4 are already ingested"):
        ingest(log, store)
    ingest(log, store, overwrite=True)
    assert_holds(store, states)


def test_overwriting_from_a_bad_log_keeps_the_old_trajectory(log, store):
    states = random_walk(4)
    ingest(write_log(log, states), store)
    (log / "step_2.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="cannot read a safetensors file"):
        ingest(log, store, overwrite=True)
    assert_holds(store, states)


def test_a_folder_that_is_not_a_trajectory_is_kept(log, store):
    store.mkdir(parents=True)
    (store / "thesis.tex").write_text("years of work")
    write_log(log, random_walk(2))
    for overwrite in (False, True):
        with pytest.raises(InputError, match="no trajectory here"):
            ingest(log, store, overwrite=overwrite)
        assert names(store) == {"thesis.tex"}


# Steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers",
    [[0], [7], [0, 1, 2], [5, 6, 7], [0, 10, 20, 30], [3, 103], [1000, 1500, 2000]],
)
def test_evenly_spaced_steps_are_ingested(log, store, numbers):
    states = random_walk(len(numbers))
    ingest(write_log(log, states, numbers), store)
    assert_holds(store, states, numbers)


@pytest.mark.parametrize(
    ("numbers", "what", "file"),
    [
        ([0, 1, 2, 4, 5], "step 3 is missing: steps are 1 apart, but 4 follows 2", 4),
        ([0, 2, 3, 4], "step 1 is missing: steps are 1 apart, but 2 follows 0", 2),
        ([0, 10, 20, 40], "step 30 is missing: steps are 10 apart, but 40 follows 20", 40),
        ([0, 10, 20, 25, 30, 40, 50], "the steps are not evenly spaced: steps are 10 apart, but 25 follows 20", 25),
    ],
)
def test_a_gap_is_rejected_unless_gaps_are_allowed(log, store, numbers, what, file):
    states = random_walk(len(numbers))
    write_log(log, states, numbers)
    with pytest.raises(InputError, match=what) as caught:
        ingest(log, store)
    assert caught.value.where == f"{log / f'step_{file}.safetensors'}, step {file}"
    assert "--allow-gaps" in caught.value.remedy
    assert not store.parent.exists()
    ingest(log, store, allow_gaps=True)
    assert_holds(store, states, numbers)


@pytest.mark.parametrize(("before", "after"), [([0, 1, 2], [4]), ([0, 10], [11]), ([0, 1], [3, 5])])
def test_a_gap_after_the_ingested_steps_is_rejected(log, store, before, after):
    states = random_walk(len(before) + len(after))
    ingest(write_log(log, states[: len(before)], before), store)
    write_log(log, states[len(before) :], after)
    with pytest.raises(InputError, match=f"{after[0]} follows {before[-1]}"):
        ingest(log, store)
    assert_holds(store, states[: len(before)], before)
    ingest(log, store, allow_gaps=True)
    assert_holds(store, states, before + after)


# Errors ------------------------------------------------------------------------------------------------------


def drop(key):
    return lambda state: state.pop(key)


def put(**changes):
    return lambda state: state.update({key.replace("__", "/"): value for key, value in changes.items()})


def retype(state):
    state["gradient/scale"] = state["gradient/scale"].astype(np.float64)


def reshape(state):
    for array in ("parameter", "gradient"):
        state[f"{array}/layer.weight"] = state[f"{array}/layer.weight"].T


def rename(state):
    for array in ("parameter", "gradient"):
        state[f"{array}/gain"] = state.pop(f"{array}/scale")


BAD_STEPS = {
    "shape": (reshape, r"shape changes from \(4, 3\) to \(3, 4\)", "layer.weight"),
    "dtype": (retype, "dtype changes from float32 to float64", "scale"),
    "name": (rename, "tensor 'scale' is missing at step 3", "scale"),
    "new tensor": (put(parameter__more=np.ones(2), gradient__more=np.ones(2)), "'more' is new at step 3", "more"),
    "no gradient": (drop("gradient/scale"), "tensor 'scale' has no gradient", "scale"),
    "integers": (put(gradient__scale=np.int64(3)), "is not a float", "scale"),
    "curvature": (
        put(**{f"hvp__{name}": np.ones(shape) for name, shape in TENSORS.items()}),
        "hvp is not logged",
        "",
    ),
}


@pytest.mark.parametrize("container", ["safetensors", "npz"])
@pytest.mark.parametrize("bad", BAD_STEPS)
def test_a_step_of_another_model_is_refused_before_a_byte_is_written(tmp_path, log, container, bad):
    change, what, tensor = BAD_STEPS[bad]
    states = random_walk(6)
    good = dict(states[3])
    change(states[3])
    write_log(log, states, container=container)
    store = tmp_path / "deep" / "out" / "trajectory.zarr"
    with pytest.raises(InputError, match=what) as caught:
        ingest(log, store)
    # If hvp is logged at one step only, the error names the first step without it.
    location = "step 0" if bad == "curvature" else f"{log / f'step_3.{container}'}, step 3"
    assert location in caught.value.where
    assert not tensor or f"tensor {tensor!r}" in caught.value.where
    assert names(tmp_path) == names(log.parent) == {"log", *(f"log/step_{n}.{container}" for n in range(6))}
    write_step(log, 3, good, container)
    ingest(log, store)
    assert_holds(store, [*states[:3], good, *states[4:]])


@pytest.mark.parametrize("bad", ["shape", "dtype", "name", "new tensor", "no gradient", "curvature"])
def test_a_step_of_another_model_is_not_appended(log, store, bad):
    states = random_walk(4)
    ingest(write_log(log, states[:3]), store)
    BAD_STEPS[bad][0](states[3])
    write_step(log, 3, states[3])
    with pytest.raises(InputError) as caught:
        ingest(log, store)
    assert f"{log / 'step_3.safetensors'}, step 3" in caught.value.where
    assert_holds(store, states[:3])


def test_tensors_that_swap_their_dtypes_are_not_appended(log, store):
    # The dtypes of the arrays do not change, but the rounding floor of each tensor follows its own dtype.
    def state(weight, bias):
        tensors = {"weight": np.ones(3, DTYPES[weight]), "bias": np.ones(2, DTYPES[bias])}
        return {f"{array}/{name}": value for array in ("parameter", "gradient") for name, value in tensors.items()}

    ingest(write_log(log, [state("float32", "bfloat16")] * 2), store)
    write_step(log, 2, state("bfloat16", "float32"))
    with pytest.raises(InputError, match=r"float32 of shape \(2,\) instead of bfloat16 of shape \(2,\)") as caught:
        ingest(log, store)
    assert "step 2, parameter of tensor 'bias'" in caught.value.where


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-40])


def damage_one_byte(path):
    """Change the data of a tensor in an archive, which is detected only when the data are read."""
    whole = path.read_bytes()
    start = whole.index(b"gradient/layer.weight.npy")
    value = whole.index(b"\n", start) + 1
    path.write_bytes(whole[:value] + bytes([whole[value] ^ 255]) + whole[value + 1 :])


DAMAGES = [("safetensors", damage_truncated), ("npz", damage_truncated), ("npz", damage_one_byte)]


@pytest.mark.parametrize(("container", "damage"), DAMAGES)
@pytest.mark.parametrize("bad", [0, 4, 6])
@pytest.mark.parametrize("out_is_there", [False, True])
def test_a_damaged_file_does_not_affect_the_next_run(
    ingest, tmp_path, log, store, container, damage, bad, out_is_there
):
    states = random_walk(7)
    write_log(log, states, container=container)
    path = log / f"step_{bad}.{container}"
    whole, times = path.read_bytes(), path.stat()
    damage(path)
    os.utime(path, ns=(1, 1))  # an old file, so it is not being written
    if out_is_there:
        store.parent.mkdir()
        (store.parent / "notes.txt").write_text("mine")
    with pytest.raises(InputError) as caught:
        ingest(log, store)
    assert f"{path}, step {bad}" in caught.value.where
    if damage is damage_one_byte:
        assert "gradient of tensor 'layer.weight'" in caught.value.where
    if not store.exists():
        assert names(store.parent) == ({"notes.txt", f".{store.name}.lock"} if out_is_there else set())
        assert store.parent.exists() == out_is_there
    else:
        rows = open_trajectory(store).n_states
        assert 0 < rows <= bad
        assert_holds(store, states[:rows])
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    ingest(log, store)
    ingest(log, tmp_path / "clean" / "trajectory.zarr")
    assert content(store) == content(tmp_path / "clean" / "trajectory.zarr")


def restart_with_another_model(path):
    os.utime(write_step(path.parent, 5, random_walk(1, {"scale": ()})[0]), ns=(1, 1))


def remove(path):
    path.unlink(missing_ok=True)


def log_again(path):
    os.utime(write_step(path.parent, 5, random_walk(1, seed=9)[0]), ns=(1, 1))


@pytest.mark.parametrize(
    ("interfere", "what"),
    [
        (restart_with_another_model, "step 5 changed while it was read"),
        (log_again, "step 5 changed while it was read"),
    ],
)
def test_a_file_that_changes_between_description_and_reading_is_refused(log, store, interfere, what):
    states = random_walk(7)
    write_log(log, states)

    def disturb(done, total):
        if done == 3:
            interfere(log / "step_5.safetensors")

    with pytest.raises(InputError, match=what) as caught:
        ingest(log, store, limits=small(DEEP), progress=disturb)
    assert caught.value.where == f"{log / 'step_5.safetensors'}, step 5"
    assert_holds(store, states[:3])
    write_step(log, 5, states[5])
    ingest(log, store)
    assert_holds(store, states)


def test_a_step_that_was_opened_is_read_after_its_file_was_removed(log, store):
    states = random_walk(7)
    write_log(log, states)
    summary = ingest(
        log, store, limits=small(DEEP), progress=lambda done, total: remove(log / "step_5.safetensors")
    )
    assert summary.new_steps == 7
    assert_holds(store, states)


def test_a_removed_file_changes_the_listing(log, store):
    # Steps that were not written recently are not kept open.
    states = random_walk(9)
    for path in write_log(log, states).iterdir():
        os.utime(path, (1, 1))
    summary = ingest(
        log, store, limits=small(DEEP), progress=lambda done, total: remove(log / "step_8.safetensors")
    )
    assert summary.new_steps == 8
    assert_holds(store, states[:8])


def test_a_stored_step_whose_file_is_removed_while_it_is_compared_does_not_end_the_ingest(log, store, monkeypatch):
    states = random_walk(9)
    ingest(write_log(log, states[:6]), store)
    write_log(log, states)
    # The new file of step 0 has to be compared with the stored state, and is removed when it is opened for that.
    first, opened = log / "step_0.safetensors", SafetensorsFile.__init__

    def open_removed(self, step, *arguments):
        if step.number == 0:
            remove(first)
        opened(self, step, *arguments)

    monkeypatch.setattr(SafetensorsFile, "__init__", open_removed)
    assert ingest(log, store).new_steps == 3
    assert_holds(store, states)


# Warnings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_ingested_with_a_warning(ingest, log, store, caplog, dtype, value):
    states = random_walk(5, dtype=dtype)
    states[2]["gradient/layer.weight"][3, 1] = value
    states[4]["parameter/scale"] = np.asarray(value, DTYPES[dtype])
    summary = ingest(write_log(log, states), store)
    assert_holds(store, states)
    (warning,) = summary.warnings
    assert warning == (
        f"not finite: {log / 'step_2.safetensors'}, step 2, gradient of tensor 'layer.weight'; "
        f"{log / 'step_4.safetensors'}, step 4, parameter of tensor 'scale'"
    )
    assert [record.getMessage() for record in caplog.records if record.name == "natgrad.ingestion"] == [warning]


def test_a_diverged_run_causes_one_warning(log, store):
    states = random_walk(9)
    for state in states[2:]:
        state["gradient/layer.bias"][:] = np.nan
    (warning,) = ingest(write_log(log, states), store).warnings
    assert warning.count("gradient of tensor 'layer.bias'") == 5
    assert warning.endswith("; and 2 more")
    assert_holds(store, states)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_finite(log, store, dtype):
    largest = {
        "float16": 65504.0,
        "bfloat16": 3.3895314e38,
        "float32": 3.4028235e38,
        "float64": 1.7976931348623157e308,
    }
    states = random_walk(2, dtype=dtype)
    states[1]["gradient/layer.weight"][:] = -largest[dtype]
    assert ingest(write_log(log, states), store).warnings == []


@pytest.mark.parametrize("container", ["safetensors", "npz"])
def test_missing_scalars_cause_warnings_with_their_consequences(log, store, container):
    states = random_walk(4)
    for state in states:
        del state["learning_rate"]
    del states[1]["loss"]
    states[3]["loss"] = np.float64(np.nan)
    summary = ingest(write_log(log, states, container=container), store)
    assert summary.warnings == [
        "loss is missing or NaN in 2 of 4 steps: results that need it are NaN with status unverifiable",
        "learning_rate is missing or NaN in 4 of 4 steps: "
        "pass it with --learning-rate; only the angles and condition numbers of single updates do not depend on it",
    ]
    loss = [states[0]["loss"], np.nan, states[2]["loss"], np.nan]
    np.testing.assert_array_equal(open_trajectory(store).scalar("loss"), loss)
    np.testing.assert_array_equal(open_trajectory(store).scalar("learning_rate"), np.nan)


def test_unused_keys_cause_a_warning(log, store):
    states = random_walk(3)
    states[1]["accuracy"] = np.float64(0.5)
    (warning,) = ingest(write_log(log, states), store).warnings
    assert warning == "1 keys are not used; the first is 'accuracy' (in step_1.safetensors)"


def test_optional_scalars_are_stored_or_reported_if_they_are_logged_too_late(log, store):
    states = random_walk(4)
    states[1]["hessian_min_eigenvalue"] = np.float64(-0.5)
    ingest(write_log(log, states[:3]), store)
    states[3]["loss_time_derivative"] = np.float64(0.25)
    write_step(log, 3, states[3])
    (warning,) = ingest(log, store).warnings
    assert warning.startswith("loss_time_derivative has been logged since step 3, but is not stored")
    trajectory = open_trajectory(store)
    assert trajectory.scalars == ("loss", "learning_rate", "hessian_min_eigenvalue")
    np.testing.assert_array_equal(trajectory.scalar("hessian_min_eigenvalue"), [np.nan, -0.5, np.nan, np.nan])
    np.testing.assert_array_equal(trajectory.scalar("loss_time_derivative"), np.full(4, np.nan))


# Shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicates", [0, 2])
@pytest.mark.parametrize("hvp", [False, True])
def test_the_shape_that_is_checked_is_that_of_the_trajectory_that_is_stored(log, store, ingest, replicates, hvp):
    recorder, shapes = Recorder(log), []
    state = {"a": np.ones((2, 3), np.float32), "b": np.ones(2)}
    for steps in (range(4), range(4, 9), ()):
        for step in steps:
            of_draws = {name: np.stack([array] * replicates) for name, array in state.items()} if replicates else {}
            draws = {"parameter": of_draws, **({"hvp": of_draws} if hvp else {})}
            recorder.record(
                step,
                parameter=state,
                gradient=state,
                hvp=state if hvp else None,
                replicates=draws if replicates else None,
            )
        ingest(log, store, check_shape=shapes.append)
        assert shapes[-1] == open_trajectory(store).shape
    assert [shape.states for shape in shapes] == [4, 9]


def test_nothing_is_stored_if_the_shape_is_refused(log, store, ingest):
    write_log(log, random_walk(3))

    def refuse(shape):
        raise InputError("too large")

    with pytest.raises(InputError, match="too large"):
        ingest(log, store, check_shape=refuse)
    assert not [path for path in store.parent.rglob("*") if path.is_file()]
