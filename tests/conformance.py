"""Writers of one training run in every format, for the conformance suite, and its table of abilities.

A writer takes a folder and the states by their numbers, writes those that are new or different, and returns the
SOURCEs. Real writers are used where they are fast; the tests of single formats use the real writer of each.
"""

import argparse
import json
import pickle
import shutil
import struct
import tomllib
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import safetensors.numpy
import zarr
from test_scalar_log import (
    write_json_lines,
    write_long_csv,
    write_mlflow,
    write_mlflow_database,
    write_pandas_csv,
    write_parquet,
    write_trackio,
)

from lazy import Lazy
from logs import random_walk, run_writer, write_step

torch = Lazy("torch")
dcp = Lazy("torch.distributed.checkpoint")
distributed = Lazy("torch.distributed")
tensor_parts = Lazy("torch.distributed.tensor")
tensorboard = Lazy("torch.utils.tensorboard")

DECLARED = Path(__file__).with_name("conformance.toml")
TENSORS = {"layers.10.weight": (4, 3), "layers.9.weight": (3, 2)}
STATES = 6


class State(dict):
    """A state with native keys, and its name among all states of the suite."""

    def __init__(self, items, tag):
        super().__init__(items)
        self.tag = tag

    def only(self, *arrays):
        """Return the part of the state that consists of some arrays or scalars."""
        kept = {key: value for key, value in self.items() if key.partition("/")[0] in arrays}
        return State(kept, f"{self.tag}-{'-'.join(arrays)}")


def states_of(run, steps=STATES):
    """Return the states of run "a" or "b" by number. Both are the same before step 2."""
    first, other = (random_walk(steps, TENSORS, "float32", seed) for seed in (0, 1))
    states = first if run == "a" else [*first[:2], *other[2:]]
    return {n: State(state, f"{run if n > 1 else 'a'}{n}") for n, state in enumerate(states)}


def with_last_state(states):
    """Return states, the last of which has only parameters, because a hook ran before each update."""
    last = max(states)
    return states | {last: states[last].only("parameter")}


def arrays_of(state, array):
    found = {key.partition("/")[2]: np.array(v) for key, v in state.items() if key.startswith(f"{array}/")}
    return {name: torch.from_numpy(value) for name, value in found.items()}


def tree_of(state, model="model"):
    """Return a state in the nested form that trainers save."""
    tree = {model: arrays_of(state, "parameter"), "grad": arrays_of(state, "gradient")}
    tree = {name: tensors for name, tensors in tree.items() if tensors}
    if "loss" in state:
        groups = [{"lr": float(state["learning_rate"]), "params": list(range(len(TENSORS)))}]
        tree |= {"loss": float(state["loss"]), "optimizer": {"state": {}, "param_groups": groups}}
    return tree


def by_step(write):
    """Return a writer that writes each state that does not exist yet or has changed."""

    def writer(folder, states):
        folder.mkdir(parents=True, exist_ok=True)
        written = folder.with_name(f"{folder.name}.written.json")
        tags = json.loads(written.read_text()) if written.exists() else {}
        for number, state in states.items():
            if tags.get(str(number)) != state.tag:
                write(folder, number, state)
        written.write_text(json.dumps(tags | {str(n): state.tag for n, state in states.items()}))
        return [folder]

    return writer


# One file or folder for each step ------------------------------------------------------------------------------


def native(container):
    return by_step(lambda folder, number, state: write_step(folder, number, state, container))


def flat_file(save, suffix):
    return by_step(lambda folder, number, state: save(folder / f"step_{number}{suffix}", state))


def save_hdf5(path, state):
    with h5py.File(path, "w") as file:
        for key, value in state.items():
            file[key] = value


def save_zarr(path, state):
    with zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.open_group(path, mode="w")
        for key, value in state.items():
            group.create_array(key, data=np.asarray(value))


def save_safetensors_folder(folder, number, state):
    path = folder / f"step-{number}"
    path.mkdir(exist_ok=True)
    scalars = {name: repr(float(state[name])) for name in ("loss", "learning_rate") if name in state}
    for array, stem in (("parameter", "model"), ("gradient", "gradient")):
        tensors = {key.partition("/")[2]: np.array(v) for key, v in state.items() if key.startswith(f"{array}/")}
        if tensors:
            metadata = scalars if array == "parameter" else None
            safetensors.numpy.save_file(tensors, path / f"{stem}.safetensors", metadata)


