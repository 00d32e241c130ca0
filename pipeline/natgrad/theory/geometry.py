"""Compute the results of the paper from a few numbers per update.

For an update g and a negative gradient y, the paper studies the symmetric positive definite matrices M with M g =
y. Their existence and their smallest condition number depend only on the *pair* (y, g): on the lengths of the two
vectors and the angle psi between them::

                    y                          along  = y.g / |g|           (signed)
                  / |                          across = |y - (y.g / g.g) g|
          |y|   /   | across
              /     |                          psi = atan2(across, along)
            / psi   |
           +--------+------> g
             along

A pair is stored as g.g, y.g and across^2, each with any leading shape. The component of y across (orthogonal to) g
is computed from the residual of the ledger, not from a difference of large numbers. Therefore psi is also accurate
near 0 and pi, where an arccos would lose all digits below 1e-8 rad. All functions are formulas in these numbers.
Undefined values are NaN.

This module needs only NumPy, and its cost does not depend on the number of parameters.

References
----------
Shoji, Suzuki, Kozachkov, "Is All Learning (Natural) Gradient Descent?"; equation numbers are the paper's.
Docstrings state where the paper is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from natgrad.schema.variables import Status

__all__ = [
    "LEDGER_ERROR",
    "Pair",
    "across_floor",
    "angle",
    "angle_uncertainty",
    "combination_floor",
    "condition_number",
    "cosine",
    "direct_sum",
    "displacement_floor",
    "eigenvalue_bounds",
    "eigenvalues",
    "family_asymptotes",
    "family_condition_number",
    "family_eigenvalues",
    "family_log_determinant",
    "multiplicities",
    "pair",
    "representable",
    "rounding_error",
    "safe_divide",
    "scaled",
    "similarity",
    "squared_norm",
    "status",
    "where_effective",
    "window",
    "with_time",
]

Array = NDArray[np.float64]

LEDGER_ERROR = 1e-14
"""Guaranteed bound on the error of an inner product x.y of the ledger, relative to |x| |y|."""

EXACT_NORM = 2.0**-490
"""A norm below this has no accurate square. Each product that underflows is off by up to 2**-1075, so a square of
up to 2**48 elements is off by 2**-1027, which is 2**-47 of this square."""

LEAST_NORM, MOST_NORM = 2.0**-440, 2.0**500
"""Limits of |y|, |g| and the displacement eta |g|. Between them, results are accurate as promised, because neither
their products nor those of their parts underflow or overflow. A part below `EXACT_NORM` is then less than 2**-49 of
the vector."""

NONZERO = 5e-324
"""Square of a nonzero vector whose square underflows. The ledger stores it instead of 0."""


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """Divide, and return 0 if the denominator is 0 (projection onto a zero vector)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(denominator == 0, 0.0, numerator / denominator)


