"""Compare the change of the loss with the gradients, to see whether both belong to one objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.layout import MEBIBYTE, storage_dtype, widened
from natgrad.schema.objective import LEAST_UPDATES, consistency
from natgrad.sources.base import Source, StepContent
from natgrad.sources.completion import complete
from natgrad.sources.steps import LoggedStep
from natgrad.theory.discrete_time import trapezoid_residual

__all__ = ["loss_residual", "objective_of"]

_STATES = 8
_BYTES_LIMIT = 256 * MEBIBYTE


def loss_residual(loss: Sequence[float], products: Sequence[tuple[float, float]]) -> float:
    """Return how much of the change of the loss the gradients of both states do not explain, 0 to 1.

    Parameters
    ----------
    loss : sequence of float, length n + 1
        Loss of consecutive states.
    products : sequence of (float, float), length n
        Products g.d and g'.d of each displacement d with the gradients g of its first and g' of its second state.

    Returns
    -------
    float
        Median over the updates of `natgrad.theory.discrete_time.trapezoid_residual`. NaN if no update has finite
        values and a change.

    Notes
    -----
    If every loss is that of another mini-batch, its change is mainly the difference of the batches.

    Examples
    --------
    >>> loss_residual([4.0, 1.0], [(-4.0, -2.0)])  # theta^2 from 2 to 1
    0.0
    """
    with np.errstate(all="ignore"):
        change = np.diff(np.asarray(loss, np.float64))
        first, last = np.asarray(products, np.float64).reshape(-1, 2).T
        residuals, _ = trapezoid_residual(change, first, (last - first) / 2)
    known = residuals[np.isfinite(residuals)]
    return float(np.median(known)) if len(known) else math.nan


def objective_of(
    log: Source, steps: Sequence[LoggedStep], content: StepContent, stop: Callable[[], bool] = lambda: False
) -> str:
    """Return whether the losses and gradients of the first states belong to one objective.

    Parameters
    ----------
    log : Source
    steps : sequence of LoggedStep
    content : StepContent
        Complete content of the first step.
    stop : callable
        The comparison ends when it returns True.
    """
    if "gradient" not in content.readable:
        return f"unknown: the log has no {'states' if content.recorded else 'gradients'}"
    if "loss" not in content.scalars:
        return "unknown: the log has no loss"
    first = [step for step in steps[:_STATES] if step.run == steps[0].run]
    sizes = [
        math.prod(tensor.shape) * storage_dtype(tensor.dtype).itemsize
        for array in ("parameter", "gradient")
        for tensor in content.arrays[array].values()
    ]
    if 3 * sum(sizes) > _BYTES_LIMIT:
        return "unknown: the states are too large to be read here; process computes it"
    losses, products = [], []
    before: dict[str, NDArray[np.float64]] | None = None
    for step in first:
        if stop():
            break
        state, loss = _state(log, step, tuple(content.arrays["parameter"]))
        if loss is None or state is None:
            break
        if before is not None:
            displacement = state["parameter"] - before["parameter"]
            with np.errstate(all="ignore"):
                products.append((float(before["gradient"] @ displacement), float(state["gradient"] @ displacement)))
        losses.append(loss)
        before = state
    if not products:
        return "unknown: no two states with loss and gradient follow each other"
    residual = loss_residual(losses, products)
    between = f"gradients do not explain {residual:.2g} of dL in the first {len(products)} updates (median)"
    if math.isnan(residual):
        return f"unknown: dL of the first {len(products)} updates is 0 or not finite"
    found = consistency(residual if len(products) >= LEAST_UPDATES else None)
    if found == "inconsistent":
        between += ", as if each loss belonged to another mini-batch or step; declare it with --evaluation"
    return {"consistent": "consistent: ", "inconsistent": "not consistent: "}.get(found, "unknown: ") + between


def _state(
    log: Source, step: LoggedStep, tensors: tuple[str, ...]
) -> tuple[dict[str, NDArray[np.float64]] | None, float | None]:
    """Read the parameters and gradients of a state, each in one vector of float64, and its loss."""
    with log.open(step) as reader:
        content = complete(step, reader.content(), tensors=tensors, is_last=True)
        if "gradient" not in content.arrays:
            return None, None
        found = {}
        for array in ("parameter", "gradient"):
            parts: list[NDArray[Any]] = []
            for name, tensor in content.arrays[array].items():
                words = np.empty(math.prod(tensor.shape), storage_dtype(tensor.dtype))
                reader.read(array, name, 0, words)
                with np.errstate(all="ignore"):
                    parts.append(widened(words, tensor.dtype).astype(np.float64))
            found[array] = np.concatenate(parts) if parts else np.zeros(0)
    return found, content.scalars.get("loss")
