"""Ledger to pairs: of the model and of each tensor, the numbers of (y, g) that everything else is computed from.

The Gram matrix of a row becomes a pair for each way of making a negative gradient (eq. 12), with what rounding can
move it by. `pipeline.results` makes variables of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline import discrete_time, geometry
from pipeline.geometry import Pair
from pipeline.schema import HVP, STEP, TENSOR, Layout, unit_roundoff
from pipeline.windows import consecutive

__all__ = ["Inputs", "Level", "Optimizer", "model_and_tensors"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Optimizer:
    """The metric that an adaptive optimizer used in each update.

    Attributes
    ----------
    smallest, largest : float64 array, shape (rows, tensors)
        Its eigenvalues, NaN where not known.
    learning_rate : float64 array, shape (rows, tensors)
        Of the group of each tensor.
    """

    smallest: Array
    largest: Array
    learning_rate: Array


@dataclass(frozen=True)
class Inputs:
    """What results are made of, all of it small: nothing scales with the number of elements.

    Attributes
    ----------
    gram : float64 array, shape (rows, tensors, vectors, vectors)
        The Gram ledger.
    vectors : tuple of str
        Its vectors.
    layout : Layout
    steps, spans : int64 array, shape (rows,)
        Step before the update, and updates to the next logged state.
    loss, next_loss : float64 array, shape (rows,)
        Before and after the update, NaN where not logged.
    learning_rate : float64 array, shape (rows,)
        eta of the model, NaN where neither logged nor given.
    dtypes : mapping of str to str
        Stored dtypes of ``gradient``, and of ``hvp`` where it was logged.
    attempts : int64 array, shape (rows,), optional
        Restarts before each row was logged; none where not given.
    hessian_min_eigenvalue : float64 array, shape (rows,), optional
        Smallest eigenvalue of the Hessian, NaN where not logged.
    runs : tuple of str, optional
        Names of the runs of a sweep.
    run : int64 array, shape (rows,), optional
        Position of each row's run in them; rows of a run lie together, in order.
    loss_time_derivative : float64 array, shape (rows,), optional
        dL/dt of a loss that changes with time (section 2.1), NaN where not logged. A run that logs it has the model
        extended by time: y has the element -dL/dt more, and g the element 1.
    optimizer : Optimizer, optional
        Where its state was stored.
    tensor_learning_rate : float64 array, shape (rows, tensors), optional
        eta of each tensor, where groups of the optimizer have several; that of the model where not given.
    """

    gram: Array
    vectors: tuple[str, ...]
    layout: Layout
    steps: NDArray[np.int64]
    spans: NDArray[np.int64]
    loss: Array
    next_loss: Array
    learning_rate: Array
    dtypes: Mapping[str, str]
    attempts: NDArray[np.int64] | None = None
    hessian_min_eigenvalue: Array | None = None
    runs: tuple[str, ...] = ()
    run: NDArray[np.int64] | None = None
    loss_time_derivative: Array | None = None
    optimizer: Optimizer | None = None
    tensor_learning_rate: Array | None = None

    def whole(self, m: int) -> NDArray[np.bool_]:
        """Whether each row is the first of m updates, each from the state that the one before led to."""
        if m == 1:
            return np.ones(len(self.steps), bool)
        return np.pad(consecutive(self.follows(), m - 1).all(axis=-1), (0, m - 1))

    def follows(self) -> NDArray[np.bool_]:
        """Whether each row but the first starts from the state that the one before led to, shape (rows - 1,)."""
        follows: NDArray[np.bool_] = self.steps[:-1] + self.spans[:-1] == self.steps[1:]
        if self.run is not None:
            follows &= self.run[:-1] == self.run[1:]
        return follows

    def extended(self) -> NDArray[np.bool_]:
        """Whether the model of each row is extended by time: its run logs how the loss changes with it."""
        if self.loss_time_derivative is None:
            return np.zeros(len(self.steps), bool)
        runs = np.zeros(len(self.steps), np.int64) if self.run is None else self.run
        return np.isin(runs, runs[~np.isnan(self.loss_time_derivative)])

    def of_runs(self) -> list[slice]:
        """Rows of each run of a sweep; all rows where it is one run."""
        if self.run is None:
            return [slice(0, len(self.steps))]
        bounds = np.searchsorted(self.run, range(len(self.runs) + 1))
        return [slice(int(first), int(stop)) for first, stop in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class _Way:
    """How a negative gradient is made of the ledger: with half of which vector, and corrected or not (eq. 12)."""

    half: str | None = None
    corrected: bool = False


_WAYS = {
    "gradient": _Way(),
    "corrected": _Way(corrected=True),
    "trapezoid": _Way(half="gradient_change", corrected=True),
    "taylor": _Way(half=HVP),
}


@dataclass(frozen=True)
class Level:
    """Model or tensors: of every row the pair, eta times its updates, what rounding can move it by; the dimensions.

    Each tensor has its own eta where groups of the optimizer have several: eq. (2) holds for it with that. The
    model has one. Its g is along the displacement, which alone decides whether the update descends, y.g > 0: how
    the etas of the tensors differ is a part of the learning rule, as in the metric that an optimizer used. Stacked
    g of etas of their own would be another vector, along which the loss may fall where it rises along the update.
    """

    dimensions: tuple[str, ...]
    rate: Array
    pair: Pair
    finite: NDArray[np.bool_]
    known: NDArray[np.bool_]
    update_floor: Array
    gradient_floor: Array
    gradient_norm: Array | None
    parameter_norm: Array


def model_and_tensors(inputs: Inputs, descent: str) -> tuple[Level, Level]:
    """Model and tensors, compared with one negative gradient.

    Parameters
    ----------
    inputs : Inputs
    descent : str
        One of `pipeline.schema.DESCENTS`: how y is made (eqs. 12 and 16).

    Returns
    -------
    model, tensors : Level
        With arrays of shape (rows,) and (rows, tensors).
    """
    gram, vectors, layout = inputs.gram, inputs.vectors, inputs.layout
    way = _WAYS[descent]
    half, logged = way.half, way.half is None or way.half in vectors
    if not logged:
        # NaN in its place, and not known: a vector that was not logged is no failure of the run.
        gram = np.pad(gram, [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=np.nan)
        vectors = (*vectors, str(half))
    index = {name: position for position, name in enumerate(vectors)}

    def norm(vector: str) -> Array:
        return np.sqrt(gram[..., index[vector], index[vector]])

    # A row that spans k updates has moved by k of them: the update g is their mean (eq. 2).
    rate = (inputs.learning_rate * inputs.spans)[:, None]
    own = inputs.tensor_learning_rate
    own_rate = rate if own is None else own * inputs.spans[:, None]
    change = (inputs.next_loss - inputs.loss)[:, None]
    sizes = np.array([tensor.size for tensor in layout.tensors])
    roundoff = np.array([unit_roundoff(tensor.dtype) for tensor in layout.tensors])
    part = geometry.pair(gram, vectors, rate, sizes, half=half)
    whole = geometry.direct_sum([part[:, tensor] for tensor in range(len(layout.tensors))])
    if own is not None:
        part = geometry.pair(gram, vectors, own_rate, sizes, half=half)
    displacement_floor = geometry.displacement_floor(norm("parameter"), norm("displacement"), roundoff)
    gradient_floor = unit_roundoff(inputs.dtypes["gradient"]) * norm("gradient")
    finite = np.isfinite(norm("displacement") + norm("gradient"))
    if half is not None and logged:
        # The other gradient is no longer than this one and their difference together.
        stored = unit_roundoff(inputs.dtypes[half if half == HVP else "gradient"]) * norm(half) / 2.0
        gradient_floor = gradient_floor + stored + geometry.across_floor(gram, vectors, half, part)
        finite &= np.isfinite(norm(half))
    tensors = Level(
        (STEP, TENSOR),
        np.broadcast_to(own_rate, finite.shape),
        part,
        finite,
        np.full(finite.shape, logged),
        displacement_floor / own_rate,
        gradient_floor,
        norm("gradient") if half is None else None,
        norm("parameter"),
    )
    model = Level(
        (STEP,),
        rate[:, 0],
        whole,
        np.asarray(finite.all(axis=1)),
        np.full(len(finite), logged),
        _norm(displacement_floor / rate, axis=1),
        _norm(gradient_floor, axis=1),
        _norm(norm("gradient"), axis=1) if half is None else None,
        _norm(norm("parameter"), axis=1),
    )
    model = _with_time(model, inputs, way)
    if not way.corrected:
        return model, tensors
    # The share of a tensor in the change of the loss is told by the model's pair.
    tensors = replace(tensors, known=tensors.known & model.known[:, None])
    # Per the learning rate of the tensor, as the tensor's own update is.
    factor = np.where(own_rate == rate, 1.0, rate / own_rate)
    return (
        _corrected(model, change[:, 0], model.pair, model.update_floor),
        _corrected(
            tensors, change, geometry.scaled(model.pair[:, None], factor), model.update_floor[:, None] * factor
        ),
    )


def _corrected(level: Level, change: Array, whole: Pair, whole_floor: Array) -> Level:
    """Level of the discrete gradient along the displacement, which needs the losses at both ends."""
    floors = level.update_floor, whole_floor
    floor = discrete_time.correction_floor(level.pair, level.rate, change, whole, floors)
    return replace(
        level,
        pair=discrete_time.corrected(level.pair, level.rate, change, whole),
        known=level.known & np.isfinite(change),
        gradient_floor=level.gradient_floor + floor,
        gradient_norm=None,
    )


def _with_time(model: Level, inputs: Inputs, way: _Way) -> Level:
    """Model extended by time, in the runs that log how their loss changes with it."""
    extended, slope = inputs.extended(), inputs.loss_time_derivative
    if slope is None:
        return model
    columns = zip(astuple(geometry.with_time(model.pair, slope)), astuple(model.pair), strict=True)
    norm = model.gradient_norm
    return replace(
        model,
        pair=Pair(*(np.where(extended, new, old) for new, old in columns)),
        # A Hessian-vector product of the parameters alone lacks what the gradient does in time.
        known=model.known & ~(extended & (np.isnan(slope) | (way.half == HVP))),
        gradient_norm=norm if norm is None else np.where(extended, np.hypot(norm, slope), norm),
    )


def _norm(values: Array, axis: int) -> Array:
    return np.asarray(np.sqrt(np.square(values).sum(axis=axis)))
