"""Factories of objectives for `natgrad replay`, which its workers import."""

import os
import signal
from pathlib import Path

import numpy as np


class Quartic:
    """A loss with a cubic gradient, in NumPy alone. Products with its Hessian are exact to rounding."""

    def __call__(self, tensors):
        a, b = (tensors[name].astype(np.float64) for name in ("a", "b"))
        loss = float((a**4).sum() + (b**2).sum() + a.sum() * b.sum())
        return loss, {"a": 4 * a**3 + b.sum(), "b": 2 * b + a.sum()}

    def hvp(self, tensors, direction):
        a = tensors["a"]
        return {
            "a": 12 * a**2 * direction["a"] + direction["b"].sum(),
            "b": 2 * direction["b"] + direction["a"].sum(),
        }

    @staticmethod
    def hessian(tensors):
        count = tensors["a"].size
        found = np.full((count + tensors["b"].size,) * 2, 1.0)
        found[:count, :count] = np.diag(12 * tensors["a"].astype(np.float64) ** 2)
        found[count:, count:] = 2 * np.eye(tensors["b"].size)
        return found


quartic = Quartic


def without_hvp():
    return lambda tensors: Quartic()(tensors)


def random():
    generator = np.random.default_rng()
    return lambda tensors: (1.0, {name: generator.normal(size=array.shape) for name, array in tensors.items()})


def rounded():
    """The gradient of the second call differs by rounding, as that of a sum in another order does."""
    calls = []

    def objective(tensors):
        calls.append(1)
        loss, gradients = Quartic()(tensors)
        return loss, {name: array * (1 + 1e-7 * (len(calls) == 2)) for name, array in gradients.items()}

    return objective


def failing():
    def objective(tensors):
        if tensors["a"][0] < 0.49:
            raise ZeroDivisionError("at this state")
        return Quartic()(tensors)

    return objective


def changing():
    def objective(tensors):
        loss, gradients = Quartic()(tensors)
        return loss, gradients if tensors["a"][0] > 0.49 else {"a": gradients["a"]}

    return objective


def refused():
    raise RuntimeError("there are no data")


def not_a_function():
    return 3


def fingerprinted():
    objective = Quartic()
    objective.fingerprint = {"data": os.environ.get("OBJECTIVE_DATA", "first")}
    return objective


class _Killing(Quartic):
    """Kill a process when some states after the first are evaluated, once for each."""

    def __init__(self, process, states):
        self._process, self._states = process, states

    def __call__(self, tensors):
        marker = Path(os.environ["KILLED"]) / f"{tensors['a'][0]:.6f}"
        if tensors["a"][0] < 0.495 and len(list(marker.parent.iterdir())) < self._states and not marker.exists():
            marker.touch()
            os.kill(self._process(), signal.SIGKILL)
            signal.pause()  # a killed command ends its workers
        return super().__call__(tensors)


def killing_workers():
    return _Killing(os.getpid, 2)


def killing_the_command():
    return _Killing(os.getppid, 1)


def linear():
    import torch

    import natgrad

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=generator), torch.randn(20, 2, generator=generator)
    return natgrad.TorchObjective(
        torch.nn.Linear(3, 2), lambda module, batch: (module(batch[0]) - batch[1]).square(), [(x, y)]
    )


STEPS = (0, 1, 2, 4, 8)


def trained(steps=STEPS):
    """Return the parameters of a run of gradient descent by step."""
    quartic, tensors, found = Quartic(), {"a": np.linspace(0.5, 1.0, 3), "b": np.ones(2)}, {}
    for step in range(max(steps) + 1):
        if step in steps:
            found[step] = tensors
        _, gradients = quartic(tensors)
        tensors = {name: array - 0.02 * gradients[name] for name, array in tensors.items()}
    return found


def write(folder, states, rate=None, **others):
    """Write the parameters of a run, and other arrays of each state."""
    folder.mkdir(exist_ok=True)
    for step, tensors in states.items():
        arrays = {f"parameter/{name}": array for name, array in tensors.items()} | others
        if rate is not None:
            arrays["learning_rate"] = np.float64(rate)
        np.savez(folder / f"step_{step}.npz", **arrays)