def save_huggingface(folder, number, state):
    path = folder / f"checkpoint-{number}"
    path.mkdir(exist_ok=True)
    for array, stem in (("parameter", "model"), ("gradient", "gradient")):
        tensors = {key.partition("/")[2]: np.array(v) for key, v in state.items() if key.startswith(f"{array}/")}
        if tensors:
            safetensors.numpy.save_file(tensors, path / f"{stem}.safetensors")
    if "learning_rate" in state:
        torch.save(tree_of(state)["optimizer"], path / "optimizer.pt")
    history = path / "losses.json"  # the Trainer logs the loss of a state with the update that follows it
    earlier = folder / f"checkpoint-{number - 1}" / "losses.json"
    losses = json.loads(earlier.read_text()) if earlier.exists() else []
    entries = [{"step": step + 1, "loss": loss} for step, loss in enumerate(losses)]
    history.write_text(json.dumps([*losses, float(state.get("loss", np.nan))]))
    (path / "trainer_state.json").write_text(json.dumps({"global_step": number, "log_history": entries}))


def save_npy_folder(folder, number, state):
    """Write a file for each tensor, and the scalars as JSON."""
    path = folder / f"step_{number}"
    shutil.rmtree(path, ignore_errors=True)
    for key, value in state.items():
        if "/" in key:
            array, _, name = key.partition("/")
            (path / f"{array}s").mkdir(parents=True, exist_ok=True)
            np.save(path / f"{array}s" / name, value)
    scalars = {name: float(state[name]) for name in ("loss", "learning_rate") if name in state}
    (path / "info.json").write_text(json.dumps(scalars))


def pickled(state):
    """Return the nested form of a state with NumPy arrays."""
    tree = {}
    for key, value in state.items():
        array, _, name = key.partition("/")
        if name:
            tree.setdefault(f"{array}s", {})[name] = np.array(value)
        else:
            tree[key] = value
    return tree


def save_pickle(folder, number, state):
    (folder / f"step_{number}.pkl").write_bytes(pickle.dumps(pickled(state)))


def save_pickled_list(path, states):
    path.write_bytes(pickle.dumps([{"step": number} | pickled(state) for number, state in states.items()]))


def save_torch(folder, number, state):
    torch.save(tree_of(state), folder / f"ckpt_{number}.pt")


def save_torch_parts(folder, number, state):
    tree = tree_of(state)
    torch.save(tree["model"], folder / f"params_{number}.pt")
    (folder / f"grads_{number}.pt").unlink(missing_ok=True)
    if "grad" in tree:
        torch.save(tree["grad"] | {"loss": tree["loss"]}, folder / f"grads_{number}.pt")
    elif "loss" in tree:
        torch.save(tree["model"] | {"loss": tree["loss"]}, folder / f"params_{number}.pt")
    groups = [{"lr": float(state.get("learning_rate", 0.1)), "params": list(range(len(TENSORS)))}]
    torch.save({"state": {}, "param_groups": groups}, folder / f"optim_{number}.pt")


def save_lightning(folder, number, state):
    tree = tree_of(state, "state_dict")
    tree |= {"optimizer_states": [tree.pop("optimizer")]} if "optimizer" in tree else {}
    tree |= {"gradient": tree.pop("grad")} if "grad" in tree else {}
    torch.save(tree | {"epoch": 0, "global_step": number}, folder / f"epoch=0-step={number}.ckpt")


def save_dcp(folder, number, state):
    shutil.rmtree(folder / f"step-{number}", ignore_errors=True)
    dcp.save(tree_of(state), checkpoint_id=folder / f"step-{number}", no_dist=True)


