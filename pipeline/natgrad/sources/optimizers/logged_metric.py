"""The metric of an optimizer, from the factors that a log holds: its extreme eigenvalues, or an operator.

One factor at a time is loaded, and nothing of the log is executed.
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
        Most rows of a factor, see `natgrad.schema.layout.IngestLimits`.

    Raises
    ------
    InputError
        Where the metric is not known, not symmetric positive definite, or a factor is too large.
    """
    if metric.problem:
        raise InputError(metric.problem)
    try:
        return _extremes(reader, tensor, metric, largest_factor)
    except np.linalg.LinAlgError as error:
        raise InputError(f"LAPACK finds no eigenvalues of a factor ({error})") from error


def _extremes(reader: StepReader, tensor: str, metric: FactoredMetric, largest: int) -> tuple[float, float]:
    index, found = 0, []
    for block in metric.blocks:
        damping = _damping(reader, tensor, metric, block, index, largest)
        ends = []
        for factor, term in zip(block, damping, strict=True):
            matrix = _loaded(reader, tensor, metric, factor, index, largest)
            index += 1
            ends.append(factor_eigenvalues(matrix, exponent=metric.exponent, damping=term, root=metric.root))
        # Of inverses each factor was found definite beyond its rounding.
        rows = sum(factor.shape[0] for factor in block if len(factor.shape) == 2) if metric.exponent > 0 else 0
        found.append(kronecker_eigenvalues(ends, metric.shift, rows=rows))
    return min(low for low, _ in found), max(high for _, high in found)


def read_metric(
    source: Path | str,
    tensor: str,
    step: int,
    *,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
) -> Kronecker:
    """Metric that an optimizer used for a tensor in the update from a step, as an operator.

    Parameters
    ----------
    source : path
        Log, as of `natgrad.sources.opening.open_source`.
    tensor : str
    step : int
        Step of the state before the update.
    format, mapping
        As of `natgrad.sources.opening.open_source`.

    Returns
    -------
    Kronecker
        Of the tensor's elements in C order; its factors are the symmetric parts of what was saved. Where weight and
        bias share a block of K-FAC it acts on both: on ``np.column_stack([W.reshape(len(W), -1), b]).ravel()``.

    Raises
    ------
    InputError
        Where the step or the tensor is not there, or its metric is not known, no Kronecker product or not positive
        definite.
    """
    from natgrad.theory.symmetric_operators import Kronecker  # SciPy, which what ingests does not need

    log = open_source(open_storage(source), format, mapping)
    steps = list(log.steps())
    places = [index for index, logged in enumerate(steps) if logged.number == step]
    if not places:
        raise InputError(f"step {step} is not in the log", where=str(source), remedy="give one that is")
    # Curvature is saved with the state it was taken at, what an optimizer keeps with the state after the update.
    for logged in steps[places[0] : places[0] + 2]:
        with log.open(logged) as reader:
            state = reader.content().optimizer
            metric = None if state is None else state.metrics.get(tensor)
            if state is not None and state.problem:
                raise InputError(state.problem, where=where(logged))
            if isinstance(metric, FactoredMetric) and (metric.follows == (logged.number == step)):
                try:
                    return _operator(reader, tensor, metric, Kronecker)
                except InputError as error:
                    place = where(logged, f"{metric.rule} metric", tensor)
                    raise InputError(error.what, where=place, remedy=error.remedy) from error
    raise InputError(
        f"no metric of Kronecker factors was saved of tensor {tensor!r} for the update from step {step}",
        where=str(source),
        why="the optimizer has none (that of SOAP is rotated, that of Adam a diagonal), or the state after the "
        "update is not in the log",
    )


def _operator(reader: StepReader, tensor: str, metric: FactoredMetric, kind: type[Kronecker]) -> Kronecker:
    if metric.problem or len(metric.blocks) != 1:
        raise InputError(metric.problem or f"the tensor is parted into {len(metric.blocks)} blocks")
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
    """Damping of each factor of a product."""
    if not metric.balanced:
        return list(metric.damping) or [0.0] * len(block)
    left, right = (
        _loaded(reader, tensor, metric, factor, first + index, largest) for index, factor in enumerate(block)
    )
    return list(balanced_damping((left, right), *metric.damping))


def _loaded(
    reader: StepReader, tensor: str, metric: FactoredMetric, factor: Factor, index: int, largest: int
) -> Array:
    """Load a factor as float64, its symmetric part where it is no root."""
    size, dimensions = math.prod(factor.shape[:1]), len(factor.shape)
    square = dimensions < 2 or (dimensions == 2 and factor.shape[0] == factor.shape[1])
    if factor.dtype not in STORAGE_DTYPES or not square or not size:
        raise InputError(f"a factor is {factor.dtype} of shape {list(factor.shape)}")
    if len(factor.shape) > 1 and size > largest:
        raise InputError(f"a factor of {size} x {size} is too large: the limit is {largest} rows")
    words: NDArray[Any] = np.empty(math.prod(factor.shape), storage_dtype(factor.dtype))
    reader.read(factor_array(index), tensor, factor.start, words)
    values = np.asarray(widened(words, factor.dtype), np.float64)
    values = values.reshape(factor.shape if len(factor.shape) == 2 else size)
    if metric.root:
        return values
    return symmetric_factor(values, unit_roundoff(factor.dtype), definite=metric.exponent < 0)
