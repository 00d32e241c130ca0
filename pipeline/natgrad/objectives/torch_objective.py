"""Evaluate a PyTorch module on fixed batches as an objective of the tensors of a checkpoint."""

from __future__ import annotations

import fnmatch
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.objectives.mean import RunningMean, counted
from natgrad.objectives.protocol import Tensors
from natgrad.recording.arrays import tensor_array
from natgrad.schema.errors import InputError
from natgrad.sources.steps import LoggedTensor
from natgrad.sources.tensor_names import matched_names

__all__ = ["TorchObjective", "causal_lm_loss"]

_IGNORED = -100
"""Label of tokens that do not count, as in `torch.nn.functional.cross_entropy`."""


def causal_lm_loss(module: Any, batch: Any) -> Any:
    """Return the loss of each predicted token of a causal language model.

    Parameters
    ----------
    module : torch.nn.Module
        Called with the batch; it returns logits of shape (sequences, tokens, vocabulary), or an object with the
        attribute ``logits``, as the models of transformers do.
    batch : mapping or torch.Tensor
        Arguments of the module, with ``input_ids`` of shape (sequences, tokens) and optionally ``labels`` and
        ``attention_mask``; or ``input_ids`` alone. Tokens with the label -100 or the mask 0 are not counted.

    Returns
    -------
    torch.Tensor, shape (counted tokens,)
        Cross entropy of each token with its predecessors.
    """
    import torch

    if isinstance(batch, Mapping):
        arguments = {name: value for name, value in batch.items() if name != "labels"}
        found, tokens = module(**arguments), batch["input_ids"]
    else:
        found, tokens = module(batch), batch
        batch = {}
    labels = batch.get("labels", tokens)
    counts = labels != _IGNORED
    if batch.get("attention_mask") is not None:
        counts = counts & (batch["attention_mask"] != 0)
    logits = getattr(found, "logits", found)
    counts = counts[:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1][counts], labels[:, 1:][counts], reduction="none")