def save_deepspeed(folder, number, state):
    path = folder / f"global_step{number}"
    path.mkdir(exist_ok=True)
    tree = tree_of(state, "module") | {"global_steps": number, "dp_world_size": 1, "mp_world_size": 1}
    torch.save(tree, path / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text(path.name)


def save_megatron(folder, number, state):
    path = folder / f"iter_{number:07d}" / "mp_rank_00"
    path.mkdir(parents=True, exist_ok=True)
    tree = tree_of(state) | {"iteration": number, "checkpoint_version": 3.0}
    tree["args"] = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    if "optimizer" in tree:
        tree["optimizer"] = {"optimizer": tree["optimizer"]}
    torch.save(tree, path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(number))


def in_one_process_group(folder):
    """Return the mesh of a job with one process, and the function that ends it."""
    rendezvous = (folder / "rendezvous").absolute()
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    return tensor_parts.init_device_mesh("cpu", (1,)), distributed.destroy_process_group


def write_verl(folder, states):
    """Write the parameters; gradients and scalars are another SOURCE."""
    folder.mkdir(parents=True, exist_ok=True)
    mesh, end = in_one_process_group(folder)

    def save(path, number, state):
        path = path / f"global_step_{number}" / "actor"
        path.mkdir(parents=True, exist_ok=True)
        split = [tensor_parts.Shard(0)]
        parts = {
            name: tensor_parts.distribute_tensor(tensor, mesh, split)
            for name, tensor in arrays_of(state, "parameter").items()
        }
        torch.save(parts, path / "model_world_size_1_rank_0.pt")

    try:
        sources = by_step(save)(folder / "log", states)
    finally:
        end()
        (folder / "rendezvous").unlink(missing_ok=True)
    return [*sources, *others(folder, states)]


def others(folder, states):
    """Write gradients and scalars to another native log, if there are any."""
    rest = {n: state.only("gradient", "loss", "learning_rate") for n, state in states.items()}
    rest = {n: state for n, state in rest.items() if any(key.startswith("gradient/") for key in state)}
    return native("safetensors")(folder / "others", rest) if rest else []


def write_bergson(folder, states):
    """Write gradient stores; parameters and scalars are another SOURCE."""

    def save(path, number, state):
        store = path / f"checkpoint-{number}"
        store.mkdir(exist_ok=True)
        gradients = {k.removeprefix("gradient/"): v for k, v in state.items() if k.startswith("gradient/")}
        sizes = {name.removesuffix(".weight"): value.size for name, value in gradients.items()}
        info = {"num_grads": 1, "grad_sizes": sizes, "base_dtype": "float32", "attribute_tokens": False}
        (store / "info.json").write_text(json.dumps(info))
        settings = "aggregation: mean\nunit_normalize: false\nprecision: fp32\n"
        (store / "config.yaml").write_text(settings)
        (store / "processor_config.yaml").write_text("projection_dim: null\n")
        (store / "gradients.bin").write_bytes(b"".join(value.tobytes() for value in gradients.values()))

    rest = {n: state.only("parameter", "loss", "learning_rate") for n, state in states.items()}
    sources = native("safetensors")(folder / "others", rest)
    kept = {n: state.only("gradient") for n, state in states.items()}
    stores = by_step(save)(folder / "log", {n: state for n, state in kept.items() if state})
    (folder / "log" / "natgrad.toml").write_text('[bergson]\nlayout = "linear"\n')
    return [*stores, *sources]


class Orbax:
    """A writer that copies steps from a job of Orbax, which runs once, in another process."""

    def __init__(self, folder):
        self._folder = folder
        runs = {"a": states_of("a"), "b": states_of("b")}
        every = {state.tag: state for run in runs.values() for state in run.values()}
        every |= {s.tag: s for s in (s.only("parameter") for s in [*every.values()] if s.tag == f"a{STATES - 1}")}
        stripped = [state.only("parameter", "loss", "learning_rate") for state in runs["a"].values()]
        every |= {state.tag: state for state in stripped}
        self._numbers = {tag: number for number, tag in enumerate(every)}
        rate = {"loss": np.float64(np.nan), "learning_rate": np.float64(np.nan)}
        (folder / "all.states").write_bytes(pickle.dumps([rate | dict(state) for state in every.values()]))
        run_writer("write_orbax.py", folder / "all.states", JAX_PLATFORMS="cpu", LAYOUT="ocdbt")

    def __call__(self, folder, states):
        def copy(path, number, state):
            shutil.rmtree(path / str(number), ignore_errors=True)
            shutil.copytree(self._folder / "all" / "ocdbt" / str(self._numbers[state.tag]), path / str(number))

        return by_step(copy)(folder, states)


# One file for all steps ----------------------------------------------------------------------------------------


def stacked(states):
    """Stack states along a new first axis. The length of an array is the number of states that have it."""
    keys = dict.fromkeys(key for state in states.values() for key in state)
    arrays = {key: np.stack([state[key] for state in states.values() if key in state]) for key in keys}
    return arrays | {"step": np.array(list(states))}


def one_file(name, save):
    def writer(folder, states):
        folder.mkdir(parents=True, exist_ok=True)
        save(folder / name, stacked(states))
        return [folder / name]

    return writer


def save_hdf5_groups(path, states):
    """Write a group for each state, with the scalars as attributes."""
    with h5py.File(path, "w") as file:
        for number, state in states.items():
            group = file.create_group(f"step_{number}")
            for key, value in state.items():
                if "/" in key:
                    group[key] = value
                else:
                    group.attrs[key] = value


def save_zarr_groups(path, states):
    with zarr.config.set({"array.write_empty_chunks": True}):
        file = zarr.open_group(path, mode="w")
        for number, state in states.items():
            group = file.create_group(str(number))
            for key, value in state.items():
                if "/" in key:
                    group.create_array(key, data=np.asarray(value))
                else:
                    group.attrs[key] = float(value)


def save_torch_list(path, states):
    """Write a list with a dict for each state, in the order in which they are given."""
    torch.save([{"step": number} | tree_of(state) for number, state in states.items()], path)


def grouped(name, save):
    def writer(folder, states):
        folder.mkdir(parents=True, exist_ok=True)
        save(folder / name, states)
        return [folder / name]

    return writer


# Logs of scalars -----------------------------------------------------------------------------------------------


def write_tensorboard(folder, values):
    with tensorboard.SummaryWriter(folder / "events") as writer:
        for step, loss, rate in values:
            writer.add_scalar("loss", loss, step)
            writer.add_scalar("lr", rate, step)
    return folder / "events"


def write_wandb(folder, values):
    """Write the records of wandb, one fragment each, in the file format of its log."""
    from wandb.proto.wandb_internal_pb2 import Record

    body = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
    for number, (step, loss, rate) in enumerate(values):
        record = Record()
        for key, value in (("global_step", step), ("loss", loss), ("lr", rate), ("_step", number)):
            record.history.item.add(key=key, value_json=json.dumps(value))
        fragment = b"\1" + record.SerializeToString()
        body += struct.pack("<IH", zlib.crc32(fragment), len(fragment) - 1) + fragment
    path = folder / "run-20260101_000000-abc" / "run-abc.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(body)
    return path


def write_text(folder, values):
    (folder / "train.log").write_text("".join(f"step {s}: loss {a!r}, lr {b!r}\n" for s, a, b in values))
    return folder / "train.log"


def write_trainer_state(folder, values):
    entries = [{"step": s + 1, "loss": a, "learning_rate": b, "epoch": 1.0} for s, a, b in values]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    return folder / "trainer_state.json"


def afresh(write):
    """Return a writer that removes its previous output."""

    def writer(folder, values):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return write(folder, values)

    return writer


# The table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """Writer of a format.

    Attributes
    ----------
    write : callable
        Function of a folder and states, or of a folder and the values of a log of scalars.
    pattern : str
        Names of the steps in the test of other names, with the suffix of the format.
    options : dict
        Options of the ingest.
    """

    write: object
    pattern: str = "odd {step} name"
    options: dict = field(default_factory=dict)


TENSOR_WRITERS = {
    "steps": Writer(native("safetensors"), "odd {step} name.safetensors"),
    "npz": Writer(native("npz"), "odd {step} name.npz"),
    "npz, one file": Writer(one_file("run.npz", lambda path, arrays: np.savez(path, **arrays))),
    "hdf5": Writer(flat_file(save_hdf5, ".h5"), "odd {step} name.h5"),
    "hdf5, one file": Writer(one_file("run.h5", save_hdf5)),
    "hdf5, groups": Writer(grouped("run.h5", save_hdf5_groups)),
    "zarr": Writer(flat_file(save_zarr, ".zarr"), "odd {step} name.zarr"),
    "zarr, one group": Writer(one_file("run.zarr", save_zarr)),
    "zarr, groups": Writer(grouped("run.zarr", save_zarr_groups)),
    "npy": Writer(by_step(save_npy_folder)),
    "pickle": Writer(by_step(save_pickle), "odd {step} name.pkl"),
    "pickle, one file": Writer(grouped("run.pkl", save_pickled_list)),
    "safetensors": Writer(by_step(save_safetensors_folder)),
    "torch": Writer(by_step(save_torch), "odd {step} name.pt"),
    "torch, several files": Writer(by_step(save_torch_parts), "odd {step} name *.pt"),
    "torch, one file": Writer(grouped("run.pt", save_torch_list)),
    "huggingface": Writer(by_step(save_huggingface)),
    "lightning": Writer(by_step(save_lightning), "odd {step} name.ckpt", {"shift": {"gradient": 0}}),
    "dcp": Writer(by_step(save_dcp)),
    "deepspeed": Writer(by_step(save_deepspeed)),
    "megatron": Writer(by_step(save_megatron)),
    "verl": Writer(write_verl),
    "orbax": Writer(Orbax),
    "bergson": Writer(write_bergson),
}
SCALAR_WRITERS = {
    "csv": Writer(write_pandas_csv),
    "csv, long": Writer(write_long_csv),
    "jsonl": Writer(write_json_lines),
    "trainer-state": Writer(write_trainer_state),
    "text": Writer(write_text, options={"mapping": {"line": "step {step}: loss {loss}, lr {lr}"}}),
    "parquet": Writer(write_parquet),
    "tensorboard": Writer(write_tensorboard),
    "wandb": Writer(write_wandb),
    "trackio": Writer(write_trackio),
    "mlflow": Writer(write_mlflow),
    "mlflow-sqlite": Writer(write_mlflow_database),
}


def declared():
    """Return the declared abilities: for each kind of log, ability, and format, "yes" or why it is refused."""
    return tomllib.loads(DECLARED.read_text(encoding="utf-8"))
