"""Define a small model that is trained and recorded, its gradients from formulas, and the contents of its logs."""

import numpy as np

from lazy import Lazy
from natgrad.sources.ledger_log import LedgerLog

torch = Lazy("torch")
safetensors_torch = Lazy("safetensors.torch")
safetensors = Lazy("safetensors")

ROUNDING = 64 * 2.0**-53
"""Products of at most 24 float64 numbers, computed in two orders, differ by less than this, relative to the sum of
their absolute values, which is at most 4 here."""


def read(folder):
    """Return the tensors and numbers of each recorded step with a gradient, in order."""
    states = all_states(folder)
    for number in [number for number, state in states.items() if not state["gradient"]]:
        # The state after the last update.
        assert number == max(states)
        assert not states[number]["texts"]
        assert "loss" not in states.pop(number)
    return states


def all_states(folder):
    """Return the tensors and numbers of each recorded state, in order."""
    states = {}
    for path in folder.glob("step_*"):
        groups = {"parameter": {}, "gradient": {}}
        for key, tensor in safetensors_torch.load_file(path).items():
            kind, _, name = key.partition("/")
            groups.setdefault(kind, {})
            if name:
                groups[kind][name] = tensor
            else:
                groups[kind] = tensor.item()
        with safetensors.safe_open(path, "pt") as file:
            groups["texts"] = file.metadata() or {}
        states[int(path.stem.removeprefix("step_"))] = groups
    return dict(sorted(states.items()))


def make_model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2).double()


def batch(step):
    """Return the inputs and targets of a step."""
    generator = torch.Generator().manual_seed(step)
    draw = [torch.rand(4, size, dtype=torch.float64, generator=generator) for size in (3, 2)]
    return draw[0], draw[1]


def loss_of(model, step):
    inputs, targets = batch(step)
    return ((model(inputs) - targets) ** 2).mean()


def by_hand(parameters, *steps):
    """Return the loss and the gradients of the mean over the batches of some steps, from their formulas."""
    weight, bias = parameters["weight"].numpy(), parameters["bias"].numpy()
    losses, weights, biases = [], [], []
    for step in steps:
        inputs, targets = (tensor.numpy() for tensor in batch(step))
        residual = inputs @ weight.T + bias - targets
        losses.append((residual**2).sum() / 8)
        weights.append(2 / 8 * residual.T @ inputs)
        biases.append(2 / 8 * residual.sum(axis=0))
    return np.mean(losses), {"weight": np.mean(weights, axis=0), "bias": np.mean(biases, axis=0)}


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(model, optimizer, steps, **hooks):
    """Train, and before each step call a function of it, if there is one."""
    for step in range(steps):
        hooks.get(f"before_{step}", lambda: None)()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return snapshot(model)


def updates_of(folder):
    """Yield the updates of a log of ledgers."""
    log = LedgerLog(folder)
    names = [tensor.name for tensor in log.header.tensors]
    for step in log.steps():
        with log.open(step) as reader:
            content = reader.content()
            if "skipped" not in content.scalars:  # the state after an update that no other follows
                continue
            gram, ratio = reader.products(names)
        rate = content.scalars.get("learning_rate", np.nan)
        rates = dict.fromkeys(names, rate) if content.optimizer is None else content.optimizer.rates
        yield {
            "step": step.number,
            "skipped": content.scalars["skipped"] == 1.0,
            "loss": content.scalars.get("loss", np.nan),
            "gram": dict(zip(names, gram, strict=True)),
            "ratio": dict(zip(names, ratio, strict=True)),
            "rates": rates,
        }
