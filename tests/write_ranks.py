"""A training job of several ranks, each of which saves its part of the tensors with torch.save, as verl does.

Run as ``python write_ranks.py STATES FOLDER RANKS``, with the states in a file of torch, each as model and moments.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ranks import run_ranks


def save(rank, ranks, states, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{states}-rendezvous", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))

    def shard(name, tensor):
        placement = Shard(int(name == "layers.9.weight")) if tensor.ndim else Replicate()
        return distribute_tensor(tensor, mesh, [placement])

    for step, tree in enumerate(torch.load(states, weights_only=True)):
        path = Path(folder) / f"global_step_{step}" / "actor"
        path.mkdir(parents=True, exist_ok=True)
        parts = {name: shard(name, tensor) for name, tensor in tree["model"].items()}
        names = list(parts)
        entries = {
            index: {"step": torch.tensor(float(step)), "exp_avg": shard(name, tree["model"][name] * 2)}
            for index, name in enumerate(names)
        }
        groups = [{"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "params": list(range(len(names)))}]
        torch.save(parts | {"buffer": torch.arange(3)}, path / f"model_world_size_{ranks}_rank_{rank}.pt")
        torch.save({"state": entries, "param_groups": groups}, path / f"optim_world_size_{ranks}_rank_{rank}.pt")
        torch.save({"rng": torch.get_rng_state()}, path / f"extra_state_world_size_{ranks}_rank_{rank}.pt")
        dist.barrier()
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text(str(step))
    dist.destroy_process_group()


def main(states, folder, ranks):
    run_ranks(save, int(ranks), int(ranks), states, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
