"""Compare the ledgers of distributed runs with the products of the gathered tensors, in real processes."""

import functools
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from lazy import Lazy
from natgrad.kernel.ledger_sums import roundoff_bound
from natgrad.kernel.updates import portable_products
from natgrad.sources.ledger_log import LedgerLog
from watched import updates_of

torch = Lazy("torch")


def run(program, ranks, folder):
    """Run a program in one process for each rank, and return their standard output and error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program],
            cwd=folder,
            env={**common, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, outputs
    return outputs


START = """
import torch
import natgrad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

torch.distributed.init_process_group("gloo")
rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
torch.manual_seed(0)

def make_model():
    # The weight of the first layer has one row, so that all ranks but one have none of it.
    return torch.nn.Sequential(torch.nn.Linear(17, 1), torch.nn.Linear(1, 5), torch.nn.Linear(5, 3)).double()

def batch(step):
    return torch.randn(4, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))

def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()

def train(model, optimizer, steps, before=lambda step: None):
    for step in range(steps):
        before(step)
        optimizer.zero_grad()
        model(batch(step)).square().sum().backward()
        if kind != "ddp":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

def sharded(model):
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

"""

COMPARED = """
states, angles = [], []
model = sharded(make_model()) if kind == "fsdp" else torch.nn.parallel.DistributedDataParallel(make_model())
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

def keep(*_):
    named = {name.removeprefix("module."): one for name, one in model.named_parameters()}
    states.append({name: (full(one), full(one.grad)) for name, one in named.items()})

optimizer.register_step_pre_hook(keep)
with natgrad.watch(optimizer, "log", model=model, mode="ledger", on_error="raise") as watch:
    train(model, optimizer, 4, lambda step: angles.append(watch.last))
keep()
assert watch.recorded == (4 if kind == "fsdp" or rank == 0 else 0)
if kind == "fsdp":
    print([last.model.angle for last in angles[1:]])
if rank == 0:
    torch.save(states, "states.pt")
"""

FAILING = """
model = sharded(make_model())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
watch = natgrad.watch(optimizer, "ended", model=model, mode="ledger")

def fail(step):
    if step == 2 and rank == 1:
        optimizer.load_state_dict(optimizer.state_dict())

train(model, optimizer, 5, fail)
assert not watch.active
watch.close()
# Another training with the same processes is recorded.
with natgrad.watch(optimizer, "again", model=model, mode="ledger") as watch:
    train(model, optimizer, 2)
assert watch.recorded == 2
"""

REFUSED = """
def refused(model, wanted, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        natgrad.watch(optimizer, "refused", model=model, mode="ledger", **options)
    except ValueError as error:
        assert wanted in str(error), error
    else:
        raise AssertionError(wanted)

mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
refused(fully_shard(make_model(), mesh=mesh), "distributed as Replicate, Shard over 2 of 2 processes")
refused(FullyShardedDataParallel(make_model(), device_id=torch.device("cpu")), "use torch.distributed.fsdp.fully")
"""

END = """
torch.distributed.barrier()  # gloo may abort a process whose peer has ended
torch.distributed.destroy_process_group()
"""

# Processes start slowly, so each runs several parts.
CASES = {("fsdp", 3): FAILING, ("ddp", 2): REFUSED}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a function of a case that runs it once, and returns its folder and outputs."""

    @functools.cache
    def run_case(kind, ranks):
        folder = tmp_path_factory.mktemp(kind)
        return folder, run(START + f"kind = {kind!r}\n" + COMPARED + CASES[kind, ranks] + END, ranks, folder)

    return run_case


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_ledgers_of_several_ranks_are_those_of_the_gathered_tensors(finished, kind, ranks):
    folder, outputs = finished(kind, ranks)
    # All ranks have the same values.
    assert len({output for output, _ in outputs}) == 1
    states = torch.load(folder / "states.pt")
    log = LedgerLog(folder / "log")
    assert [tensor.shape for tensor in log.header.tensors] == [(1, 17), (1,), (5, 1), (5,), (3, 5), (3,)]
    updates, names = list(updates_of(folder / "log")), [tensor.name for tensor in log.header.tensors]
    assert [update["step"] for update in updates] == [0, 1, 2, 3]
    for step, update in enumerate(updates):
        found, ratio = (np.stack([*update[kind].values()]) for kind in ("gram", "ratio"))
        pairs = [states[step][name] for name in names]
        after = [states[step + 1][name][0] for name in names]
        arrays = ([one for one, _ in pairs], after, [gradient for _, gradient in pairs])
        expected, its_ratio = portable_products(*([one.numpy().ravel() for one in each] for each in arrays))
        norms = np.sqrt(np.einsum("tii->ti", expected))
        # Forming a residual, and converting it to another ratio, cost roundings of its parts.
        norms[:, 3] = 2 * (norms[:, 2] + abs(its_ratio) * norms[:, 1])
        bound = 4 * roundoff_bound(17) * norms[:, :, None] * norms[:, None, :]
        assert (abs(found - expected) <= bound).all()
        np.testing.assert_allclose(ratio, its_ratio, 64 * roundoff_bound(17))


def test_an_error_in_one_rank_ends_the_recording_in_all_and_the_training_continues(finished):
    folder, outputs = finished("fsdp", 3)
    assert "the recording has ended in 1 other processes" in outputs[0][1]
    assert "the state of the optimizer was replaced" in outputs[1][1]
    assert all("the training continues" in error for _, error in outputs)
    for name in ("ended", "again"):
        assert [update["step"] for update in updates_of(folder / name)] == [0, 1]


def test_parameters_that_several_ranks_have_and_flattened_ones_are_refused(finished):
    folder, _ = finished("ddp", 2)  # its processes compare the messages
    assert not (folder / "refused").exists()
