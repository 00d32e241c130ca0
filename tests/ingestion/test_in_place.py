"""Logs that are processed in place: the bits are those of copied states, and a changed file is never read."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import natgrad
from lazy import Lazy
from logs import random_walk, with_replicates, write_log, write_step
from natgrad.app.describe import describe_run
from natgrad.compute import executors
from natgrad.compute.plan import PlanLimits
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits, LedgerChunk
from natgrad.schema.names import ATTEMPT
from natgrad.storage import open_storage
from natgrad.store import copies, open_ledger, open_store, open_trajectory
from opened import compute_ledger, ingest, verify_ledger, verify_trajectory

h5py, torch, distributed = Lazy("h5py"), Lazy("torch"), Lazy("distributed")
safetensors_numpy = Lazy("safetensors.numpy")

STATES = 9
TENSORS = {"layer.10": (3, 2), "layer.9": (7,), "norm": (), "empty": (0, 3), "head": (4, 3)}
SMALL = {
    "limits": IngestLimits(chunk=(2, 5)),
    "pass_limits": PlanLimits(
        tile_bytes=400, least_tile_bytes=1, least_updates=3, minimum_updates=1, read_block_elements=3
    ),
}


def process(source, out, executor=None, *, in_place=False, limits=None, pass_limits=PlanLimits(), **options):
    options |= {} if limits is None else {"limits": limits}
    summary = ingest(source, out / "trajectory.zarr", in_place=in_place, **options)
    arguments = out / "trajectory.zarr", out / "ledger.zarr"
    compute_ledger(*arguments, executor=executor or executors.serial, limits=pass_limits)
    return summary


def content(out):
    """Return all states, numbers and inner products as bytes, and the digests of the states."""
    trajectory, ledger = open_trajectory(out / "trajectory.zarr"), open_ledger(out / "ledger.zarr")
    found = {name: trajectory.scalar(name).tobytes() for name in trajectory.numbers}
    for name, dtype in trajectory.dtypes.items():
        states = np.zeros((trajectory.n_states, trajectory.layout.elements), "u2" if dtype == "bfloat16" else dtype)
        for column in range(trajectory.columns):
            part = states[:, slice(*trajectory.column(column))]
            trajectory.read(name, 0, trajectory.n_states, column, part)
        found[name] = states.tobytes()
    records = ledger.records()
    found["ledger"] = [
        ledger.read_chunk(name, record["start"], record["stop"]).tobytes()
        for name in ledger.products
        for record in records
    ]
    found["digests"] = [(record["start"], record["stop"], record["digest"]) for record in records]
    assert all(digest for _, _, digest in found["digests"])
    return found | {"fingerprint": trajectory.fingerprint()}


def copied_arrays(out):
    """Return the arrays whose states a trajectory contains."""
    names = open_trajectory(out / "trajectory.zarr").array_dtypes
    return {name for name in names if any((out / "trajectory.zarr" / name / "c").glob("**/*"))}


def require_equal(source, folder, executor=None, copies=frozenset(), **options):
    """Process a log by copy and in place, and require the same bits."""
    process(source, folder / "copied", **SMALL, **options)
    summary = process(source, folder / "placed", executor, in_place=True, **SMALL, **options)
    assert content(folder / "placed") == content(folder / "copied")
    assert copied_arrays(folder / "placed") == set(copies)
    assert not [
        *verify_trajectory(folder / "placed/trajectory.zarr"),
        *verify_ledger(folder / "placed/ledger.zarr"),
    ]
    return summary


# The same bits -------------------------------------------------------------------------------------------------


def write_torch(folder, states):
    folder.mkdir()
    for number, state in enumerate(states):
        tree = {"model": {}, "grad": {}, "loss": float(state["loss"]), "lr": 0.1, "step": number}
        for key, value in state.items():
            array, _, name = key.partition("/")
            if name:
                tree["model" if array == "parameter" else "grad"][name] = torch.from_numpy(np.array(value))
        torch.save(tree, folder / f"checkpoint_{number}.pt")
    return folder


def stacked(states):
    return {key: np.stack([state[key] for state in states]) for key in states[0]} | {"step": np.arange(len(states))}


def write_npz_stack(folder, states):
    folder.mkdir()
    np.savez(folder / "run.npz", **stacked(states))
    return folder / "run.npz"


def write_hdf5_stack(folder, states):
    folder.mkdir()
    with h5py.File(folder / "run.h5", "w", userblock_size=512) as file:
        for key, array in stacked(states).items():
            file[key] = array
    return folder / "run.h5"


def write_shards(folder, states):
    """Write each step as a folder with the shards of a model, and the gradients in another file."""
    for number, state in enumerate(states):
        step = folder / f"checkpoint-{number}"
        step.mkdir(parents=True)
        shards, names = {}, [key for key in state if key.startswith("parameter/")]
        for index, key in enumerate(names):
            shards.setdefault(f"model-{index % 2}.safetensors", {})[key.partition("/")[2]] = np.array(state[key])
        for file, tensors in shards.items():
            safetensors_numpy.save_file(tensors, step / file)
        index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
        (step / "model.safetensors.index.json").write_text(json.dumps(index))
        gradients = {key.partition("/")[2]: np.array(v) for key, v in state.items() if key.startswith("gradient/")}
        safetensors_numpy.save_file(gradients, step / "gradient.safetensors")
        history = [{"step": n + 1, "loss": 1.0 / (n + 1), "learning_rate": 0.1} for n in range(number)]
        (step / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


FORMATS = {
    "safetensors": write_log,
    "npz": lambda folder, states: write_log(folder, states, container="npz"),
    "torch": write_torch,
    "npz, one file": write_npz_stack,
    "hdf5, one file": write_hdf5_stack,
    "shards": write_shards,
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_bits_are_those_of_copied_states(tmp_path, form):
    source = FORMATS[form](tmp_path / "log", random_walk(STATES, TENSORS))
    assert not [text for text in require_equal(source, tmp_path).warnings if "copied" in text]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_bits_are_those_of_copied_states_in_every_dtype(tmp_path, dtype):
    require_equal(write_log(tmp_path / "log", random_walk(STATES, TENSORS, dtype)), tmp_path)


def write_in_order(path, arrays, metadata):
    """Write a safetensors file with the tensors in this order; the library sorts them."""
    header, end = {"__metadata__": metadata}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [end, end := end + array.nbytes]}
    text = json.dumps(header).encode()
    path.write_bytes(b"".join((len(text).to_bytes(8, "little"), text, *(a.tobytes() for a in arrays.values()))))


@pytest.mark.parametrize("several", [False, True], ids=["one source", "two sources"])
def test_files_whose_tensors_are_at_other_places_are_located_one_by_one(tmp_path, several):
    random = np.random.default_rng(0)
    sources = [tmp_path / "one", tmp_path / "two"][: 1 + several]
    for source in sources:
        source.mkdir()
    for step in range(24):
        shapes = {f"{array}/{name}": (2, 3) for array in ("parameter", "gradient") for name in "abc"}
        arrays = {name: random.normal(size=shapes[name]).astype("f4") for name in random.permutation([*shapes])}
        metadata = {"loss": repr(float(step)), "note": "x" * int(random.integers(0, 3))}
        kind = random.integers(0, 4)
        for source, array in zip(sources, ("parameter", "gradient") if several else ("",), strict=True):
            own = {name: values for name, values in arrays.items() if name.startswith(array)}
            if kind == 0 and not several:
                np.savez(source / f"step_{step}.npz", loss=float(step), **own)
            elif kind == 1:
                other = {f"{'az'[step % 2]}_unused": np.zeros(int(random.integers(1, 4)), "f4")}
                safetensors_numpy.save_file(own | other, source / f"step_{step}.safetensors", metadata=metadata)
            else:
                kept = dict(sorted(own.items())) if kind == 2 else own
                write_in_order(source / f"step_{step}.safetensors", kept, metadata)
    require_equal(sources if several else sources[0], tmp_path)


@pytest.mark.parametrize("container", ["safetensors", "npz"])
def test_replicates_and_products_are_read_in_place(tmp_path, container):
    states = with_replicates(random_walk(STATES, {"weight": (4, 3), "bias": (2,)}), 2)
    for state in states:
        state |= {key.replace("gradient", "hvp"): value for key, value in state.items() if "gradient" in key}
    require_equal(write_log(tmp_path / "log", states, container=container), tmp_path)


def test_states_that_are_not_plain_bytes_of_one_dtype_are_copied_and_reported(tmp_path):
    states = random_walk(STATES, TENSORS)
    folder = write_log(tmp_path / "log", states, container="npz")
    for number in (2, 3, 6):
        np.savez_compressed(folder / f"step_{number}.npz", **states[number])
    for number in (4, 8):
        transposed = {key: np.asarray(value, order="F") for key, value in states[number].items()}
        np.savez(folder / f"step_{number}.npz", **transposed)
    summary = require_equal(folder, tmp_path, copies={"parameter", "gradient"})
    assert [warning for warning in summary.warnings if "is copied" in warning] == [
        f"{name} of 5 of {STATES} new steps is copied, because it is not plain bytes of one dtype in the files "
        "(first in step_2.npz)"
        for name in ("parameter", "gradient")
    ]
    (tmp_path / "mixed").mkdir()
    for state in states:
        state["gradient/head"] = state["gradient/head"].astype(np.float16)
    require_equal(write_log(tmp_path / "mixed/log", states), tmp_path / "mixed", copies={"gradient"})


def test_several_threads_and_a_cluster_compute_the_same_bits(tmp_path):
    source = write_log(tmp_path / "log", random_walk(STATES, TENSORS))
    process(source, tmp_path / "copied", **SMALL)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        every = {"threads": executors.threads(3), "cluster": executors.existing_cluster(cluster.scheduler_address)}
        for name, executor in every.items():
            process(source, tmp_path / name, executor, in_place=True, **SMALL)
            assert content(tmp_path / name) == content(tmp_path / "copied")


def test_a_sweep_that_grows_has_the_same_bits(tmp_path):
    runs = {name: random_walk(STATES, TENSORS, seed=seed) for seed, name in enumerate("abc")}
    for count in (4, 7, STATES):
        for name, states in runs.items():
            for number in range(count):
                if not (tmp_path / "log" / name / f"step_{number}.safetensors").exists():
                    write_step(tmp_path / "log" / name, number, states[number])
        for out in ("copied", "placed"):
            process(tmp_path / "log", tmp_path / out, in_place=out == "placed", sweep=True, **SMALL)
        assert content(tmp_path / "placed") == content(tmp_path / "copied")
    assert not copied_arrays(tmp_path / "placed")


def test_a_log_whose_last_state_is_completed_has_the_same_bits(tmp_path):
    states = random_walk(STATES, TENSORS)
    for count in (3, 6, STATES):
        for number in range(count):
            last = {key: value for key, value in states[number].items() if key.startswith("parameter/")}
            write_step(tmp_path / "log", number, last if number == count - 1 else states[number])
        for out in ("copied", "placed"):
            process(tmp_path / "log", tmp_path / out, in_place=out == "placed", **SMALL)
        assert content(tmp_path / "placed") == content(tmp_path / "copied")


def test_the_state_of_an_optimizer_is_located_and_its_extremes_are_computed(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    (tmp_path / "log").mkdir()
    for number in range(STATES):
        loss = sum((parameter**2).sum() for parameter in model.parameters())
        optimizer.zero_grad()
        loss.backward()
        tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loss": loss.item()}
        tree["grad"] = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save(tree, tmp_path / "log" / f"checkpoint_{number}.pt")
        optimizer.step()
    require_equal(tmp_path / "log", tmp_path, copies={"exp_avg", "exp_avg_sq"}, include=["optimizer"])
    # Only the first state, which the optimizer did not have yet, is written.
    chunks = (tmp_path / "placed/trajectory.zarr/exp_avg_sq/c").glob("*/*")
    assert {chunk.parent.name for chunk in chunks} == {"0"}


def test_many_files_need_few_descriptors(tmp_path):
    write_log(tmp_path / "log", random_walk(300, {"weight": (3,)}))
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160)); import natgrad; "
        "natgrad.process(sys.argv[1], sys.argv[2], in_place=True, workers=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "log", tmp_path / "placed"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    process(tmp_path / "log", tmp_path / "copied")
    assert content(tmp_path / "placed") == content(tmp_path / "copied")
    written = sum(path.stat().st_size for path in (tmp_path / "placed/trajectory.zarr/commits").iterdir())
    assert written < 100 * 300  # the locations of equal files are stored once


def test_a_log_in_an_object_store_is_read_in_place(tmp_path, url):
    log = write_log(tmp_path / "log", random_walk(STATES, TENSORS))
    objects = open_storage(url) / "log"
    objects.put_entries({path.name: path.read_bytes() for path in log.iterdir()})
    process(log, tmp_path / "copied", **SMALL)
    process(str(objects), tmp_path / "placed", in_place=True, **SMALL)
    assert content(tmp_path / "placed") == content(tmp_path / "copied")
    assert not copied_arrays(tmp_path / "placed")
    changed = bytearray((objects / "step_4.safetensors").get())
    changed[-1] ^= 1
    (objects / "step_4.safetensors").put(bytes(changed))
    shutil.rmtree(tmp_path / "placed/ledger.zarr")
    with pytest.raises(InputError, match=r"checksum mismatch|it was changed after it was recorded") as caught:
        compute_ledger(tmp_path / "placed/trajectory.zarr", tmp_path / "placed/ledger.zarr")
    assert caught.value.where == str(objects / "step_4.safetensors")


# Changed files -------------------------------------------------------------------------------------------------


def spoil(path, damage):
    status = path.stat()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, status.st_size - 1)
    elif damage == "touched":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        words = bytearray(path.read_bytes())
        words[-1] ^= 1
        path.write_bytes(words)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGES = {
    "missing": "No such file",
    "truncated": r"it has \d+ instead of \d+ bytes",
    "touched": "it was changed after it was recorded",
    "inverted bit": "checksum mismatch",
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_changed_file_is_an_error_that_names_it(tmp_path, damage, compiled):
    states = random_walk(STATES, TENSORS)
    states = states if compiled else with_replicates(states, 2)
    process(write_log(tmp_path / "log", states), tmp_path / "out", in_place=True, **SMALL)
    ledger = {path.name: path.read_bytes() for path in (tmp_path / "out/ledger.zarr/gram/c").glob("*/*/*/*")}
    spoil(tmp_path / "log/step_4.safetensors", damage)
    # The ledger does not need the log.
    compute_ledger(tmp_path / "out/trajectory.zarr", tmp_path / "out/ledger.zarr", limits=SMALL["pass_limits"])
    assert ledger == {p.name: p.read_bytes() for p in (tmp_path / "out/ledger.zarr/gram/c").glob("*/*/*/*")}
    shutil.rmtree(tmp_path / "out/ledger.zarr")
    with pytest.raises(InputError, match=DAMAGES[damage]) as caught:
        compute_ledger(tmp_path / "out/trajectory.zarr", tmp_path / "out/ledger.zarr", limits=SMALL["pass_limits"])
    assert caught.value.where == str(tmp_path / "log/step_4.safetensors")
    found = list(verify_trajectory(tmp_path / "out/trajectory.zarr"))
    assert {entry.path for entry in found} == {str(tmp_path / "log/step_4.safetensors")}
    if damage in ("missing", "truncated", "touched"):
        assert {entry.steps for entry in found} == {(4, 4)}


def test_a_log_that_was_moved_or_touched_is_compared_and_recorded_again(tmp_path):
    write_log(tmp_path / "log", random_walk(STATES, TENSORS))
    process(tmp_path / "log", tmp_path / "out", in_place=True, **SMALL)
    before = content(tmp_path / "out")
    (tmp_path / "log").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        os.utime(path)
    shutil.rmtree(tmp_path / "out/ledger.zarr")
    with pytest.raises(InputError, match="No such file"):
        compute_ledger(tmp_path / "out/trajectory.zarr", tmp_path / "out/ledger.zarr", limits=SMALL["pass_limits"])
    assert process(tmp_path / "moved", tmp_path / "out", **SMALL).new_steps == 0
    assert content(tmp_path / "out") == before


def test_an_ingest_that_no_pass_followed_can_be_repeated_for_a_moved_log(tmp_path):
    write_log(tmp_path / "log", random_walk(STATES, TENSORS))
    ingest(tmp_path / "log", tmp_path / "out/trajectory.zarr", in_place=True, limits=SMALL["limits"])
    with pytest.raises(InputError, match="no pass has read all of them"):
        open_trajectory(tmp_path / "out/trajectory.zarr").fingerprint()
    (tmp_path / "log").rename(tmp_path / "moved")
    process(tmp_path / "moved", tmp_path / "out", **SMALL)
    process(tmp_path / "moved", tmp_path / "copied", **SMALL)
    assert content(tmp_path / "out") == content(tmp_path / "copied")


@pytest.mark.parametrize("was_read", [True, False])
def test_states_that_are_no_longer_plain_bytes_are_copied(tmp_path, was_read):
    states = random_walk(STATES, TENSORS)
    log = write_log(tmp_path / "log", states, container="npz")
    ingest(log, tmp_path / "out/trajectory.zarr", in_place=True, limits=SMALL["limits"])
    if was_read:
        process(log, tmp_path / "out", **SMALL)
    for step in (2, 3, 5):
        np.savez_compressed(log / f"step_{step}.npz", **states[step])
    summary = process(log, tmp_path / "out", **SMALL)
    assert summary.new_steps == 0
    assert "3 states are copied, because their files no longer contain them as plain bytes" in summary.warnings
    process(log, tmp_path / "copied", **SMALL)
    assert content(tmp_path / "out") == content(tmp_path / "copied")
    for step in (2, 3, 5):
        (log / f"step_{step}.npz").unlink()
    assert not list(verify_trajectory(tmp_path / "out/trajectory.zarr"))
    copies.materialize(open_store(tmp_path / "out/trajectory.zarr"))
    shutil.rmtree(log)
    assert content(tmp_path / "out") == content(tmp_path / "copied")


# Restarts ------------------------------------------------------------------------------------------------------


def restart(folder, first, count, seed=5):
    """Overwrite the steps of a log from ``first`` on, like a run that was restarted from an older state."""
    for number, state in enumerate(random_walk(count, TENSORS, seed=seed)[first:], first):
        write_step(folder, number, state)


def test_a_restart_keeps_the_updates_of_states_that_it_overwrites(tmp_path):
    for out in ("copied", "placed"):
        write_log(tmp_path / out / "log", random_walk(STATES, TENSORS))
        process(tmp_path / out / "log", tmp_path / out, in_place=out == "placed", **SMALL)
        restart(tmp_path / out / "log", 4, STATES + 2)
        summary = process(tmp_path / out / "log", tmp_path / out, **SMALL)
        assert summary.attempts == 2
    trajectory = open_trajectory(tmp_path / "placed/trajectory.zarr")
    assert trajectory.gone == set(range(4, STATES))
    assert any(
        re.search(r"files of 5 states of older attempts \(steps 4 to 8\)", text) for text in summary.warnings
    )
    ledgers = [open_ledger(tmp_path / out / "ledger.zarr") for out in ("copied", "placed")]
    for one, other in zip(*(ledger.read() for ledger in ledgers), strict=True):
        assert one.tobytes() == other.tobytes()
    assert trajectory.fingerprint() == open_trajectory(tmp_path / "copied/trajectory.zarr").fingerprint()
    assert describe_run(tmp_path / "placed")["states_gone"] == ["steps 4 to 8 of attempt 0"]
    shutil.rmtree(tmp_path / "placed/ledger.zarr")
    with pytest.raises(InputError, match="a restarted run has overwritten or removed it") as caught:
        compute_ledger(tmp_path / "placed/trajectory.zarr", tmp_path / "placed/ledger.zarr")
    assert caught.value.where == str(tmp_path / "placed/log/step_4.safetensors")


@pytest.mark.parametrize("copied", [frozenset(), {"gradient"}])
def test_states_that_were_overwritten_before_a_pass_have_no_updates(tmp_path, copied):
    def write(states, numbers):
        for number in numbers:
            order = {name: "F" if name.partition("/")[0] in copied else "C" for name in states[number]}
            arrays = {name: np.asarray(values, order=order[name]) for name, values in states[number].items()}
            write_step(tmp_path / "log", number, arrays, "npz")

    write(random_walk(STATES, TENSORS), range(STATES))
    ingest(tmp_path / "log", tmp_path / "out/trajectory.zarr", in_place=True, limits=SMALL["limits"])
    write(random_walk(STATES + 2, TENSORS, seed=5), range(4, STATES + 2))
    assert copied_arrays(tmp_path / "out") == copied
    process(tmp_path / "log", tmp_path / "out", **SMALL)
    trajectory, ledger = (opener(tmp_path / "out" / name) for opener, name in OPENERS.items())
    assert trajectory.gone == set(range(4, STATES))
    assert trajectory.scalar(ATTEMPT).tolist() == [0] * STATES + [1] * (STATES + 2 - 4)
    gram, _ = ledger.read()
    known = np.isfinite(gram).all(axis=(1, 2, 3))
    # Updates 3 to 8 would need states 4 to 8; the new attempt begins with state 9.
    assert known.tolist() == [True] * 3 + [False] * 6 + [True] * (len(known) - 9)
    chunks = [LedgerChunk(record["start"], record["stop"]) for record in ledger.records()]
    assert all(trajectory.digests(chunks).values())


OPENERS = {open_trajectory: "trajectory.zarr", open_ledger: "ledger.zarr"}


# Settings ------------------------------------------------------------------------------------------------------


def test_a_trajectory_of_copies_is_not_continued_in_place(tmp_path):
    write_log(tmp_path / "log", random_walk(3, TENSORS))
    ingest(tmp_path / "log", tmp_path / "trajectory.zarr")
    with pytest.raises(InputError, match="the trajectory was created with copies of the states") as caught:
        ingest(tmp_path / "log", tmp_path / "trajectory.zarr", in_place=True)
    assert "--overwrite" in caught.value.remedy
    ingest(tmp_path / "log", tmp_path / "trajectory.zarr", in_place=True, overwrite=True)
    assert open_trajectory(tmp_path / "trajectory.zarr").in_place
    write_step(tmp_path / "log", 3, random_walk(4, TENSORS)[3])
    ingest(tmp_path / "log", tmp_path / "trajectory.zarr")
    assert open_trajectory(tmp_path / "trajectory.zarr").n_states == 4
    assert not any((tmp_path / "trajectory.zarr/parameter/c").glob("**/*"))


# Copies that are made later, and copies that are removed ---------------------------------------------------------


def compute(out, **options):
    stores = out / "trajectory.zarr", out / "ledger.zarr"
    return compute_ledger(*stores, limits=SMALL["pass_limits"], **options)


def opened(out):
    return open_store(out / "trajectory.zarr"), open_store(out / "ledger.zarr")


def test_copies_that_are_made_later_have_the_same_bytes_and_need_no_pass(tmp_path):
    states = random_walk(STATES, TENSORS)
    last = {key: value for key, value in states[-1].items() if key.startswith("parameter/")}
    log = write_log(tmp_path / "log", [*states[:-1], last])
    process(log, tmp_path / "copied", **SMALL)
    process(log, tmp_path / "placed", in_place=True, **SMALL)
    moved = copies.materialize(opened(tmp_path / "placed")[0])
    assert moved == (STATES, 4 * 26 * (2 * STATES - 1))
    shutil.rmtree(log)
    assert content(tmp_path / "placed") == content(tmp_path / "copied")
    # The last column contains padding.
    chunks = list((tmp_path / "copied").glob("trajectory.zarr/parameter/c/*/[0-4]"))
    assert len(chunks) == 5 * 5
    for chunk in chunks:
        assert (tmp_path / "placed" / chunk.relative_to(tmp_path / "copied")).read_bytes() == chunk.read_bytes()
    assert compute(tmp_path / "placed").computed_updates == 0
    assert not list(verify_trajectory(tmp_path / "placed/trajectory.zarr"))
    assert copies.materialize(opened(tmp_path / "placed")[0]) == (0, 0)
    # A run that grows stays in place.
    write_log(log, random_walk(STATES + 2, TENSORS))
    assert process(log, tmp_path / "placed", **SMALL).new_steps == 2
    process(log, tmp_path / "other", **SMALL)
    assert content(tmp_path / "placed") == content(tmp_path / "other")


def test_states_can_be_copied_before_a_pass_and_a_damaged_file_copies_nothing(tmp_path):
    log = write_log(tmp_path / "log", random_walk(STATES, TENSORS))
    process(log, tmp_path / "copied", **SMALL)
    ingest(log, tmp_path / "out/trajectory.zarr", in_place=True, limits=SMALL["limits"])
    kept = (log / "step_5.safetensors").rename(tmp_path / "kept")
    with pytest.raises(InputError, match="it is missing") as caught:
        copies.materialize(opened(tmp_path / "out")[0])
    assert caught.value.where == str(log / "step_5.safetensors")
    kept.rename(log / "step_5.safetensors")
    assert open_trajectory(tmp_path / "out/trajectory.zarr").references.has("parameter", 0)
    copies.materialize(opened(tmp_path / "out")[0])
    shutil.rmtree(log)
    compute(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "copied")


def test_removed_states_of_an_older_attempt_are_not_copied(tmp_path):
    write_log(tmp_path / "log", random_walk(STATES, TENSORS))
    process(tmp_path / "log", tmp_path, in_place=True, **SMALL)
    restart(tmp_path / "log", 4, STATES + 2)
    process(tmp_path / "log", tmp_path, **SMALL)
    before = open_trajectory(tmp_path / "trajectory.zarr").fingerprint()
    assert copies.materialize(opened(tmp_path)[0]).states == 4 + STATES + 2 - 4
    trajectory = open_trajectory(tmp_path / "trajectory.zarr")
    assert (trajectory.gone, trajectory.fingerprint()) == (set(range(4, STATES)), before)
    assert compute(tmp_path).computed_updates == 0
    assert not list(verify_trajectory(tmp_path / "trajectory.zarr"))


def test_copies_are_removed_and_the_run_can_grow(tmp_path):
    log = write_log(tmp_path / "log", random_walk(STATES, TENSORS))
    process(log, tmp_path / "out", **SMALL)
    before = open_trajectory(tmp_path / "out/trajectory.zarr").fingerprint()
    assert copies.slim(*opened(tmp_path / "out")).states == STATES - 1
    assert copies.slim(*opened(tmp_path / "out")) == (0, 0)
    trajectory = open_trajectory(tmp_path / "out/trajectory.zarr")
    assert (trajectory.dropped, trajectory.fingerprint()) == (set(range(STATES - 1)), before)
    assert not list(verify_trajectory(tmp_path / "out/trajectory.zarr"))
    assert compute(tmp_path / "out").computed_updates == 0
    assert {path.parent.name for path in (tmp_path / "out/trajectory.zarr/parameter/c").glob("*/*")} == {"4"}
    write_log(log, random_walk(STATES + 3, TENSORS))
    process(log, tmp_path / "out", **SMALL)
    process(log, tmp_path / "copied", **SMALL)
    one, other = (open_ledger(tmp_path / out / "ledger.zarr").read() for out in ("out", "copied"))
    assert [array.tobytes() for array in one] == [array.tobytes() for array in other]
    shutil.rmtree(tmp_path / "out/ledger.zarr")
    with pytest.raises(InputError, match="the states of step 0 were dropped") as caught:
        compute(tmp_path / "out")
    assert "--overwrite" in caught.value.remedy


def test_states_that_are_not_analyzed_are_not_removed(tmp_path):
    ingest(write_log(tmp_path / "log", random_walk(STATES, TENSORS)), tmp_path / "trajectory.zarr")
    with pytest.raises(InputError, match="the ledger lacks 8 updates") as caught:
        copies.slim(*opened(tmp_path))
    assert caught.value.remedy == "run natgrad analyze OUT first"


# Zarr ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicates", [0, 2])
def test_the_states_are_a_dataset_of_xarray_whether_they_are_copied_or_not(tmp_path, replicates):
    states = (
        with_replicates(random_walk(STATES, TENSORS), replicates) if replicates else random_walk(STATES, TENSORS)
    )
    log = write_log(tmp_path / "log", states)
    process(log, tmp_path / "copied", **SMALL)
    process(log, tmp_path / "placed", in_place=True, **SMALL)
    copied, placed = (natgrad.open_trajectory(tmp_path / out) for out in ("copied", "placed"))
    assert placed.drop_attrs().identical(copied.drop_attrs())
    order = list(open_trajectory(tmp_path / "placed/trajectory.zarr").layout.names)
    for step, state in enumerate(states):
        expected = np.concatenate([np.ravel(state[f"gradient/{name}"]) for name in order])
        np.testing.assert_array_equal(placed["gradient"].sel(step=step), expected)
    assert placed["loss"].values.tolist() == [state["loss"] for state in states]
    spoil(log / "step_4.safetensors", "inverted bit")
    with pytest.raises(InputError, match="checksum mismatch"):
        natgrad.open_trajectory(tmp_path / "placed").load()
