"""Training jobs of several ranks that save checkpoints with torch.distributed.checkpoint.

Run as ``python write_dcp.py STATES FOLDER JOB ...``. A job ``RANKS:FIRST:LAST`` saves the steps FIRST to LAST of
the states in a file of torch, each as model, gradients and scalars, in tensors that are sharded over its ranks.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ranks import run_ranks


def save(rank, ranks, first, last, states, folder):
    torch.set_num_threads(1)
    rendezvous = f"{states}-rendezvous-{ranks}"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    grid = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("rows", "columns"))

    def shard(name, tensor):
        if name == "layers.10.weight":
            return distribute_tensor(tensor, grid, [Shard(0), Shard(1)])
        if name == "layers.9.weight":
            return distribute_tensor(tensor, mesh, [Shard(1)])
        if tensor.ndim:
            return distribute_tensor(tensor, mesh, [Shard(0)])
        return distribute_tensor(tensor, mesh, [Replicate()])

    for step, tree in enumerate(torch.load(states, weights_only=True)):
        if first <= step <= last:
            for array in ("model", "grad"):
                tree[array] = {name: shard(name, tensor) for name, tensor in tree[array].items()}
            dcp.save(tree, checkpoint_id=Path(folder) / f"step-{step}")
    dist.destroy_process_group()


def main(states, folder, *jobs):
    for job in jobs:
        ranks, first, last = map(int, job.split(":"))
        run_ranks(save, ranks, ranks, first, last, states, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
