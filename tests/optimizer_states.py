"""Train networks with the optimizers of torch, and keep the states of model and optimizer as logs in memory."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lazy import Lazy
from natgrad.sources.base import StepContent
from natgrad.sources.container import Container
from natgrad.sources.named_step import NamedStep
from natgrad.sources.names import CHECKPOINT
from natgrad.sources.recovered import Recovered
from natgrad.sources.steps import LoggedStep
from natgrad.storage import open_storage

torch = Lazy("torch")


def words(tensor):
    """Return the elements of a tensor as they are stored: bfloat16 as its bits in uint16."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy().copy() if tensor.dtype == torch.bfloat16 else tensor.numpy().copy()


def leaves(tree, prefix=""):
    """Yield the keys and values of a nested dict, joined by slashes."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if items is None:
        yield prefix.rstrip("/"), tree
        return
    for key, value in items:
        yield from leaves(value, f"{prefix}{key}/")


class MemoryStep(Container):
    """A step of `torch.save`, without the file."""

    ordered = True

    def __init__(self, step, tree):
        super().__init__(step)
        self.arrays = {}
        for key, leaf in leaves(tree):
            if isinstance(leaf, torch.Tensor):
                self.arrays[key] = words(leaf)
                dtype = str(leaf.dtype).removeprefix("torch.")
                self.add(key, tuple(leaf.shape), dtype)
            elif isinstance(leaf, bool | str):
                self.texts[key] = str(leaf)
            elif isinstance(leaf, int | float):
                self.numbers[key] = float(leaf)

    def read(self, key, start, out):
        out[:] = self.arrays[key].ravel()[start : start + len(out)]


class MemoryLog:
    """A log whose steps are in memory.

    Parameters
    ----------
    trees : list of dict
        What a training program saves at each step.
    numbers : sequence of int, optional
    names : Names
        Keys of the log.
    """

    def __init__(self, trees, numbers=None, names=CHECKPOINT):
        self.location, self.names = Path("log"), names
        numbers = range(len(trees)) if numbers is None else numbers
        steps = [LoggedStep(number, open_storage(f"log/step-{number}.pt")) for number in numbers]
        self.opened = {step: MemoryStep(step, tree) for step, tree in zip(steps, trees, strict=True)}

    def steps(self):
        return list(self.opened)

    @contextmanager
    def open(self, step):
        yield NamedStep(self.opened[step], self.names)


class WithoutGradients:
    """A log whose gradients are hidden."""

    def __init__(self, log):
        self._log, self.location = log, log.location

    def steps(self):
        return self._log.steps()

    def open(self, step):
        return _Opened(self._log.open(step))


class _Opened:
    def __init__(self, opened):
        self._opened = opened

    def __enter__(self):
        self._reader = self._opened.__enter__()
        return self

    def __exit__(self, *exception):
        return self._opened.__exit__(*exception)

    def content(self):
        found = self._reader.content()
        values = {**vars(found), "arrays": {"parameter": found.arrays["parameter"]}}
        return StepContent(**values)

    def read(self, *arguments):
        self._reader.read(*arguments)


def network(dtype, bias=True):
    """Return a network with two matrices, and optionally vectors."""
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16, bias=bias), torch.nn.Tanh(), torch.nn.Linear(16, 3, bias=bias)
    ).to(dtype)


def train(optimizer_of, steps, dtype="float32", *, bias=True, clip=1.0, schedule=None, between=None):
    """Train a network on mini-batches, with clipping.

    Parameters
    ----------
    optimizer_of : callable
        Takes the model and returns its optimizer.
    steps : int
        Number of updates.
    dtype : str
    bias : bool
    clip : float or None
    schedule : callable, optional
        Called with the optimizer and the number of the update after each update.
    between : callable, optional
        Called with the model and the number of the update after each update.

    Returns
    -------
    trees : list of dict
        Model and optimizer at each state, from the first to the last.
    gradients : list of dict
        Gradient of each update by tensor, as float64 arrays.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    model = network(dtype, bias)
    optimizer = optimizer_of(model)
    x = torch.randn(128, 6).to(dtype)
    target = (torch.tanh(x @ torch.randn(6, 3).to(dtype)) + 0.5 * torch.randn(128, 3).to(dtype)).detach()
    trees, gradients = [], []
    for step in range(steps + 1):
        copied = {key: value.clone() for key, value in model.state_dict().items()}
        trees.append({"model": copied, "optimizer": _copied(optimizer.state_dict())})
        if step == steps:
            return trees, gradients
        batch = torch.randint(0, 128, (8,))
        optimizer.zero_grad()
        ((model(x[batch]) - target[batch]) ** 2).mean().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        found = {name: p.grad.double().numpy().ravel().copy() for name, p in model.named_parameters()}
        gradients.append(found)
        optimizer.step()
        if schedule is not None:
            schedule(optimizer, step)
        if between is not None:
            between(model, step)
    raise AssertionError


def _copied(tree):
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copied(value) for value in tree]
    return tree.clone() if isinstance(tree, torch.Tensor) else tree


def recovered(log, largest_span=20):
    """Recover all gradients of a log.

    Returns
    -------
    gradients : list of dict
        By tensor, for each state that has one, in float64.
    figures : list of dict
        Numbers that describe the recovery, by name and tensor.
    """
    source = Recovered(log, largest_span)
    gradients, figures = [], []
    for step in source.steps():
        with source.open(step) as reader:
            found = {}
            for tensor, logged in reader.content().arrays.get("gradient", {}).items():
                found[tensor] = np.empty(int(np.prod(logged.shape)), logged.dtype)
                reader.read("gradient", tensor, 0, found[tensor])
            if found:
                gradients.append({tensor: values.astype(np.float64) for tensor, values in found.items()})
                figures.append(reader.recovery())
    return gradients, figures


def errors(gradients, truth):
    """Return the relative errors of recovered gradients, for all updates and tensors, shape (updates, tensors)."""
    return np.array(
        [
            [np.linalg.norm(one[name] - true[name]) / np.linalg.norm(true[name]) for name in true]
            for one, true in zip(gradients, truth, strict=True)
        ]
    )
