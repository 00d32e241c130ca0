"""A training job of some ranks that saves checkpoints with DeepSpeed, on the processor.

Run as ``python write_deepspeed.py RENDEZVOUS STATES FOLDER``: saves the states in a file of torch as master
weights, once with each of the configurations below, into a folder of its name. Then it trains from the first state
with the ``exact`` gradient of each, and saves before the first update and after each, into "<name>, trained". The
first file also has the options of the optimizer: ``groups``, for matrices and for other tensors. Two processes do
this, and then three processes with some of the configurations, into "<name>, three".
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

from ranks import run_ranks

CONFIGURATIONS = {
    "stage 0": {"zero_optimization": {"stage": 0}},
    "stage 1, bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 2, bf16": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}, "bf16": {"enabled": True}},
    "stage 3": {"zero_optimization": {"stage": 3, "sub_group_size": 500}},
    "stage 3, bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
}
THREE = ("stage 2", "stage 3")


class Linear(torch.nn.Module):
    """Parameters with specified gradients."""

    def forward(self, gradients):
        own = self.named_parameters(recurse=False)
        return sum((parameter.float() * gradients[name]).sum() for name, parameter in own)


class Model(Linear):
    """Parameters with specified shapes, one of them under two names, and a buffer."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            module, levels = self, name.split(".")
            for level in levels[:-1]:
                if level not in module._modules:
                    module.add_module(level, Linear())
                module = getattr(module, level)
            module.register_parameter(levels[-1], torch.nn.Parameter(tensor.clone()))
        self.tied = torch.nn.Module()
        self.tied.weight = self.layers.get_submodule("9").weight
        self.register_buffer("running_mean", torch.arange(3.0))

    def forward(self, gradients):
        # Each module computes with its own parameters, because stage 3 gathers them for each module.
        loss = super().forward(gradients)
        for name, module in self.named_modules():
            if name not in ("", "tied") and module._parameters:
                loss = loss + module({own: gradients[f"{name}.{own}"] for own in module._parameters})
        return loss


def train(rank, ranks, rendezvous, states, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    # Empty: no kernel is compiled.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(
        "gloo", init_method=f"file://{rendezvous}-{ranks}", rank=rank, world_size=ranks, auto_mpi_discovery=False
    )
    trees = torch.load(states, weights_only=True)
    rate = trees[0]["optimizer"]["param_groups"][0]["lr"]

    def engine_of(configuration, **options):
        model = Model(trees[0]["model"])
        matrices, others = [], []
        for parameter in model.parameters():
            (matrices if parameter.ndim == 2 else others).append(parameter)
        of_matrices, of_others = ({**group, **options} for group in trees[0]["groups"])
        groups = [{"params": matrices, **of_matrices}, {"params": others, **of_others}]
        optimizer = torch.optim.AdamW(groups)
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, **configuration}
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    for name, configuration in CONFIGURATIONS.items():
        if ranks == 3 and name not in THREE:
            continue
        engine = engine_of(configuration, lr=rate)
        for step, tree in enumerate(trees if ranks == 2 else ()):
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
        engine, later = engine_of(configuration), Path(folder) / f"{name}, {'trained' if ranks == 2 else 'three'}"
        engine.save_checkpoint(later, client_state={"grad": trees[0]["exact"]})
        for tree in trees:
            engine.backward(engine(tree["exact"]))
            engine.step()
            engine.save_checkpoint(later, client_state={"grad": tree["exact"]})
    torch.distributed.destroy_process_group()


def main(*arguments):
    for ranks in (2, 3):
        run_ranks(train, ranks, ranks, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
