"""A training job that saves checkpoints with Orbax.

Run as ``python write_orbax.py STATES ...``. It saves the states in each pickle with each of the managers below, in
a folder named after the manager, below a folder named after the pickle; with LAYOUT in the environment, only with
that manager, and no large checkpoint. It runs in a separate process, because JAX
must not be forked.
"""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp


def manager(folder, items, **options):
    return ocp.CheckpointManager(
        folder.absolute(), item_handlers=items, options=ocp.CheckpointManagerOptions(**options)
    )


def managers(folder):
    """Return managers by name, and functions that build the arguments of save from a tree and a loss."""

    def one(tree, loss):
        return ocp.args.Composite(state=ocp.args.PyTreeSave({**tree, "loss": loss}))

    def parts(tree, loss):
        return ocp.args.Composite(
            params=ocp.args.PyTreeSave(tree["params"]),
            grads=ocp.args.PyTreeSave(tree["grads"]),
            scalars=ocp.args.JsonSave({"loss": loss, "lr": tree["lr"]}),
        )

    plain = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=False)}
    third = {"state": ocp.PyTreeCheckpointHandler(use_zarr3=True)}
    of_parts = {
        "params": ocp.PyTreeCheckpointHandler(),
        "grads": ocp.PyTreeCheckpointHandler(),
        "scalars": ocp.JsonCheckpointHandler(),
    }
    return {
        "ocdbt": (manager(folder / "ocdbt", {"state": ocp.PyTreeCheckpointHandler()}), one),
        "plain": (manager(folder / "plain", plain, step_prefix="ckpt", step_format_fixed_length=6), one),
        "zarr3": (manager(folder / "zarr3", third), one),
        "parts": (manager(folder / "parts", of_parts), parts),
        "standard": (
            manager(folder / "standard", None),
            lambda tree, loss: ocp.args.StandardSave({**tree, "loss": np.float64(loss)}),
        ),
    }


def save(states, folder):
    for name, (saver, arguments) in managers(folder).items():
        if name != os.environ.get("LAYOUT", name):
            continue
        with saver:
            for step, state in enumerate(states):
                tree = {"params": {}, "grads": {}, "lr": float(state["learning_rate"]), "none": None, "empty": {}}
                for key, value in state.items():
                    array, _, tensor = key.partition("/")
                    if tensor:
                        module, _, leaf = tensor.rpartition(".")
                        branch = tree["params" if array == "parameter" else "grads"]
                        branch = branch.setdefault(module, {}) if module else branch
                        branch[leaf] = value
                if name == "standard":
                    del tree["none"], tree["empty"]
                saver.save(step, args=arguments(tree, float(state["loss"])))
                saver.wait_until_finished()


def save_large(path):
    """Save 64 MiB in chunks of half a MiB."""
    tree = {"params": {"weight": np.zeros((4096, 4096), np.float32)}}
    arguments = {"params": {"weight": ocp.SaveArgs(chunk_byte_size=1 << 19)}}
    ocp.PyTreeCheckpointer().save(path.absolute(), tree, save_args=arguments)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        save(pickle.loads(path.read_bytes()), path.with_suffix(""))
    if "LAYOUT" not in os.environ:
        save_large(path.parent / "large" / "0")
