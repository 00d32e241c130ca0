"""Runs whose last state has no gradient yet: all updates are ingested, and a later ingest completes the state.

A hook that runs before each update of the optimizer logs T gradients, and the program logs T + 1 states.
"""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import natgrad
from commands import started
from lazy import Lazy
from logs import random_walk, with_replicates, write_step
from natgrad.app.describe import describe_run
from natgrad.results import dataset
from natgrad.results.inputs import update_table
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits
from natgrad.schema.names import ATTEMPT, STEP
from natgrad.schema.variables import Status
from natgrad.store import open_ledger, open_trajectory
from opened import compute_ledger, ingest, verify_ledger, verify_trajectory

h5py, torch, zarr = Lazy("h5py"), Lazy("torch"), Lazy("zarr")
safetensors_numpy = Lazy("safetensors.numpy")

STATES = 5


def only_parameters(state):
    return {key: value for key, value in state.items() if key.startswith("parameter/")}


def cut(states):
    """Return states, the last of which has only parameters."""
    return [*states[:-1], only_parameters(states[-1])]


# Writers: write the steps from ``first`` on to a folder, and return the SOURCEs ---------------------------------


def write_native(folder, states, first=0, container="safetensors"):
    for number in range(first, len(states)):
        write_step(folder, number, states[number], container)
    return [folder]


def write_npz(folder, states, first=0):
    return write_native(folder, states, first, "npz")


def stacked(states):
    """Stack states along a new first axis. The length of an array is the number of states that have it."""
    arrays = {key: np.stack([state[key] for state in states if key in state]) for key in states[0]}
    return arrays | {"step": np.arange(len(states))}


def write_npz_stack(folder, states, first=0):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "aside.npz", **{key: array for key, array in stacked(states).items() if key != "step"})
    (folder / "aside.npz").rename(folder / "run.npz")
    return [folder / "run.npz"]


def write_hdf5_stack(folder, states, first=0):
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / "run.h5", "w") as file:
        for key, array in stacked(states).items():
            file[key] = array
    return [folder / "run.h5"]


def write_zarr_stack(folder, states, first=0):
    group = zarr.open_group(folder / "run.zarr", mode="w")
    for key, array in stacked(states).items():
        group.create_array(key, data=array)
    return [folder / "run.zarr"]


def tree_of(state, step):
    """Return a state as a trainer of torch saves it."""
    tensors = {"model": {}, "grad": {}}
    for key, value in state.items():
        array, _, name = key.partition("/")
        if name:
            tensors["model" if array == "parameter" else "grad"][name] = torch.from_numpy(np.array(value))
    tree = {name: found for name, found in tensors.items() if found} | {"step": step}
    # A buffer is not trained, with and without gradients.
    tree["model"]["running_mean"] = torch.ones(3)
    if "loss" in state:
        tree |= {"loss": float(state["loss"]), "lr": float(state["learning_rate"])}
    return tree


def write_torch(folder, states, first=0):
    folder.mkdir(exist_ok=True)
    for number in range(first, len(states)):
        torch.save(tree_of(states[number], number), folder / f"checkpoint_{number}.pt")
    return [folder]


def write_huggingface(folder, states, first=0):
    for number in range(first, len(states)):
        checkpoint, state = folder / f"checkpoint-{number}", states[number]
        checkpoint.mkdir(parents=True, exist_ok=True)
        for array, file in (("parameter", "model"), ("gradient", "gradient")):
            tensors = {key.partition("/")[2]: np.asarray(v) for key, v in state.items() if key.startswith(array)}
            if tensors:
                safetensors_numpy.save_file(tensors, checkpoint / f"{file}.safetensors")
        # The Trainer logs the loss of a state with the next update.
        history = [
            {"step": step + 1, "loss": float(known["loss"]), "learning_rate": float(known["learning_rate"])}
            for step, known in enumerate(states[:number])
        ]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return [folder]


