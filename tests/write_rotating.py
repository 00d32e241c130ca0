"""Write a run that keeps only its last checkpoints: FOLDER KIND STEPS SECONDS KEPT."""

import shutil
import sys
import time
from pathlib import Path

from logs import random_walk, write_step


def write_torch(folder, number, state):
    import torch

    tree = {"model": {}, "grad": {}, "loss": float(state["loss"])}
    for key, value in state.items():
        array, _, name = key.partition("/")
        if name:
            tree["model" if array == "parameter" else "grad"][name] = torch.from_numpy(value.reshape(value.shape))
    path = folder / f"checkpoint_{number}.pt"
    torch.save(tree, path)
    return path


def write_folder(folder, number, state):
    """Write the parameters and the gradients into files of a folder, as trainers do."""
    path = folder / f".step-{number}"
    for array, file in (("parameter", "model"), ("gradient", "gradient")):
        tensors = {key.partition("/")[2]: value for key, value in state.items() if key.startswith(f"{array}/")}
        write_step(path, 0, tensors).rename(path / f"{file}.safetensors")
    return path.rename(folder / f"step-{number}")


WRITERS = {"safetensors": write_step, "torch": write_torch, "folder": write_folder}


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def main(folder, kind, steps, seconds, kept):
    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    for number, state in enumerate(random_walk(int(steps))):
        written.append(WRITERS[kind](folder, number, state))
        if len(written) > int(kept):
            remove(written.pop(0))
        time.sleep(max(0.0, begin + (number + 1) * float(seconds) - time.monotonic()))


if __name__ == "__main__":
    main(*sys.argv[1:])
