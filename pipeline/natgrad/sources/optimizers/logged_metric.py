"""Compute the metric of an optimizer from logged factors: its extreme eigenvalues, or an operator.

Factors are loaded one at a time. Nothing in the log is executed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES, IngestLimits, storage_dtype, unit_roundoff, widened
from natgrad.sources.base import StepReader
from natgrad.sources.opening import open_source
from natgrad.sources.optimizers.state import Factor, FactoredMetric, factor_array
from natgrad.sources.steps import where
from natgrad.storage import open_storage
from natgrad.theory.preconditioners import (
    balanced_damping,
    factor_eigenvalues,
    kronecker_eigenvalues,
    symmetric_factor,
)

if TYPE_CHECKING:
    from natgrad.theory.symmetric_operators import Kronecker

__all__ = ["extremes", "read_metric"]

Array = NDArray[np.float64]


def extremes(
    reader: StepReader, tensor: str, metric: FactoredMetric, largest_factor: int = IngestLimits.largest_factor
) -> tuple[float, float]:
    """Return the smallest and largest eigenvalue of the metric of a tensor in an open step.

    Parameters
    ----------
    reader : StepReader
    tensor : str
    metric : FactoredMetric
    largest_factor : int, optional
        Maximum number of rows of a factor; see `natgrad.schema.layout.IngestLimits`.

    Raises
    ------
    InputError
        If the metric is unknown or not symmetric positive definite, or if a factor is too large.
    """
    if metric.problem:
        raise InputError(metric.problem)
    try:
        return _extremes(reader, tensor, metric, largest_factor)
    except np.linalg.LinAlgError as error:
        raise InputError(f"LAPACK failed to compute the eigenvalues of a factor ({error})") from error


def _extremes(reader: StepReader, tensor: str, metric: FactoredMetric, largest: int) -> tuple[float, float]:
    index, found = 0, []
    for block in metric.blocks:
        damping = _damping(reader, tensor, metric, block, index, largest)
        eigenvalue_ranges = []
        for factor, term in zip(block, damping, strict=True):
            matrix = _loaded(reader, tensor, metric, factor, index, largest)
            index += 1
            eigenvalue_ranges.append(
                factor_eigenvalues(matrix, exponent=metric.exponent, damping=term, root=metric.root)
            )
        # Inverse factors have already been checked to be definite beyond rounding errors.
        rows = sum(factor.shape[0] for factor in block if len(factor.shape) == 2) if metric.exponent > 0 else 0
        found.append(kronecker_eigenvalues(eigenvalue_ranges, metric.shift, rows=rows))
    return min(low for low, _ in found), max(high for _, high in found)


def read_metric(
    source: Path | str,
    tensor: str,
    step: int,
    *,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
) -> Kronecker:
    """Return the metric that an optimizer used for a tensor in the update from a step, as an operator.

    Parameters
    ----------
    source : path
        Location of the log; see `natgrad.sources.opening.open_source`.
    tensor : str
    step : int
        Step number of the state before the update.
    format, mapping
        See `natgrad.sources.opening.open_source`.

    Returns
    -------
    Kronecker
        Operator on the elements of the tensor in C order. Its factors are the symmetric parts of the saved factors.
        If weight and bias share a K-FAC block, the operator acts on both:
        ``np.column_stack([W.reshape(len(W), -1), b]).ravel()``.

    Raises
    ------
    InputError
        If the step or tensor does not exist, or if its metric is unknown, not a Kronecker product or not positive
        definite.
    """
    from natgrad.theory.symmetric_operators import Kronecker  # imports SciPy, which ingestion does not need

    log = open_source(open_storage(source), format, mapping)
    steps = list(log.steps())
    indices = [index for index, logged in enumerate(steps) if logged.number == step]
    if not indices:
        raise InputError(
            f"step {step} is not in the log", where=str(source), remedy="choose a step that is in the log"
        )
    # Curvature is saved with the state where it was computed; optimizer state with the state after the update.
    for logged in steps[indices[0] : indices[0] + 2]:
        with log.open(logged) as reader:
            state = reader.content().optimizer
            metric = None if state is None else state.metrics.get(tensor)
            if state is not None and state.problem:
                raise InputError(state.problem, where=where(logged))
            if isinstance(metric, FactoredMetric) and (metric.follows == (logged.number == step)):
                try:
                    return _operator(reader, tensor, metric, Kronecker)
                except InputError as error:
                    location = where(logged, f"{metric.rule} metric", tensor)
                    raise InputError(error.what, where=location, remedy=error.remedy) from error
    raise InputError(
        f"no metric with Kronecker factors is saved for tensor {tensor!r} and the update from step {step}",
        where=str(source),
        why="the optimizer has no such metric (that of SOAP is rotated, that of Adam is diagonal), or the state "
        "after the update is not in the log",
    )


def _operator(reader: StepReader, tensor: str, metric: FactoredMetric, kind: type[Kronecker]) -> Kronecker:
    if metric.problem or len(metric.blocks) != 1:
        raise InputError(metric.problem or f"the tensor is split into {len(metric.blocks)} blocks")
    (block,) = metric.blocks
    largest = IngestLimits.largest_factor
    damping = _damping(reader, tensor, metric, block, 0, largest)
    factors = [_loaded(reader, tensor, metric, factor, index, largest) for index, factor in enumerate(block)]
    if metric.root:
        factors = [factor**2 if factor.ndim == 1 else _gram(factor) for factor in factors]
    return kind(*factors, exponent=metric.exponent, damping=damping, shift=metric.shift)


def _gram(root: Array) -> Array:
    product = root.T @ root
    return np.asarray((product + product.T) / 2.0)


def _damping(
    reader: StepReader, tensor: str, metric: FactoredMetric, block: tuple[Factor, ...], first: int, largest: int
) -> list[float]:
    """Return the damping of each factor of a product."""
    if not metric.balanced:
        return list(metric.damping) or [0.0] * len(block)
    left, right = (
        _loaded(reader, tensor, metric, factor, first + index, largest) for index, factor in enumerate(block)
    )
    return list(balanced_damping((left, right), *metric.damping))


def _loaded(
    reader: StepReader, tensor: str, metric: FactoredMetric, factor: Factor, index: int, largest: int
) -> Array:
    """Load a factor as float64. Return its symmetric part, unless it is a root."""
    size, dimensions = math.prod(factor.shape[:1]), len(factor.shape)
    square = dimensions < 2 or (dimensions == 2 and factor.shape[0] == factor.shape[1])
    if factor.dtype not in STORAGE_DTYPES or not square or not size:
        raise InputError(f"a factor has dtype {factor.dtype} and shape {list(factor.shape)}")
    if len(factor.shape) > 1 and size > largest:
        raise InputError(f"a factor of {size} x {size} is too large: the limit is {largest} rows")
    words: NDArray[Any] = np.empty(math.prod(factor.shape), storage_dtype(factor.dtype))
    reader.read(factor_array(index), tensor, factor.start, words)
    values = np.asarray(widened(words, factor.dtype), np.float64)
    values = values.reshape(factor.shape if len(factor.shape) == 2 else size)
    if metric.root:
        return values
    return symmetric_factor(values, unit_roundoff(factor.dtype), definite=metric.exponent < 0)