def write_joined(folder, states, first=0):
    """Write parameters, gradients and scalars to one source each."""
    for number in range(first, len(states)):
        state = states[number]
        write_step(folder / "parameters", number, only_parameters(state))
        gradients = {key: value for key, value in state.items() if key.startswith("gradient/")}
        if gradients:
            write_step(folder / "gradients", number, gradients)
    rows = [
        {"step": step, "loss": float(state["loss"]), "learning_rate": float(state["learning_rate"])}
        for step, state in enumerate(states)
        if "loss" in state
    ]
    (folder / "scalars.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / "gradients", folder / "parameters", folder / "scalars.jsonl"]


def write_shifted(folder, states, first=0):
    """Write the gradient of each state with the next one, as a hook after the update does."""
    for number in range(max(first - 1, 0), len(states)):
        before = states[number - 1] if number else states[0]
        later = {key: value for key, value in before.items() if not key.startswith("parameter/")}
        write_step(folder, number, only_parameters(states[number]) | later)
    return [folder]


SHIFTS = {"gradient": -1, "loss": -1, "learning_rate": -1}

WRITERS = {
    "native": write_native,
    "npz": write_npz,
    "npz, one file": write_npz_stack,
    "hdf5, one file": write_hdf5_stack,
    "zarr, one group": write_zarr_stack,
    "torch": write_torch,
    "huggingface": write_huggingface,
    "joined": write_joined,
    "shifted": write_shifted,
}


def options_of(writer):
    return {"shift": SHIFTS} if writer == "shifted" else {}


def process(sources, out, **options):
    """Ingest a log and compute its ledger; return the summary of the ingest."""
    summary = ingest(sources, out / "trajectory.zarr", **options)
    compute_ledger(out / "trajectory.zarr", out / "ledger.zarr")
    return summary


def content(out):
    """Return all states, numbers, and inner products as bytes."""
    trajectory, ledger = open_trajectory(out / "trajectory.zarr"), open_ledger(out / "ledger.zarr")
    arrays = {name: trajectory.scalar(name) for name in trajectory.numbers}
    for name, dtype in trajectory.dtypes.items():
        arrays[name] = np.zeros((trajectory.n_states, trajectory.layout.elements), dtype)
        for column in range(trajectory.columns):
            elements = arrays[name][:, slice(*trajectory.column(column))]
            trajectory.read(name, 0, trajectory.n_states, column, elements)
    found = {name: (array.shape, array.tobytes()) for name, array in arrays.items()}
    return found, [array.tobytes() for array in (*ledger.read(), *ledger.steps())]


def labels(out, attempt=None, windows=(1,)):
    trajectory, ledger = open_trajectory(out / "trajectory.zarr"), open_ledger(out / "ledger.zarr")
    _, table = update_table(trajectory, ledger, attempt=attempt)
    return dataset.label(table, windows=windows)


# Every format --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_a_growing_log_gives_the_same_as_one_ingested_in_one_pass(tmp_path, writer):
    write, states, options = WRITERS[writer], random_walk(STATES), options_of(writer)
    for count in (2, 3, STATES):
        sources = write(tmp_path / "grown", cut(states[:count]), max(count - 3, 0))
        summary = process(sources, tmp_path / "out", **options)
        assert (summary.last_step, summary.steps, summary.attempts) == (count - 1, count, 1)
        assert {"gradient", "loss", "learning_rate"} <= {*summary.last_step_lacks}
        assert not [warning for warning in summary.warnings if "missing" in warning or "are kept" in warning]
    process(write(tmp_path / "once", cut(states)), tmp_path / "expected", **options)
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert not [*verify_trajectory(tmp_path / "out/trajectory.zarr"), *verify_ledger(tmp_path / "out/ledger.zarr")]

    again = process(sources, tmp_path / "out", **options)
    assert (again.new_steps, again.completed_steps) == (0, 0)
    if writer in ("huggingface", "shifted"):  # a later step has what the last one lacks
        states = random_walk(STATES + 1)
        summary = process(write(tmp_path / "grown", cut(states), STATES - 1), tmp_path / "out", **options)
        assert (summary.new_steps, summary.completed_steps) == (1, 1)
        states = cut(states)
    else:
        summary = process(write(tmp_path / "grown", states, STATES - 1), tmp_path / "out", **options)
        assert (summary.new_steps, summary.completed_steps, summary.last_step_lacks) == (0, 1, [])
    process(write(tmp_path / "complete", states), tmp_path / "completed", **options)
    assert content(tmp_path / "out") == content(tmp_path / "completed")


def test_only_the_last_state_may_lack_its_gradient(tmp_path):
    states = random_walk(STATES)
    states[2] = only_parameters(states[2])
    with pytest.raises(InputError) as caught:
        ingest(write_native(tmp_path / "log", states), tmp_path / "trajectory.zarr")
    assert caught.value.what == "gradient is not logged at every step"
    assert caught.value.where.endswith("step_2.safetensors, step 2, gradient of tensor 'layer.bias'")
    assert not (tmp_path / "trajectory.zarr").exists()
    with pytest.raises(InputError, match="there is only one state, and it has no gradient"):
        ingest(write_native(tmp_path / "one", cut(random_walk(1))), tmp_path / "trajectory.zarr")


def test_a_state_that_others_follow_must_have_its_gradient(tmp_path):
    states = random_walk(STATES)
    sources = write_native(tmp_path / "log", cut(states[:3]))
    process(sources, tmp_path)
    before = content(tmp_path)
    write_native(tmp_path / "log", [*cut(states[:3]), *states[3:]], 3)
    with pytest.raises(InputError, match="gradient is not logged at every step") as caught:
        ingest(sources, tmp_path / "trajectory.zarr")
    assert "step_2.safetensors, step 2, gradient of tensor" in caught.value.where
    assert content(tmp_path) == before


def test_a_gradient_of_some_tensors_is_not_a_missing_one(tmp_path):
    states = cut(random_walk(STATES))
    states[-1]["gradient/scale"] = np.float32(1.0)
    with pytest.raises(InputError, match=r"tensor 'layer\.bias' has no gradient"):
        ingest(write_native(tmp_path / "log", states), tmp_path / "trajectory.zarr")


def test_a_mapped_key_may_be_missing_in_the_last_state(tmp_path):
    states = [
        {key.replace("gradient/", "slope/"): value for key, value in state.items()} for state in random_walk(3)
    ]
    sources, mapping = write_native(tmp_path / "log", cut(states)), {"gradient": "slope", "loss": "loss"}
    assert ingest(sources, tmp_path / "trajectory.zarr", mapping=mapping).last_step_lacks
    write_native(tmp_path / "first", [only_parameters(states[0]), *states[1:]])
    with pytest.raises(InputError, match="there is no gradient under the key 'slope'"):
        ingest(tmp_path / "first", tmp_path / "other.zarr", mapping={"gradient": "slope"})


def test_a_stack_of_more_steps_than_step_numbers_is_refused(tmp_path):
    arrays = stacked(cut(random_walk(STATES)))
    np.savez(tmp_path / "run.npz", **arrays | {"step": np.arange(STATES - 1)})
    with pytest.raises(InputError, match="of \\(5,\\) steps, not 4"):
        ingest(tmp_path / "run.npz", tmp_path / "trajectory.zarr")


def test_the_learning_rate_is_needed_only_where_an_update_follows(tmp_path):
    states = random_walk(STATES)
    del states[-1]["learning_rate"]
    assert not ingest(write_native(tmp_path / "log", states), tmp_path / "trajectory.zarr").warnings
    del states[1]["learning_rate"]
    (warning,) = ingest(write_native(tmp_path / "other", states), tmp_path / "other.zarr").warnings
    assert warning.startswith("learning_rate is missing or NaN in 2 of 5 steps")


# Results -------------------------------------------------------------------------------------------------------


def test_the_last_update_has_the_results_that_need_only_its_own_gradient(tmp_path):
    states = random_walk(STATES)
    for state in states:
        state |= {key.replace("gradient", "hvp"): value for key, value in state.items() if "gradient" in key}
    process(write_native(tmp_path / "complete", states), tmp_path / "whole")
    process(write_native(tmp_path / "log", cut(states)), tmp_path / "out")
    whole, out = (labels(tmp_path / name, windows=(1, 2)) for name in ("whole", "out"))
    for group in ("model", "tensor"):
        expected, found = whole[group].to_dataset(), out[group].to_dataset()
        for name in expected.data_vars:
            # The residual of eq. (12) needs the loss after the update.
            if {"step", "descent", "window"} <= {*expected[name].dims} and "identity" not in name:
                same = dict(descent=["gradient", "taylor"], window=1)
                np.testing.assert_array_equal(found[name].sel(same), expected[name].sel(same), name)
                earlier = dict(step=slice(0, STATES - 4))
                np.testing.assert_array_equal(found[name].sel(earlier), expected[name].sel(earlier), name)
        # The losses and gradients of both states.
        last = found.isel(step=-1).sel(descent=["corrected", "trapezoid"], window=1)
        np.testing.assert_array_equal(last["status"], Status.UNVERIFIABLE)
        for name in ("angle", "condition_number"):
            assert np.isnan(last[name]).all()
    assert np.isnan(out["model"]["loss_decrease"].sel(window=1)[-1])


def test_a_loss_without_a_gradient_corrects_the_gradient_of_the_last_update(tmp_path):
    states = random_walk(STATES)
    last = only_parameters(states[-1]) | {"loss": states[-1]["loss"]}
    process(write_native(tmp_path / "complete", states), tmp_path / "whole")
    process(write_native(tmp_path / "log", [*states[:-1], last]), tmp_path / "out")
    whole, out = (labels(tmp_path / name)["model"].to_dataset().isel(step=-1) for name in ("whole", "out"))
    for name in ("angle", "status", "gradient_norm"):
        same = dict(descent=["gradient", "corrected"], window=1)
        np.testing.assert_array_equal(out[name].sel(same), whole[name].sel(same), name)
    assert out["status"].sel(descent="trapezoid", window=1) == Status.UNVERIFIABLE
    assert np.isnan(out["gradient_norm"].sel(descent="trapezoid", window=1))


def test_replicates_and_products_of_the_last_state_may_be_missing_alone(tmp_path):
    states = with_replicates(random_walk(STATES), 2)
    last = {key: value for key, value in states[-1].items() if not key.startswith("replicate")}
    process(write_native(tmp_path / "complete", states), tmp_path / "whole")
    for name, end in (("parameters", only_parameters(last)), ("gradients", last)):
        sources = write_native(tmp_path / name, [*states[:-1], end])
        summary = process(sources, tmp_path / f"{name}-out")
        assert {"replicate_parameter", "replicate_hvp", "replicate_loss"} <= {*summary.last_step_lacks}
        found, expected = (open_ledger(tmp_path / out / "ledger.zarr") for out in (f"{name}-out", "whole"))
        products = [ledger.read_chunk("replicate_gram", 0, STATES - 1) for ledger in (found, expected)]
        np.testing.assert_array_equal(*products)
        process(write_native(tmp_path / name, states, STATES - 1), tmp_path / f"{name}-out")
        assert content(tmp_path / f"{name}-out") == content(tmp_path / "whole")


# Restarts, removed steps and sweeps ----------------------------------------------------------------------------


def test_a_restart_keeps_the_incomplete_state_of_the_older_attempt(tmp_path):
    first, second = random_walk(STATES), random_walk(STATES, seed=1)
    sources = write_native(tmp_path / "log", cut(first))
    process(sources, tmp_path)
    older = labels(tmp_path)
    restarted = [*first[:2], *cut(second)[2:]]
    summary = process(write_native(tmp_path / "log", restarted, 2), tmp_path)
    assert not any("not finite" in warning for warning in summary.warnings)
    trajectory = open_trajectory(tmp_path / "trajectory.zarr")
    assert trajectory.scalar(STEP).tolist() == [0, 1, 2, 3, 4, 2, 3, 4]
    assert trajectory.scalar(ATTEMPT).tolist() == [0] * 5 + [1] * 3
    assert [*trajectory.lacking()] == [4, 7]
    assert not [*verify_trajectory(tmp_path / "trajectory.zarr")]
    for name in ("angle", "status"):
        np.testing.assert_array_equal(labels(tmp_path, 0)["model"][name], older["model"][name])
    process(write_native(tmp_path / "log", [*first[:2], *second[2:]], 4), tmp_path)
    process(write_native(tmp_path / "once", [*first[:2], *second[2:]]), tmp_path / "once-out")
    newest = labels(tmp_path)["model"]["angle"].sel(step=[2, 3])
    np.testing.assert_array_equal(newest, labels(tmp_path / "once-out")["model"]["angle"].sel(step=[2, 3]))


def test_another_last_state_is_a_restart(tmp_path):
    states = random_walk(STATES)
    sources = write_native(tmp_path / "log", cut(states))
    process(sources, tmp_path)
    write_native(tmp_path / "log", [*states[:-1], random_walk(STATES, seed=1)[-1]], STATES - 1)
    assert process(sources, tmp_path).attempts == 2
    assert open_trajectory(tmp_path / "trajectory.zarr").scalar(STEP).tolist() == [0, 1, 2, 3, 4, 4]


def test_an_incomplete_state_that_was_removed_from_the_log_is_kept_with_a_warning(tmp_path):
    states = random_walk(STATES)
    sources = write_native(tmp_path / "log", cut(states[:3]))
    process(sources, tmp_path)
    write_native(tmp_path / "log", states, 3)
    for step in range(3):
        (tmp_path / "log" / f"step_{step}.safetensors").unlink()
    (warning,) = [warning for warning in process(sources, tmp_path).warnings if "removed" in warning]
    assert warning.startswith("step 2 was removed from the log before it contained gradient, loss, learning_rate")
    process(write_native(tmp_path / "complete", states), tmp_path / "whole")
    found, whole = (labels(folder)["model"].to_dataset().sel(window=1) for folder in (tmp_path, tmp_path / "whole"))
    np.testing.assert_array_equal(found["step"], whole["step"])
    known = dict(step=[0, 1, 3], descent="gradient")
    np.testing.assert_array_equal(found["angle"].sel(known), whole["angle"].sel(known))
    assert np.isnan(found["angle"].sel(step=2)).all()
    assert np.isnan(found["gradient_norm"].sel(step=2)).all()


def test_a_sweep_of_growing_runs_gives_the_results_of_one_ingested_in_one_pass(tmp_path):
    walks = {"a": random_walk(STATES), "b": random_walk(STATES, seed=1), "c": random_walk(STATES, seed=2)}
    for count in (2, 3, STATES):
        for run, states in walks.items():
            write_native(tmp_path / "log" / run, cut(states[:count]), max(count - 3, 0))
        process(tmp_path / "log", tmp_path / "out", sweep=True)
        process(tmp_path / "log", tmp_path / f"once-{count}", sweep=True)
        found, expected = (labels(tmp_path / out) for out in ("out", f"once-{count}"))
        for group in ("model", "tensor"):
            assert found[group].to_dataset().identical(expected[group].to_dataset()), (count, group)
    write_native(tmp_path / "log" / "a", walks["a"], STATES - 1)
    summary = process(tmp_path / "log", tmp_path / "out", sweep=True)
    assert (summary.new_steps, summary.completed_steps) == (0, 1)
    process(tmp_path / "log", tmp_path / "once", sweep=True)
    assert labels(tmp_path / "out")["model"].to_dataset().identical(labels(tmp_path / "once")["model"].to_dataset())
    assert not [*verify_trajectory(tmp_path / "out" / "trajectory.zarr")]


# Passes, kills and processes -----------------------------------------------------------------------------------


def test_only_the_last_update_is_computed_again(tmp_path):
    states, computed = random_walk(STATES), []
    for count, complete in ((3, False), (STATES, False), (STATES, True)):
        log = states[:count] if complete else cut(states[:count])
        ingest(write_native(tmp_path / "log", log, max(count - 3, 0)), tmp_path / "trajectory.zarr")
        for _ in range(2):
            done = compute_ledger(tmp_path / "trajectory.zarr", tmp_path / "ledger.zarr")
            computed.append(done.computed_updates)
            assert done.states_verified is not None
    assert computed == [2, 0, 3, 0, 1, 0]
    process(write_native(tmp_path / "complete", states), tmp_path / "whole")
    assert content(tmp_path) == content(tmp_path / "whole")


@pytest.mark.parametrize("chunk", [(4, 5), (1, 17)], ids=["several states in a chunk", "one state in a chunk"])
def test_readers_never_see_a_part_of_the_completed_state(tmp_path, chunk):
    states, limits = random_walk(STATES), IngestLimits(chunk=chunk)
    process(write_native(tmp_path / "log", cut(states)), tmp_path, limits=limits)
    before = content(tmp_path)
    reader, writer = (open_trajectory(tmp_path / "trajectory.zarr") for _ in range(2))
    # A writer that is killed has written the gradient, or a part of it, but not the record.
    for column in range(writer.columns):
        writer.write("gradient", STATES - 1, column, np.ones((1, chunk[1]), np.float32))
        writer.abandon()
        for each in (reader, open_trajectory(tmp_path / "trajectory.zarr")):
            found = np.zeros((2, chunk[1]), np.float32)
            each.read("gradient", STATES - 2, STATES, column, found)
            first, last = each.column(column)
            assert np.isnan(found[1, : last - first]).all()
            assert not np.isnan(found[0, : last - first]).any()
    assert content(tmp_path) == before
    assert not [*verify_trajectory(tmp_path / "trajectory.zarr")]
    shutil.rmtree(tmp_path / "ledger.zarr")
    compute_ledger(tmp_path / "trajectory.zarr", tmp_path / "ledger.zarr")
    assert content(tmp_path) == before
    process(write_native(tmp_path / "log", states, STATES - 1), tmp_path)
    process(write_native(tmp_path / "complete", states), tmp_path / "whole", limits=limits)
    assert content(tmp_path) == content(tmp_path / "whole")


# Continues a run in a separate process, kills it before one of its changes to files, and then runs it to the end.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from natgrad.compute.ledger_pass import compute_ledger
from natgrad.ingestion import ingest
from natgrad.storage import open_storage
from natgrad.store.recorded import located
from natgrad.store.verify import verify_ledger, verify_trajectory

os.fsync = lambda descriptor: None
log, base, folder, every = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

AGAIN = (": run natgrad analyze OUT", ": process the log again")

def run(out, last_change=None):
    process = os.fork()
    if process == 0:
        changes = 0

        def watch(event, arguments):
            nonlocal changes
            if event in ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate") or (
                event == "open" and arguments[2] & os.O_ACCMODE
            ):
                if changes == last_change:
                    os.kill(os.getpid(), signal.SIGKILL)
                changes += 1

        sys.addaudithook(watch)
        states, ledger = (open_storage(out / name) for name in ("trajectory.zarr", "ledger.zarr"))
        ingest([open_storage(log)], states)
        compute_ledger(located(states), ledger)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL), status
    return status