def squared_norm(vector: ArrayLike) -> Array:
    """Return the squared norms of vectors on the last axis, with the conventions of the ledger.

    Returns
    -------
    array, shape (...)
        0 only for zero vectors, NaN only for vectors with an element that is not finite, `NONZERO` if the square
        underflows to 0, and infinity if it overflows.
    """
    values = np.asarray(vector, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        square = np.vecdot(values, values)
    square = np.where((square == 0) & values.any(axis=-1), NONZERO, square)
    return np.where(np.isfinite(values).all(axis=-1), np.where(np.isnan(square), np.inf, square), np.nan)


def representable(norm: ArrayLike) -> Array:
    """Return norms, and NaN for those that are not accurate because their squares underflow or overflow."""
    value = np.asarray(norm, dtype=np.float64)
    return np.where((value == 0) | ((value >= EXACT_NORM) & np.isfinite(value)), value, np.nan)


# Pairs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A negative gradient y and an update g, up to a rotation of the parameter space.

    Squared norms are 0 only for zero vectors. If the square of another vector underflows, it is a positive number
    without meaning.

    Attributes
    ----------
    update_square : float64 array
        g.g
    alignment : float64 array
        y.g, the rate at which the update descends (section 2.1).
    across_square : float64 array
        Squared norm of the component of y across g.
    size : int64 array
        Dimension D of the parameter space. All four arrays have the same shape.
    """

    update_square: Array
    alignment: Array
    across_square: Array
    size: NDArray[np.int64]

    def __getitem__(self, index: Any) -> Pair:
        """Select or reshape pairs with NumPy indexing."""
        return Pair(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def update_norm(self) -> Array:
        """Norm of the update, |g|."""
        return np.sqrt(self.update_square)

    @property
    def along(self) -> Array:
        """Signed component of y along g; 0 if the update is zero."""
        return safe_divide(self.alignment, self.update_norm)

    @property
    def across(self) -> Array:
        """Norm of the component of y across g."""
        return np.sqrt(self.across_square)

    @property
    def gradient_norm(self) -> Array:
        """Norm of the negative gradient, |y|."""
        return np.hypot(self.along, self.across)

    @property
    def zero_gradient(self) -> NDArray[np.bool_]:
        """True where y is a zero vector. The norm of a nonzero y may underflow to 0."""
        return np.asarray((self.alignment == 0) & (self.across_square == 0))

    @property
    def ratio(self) -> Array:
        """Component of y along g in units of g, y.g / g.g; 0 if the update is zero."""
        return safe_divide(self.alignment, self.update_square)


def pair(
    gram: ArrayLike,
    vectors: Sequence[str],
    learning_rate: ArrayLike,
    size: ArrayLike,
    *,
    half: str | None = None,
) -> Pair:
    """Compute the pair of each update of a Gram ledger.

    Parameters
    ----------
    gram : array, shape (..., vectors, vectors)
        Inner products, see `natgrad.kernel.gram`.
    vectors : sequence of str
        Names of the vectors. ``displacement``, ``gradient`` and ``residual`` are required.
    learning_rate : array, broadcasts to shape (...)
        eta of eq. (2), times the number of updates between the two states, so that g is their mean. If it is not
        positive and finite, g is NaN.
    size : int array, broadcasts to shape (...)
        Dimension D.
    half : str, optional
        Vector, half of which is added to the gradient: ``gradient_change`` gives the mean of the gradients of both
        states, ``hvp`` gives eq. (16). `across_floor` bounds the error of its component across g.

    Notes
    -----
    The residual is r = gradient - c displacement with any c. Its component across the displacement equals that of
    the gradient. If c is near the best ratio, r.r - (r.d)^2 / d.d does not suffer from cancellation.

    The square of a displacement or an update below `EXACT_NORM` is not accurate, so the complete y is taken as the
    component across it. The status of the pair is then ``underflow``, and the pair of the model, of which it is a
    part, remains accurate.
    """
    gram = np.asarray(gram, dtype=np.float64)
    index = {name: position for position, name in enumerate(vectors)}

    def product(one: str, other: str) -> Array:
        return np.asarray(gram[..., index[one], index[other]])

    shape = gram.shape[:-2]
    rate = np.broadcast_to(np.asarray(learning_rate, dtype=np.float64), shape)
    rate = np.where((rate > 0) & np.isfinite(rate), rate, np.nan)
    dimension = np.broadcast_to(np.asarray(size, dtype=np.int64), shape)
    displacement_square = product("displacement", "displacement")
    added = [product("gradient", "gradient")]
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        update_square = displacement_square / rate**2
        inexact = (np.fmin(displacement_square, update_square) < EXACT_NORM**2) & (displacement_square > 0)
        descent = -product("gradient", "displacement")
        # The displacement may be accurate although the update is not: the residual then lacks a component of y.
        y_square = np.where(inexact, product("gradient", "gradient"), product("residual", "residual"))
        residual_along = product("residual", "displacement")
        if half is not None:
            descent = descent - product(half, "displacement") / 2.0
            mixed = np.where(inexact, product("gradient", half), product("residual", half))
            y_square = y_square + mixed + product(half, half) / 4.0
            residual_along = residual_along + product(half, "displacement") / 2.0
            added.append(product(half, half))
        descent, residual_along = np.where(inexact, 0.0, descent), np.where(inexact, 0.0, residual_along)
        across = y_square - safe_divide(residual_along, np.sqrt(displacement_square)) ** 2
        # If D = 1, there is no component across a g that is not zero, only rounding. (0 x NaN remains NaN.) Adding
        # zero makes a negative zero positive; with a negative zero the angle of -g would be -pi.
        on_line = (dimension == 1) & (displacement_square != 0) & ~inexact
        across = np.where(on_line, 0.0 * across, np.maximum(across, 0.0)) + 0.0
        # Only zero vectors have the norm 0, even if products underflow.
        lost = np.any([(square > 0) & (square < LEAST_NORM**2) for square in added], axis=0)
        alignment = descent / rate
        across = _nonzero(across, lost & (alignment == 0))
        return Pair(_nonzero(update_square, displacement_square > 0), alignment, across, dimension)


def across_floor(gram: ArrayLike, vectors: Sequence[str], half: str, pair: Pair) -> Array:
    """Return the largest error of the component of y across g if half of a vector v was added to the gradient.

    The residual r is nearly orthogonal to g, so its products do not cancel. v may be nearly parallel to g. Its
    component across g is then a difference of entries, each off by 1e-14 of |v|^2, which causes an error of
    ``4e-14 (|r| + |v| / 2)^2`` in across^2. The root is off by at most e = 2e-7 (|r| + |v| / 2), and by at most
    e^2 / across if that is smaller.

    With rho = (|r| + |v| / 2) / |y|, the error of the angle is thus 1e-13, as for the gradient, if sin psi >= 0.4
    rho^2, and 2e-7 rho otherwise. rho shrinks with the learning rate. The ledger carries no further precision.

    Parameters
    ----------
    gram, vectors, half
        See `pair`.
    pair : Pair
        The result of `pair`.

    Returns
    -------
    array, shape (...)
    """
    gram = np.asarray(gram, dtype=np.float64)
    index = {name: position for position, name in enumerate(vectors)}
    residual, added = (np.sqrt(gram[..., index[name], index[name]]) for name in ("residual", half))
    return combination_floor(residual + added / 2.0, pair)


def combination_floor(length: ArrayLike, pair: Pair) -> Array:
    """Return the largest error of the component of y across g if it is a sum of vectors that may cancel.

    Parameters
    ----------
    length : array, of the shape of the pair
        Sum of the norms of the terms. See `across_floor` for the derivation of the bound.
    pair : Pair
        The result of `pair`.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = 2.0 * np.sqrt(LEDGER_ERROR) * np.asarray(length, dtype=np.float64)
        floor = np.minimum(error, error**2 / pair.across)
        return np.asarray(np.where(pair.size == 1, 0.0 * error, np.where(pair.across > 0, floor, error)))


def direct_sum(parts: Sequence[Pair]) -> Pair:
    """Return the pair of stacked vectors, for example of the model from its tensors.

    With r_k = y_k.g_k / g_k.g_k, and r the same ratio of the sums, the component of y across g has the square
    ``sum across_k^2 + ((r_k - r) |g_k|)^2``. All terms have the same sign, so they do not cancel.

    Parameters
    ----------
    parts : sequence of Pair, of the same shape
        Parts, which are added in this order.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        square = _sum([part.update_square for part in parts])
        alignment = _sum([part.alignment for part in parts])
        ratio = safe_divide(alignment, square)
        # The square of a ratio alone may be out of the range of float64.
        across = _sum([part.across_square + ((part.ratio - ratio) * part.update_norm) ** 2 for part in parts])
        nonzero = ~np.all([part.zero_gradient for part in parts], axis=0)
    across = _nonzero(across, nonzero & (alignment == 0))
    return Pair(square, alignment, across, np.asarray(_sum([part.size for part in parts])))


def scaled(pair: Pair, factor: ArrayLike) -> Pair:
    """Return the pair of y and a positive multiple of g: the same displacement, divided by another learning rate.

    Parameters
    ----------
    pair : Pair
    factor : array, broadcasts with the shape of the pair
    """
    factor = np.asarray(factor, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        square, alignment = pair.update_square * factor**2, pair.alignment * factor
    across = _nonzero(pair.across_square, ~pair.zero_gradient & (alignment == 0))
    square = _nonzero(square, pair.update_square > 0)
    return Pair(square, alignment, across, np.broadcast_to(pair.size, across.shape))


def with_time(pair: Pair, loss_time_derivative: ArrayLike) -> Pair:
    """Return the pair of the parameters extended by time, v = (theta, t), for a loss that changes with time.

    y has the additional element -dL/dt at constant theta, and g the additional element 1 (section 2.1). y.g is then
    the rate at which the loss decreases, and not only the part that the update causes.

    Parameters
    ----------
    pair : Pair
        Pair of the model.
    loss_time_derivative : array, of the shape of the pair
        dL/dt, in a unit of time in which an update takes the learning rate eta.

    Notes
    -----
    The paper prints (dL/dv)' theta' for (dL/dv)' v', which includes time.
    """
    slope = np.asarray(loss_time_derivative, dtype=np.float64)
    one = np.ones_like(slope)
    return direct_sum([pair, Pair(one, -slope, 0.0 * slope, np.ones(slope.shape, np.int64))])


def _nonzero(square: Array, where: NDArray[np.bool_]) -> Array:
    return np.where(where & (square == 0), NONZERO, square)


def _sum(terms: Sequence[NDArray[Any]]) -> NDArray[Any]:
    total = np.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def window(pair: Pair, m: int) -> Pair:
    """Return the pair of each window of m consecutive updates, for the averaged loss (eq. 3 and below).

    The state of a window is (theta_t, .., theta_{t+m-1}), and its loss is the mean of the losses, so y has the
    blocks y_i / m and g the blocks g_i. This is *not* the mean gradient at theta_t, which does not descend L_avg in
    general, although the paper argues "without loss of generality".

    Parameters
    ----------
    pair : Pair, shape (updates, ...)
    m : int
        1 or more.

    Returns
    -------
    Pair, shape (updates - m + 1, ...)
    """
    windows = pair.alignment.shape[0] - m + 1
    stacked = direct_sum([pair[start : start + windows] for start in range(m)])
    alignment = stacked.alignment / m
    across = _nonzero(stacked.across_square / m**2, ~stacked.zero_gradient & (alignment == 0))
    return Pair(stacked.update_square, alignment, across, stacked.size)


# The angle ---------------------------------------------------------------------------------------------------


def angle(pair: Pair) -> Array:
    """Return the angle psi between y and g, in radian, from 0 to pi; NaN if either is zero or underflows.

    The psi of the paper is in (-pi/2, pi/2), but its sign has no meaning. Above pi/2 the update is not effective.
    """
    return np.where(_has_angle(pair), np.arctan2(pair.across, pair.along), np.nan)


def cosine(pair: Pair) -> Array:
    """Return the cosine of psi; NaN if either vector is zero or underflows."""
    return np.where(_has_angle(pair), safe_divide(pair.along, pair.gradient_norm), np.nan)


def _has_angle(pair: Pair) -> NDArray[np.bool_]:
    return (pair.update_norm >= EXACT_NORM) & (pair.gradient_norm >= EXACT_NORM)


def rounding_error(norm: ArrayLike, roundoff: ArrayLike, underflow: ArrayLike) -> Array:
    """Return the largest norm of the error of a vector whose elements are rounded to a dtype.

    Each element x is off by at most u |x|, or by h if it is below the normal range. In float16, where this range
    ends at 6e-5, gradients are often below it.

    Parameters
    ----------
    norm : array
        Norm of the stored vector.
    roundoff : array
        Unit roundoff u, see `natgrad.schema.layout.unit_roundoff`.
    underflow : array
        h sqrt(D), see `natgrad.schema.layout.underflow_error`.
    """
    return np.asarray(np.hypot(np.asarray(roundoff) * np.asarray(norm), underflow))


def displacement_floor(
    parameter_norm: ArrayLike, displacement_norm: ArrayLike, roundoff: ArrayLike, underflow: ArrayLike = 0.0
) -> Array:
    """Return the largest norm of the rounding error of a displacement, for the dtype of the stored parameters.

    Both states are off by `rounding_error`. The norm of the second is at most |theta_t| + |d|, so their difference
    d is off by at most u (2 |theta_t| + |d|) + 2 h sqrt(D).

    Parameters
    ----------
    parameter_norm, displacement_norm : array
        |theta_t| and |d|.
    roundoff, underflow : array
        See `rounding_error`.
    """
    norms = 2.0 * np.asarray(parameter_norm) + np.asarray(displacement_norm)
    return np.asarray(np.asarray(roundoff) * norms + 2.0 * np.asarray(underflow))


def angle_uncertainty(pair: Pair, update_floor: ArrayLike, gradient_floor: ArrayLike) -> Array:
    """Return the largest change of psi, in radian, caused by errors of y and g.

    An error of norm e rotates a vector v by at most asin(e / |v|), or by up to pi if e >= |v|.

    Parameters
    ----------
    pair : Pair
    update_floor, gradient_floor : array
        Norms of the errors of g and y.
    """
    turned = _largest_rotation(update_floor, pair.update_norm) + _largest_rotation(
        gradient_floor, pair.gradient_norm
    )
    return np.minimum(turned, np.pi)


def _largest_rotation(error: ArrayLike, norm: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.asarray(error) / norm
        return np.where(share >= 1, np.pi, np.arcsin(np.minimum(share, 1.0)))


# The optimal metric ------------------------------------------------------------------------------------------


def where_effective(pair: Pair, value: Array) -> Array:
    """Return the value if a metric exists (y.g > 0), and NaN otherwise."""
    return np.where(pair.alignment > 0, value, np.nan)


def condition_number(pair: Pair) -> Array:
    """Return the smallest condition number of any metric M with M g = y; NaN if y.g <= 0.

    kappa = ((1 + |sin psi|) / |cos psi|)^2 equals (1 + |sin psi|) / (1 - |sin psi|) of the paper (below eq. 9,
    Prop. 1), but does not suffer from cancellation near pi/2.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # Infinite if the component along g underflows to 0.
        return where_effective(pair, ((pair.gradient_norm + pair.across) / pair.along) ** 2)


def similarity(pair: Pair) -> Array:
    """Return the similarity of update and steepest descent, 1 / kappa in (0, 1]; NaN if y.g <= 0."""
    return where_effective(pair, safe_divide(pair.along, pair.gradient_norm + pair.across) ** 2)


def eigenvalues(pair: Pair) -> tuple[Array, Array, Array]:
    """Return the eigenvalues of the metric with the smallest condition number, eq. (9); NaN if y.g <= 0.

    Returns
    -------
    maximum, middle, minimum
        Eigenvalues with multiplicities 1, D - 2, 1 (`multiplicities`). The middle one is NaN if D <= 2. If D = 1,
        both others equal the only eigenvalue y / g.

    Notes
    -----
    This is the metric of the family (22) with gamma = 1. The expression 1 / cos psi - |tan psi| of the paper
    suffers from cancellation near pi/2; this function uses cos psi / (1 + |sin psi|).
    """
    maximum, middle, minimum = family_eigenvalues(pair, [1.0])
    return maximum[..., 0], middle[..., 0], minimum[..., 0]


def multiplicities(size: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the multiplicities of the largest, middle and smallest eigenvalue of a metric of the family (22).

    Lemma 1 states 1, D - 2, 1, which does not apply to D = 1: then M = y / g has only one eigenvalue, the largest.

    Examples
    --------
    >>> [[int(n) for n in multiplicities(size)] for size in (1, 2, 8)]
    [[1, 0, 0], [1, 0, 1], [1, 6, 1]]
    """
    dimension = np.asarray(size, dtype=np.int64)
    return np.ones_like(dimension), np.maximum(dimension - 2, 0), np.minimum(dimension - 1, 1)


def eigenvalue_bounds(pair: Pair) -> tuple[Array, Array]:
    """Return bounds of the spectrum of *every* metric M with M g = y; NaN if y.g <= 0.

    Returns
    -------
    infimum : array
        Infimum of the largest eigenvalue, |y| / (|g| cos psi) (Prop. 3).
    supremum : array
        Supremum of the smallest eigenvalue, |y| cos psi / |g| (Prop. 2).

    Notes
    -----
    The paper has strict inequalities; they are equalities if y is parallel to g, and if D = 1.
    """
    infimum = safe_divide(pair.gradient_norm**2, pair.alignment)
    return where_effective(pair, infimum), where_effective(pair, pair.ratio)


# The one-parameter family ------------------------------------------------------------------------------------


def _family_sum(pair: Pair, gamma: Array) -> Array:
    """Return 1 + gamma + sqrt((1 + gamma)^2 - 4 gamma cos^2 psi), gammas on a new last axis.

    The root is computed from (1 - gamma)^2 + 4 gamma sin^2 psi, which does not suffer from cancellation.
    """
    sine = safe_divide(pair.across, pair.gradient_norm)[..., None]
    return 1.0 + gamma + np.hypot(1.0 - gamma, 2.0 * np.sqrt(gamma) * sine)


def family_eigenvalues(pair: Pair, gamma: ArrayLike) -> tuple[Array, Array, Array]:
    """Return the eigenvalues of the one-parameter family (eq. 22, Lemma 1); NaN if y.g <= 0.

    Parameters
    ----------
    pair : Pair, shape (...)
    gamma : array, shape (gammas,)
        Positive weights; 1 gives the metric with the smallest condition number.

    Returns
    -------
    maximum, middle, minimum : arrays, shape (..., gammas)
        Eigenvalues with multiplicities 1, D - 2, 1 (`multiplicities`). The middle one is NaN if D <= 2. If D = 1,
        both others equal the only eigenvalue y / g, for every gamma.
    """
    weight = np.asarray(gamma, dtype=np.float64)
    total = _family_sum(pair, weight)
    column = pair[..., None]
    scale = safe_divide(column.gradient_norm**2, column.alignment)
    on_line = column.size == 1
    maximum = np.where(on_line, column.ratio, 0.5 * scale * total)
    middle = np.where(column.size > 2, weight * scale, np.nan)
    # The product of maximum and minimum is gamma (|y| / |g|)^2.
    minimum = np.where(on_line, column.ratio, 2.0 * weight * column.ratio / total)
    return where_effective(column, maximum), where_effective(column, middle), where_effective(column, minimum)


def family_condition_number(pair: Pair, gamma: ArrayLike) -> Array:
    """Return the condition numbers of the one-parameter family (appendix A); NaN if y.g <= 0.

    The smallest is at gamma = 1, where it equals `condition_number`.

    Parameters
    ----------
    pair : Pair, shape (...)
    gamma : array, shape (gammas,)

    Returns
    -------
    array, shape (..., gammas)
    """
    weight = np.asarray(gamma, dtype=np.float64)
    column = pair[..., None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        root = _family_sum(pair, weight) * column.gradient_norm / (2.0 * np.sqrt(weight) * column.along)
        return where_effective(column, np.where(column.size == 1, 1.0, root**2))


def family_asymptotes(pair: Pair, gamma: ArrayLike) -> tuple[Array, Array]:
    """Return the asymptotes of the largest and smallest eigenvalue of the family.

    The largest eigenvalue is above ``max(1, gamma)`` times the infimum of Prop. 3, and the smallest is below
    ``min(1, gamma)`` times the supremum of Prop. 2. Both approach these lines as gamma -> 0 and as gamma ->
    infinity, where the condition number becomes ``max(gamma, 1 / gamma) / cos^2 psi``. The distance from the lines
    is largest, a factor of 1 + |sin psi|, at the optimum gamma = 1.

    Parameters
    ----------
    pair : Pair, shape (...)
    gamma : array, shape (gammas,)

    Returns
    -------
    maximum, minimum : arrays, shape (..., gammas)
        NaN if y.g <= 0.
    """
    weight = np.asarray(gamma, dtype=np.float64)
    infimum, supremum = eigenvalue_bounds(pair[..., None])
    on_line = pair[..., None].size == 1
    maximum = np.where(on_line, infimum, np.maximum(1.0, weight) * infimum)
    return maximum, np.where(on_line, supremum, np.minimum(1.0, weight) * supremum)


def family_log_determinant(pair: Pair, gamma: ArrayLike) -> Array:
    """Return the logarithms of the determinants of the one-parameter family; NaN if y.g <= 0.

    By block elimination, a metric is y.g / g.g along g and alpha = gamma |y|^2 / y.g across g. The result is
    ``log(y.g / g.g) + (D - 1) log(alpha)``.

    Parameters
    ----------
    pair : Pair, shape (...)
    gamma : array, shape (gammas,)

    Returns
    -------
    array, shape (..., gammas)
    """
    column = pair[..., None]
    infimum, supremum = eigenvalue_bounds(column)
    weight = np.asarray(gamma, dtype=np.float64)
    return np.asarray(np.log(supremum) + (column.size - 1) * np.log(weight * infimum))


# Status ------------------------------------------------------------------------------------------------------


def status(
    pair: Pair,
    learning_rate: ArrayLike,
    finite: ArrayLike = True,
    known: ArrayLike = True,
    update_floor: ArrayLike = 0.0,
) -> NDArray[np.int8]:
    """Return the reason why a metric does or does not exist, as values of `natgrad.schema.variables.Status`.

    Parameters
    ----------
    pair : Pair
    learning_rate : array
        eta; NaN, infinite or not positive if it is not known.
    finite : bool array
        False if the parameters or gradients are not finite.
    known : bool array
        False if a loss or a vector is missing that the estimate of the gradient requires.
    update_floor : array
        Largest norm of the error of g by rounding. An update that is not larger cannot be distinguished from its
        error.
    """
    rate = np.asarray(learning_rate, dtype=np.float64)
    has_data, floor = np.asarray(known, dtype=bool), np.asarray(update_floor, dtype=np.float64)
    update, gradient = pair.update_norm, pair.gradient_norm
    in_range = (update <= MOST_NORM) & (gradient <= MOST_NORM) & np.isfinite(pair.alignment) & np.isfinite(floor)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        small = update * np.minimum(rate, 1.0) < LEAST_NORM
    conditions = [
        (~np.asarray(finite, dtype=bool), Status.NON_FINITE),
        (~((rate > 0) & np.isfinite(rate)), Status.NO_LEARNING_RATE),
        # The component of y along an update of infinite norm is 0 for any y.
        (pair.zero_gradient & (update < np.inf), Status.ZERO_GRADIENT),
        (update == 0, Status.ZERO_UPDATE),
        (~has_data, Status.UNVERIFIABLE),
        (small, Status.UNDERFLOW),
        (~in_range, Status.OVERFLOW),
        (gradient < LEAST_NORM, Status.UNDERFLOW),
        (floor >= update, Status.UNVERIFIABLE),
        (pair.alignment > 0, Status.EFFECTIVE),
        (pair.alignment == 0, Status.ORTHOGONAL),
    ]
    where = [np.broadcast_to(condition, pair.alignment.shape) for condition, _ in conditions]
    return np.select(where, [np.int8(value) for _, value in conditions], np.int8(Status.OBTUSE))
