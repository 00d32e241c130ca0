"""Evaluate an objective at one state of a log, or the Hessian for the update from one state to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.objectives.protocol import ObjectiveError, Tensors, evaluate, product
from natgrad.schema.errors import InputError
from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import STATES
from natgrad.sources.base import StepContent, StepReader

__all__ = ["Curvature", "evaluated_update", "gradients_differ", "tensors_of"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curvature:
    """Values of the Hessian that are requested for each update.

    Attributes
    ----------
    hvp : bool
        The product of the Hessian with the displacement.
    taylor_point : bool
        Lambda of eq. (11), at which the Hessian is then evaluated, instead of the state before the update.
    eigenvalues : bool
        The extreme eigenvalues.
    """

    hvp: bool = False
    taylor_point: bool = False
    eigenvalues: bool = False

    def __bool__(self) -> bool:
        return self.hvp or self.taylor_point or self.eigenvalues


def tensors_of(reader: StepReader, content: StepContent, array: str = STATES[0]) -> dict[str, NDArray[Any]]:
    """Read all tensors of an array of a step."""
    found = {}
    for name, logged in content.arrays[array].items():
        words = np.empty(logged.shape, storage_dtype(logged.dtype))
        if words.size:
            reader.read(array, name, 0, words.reshape(-1))
        if logged.dtype == "bfloat16":
            import ml_dtypes

            words = words.view(ml_dtypes.bfloat16)
        words.flags.writeable = False
        found[name] = words
    return found


def gradients_differ(one: Tensors, other: Tensors) -> float:
    """Return the norm of the difference of two gradients, relative to the first; 0 if their bits are equal."""
    if one.keys() != other.keys():
        return math.inf
    if all(one[name].tobytes() == other[name].tobytes() for name in one):
        return 0.0
    squares = np.zeros(2)
    for name, array in one.items():
        first = array.astype(np.float64)
        squares += np.square(first - other[name].astype(np.float64)).sum(), np.square(first).sum()
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] > 0 else math.inf


class _Flat:
    """The trained tensors of a state as one vector in float64.

    Parameters
    ----------
    tensors : mapping
        All tensors of a state.
    names : sequence of str
        The trained ones.
    """

    def __init__(self, tensors: Tensors, names: Sequence[str]) -> None:
        self._tensors, self._names = tensors, names
        self._edges = np.cumsum([0, *(tensors[name].size for name in names)])

    def vector(self, tensors: Tensors) -> Array:
        return np.concatenate([tensors[name].astype(np.float64).ravel() for name in self._names])

    def direction(self, vector: Array) -> dict[str, NDArray[Any]]:
        """Return a vector as tensors, in single precision if the parameters have no more than that."""
        dtypes = [np.float64 if self._tensors[name].dtype == np.float64 else np.float32 for name in self._names]
        return self._parts(vector, dtypes)

    def state(self, vector: Array) -> dict[str, NDArray[Any]]:
        """Return all tensors of a state with these trained ones, in the dtypes of the checkpoint."""
        trained = self._parts(vector, [self._tensors[name].dtype for name in self._names])
        return {name: trained.get(name, array) for name, array in self._tensors.items()}

    def _parts(self, vector: Array, dtypes: Sequence[Any]) -> dict[str, NDArray[Any]]:
        return {
            name: vector[start:stop].reshape(self._tensors[name].shape).astype(dtype)
            for name, dtype, start, stop in zip(self._names, dtypes, self._edges[:-1], self._edges[1:], strict=True)
        }


def evaluated_update(
    objective: Any,
    before: Tensors,
    after: Tensors,
    loss: float,
    gradients: Tensors,
    curvature: Curvature,
    where: str,
) -> tuple[dict[str, NDArray[Any]], dict[str, float], list[str]]:
    """Return the requested values of the Hessian for an update.

    Parameters
    ----------
    objective : callable
    before, after : mapping
        Tensors of the states before and after the update.
    loss : float
        Loss before the update.
    gradients : mapping
        Gradient before the update.
    curvature : Curvature
    where : str
        Location of the update, for errors.

    Returns
    -------
    hvp : dict
        Product by tensor, NaN if the point at which the Hessian is evaluated is not known; empty if not requested.
    scalars : dict
    problems : list of str
        Reasons for NaN.
    """
    names = list(gradients)
    flat = _Flat(before, names)
    start, end = flat.vector(before), flat.vector(after)
    step = end - start
    unit = float(max(_unit(array) for array in gradients.values()))
    scalars: dict[str, float] = {}
    problems: list[str] = []
    point = 0.0

    def multiply(state: Array, vector: Array) -> Array:
        return flat.vector(product(objective, flat.state(state), flat.direction(vector), where))

    if curvature.taylor_point:
        try:
            point = _taylor_point(objective, flat, start, end, loss, gradients, multiply, unit, where)
        except _NoPoint as error:
            problems.append(f"lambda of eq. (11) is not known at {where}: {error}")
            point = math.nan
        scalars["taylor_point"] = point
    state = start + point * step if point else start
    hvp: dict[str, NDArray[Any]] = {}
    if curvature.hvp or curvature.taylor_point:
        products = multiply(state, step) if np.isfinite(state).all() else np.full(len(start), np.nan)
        hvp = {name: array.astype(gradients[name].dtype) for name, array in flat.direction(products).items()}
    if curvature.eigenvalues:
        scalars |= {"hessian_min_eigenvalue": math.nan, "hessian_max_eigenvalue": math.nan}
        if np.isfinite(state).all():
            from natgrad.theory.symmetric_operators import extremes_of_products

            try:
                low, high = extremes_of_products(lambda one: multiply(state, one), len(state), math.sqrt(unit))
                scalars |= {"hessian_min_eigenvalue": low, "hessian_max_eigenvalue": high}
            except ObjectiveError:
                raise
            except InputError as error:
                problems.append(f"the eigenvalues of the Hessian are not known at {where}: {error.what}")
    return hvp, scalars, problems


class _NoPoint(Exception):
    """Error if there is no lambda of eq. (11); the message states the reason."""


def _taylor_point(
    objective: Any,
    flat: _Flat,
    start: Array,
    end: Array,
    loss: float,
    gradients: Tensors,
    multiply: Any,
    unit: float,
    where: str,
) -> float:
    from natgrad.theory.discrete_gradients import taylor_points

    if not (np.isfinite(start).all() and np.isfinite(end).all()):
        raise _NoPoint("a state is not finite")
    losses = {start.tobytes(): loss}

    def loss_of(state: Array) -> float:
        if state.tobytes() not in losses:
            losses[state.tobytes()] = evaluate(objective, flat.state(state), where)[0]
        return losses[state.tobytes()]

    try:
        # It needs only the gradient at the start.
        return float(taylor_points(loss_of, lambda _: flat.vector(gradients), multiply, start, end, unit=unit)[0])
    except ObjectiveError:
        raise
    except InputError as error:
        raise _NoPoint(error.what) from error
    except IndexError as error:
        raise _NoPoint("the curvature does not cross its mean") from error


def _unit(array: NDArray[Any]) -> float:
    """Return the unit roundoff of computations with an array, at most that of single precision."""
    return 2.0**-53 if array.dtype == np.float64 else 2.0**-24
