"""Readers need no more memory than their buffer and a few MiB, regardless of the size of a tensor."""

import h5py
import numpy as np
import pytest
import zarr

from lazy import Lazy
from memory import assert_out_of_core
from opened import open_source

torch = Lazy("torch")
dcp = Lazy("torch.distributed.checkpoint")

SHAPE = (4096, 4096)  # 64 MiB
NAME = "weight"


def write_dcp(folder):
    dcp.save({"model": {NAME: torch.zeros(SHAPE)}}, checkpoint_id=folder / "step-0", no_dist=True)
    return folder


def write_hdf5(folder, chunks=(64, 512)):
    with h5py.File(folder / "step_0.h5", "w") as file:
        file.create_dataset(f"parameter/{NAME}", data=np.zeros(SHAPE, "f4"), chunks=chunks, compression=1)
    return folder


def write_hdf5_stack(folder):
    with h5py.File(folder / "run.h5", "w") as file:
        file.create_dataset(f"parameter/{NAME}", data=np.zeros((1, *SHAPE), "f4"))
        file["step"] = [0]
    return folder / "run.h5"


def write_zarr(folder):
    with zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.open_group(folder / "run.zarr", mode="w")
        group.create_array(f"parameter/{NAME}", data=np.zeros((2, *SHAPE), "f4"), chunks=(2, 64, 512))
        group["step"] = np.arange(2)
    return folder / "run.zarr"


def write_megatron(folder):
    (folder / "iter_0000000" / "mp_rank_00").mkdir(parents=True)
    torch.save({"model": {NAME: torch.zeros(SHAPE)}}, folder / "iter_0000000" / "mp_rank_00" / "model_optim_rng.pt")
    return folder


def write_deepspeed(folder, stage):
    """Write files of two ranks like those of the engine (test_deepspeed_folder.py uses real ones)."""
    path = folder / "global_step0"
    path.mkdir()
    shapes = [{NAME: torch.Size(SHAPE)}]
    models = ["mp_rank_00"] if stage < 3 else ["zero_pp_rank_0_mp_rank_00"]
    for name in models:
        torch.save({"module": {}, "param_shapes": shapes, "global_steps": 0}, path / f"{name}_model_states.pt")
    key = "single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups"
    for rank in range(2):
        state = {key: [torch.zeros(SHAPE[0] * SHAPE[1] // 2)], "partition_count": 2}
        torch.save({"optimizer_state_dict": state}, path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


WRITERS = {
    "dcp": write_dcp,
    "hdf5, compressed": write_hdf5,
    "hdf5, one file": write_hdf5_stack,
    "zarr": write_zarr,
    "megatron": write_megatron,
    "deepspeed, stage 2": lambda folder: write_deepspeed(folder, 2),
    "deepspeed, stage 3": lambda folder: write_deepspeed(folder, 3),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_large_tensor_is_read_slice_by_slice(tmp_path, writer):
    log = open_source(WRITERS[writer](tmp_path))
    assert_out_of_core(log, NAME, np.zeros((1 << 19) + 7, np.float32))