class TorchObjective:
    """The mean loss of a module over batches, at the tensors of a checkpoint.

    The module is evaluated in eval mode. Its parameters and persistent buffers are those of the checkpoint.
    Parameters that do not require a gradient are not trained. Tied parameters have one gradient, under the name
    that the checkpoint lists first.

    Parameters
    ----------
    module : torch.nn.Module
        On the device, and in the dtype, in which it is evaluated.
    loss : callable
        Function of the module and a batch that returns the loss of each counted element of the batch, such as a
        token; or the mean loss and the number of elements that it is the mean of. If there is one batch, the mean
        alone suffices. `natgrad.causal_lm_loss` is the loss of causal language models.
    batches : iterable
        Batches: tensors, or mappings, lists or tuples with tensors, which are moved to the device of the module.
        They are the same, in the same order, in every iteration. Each is a micro-batch.
    ignore : sequence of str
        Patterns of names of tensors of the checkpoint that the module does not have.

    Raises
    ------
    InputError
        If there is no batch.

    Examples
    --------
    >>> import torch
    >>> linear = torch.nn.Linear(3, 1)
    >>> x = torch.ones(8, 3)
    >>> objective = TorchObjective(linear, lambda module, batch: module(batch).square(), [x[:6], x[6:]])
    >>> loss, gradients = objective({"weight": np.ones((1, 3), np.float32), "bias": np.zeros(1, np.float32)})
    >>> loss, gradients["bias"].tolist()
    (9.0, [6.0])
    """

    def __init__(
        self, module: Any, loss: Callable[[Any, Any], Any], batches: Iterable[Any], *, ignore: Sequence[str] = ()
    ) -> None:
        if isinstance(batches, Iterator):
            batches = list(batches)
        self._module, self._loss, self._batches, self._ignore = module.eval(), loss, batches, tuple(ignore)
        self._device = next((one.device for one in module.parameters()), None)
        if not any(True for _ in batches):
            raise InputError("there are no batches", where="TorchObjective", remedy="pass at least one batch")
        self._parameters: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
        self._buffers: dict[str, Any] = dict(module.named_buffers(remove_duplicate=False))
        # Buffers that are not saved also have names, and older checkpoints contain them.
        self._saved = set(module.state_dict())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that may change the values: data, micro-batches, dtypes, device, threads and version."""
        import torch

        digest, sizes = hashlib.sha256(), []
        for batch in self._batches:
            tensors = list(_tensors_of(batch))
            for tensor in tensors:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor_array(tensor, "a batch").tobytes())
            sizes.append(int(tensors[0].shape[0]) if tensors and tensors[0].ndim else 1)
        dtypes = sorted({str(one.dtype).removeprefix("torch.") for one in self._parameters.values()})
        device = "none" if self._device is None else self._device.type
        if device == "cuda":
            device = torch.cuda.get_device_name(self._device)
        return {
            "data": digest.hexdigest(),
            "micro_batches": sizes,
            "dtype": ", ".join(dtypes),
            "device": device,
            "threads": str(torch.get_num_threads()),
            "versions": {"torch": torch.__version__},
        }

    def __call__(self, tensors: Tensors) -> tuple[float, dict[str, NDArray[Any]]]:
        """Return the loss and the gradients at a state; see `natgrad.objectives.protocol.Objective`."""
        import torch

        trained = self._load(tensors)
        parameters, mean = list(trained.values()), RunningMean()
        with torch.enable_grad():
            for batch, alone in self._each_batch():
                loss, count = counted(self._loss(self._module, batch), alone=alone)
                count = float(count)
                if count:
                    slopes = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
                    mean.add(count, float(loss.detach()), _filled(slopes, parameters))
        loss, found = mean.result()
        return loss, {name: tensor_array(slope, name) for name, slope in zip(trained, found, strict=True)}

    def hvp(self, tensors: Tensors, direction: Tensors) -> dict[str, NDArray[Any]]:
        """Return the product of the Hessian at a state with a direction.

        Attention uses its plain formula (``SDPBackend.MATH``), because the fused kernels have no second derivative.
        """
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        trained = self._load(tensors)
        parameters, mean = list(trained.values()), RunningMean()
        vectors = [
            _tensor(direction[name]).to(one.device, one.dtype).reshape(one.shape) for name, one in trained.items()
        ]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for batch, alone in self._each_batch():
                loss, count = counted(self._loss(self._module, batch), alone=alone)
                count = float(count)
                if not count:
                    continue
                slopes = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                # A slope without a graph is constant.
                along = [
                    (slope * vector).sum()
                    for slope, vector in zip(slopes, vectors, strict=True)
                    if slope is not None and slope.requires_grad
                ]
                products = torch.autograd.grad(sum(along), parameters, allow_unused=True) if along else ()
                mean.add(count, 0.0, _filled(products, parameters))
        _, found = mean.result()
        return {name: tensor_array(one, name) for name, one in zip(trained, found, strict=True)}

    def _each_batch(self) -> Iterator[tuple[Any, bool]]:
        """Yield the batches on the device, and whether there is only one."""
        batches = iter(self._batches)
        batch, following = next(batches), next(batches, None)
        yield self._moved(batch), following is None
        while following is not None:
            yield self._moved(following), False
            following = next(batches, None)

    def _moved(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            return value if self._device is None else value.to(self._device)
        if isinstance(value, Mapping):
            return {name: self._moved(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._moved(one) for one in value]
        return value

    def _load(self, tensors: Tensors) -> dict[str, Any]:
        """Fill the module from a checkpoint, and return the trained parameters by their name there."""
        import torch

        own = {**self._parameters, **self._buffers}
        names = _matched(tensors, own)
        unknown = [name for name in tensors if name not in names]
        unknown = [name for name in unknown if not any(fnmatch.fnmatchcase(name, one) for one in self._ignore)]
        if unknown:
            raise InputError(
                f"the module has no tensor {unknown[0]!r}, and {len(unknown) - 1} others of the checkpoint",
                where="TorchObjective",
                why=f"the tensors of the module are {list(own)[:4]}, ...: it is a different model, or has "
                "different names",
                remedy="pass the module that was trained; ignore=[PATTERN] omits tensors that it does not need",
            )
        filled: dict[int, str] = {}
        trained: dict[str, Any] = {}
        with torch.no_grad():
            for name in sorted(names, key=list(tensors).index):
                target, value = own[names[name]], _tensor(tensors[name])
                _require_fits(name, target, value)
                value = value.to(target.device, target.dtype)
                if id(target) in filled:
                    if not torch.allclose(target, value, rtol=0.0, atol=0.0, equal_nan=True):
                        raise InputError(
                            f"{name!r} and {filled[id(target)]!r} share memory in the module, but differ in the "
                            "checkpoint",
                            where="TorchObjective",
                            remedy="create the module without tied parameters",
                        )
                    continue
                target.copy_(value)
                filled[id(target)] = name
                if names[name] in self._parameters and target.requires_grad:
                    trained[name] = target
        missing = [
            name
            for name, one in own.items()
            if id(one) not in filled
            and name in self._saved
            and (name in self._parameters or one.is_floating_point())
        ]
        if missing:
            raise InputError(
                f"the checkpoint has no tensor {missing[0]!r}, and lacks {len(missing) - 1} others of the module",
                where="TorchObjective",
                why=f"the tensors of the checkpoint are {list(tensors)[:4]}, ...: it is a different model, or "
                "has different names",
                remedy="pass the module that was trained",
            )
        if not trained:
            raise InputError(
                "no parameter of the module requires a gradient",
                where="TorchObjective",
                remedy="call module.requires_grad_()",
            )
        return trained


def _matched(tensors: Tensors, own: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of tensors of a checkpoint, each with its name in the module."""
    described = [
        {name: LoggedTensor(tuple(one.shape), "") for name, one in part.items()} for part in (own, tensors)
    ]
    same = {name: name for name in tensors if name in own}
    return same | matched_names(described[0], described[1], {})


def _require_fits(name: str, target: Any, value: Any) -> None:
    import torch

    narrower = target.is_floating_point() and torch.promote_types(target.dtype, value.dtype) != target.dtype
    if target.shape != value.shape or narrower:
        raise InputError(
            f"{name!r} is {value.dtype} of shape {tuple(value.shape)} in the checkpoint, and {target.dtype} of "
            f"shape {tuple(target.shape)} in the module",
            where="TorchObjective",
            why="the gradient would be evaluated at rounded parameters" if narrower else "it is a different model",
            remedy="convert the module, for example with .float()"
            if narrower
            else "pass the module that was trained",
        )


def _tensor(array: NDArray[Any]) -> Any:
    import torch

    array = np.ascontiguousarray(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # the tensor is only read
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def _filled(found: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
    """Return gradients, in at least float32, with zeros for parameters that the loss does not depend on."""
    found = found or [None] * len(parameters)
    filled = [
        one.new_zeros(one.shape) if slope is None else slope.detach()
        for slope, one in zip(found, parameters, strict=True)
    ]
    return [one.float() if one.element_size() < 4 else one for one in filled]


def _tensors_of(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_of(one)
