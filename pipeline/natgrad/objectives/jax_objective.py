"""Evaluate a function of JAX on fixed batches as an objective of the tensors of a checkpoint."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.objectives.mean import RunningMean, counted
from natgrad.objectives.protocol import Tensors
from natgrad.schema.errors import InputError

__all__ = ["JaxObjective"]


class JaxObjective:
    """The mean loss of a function of JAX over batches, at the tensors of a checkpoint.

    Parameters
    ----------
    loss : callable
        Function of the parameters and a batch that returns the loss of each counted element of the batch; or the
        mean loss and the number of elements that it is the mean of. If there is one batch, the mean alone suffices.
        It is compiled once for each shape of a batch.
    batches : sequence
        Batches: arrays, or pytrees of arrays.
    separator : str, optional
        The names of tensors are split here into levels of nested dictionaries, as Flax needs them. By default, the
        parameters are one dictionary by name.
    buffers : sequence of str
        Patterns of names of tensors that are not trained, such as ``"batch_stats*"``.

    Raises
    ------
    InputError
        If there is no batch.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Any],
        batches: Iterable[Any],
        *,
        separator: str | None = None,
        buffers: Sequence[str] = (),
    ) -> None:
        import jax

        self._loss, self._batches = loss, list(batches)
        self._separator, self._buffers = separator, tuple(buffers)
        if not self._batches:
            raise InputError("there are no batches", where="JaxObjective", remedy="pass at least one batch")
        alone = len(self._batches) == 1

        def mean(trained: Any, rest: Any, batch: Any) -> tuple[Any, Any]:
            value, count = counted(self._loss(self._tree({**trained, **rest}), batch), alone=alone)
            return value, count

        slope = jax.grad(mean, has_aux=True)
        self._evaluated = jax.jit(jax.value_and_grad(mean, has_aux=True))
        self._product = jax.jit(
            lambda trained, rest, batch, vector: jax.jvp(
                lambda one: slope(one, rest, batch), (trained,), (vector,), has_aux=True
            )
        )

    def _tree(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        if self._separator is None:
            return dict(tensors)
        tree: dict[str, Any] = {}
        for name, value in tensors.items():
            *folders, last = name.split(self._separator)
            level = tree
            for folder in folders:
                level = level.setdefault(folder, {})
            level[last] = value
        return tree

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that may change the values: data, micro-batches, device, threads, flags and versions."""
        import jax

        digest, sizes = hashlib.sha256(), []
        for batch in self._batches:
            arrays = [np.asarray(one) for one in jax.tree.leaves(batch)]
            for array in arrays:
                digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
            sizes.append(int(arrays[0].shape[0]) if arrays and arrays[0].ndim else 1)
        return {
            "data": digest.hexdigest(),
            "micro_batches": sizes,
            "device": jax.devices()[0].device_kind,
            "dtype": "up to float64" if jax.config.read("jax_enable_x64") else "up to float32",
            "flags": os.environ.get("XLA_FLAGS", ""),
            "versions": {"jax": jax.__version__},
        }

    def __call__(self, tensors: Tensors) -> tuple[float, dict[str, NDArray[Any]]]:
        """Return the loss and the gradients at a state; see `natgrad.objectives.protocol.Objective`."""
        trained, rest = self._divided(tensors)
        mean = RunningMean()
        for batch in self._batches:
            (value, count), slopes = self._evaluated(trained, rest, batch)
            if float(count):
                mean.add(float(count), float(value), [np.asarray(slopes[name]) for name in trained])
        loss, found = mean.result()
        return loss, dict(zip(trained, found, strict=True))

    def hvp(self, tensors: Tensors, direction: Tensors) -> dict[str, NDArray[Any]]:
        """Return the product of the Hessian at a state with a direction."""
        trained, rest = self._divided(tensors)
        mean = RunningMean()
        vector = {name: np.asarray(direction[name], array.dtype) for name, array in trained.items()}
        for batch in self._batches:
            _, products, count = self._product(trained, rest, batch, vector)
            if float(count):
                mean.add(float(count), 0.0, [np.asarray(products[name]) for name in trained])
        _, found = mean.result()
        return dict(zip(trained, found, strict=True))

    def _divided(self, tensors: Tensors) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return the tensors that are trained, and the others."""
        import jax

        wide = [name for name, array in tensors.items() if array.dtype == np.float64]
        if wide and not jax.config.read("jax_enable_x64"):
            raise InputError(
                f"{wide[0]!r} is float64, but JAX computes in float32",
                where="JaxObjective",
                why="the gradient would be that at rounded parameters",
                remedy='call jax.config.update("jax_enable_x64", True) in the factory',
            )
        fixed = {name for name in tensors if any(fnmatch.fnmatchcase(name, one) for one in self._buffers)}
        trained = {name: array for name, array in tensors.items() if name not in fixed}
        return trained, {name: tensors[name] for name in fixed}
