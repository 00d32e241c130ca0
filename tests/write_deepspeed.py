"""A training job of some ranks that saves checkpoints with DeepSpeed, on the processor.

Run as ``python write_deepspeed.py RANKS RENDEZVOUS STATES FOLDER``: saves the states in a file of torch as master
weights, once with each of the configurations below, into a folder of its name.
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

CONFIGURATIONS = {
    "stage 0": {"zero_optimization": {"stage": 0}},
    "stage 1, bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 2, bf16": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}, "bf16": {"enabled": True}},
    "stage 3": {"zero_optimization": {"stage": 3, "sub_group_size": 500}},
    "stage 3, bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
}


class Model(torch.nn.Module):
    """Parameters of given shapes, one of them under two names, and a buffer."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            module, levels = self, name.split(".")
            for level in levels[:-1]:
                if level not in module._modules:
                    module.add_module(level, torch.nn.Module())
                module = getattr(module, level)
            module.register_parameter(levels[-1], torch.nn.Parameter(tensor.clone()))
        self.tied = torch.nn.Module()
        self.tied.weight = self.layers.get_submodule("9").weight
        self.register_buffer("running_mean", torch.arange(3.0))


def train(rank, ranks, rendezvous, states, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    # Empty: no kernel is compiled.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, auto_mpi_discovery=False
    )
    trees = torch.load(states, weights_only=True)
    for name, configuration in CONFIGURATIONS.items():
        model = Model(trees[0]["model"])
        matrices, others = [], []
        for parameter in model.parameters():
            (matrices if parameter.ndim == 2 else others).append(parameter)
        rate = trees[0]["optimizer"]["param_groups"][0]["lr"]
        optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=rate)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 1, **configuration}
        )
        for step, tree in enumerate(trees):
            for key, parameter in engine.module.named_parameters():
                value = tree["model"][key]
                if "stage 0" in name:
                    parameter.data.copy_(value)
                elif "stage 3" in name:
                    padded = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % ranks))
                    safe_set_local_fp32_param(parameter, padded.chunk(ranks)[rank])
                else:
                    safe_set_full_fp32_param(parameter, value)
            engine.global_steps = step
            engine.save_checkpoint(Path(folder) / name, client_state={"loss": tree["loss"]})
    torch.distributed.destroy_process_group()


def main(ranks, *arguments):
    # Forked: the library is imported once.
    context = torch.multiprocessing.get_context("fork")
    job = [context.Process(target=train, args=(rank, int(ranks), *arguments)) for rank in range(int(ranks))]
    for process in job:
        process.start()
    for process in job:
        process.join()
    sys.exit(any(process.exitcode for process in job))


if __name__ == "__main__":
    main(*sys.argv[1:])