number, killed = 0, True
while killed:
    out = folder / str(number)
    shutil.copytree(base, out)
    killed = run(out, number * every) == signal.SIGKILL
    damages = [*verify_trajectory(located(open_storage(out / "trajectory.zarr")))]
    damages += verify_ledger(open_storage(out / "ledger.zarr"))
    assert not [damage for damage in damages if not damage.what.endswith(AGAIN)], damages
    assert run(out) == 0
    number += 1
sys.stdout.write(str(number))
"""


@pytest.mark.parametrize(("complete", "every"), [(False, 7), (True, 5)], ids=["longer", "complete"])
def test_a_process_killed_while_it_completes_the_state_loses_nothing(tmp_path, complete, every):
    states = random_walk(STATES)
    log = write_native(tmp_path / "log", cut(states[:4]))
    process(log, tmp_path / "base")
    grown = states[:4] if complete else cut(states)
    write_native(tmp_path / "log", grown, 3)
    process(write_native(tmp_path / "complete", grown), tmp_path / "whole")
    expected = content(tmp_path / "whole")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED,
            str(tmp_path / "log"),
            str(tmp_path / "base"),
            str(tmp_path / "trials"),
            str(every),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
    for number in range(int(done.stdout)):
        assert content(tmp_path / "trials" / str(number)) == expected, number


def replace_steps(folder, states, first):
    """Write steps like a trainer that renames complete files."""
    write_native(folder.with_name("aside"), states, first)
    for number in range(first, len(states)):
        name = f"step_{number}.safetensors"
        (folder.with_name("aside") / name).replace(folder / name)


def wait_for_states(out, states, lacking):
    """Wait until a trajectory has a number of states and the last one is provisional or not."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (out / "trajectory.zarr" / "zarr.json").exists():
            trajectory = open_trajectory(out / "trajectory.zarr")
            if (trajectory.n_states, bool(trajectory.provisional)) == (states, lacking):
                return
        time.sleep(0.05)
    raise AssertionError(f"there are no {states} states, with the last {'in' if lacking else ''}complete")


