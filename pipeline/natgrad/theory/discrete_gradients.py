"""Compute discrete gradients of an objective function, for models with few parameters (section 2.2).

No other module uses these functions. They are for users who have the objective as a function, and they reproduce
the statements of the paper about the choice of a discrete gradient.

The ledger has the loss only at the states of a run, which `natgrad.theory.discrete_time` uses. This module
evaluates the objective as a function to compute the discrete gradients of the literature. Each is a vector with
``(theta1 - theta0).result = L(theta1) - L(theta0)`` that converges to the gradient as theta1 -> theta0 (eq. 12)::

    gonzalez      gradient at the midpoint, corrected along the displacement
    mean_value    mean of the gradient along the segment
    itoh_abe      difference quotients, one coordinate after another
    taylor        grad L(theta0) + hvp / 2 with the hvp at the point of eq. (11), as in the paper (eq. 16)

``Metric(-result, (theta1 - theta0) / eta)`` of `natgrad.theory.metric_operators` is then the metric of
eqs. (14), (15), if the loss decreased. The four differ in general, but agree along the displacement.

References
----------
Shoji, Suzuki, Kozachkov, "Is All Learning (Natural) Gradient Descent?"; equation numbers are the paper's.
McLachlan, Quispel, Robidoux, Geometric integration using discrete gradients, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import quad_vec
from scipy.optimize import brentq
from scipy.special import roots_jacobi

from natgrad.schema.errors import InputError

__all__ = ["gonzalez", "identity_residual", "itoh_abe", "mean_value", "taylor", "taylor_points"]

Array = NDArray[np.float64]
Objective = Callable[[Array], float]
Gradient = Callable[[Array], ArrayLike]

_UNIT = 2.0**-53
_MOST_POINTS = 64
"""Maximum number of points between theta0 and theta1 at which eq. (11) is evaluated."""


def gonzalez(objective: Objective, gradient: Gradient, theta0: ArrayLike, theta1: ArrayLike) -> Array:
    """Return the gradient at the midpoint, corrected along the displacement so that eq. (12) holds (Gonzalez 1996).

    Parameters
    ----------
    objective : callable
        Loss of a state: a function from shape (D,) to a number.
    gradient : callable
        Gradient of the loss: a function from shape (D,) to shape (D,).
    theta0, theta1 : array, shape (D,)

    Returns
    -------
    array, shape (D,)
        The gradient if the two states are equal. The error of the correction is the rounding error of the losses
        divided by |theta1 - theta0|.

    Raises
    ------
    InputError
        If the states are not vectors of equal length, or a loss or gradient is not finite.
    """
    start, end, step = _segment(theta0, theta1)
    middle = _gradient(gradient, start + step / 2.0)
    if not step.any():
        return middle
    change = _loss(objective, end) - _loss(objective, start)
    return middle + (change - middle @ step) / (step @ step) * step


def mean_value(
    objective: Objective, gradient: Gradient, theta0: ArrayLike, theta1: ArrayLike, *, tolerance: float = 1e-12
) -> Array:
    """Return the mean of the gradient along the segment from theta0 to theta1, by Gauss-Kronrod quadrature.

    Parameters
    ----------
    objective, gradient, theta0, theta1
        See `gonzalez`; the objective is not evaluated.
    tolerance : float
        Norm of the error relative to the longest gradient, as estimated by the quadrature.

    Returns
    -------
    array, shape (D,)

    Raises
    ------
    InputError
        See `gonzalez`; also if the quadrature does not reach the tolerance.

    Notes
    -----
    Of the four discrete gradients, only this one commutes with linear changes of the parameters.
    """
    start, _, step = _segment(theta0, theta1)
    first = _gradient(gradient, start)
    if not step.any():
        return first
    largest = 0.0

    def between(share: float) -> Array:
        nonlocal largest
        value = _gradient(gradient, start + share * step)
        largest = max(largest, float(np.linalg.norm(value)))
        return value

    floor = tolerance * float(np.linalg.norm(first))
    mean, error = quad_vec(between, 0.0, 1.0, epsabs=floor, epsrel=tolerance, norm="2")
    if not error <= tolerance * largest:
        raise InputError(
            f"the mean gradient has the norm {np.linalg.norm(mean):.3g} and the error {error:.3g}",
            why="the gradient jumps between the two states, or is noisy",
            remedy="pass a greater tolerance, or use another discrete gradient",
        )
    return np.asarray(mean)


def itoh_abe(objective: Objective, gradient: Gradient, theta0: ArrayLike, theta1: ArrayLike) -> Array:
    """Return difference quotients of the loss, changing one coordinate after another (Itoh and Abe 1988).

    Parameters
    ----------
    objective, gradient, theta0, theta1
        See `gonzalez`. The loss is evaluated D + 1 times, and the gradient only if a coordinate does not change.

    Returns
    -------
    array, shape (D,)
        It depends on the order of the coordinates. The error of a quotient is the rounding error of the losses
        divided by the change of the coordinate.

    Raises
    ------
    InputError
        See `gonzalez`.
    """
    start, end, step = _segment(theta0, theta1)
    state, loss = start.copy(), _loss(objective, start)
    quotients = np.empty(len(start))
    for index in range(len(start)):
        state[index] = end[index]
        if step[index] == 0.0:
            quotients[index] = _gradient(gradient, state)[index]
            continue
        after = _loss(objective, state)
        quotients[index] = (after - loss) / step[index]
        loss = after
    return quotients


def taylor(
    objective: Objective,
    gradient: Gradient,
    hvp: Callable[[Array, Array], ArrayLike],
    theta0: ArrayLike,
    theta1: ArrayLike,
) -> Array:
    """Return the discrete gradient (16), grad L(theta0) + hvp(theta0 + lambda p, p) / 2 with lambda of eq. (11).

    Parameters
    ----------
    objective, gradient, theta0, theta1
        See `gonzalez`.
    hvp : callable
        Product of the Hessian with a vector: a function of the state and the vector, all of shape (D,).

    Returns
    -------
    array, shape (D,)
        The discrete gradient for the smallest lambda from `taylor_points`.

    Raises
    ------
    InputError
        See `taylor_points`.

    Notes
    -----
    This is not a discrete gradient by the paper's Definition 1: one of several lambda must be chosen, and the
    choice is not always continuous. Eq. (12) still holds.
    """
    start, end, step = _segment(theta0, theta1)
    first = _gradient(gradient, start)
    if not step.any():
        return first
    share = taylor_points(objective, gradient, hvp, start, end)[0]
    return first + _gradient(lambda state: hvp(state, step), start + share * step) / 2.0


def taylor_points(
    objective: Objective,
    gradient: Gradient,
    hvp: Callable[[Array, Array], ArrayLike],
    theta0: ArrayLike,
    theta1: ArrayLike,
    *,
    unit: float = _UNIT,
) -> Array:
    """Find lambda of Taylor's theorem (eq. 11), for which p' H(theta0 + lambda p) p / 2 is the remainder.

    Parameters
    ----------
    objective, gradient, hvp, theta0, theta1
        See `taylor`.
    unit : float
        Unit roundoff of the values of the functions: 2**-24 if they are computed in single precision.

    Returns
    -------
    array, shape (lambdas,)
        In ascending order, within (0, 1): one from each interval between evaluated points in which the sign
        changes. More solutions may exist. If the curvature is constant up to rounding, as for a quadratic loss,
        every lambda is a solution, and the result contains only 1/2.

    Raises
    ------
    InputError
        See `gonzalez`. Also if no lambda is found: the loss is not twice continuously differentiable, the gradient
        or the products do not belong to this loss, or the curvature changes on a scale below 1/64 of the step.

    Notes
    -----
    The remainder of L(theta1) is half the mean of p' H p over the segment, with the weight 2 (1 - lambda). This
    integral is computed by Gauss-Jacobi rules, so the rounding of the losses does not affect it if the step is
    small. The points of the rule bracket lambda, because a mean is between the smallest and the largest value. The
    losses then show whether the gradient and the products belong to them.
    """
    start, end, step = _segment(theta0, theta1)
    first, length = _gradient(gradient, start), float(np.linalg.norm(step))
    before, after = _loss(objective, start), _loss(objective, end)
    size, count, mean, last, root = 0.0, 2, np.nan, np.nan, np.sqrt(unit)

    def curvature(share: float) -> float:
        nonlocal size
        product = _gradient(lambda state: hvp(state, step), start + share * step)
        size = max(size, length * float(np.linalg.norm(product)))
        return float(step @ product)

    # Rounding errors are much smaller than the square root of the unit roundoff, mistakes are not.
    # Doubling the points of a Gauss rule roughly squares its error. After convergence only rounding errors remain.
    while not abs(mean - last) <= root * size and count <= _MOST_POINTS:
        nodes, weights = roots_jacobi(count, 1.0, 0.0)
        nodes, values = (1.0 + nodes) / 2.0, np.array([curvature((1.0 + node) / 2.0) for node in nodes])
        last, mean, count = mean, float(weights @ values / weights.sum()), 2 * count
    missed = (after - before) - first @ step - mean / 2.0
    scale = abs(before) + abs(after) + float(np.linalg.norm(first)) * length + size
    if not (abs(mean - last) <= root * size and abs(missed) <= root * scale):
        raise InputError(
            "no lambda of eq. (11) was found",
            where=f"the loss changes by {after - before:.6g}; {missed:.3g} of this is not explained",
            why="the gradient or the products are not those of the loss, or its curvature jumps",
            remedy="check the gradient against differences of the loss, or use another discrete gradient",
        )
    if np.abs(values - mean).max() <= 8.0 * (len(start) + 2) * unit * size:
        return np.array([0.5])
    changes = np.flatnonzero(np.signbit(values[:-1] - mean) != np.signbit(values[1:] - mean))
    brackets = [(nodes[left], nodes[left + 1]) for left in changes]
    return np.array(
        [brentq(lambda share: curvature(share) - mean, *bracket, xtol=4 * unit) for bracket in brackets]
    )


def identity_residual(objective: Objective, discrete: ArrayLike, theta0: ArrayLike, theta1: ArrayLike) -> float:
    """Return the relative error of eq. (12), (p.discrete - dL) / |dL|, as in ``discrete_identity_residual``.

    Parameters
    ----------
    objective, theta0, theta1
        See `gonzalez`.
    discrete : array, shape (D,)
        Any discrete gradient.

    Returns
    -------
    float
        NaN if the loss did not change.

    Raises
    ------
    InputError
        See `gonzalez`.
    """
    start, end, step = _segment(theta0, theta1)
    change = _loss(objective, end) - _loss(objective, start)
    return float((np.asarray(discrete) @ step - change) / abs(change)) if change else np.nan


def _segment(theta0: ArrayLike, theta1: ArrayLike) -> tuple[Array, Array, Array]:
    """Return start, end and displacement of an update."""
    start, end = np.asarray(theta0, dtype=np.float64), np.asarray(theta1, dtype=np.float64)
    if start.ndim != 1 or start.shape != end.shape or not start.size:
        raise InputError(
            f"states have shapes {start.shape} and {end.shape}", remedy="pass two vectors of equal length"
        )
    if not (np.isfinite(start).all() and np.isfinite(end).all()):
        raise InputError("a state is not finite", remedy="pass finite states")
    return start, end, end - start


def _loss(objective: Objective, state: Array) -> float:
    loss = float(objective(state))
    if not np.isfinite(loss):
        raise InputError(f"the loss is {loss}", where=f"at {state}", remedy="pass states with a finite loss")
    return loss


def _gradient(gradient: Gradient, state: Array) -> Array:
    value = np.asarray(gradient(state), dtype=np.float64)
    if value.shape != state.shape or not np.isfinite(value).all():
        raise InputError(
            f"a gradient or product of shape {value.shape} is not a finite vector of {len(state)} elements",
            where=f"at {state}",
            remedy="pass functions that map a state to a vector of the same length",
        )
    return value