def test_a_followed_log_gives_the_same_as_one_ingested_in_one_pass(tmp_path):
    states, out = random_walk(STATES), tmp_path / "out"
    (log,) = write_native(tmp_path / "log", cut(states[:2]))
    words = ["process", log, out, "--follow", "--interval", "0.2", "--workers", "1", "--json"]
    with started(*words) as process_of_command:
        for count in range(2, STATES + 1):
            replace_steps(log, cut(states[:count]), count - 2)
            wait_for_states(out, count, lacking=True)
        replace_steps(log, states, STATES - 1)
        wait_for_states(out, STATES, lacking=False)
        process_of_command.send_signal(signal.SIGINT)
        output, errors = process_of_command.communicate(timeout=240)
    assert process_of_command.returncode == 0, errors
    summary = json.loads(output)
    assert (summary["new_steps"], summary["steps"], summary["attempts"]) == (STATES, STATES, 1)
    compute_ledger(out / "trajectory.zarr", out / "ledger.zarr")  # the interrupt may come before the pass
    process(write_native(tmp_path / "complete", states), tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_a_scan_adds_what_the_last_state_lacked_and_all_outputs_state_it(tmp_path):
    states, root, out = random_walk(STATES), tmp_path / "root", tmp_path / "out" / "run"
    write_native(root / "run", cut(states))
    missing = "step 4, the last, has no gradient, loss, learning_rate: results"
    for _ in range(2):
        natgrad.scan(root, out.parent, workers=1)
        assert describe_run(out)["last_step_lacks"] == ["gradient", "loss", "learning_rate"]
        assert str(natgrad.verify(out)).splitlines()[1].startswith(missing)
        assert missing.replace("step", "Step") in (out / "report.html").read_text()
    write_native(root / "run", states, STATES - 1)
    summary = natgrad.scan(root, out.parent, workers=1)
    assert (summary.processed, summary.unchanged) == (1, 0)
    assert "last_step_lacks" not in describe_run(out)
    assert str(natgrad.verify(out)) == "OK: all checksums match\n"
    assert "results of the last update that need it" not in (out / "report.html").read_text()
    process(write_native(tmp_path / "complete", states), tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_a_last_state_that_still_lacks_something_is_read_again_with_its_weight_decay(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5).state_dict()

    def save(step, **more):
        parameters = {"w": weight.detach() / (step + 1)}
        torch.save({"parameter": parameters, "optimizer": optimizer, **more}, log / f"step_{step}.pt")

    gradient = {"gradient": {"w": torch.ones(3)}}
    for step in range(2):
        save(step, loss=1.0, **gradient)
    save(2)
    assert ingest([log], tmp_path / "trajectory.zarr").last_step_lacks == ["gradient", "loss"]
    save(2, **gradient)
    summary = ingest([log], tmp_path / "trajectory.zarr")
    assert (summary.new_steps, summary.completed_steps, summary.last_step_lacks) == (0, 1, ["loss"])
    assert "tensor_decoupled_weight_decay" in open_trajectory(tmp_path / "trajectory.zarr").tables
