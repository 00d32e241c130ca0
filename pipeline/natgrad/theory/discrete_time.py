"""Analyze learning rules in discrete time (section 2.2), from the pairs of `natgrad.theory.geometry`.

Over an update that is not small, the loss changes by ybar.(theta_{t+1} - theta_t) with a *discrete* gradient ybar
instead of the gradient (eq. 12). The ledger provides gradients plus multiples of its vectors:

- `corrected`: gradient + c displacement, with c fixed by eq. (12);
- trapezoid: gradient + gradient_change / 2, corrected in the same way;
- Taylor: gradient + hvp / 2, eq. (16), which obeys eq. (12) if H was evaluated at the right point.

Pairs for the last two are computed by `geometry.pair` with ``half``. The bounds of learning rates and the metrics
of stochastic rules follow from these pairs.

References
----------
Shoji, Suzuki, Kozachkov, "Is All Learning (Natural) Gradient Descent?"; equation numbers are the paper's.
Docstrings state where the paper is wrong.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from natgrad.theory.geometry import Pair, eigenvalue_bounds, eigenvalues, safe_divide, where_effective

__all__ = [
    "corrected",
    "correction",
    "correction_floor",
    "learning_rate_bounds",
    "stochastic_learning_rate_bound",
    "stochastic_weight",
    "trapezoid_residual",
]

Array = NDArray[np.float64]


# Discrete gradients ------------------------------------------------------------------------------------------


def trapezoid_residual(loss_change: ArrayLike, first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    """Return how much of the change of the loss the trapezoid rule does not explain.

    For a smooth objective that does not change, the trapezoid rule has an error of third order in the displacement.

    Parameters
    ----------
    loss_change : array
        dL = L(theta_{t+1}) - L(theta_t).
    first, second : array, of the same shape
        g.d and e.d / 2, with the gradient g, its change e and the displacement d.

    Returns
    -------
    residual, scale : arrays, of the same shape
        ``|dL - g.d - e.d / 2| / scale``, at most 1, and ``scale = |dL| + |g.d| + |e.d| / 2``. The residual is
        NaN if the scale is 0.

    Examples
    --------
    >>> trapezoid_residual(-3.0, -4.0, 1.0)  # theta^2 from 2 to 1
    (array(0.), array(8.))
    """
    change, one, other = (np.asarray(term, dtype=np.float64) for term in (loss_change, first, second))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = np.asarray(np.abs(change) + np.abs(one) + np.abs(other))
        return np.asarray(np.abs(change - one - other) / scale), scale


def corrected(pair: Pair, learning_rate: ArrayLike, loss_change: ArrayLike, model: Pair) -> Pair:
    """Return the pair of the update and the negative discrete gradient, corrected along the displacement (eq. 12).

    With p = eta g the discrete gradient is grad L + s p, and s is fixed by p.(grad L + s p) = dL. This changes
    only the component of y along g. At p = 0 the correction is 0/0; the value is then the gradient.

    Parameters
    ----------
    pair : Pair
        Pair of the model, or of parts of it.
    learning_rate, loss_change : array, of the shape of the pair
        eta, and dL = L(theta_{t+1}) - L(theta_t).
    model : Pair, broadcasts to the shape of the pair
        Pair of the model, to which dL belongs.
    """
    rate, change = np.asarray(learning_rate, dtype=np.float64), np.asarray(loss_change, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        wanted = safe_divide(-change / rate, model.update_square)
        # In this order the ratio of the model cancels exactly, and its y.g is -dL / eta as in eq. (12).
        alignment = ((pair.ratio - model.ratio) + wanted) * pair.update_square
    return Pair(pair.update_square, alignment, pair.across_square, pair.size)


def correction(learning_rate: ArrayLike, loss_change: ArrayLike, model: Pair) -> Array:
    """Return the multiple of the g of the model that `corrected` adds to y, ``(-dL / eta - y.g) / g.g``.

    Parameters
    ----------
    learning_rate, loss_change, model
        See `corrected`.

    Returns
    -------
    array
        0 if the displacement is zero.
    """
    rate, change = np.asarray(learning_rate, dtype=np.float64), np.asarray(loss_change, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return safe_divide(-change / rate, model.update_square) - model.ratio


def correction_floor(
    pair: Pair, learning_rate: ArrayLike, loss_change: ArrayLike, model: Pair, floors: tuple[Array, Array]
) -> Array:
    """Return the largest norm of the error of the correction in `corrected`, caused by errors of the displacement.

    The correction is k g with k = (-dL / eta - x.g) / g.g of the model, where x is y before the correction. If g is
    off by at most f, k is off by at most ``(|x| f + |k| (2 |g| f + f^2)) / (|g| - f)^2``, and k g accordingly.

    Parameters
    ----------
    pair, learning_rate, loss_change, model
        See `corrected`.
    floors : tuple of array
        Norms of the errors of g of the pair, and of g of the model.

    Returns
    -------
    array
        Infinite if f >= |g|, so that g is not known.
    """
    own, of_model = floors
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        factor = np.abs(correction(learning_rate, loss_change, model))
        length, known = model.update_norm, np.maximum(model.update_norm - of_model, 0.0)
        error = (model.gradient_norm * of_model + factor * (2.0 * length * of_model + of_model**2)) / known**2
        return np.where(known > 0, factor * own + error * (pair.update_norm + own), np.inf)


# Learning rates ----------------------------------------------------------------------------------------------


def learning_rate_bounds(pair: Pair, hessian_min_eigenvalue: ArrayLike) -> tuple[Array, Array]:
    """Return the learning rates below which Mbar + eta H is a metric of the true gradient; NaN if y.g <= 0.

    See eqs. (17) and (18).

    Parameters
    ----------
    pair : Pair
        Pair of the update and the negative *discrete* gradient ybar (eq. 16).
    hessian_min_eigenvalue : array, broadcasts to the shape of the pair
        Smallest eigenvalue of the Hessian of the loss at theta + lambda p, twice that of H.

    Returns
    -------
    supremum : array
        (1 / h) (|ybar| / |g|) cos(psi_bar) with h = -lambda_min(H), the paper's bound. It belongs to
        gamma -> infinity: below it, *some* metric Mbar has this property.
    optimal : array
        lambda_min(Mbar) / h for the Mbar with the smallest condition number: below it, this Mbar has the property.

    Notes
    -----
    Both are infinite if the loss is convex, h <= 0. Both are sufficient, not necessary: a metric that maps g to the
    true y exists if and only if y.g > 0. The paper prints M + H instead of Mbar + eta H below eq. (17). Because
    ybar and H themselves depend on eta, a bound applies only to the eta of this update.
    """
    concavity = np.maximum(-np.asarray(hessian_min_eigenvalue, dtype=np.float64) / 2.0, 0.0)
    _, _, minimum = eigenvalues(pair)
    with np.errstate(divide="ignore", over="ignore"):
        return eigenvalue_bounds(pair)[1] / concavity, minimum / concavity


def stochastic_weight(pair: Pair, curvature: Pair, across_product: ArrayLike, learning_rate: ArrayLike) -> Array:
    """Return the smallest alpha for which the metric of a stochastic rule (eq. 19) is positive definite.

    With n = <Hg>, ybar = y - eta n, b = n.<g>, c = y.<g> and a = c - eta b, eq. (19) adds ``alpha (I - g g' / g.g)
    + eta d d' / (a b c)`` with d = b y - c n, which is orthogonal to g, to y y' / c. The sum is definite if and
    only if c > 0 and either a b > 0 or alpha > eta |d|^2 / (|a b| c). The paper assumes it "for small enough eta",
    but the term is negative for b < 0, and |n|^2 / b may be large.

    Parameters
    ----------
    pair : Pair
        Pair of the mean update <g> and the negative gradient y = -grad L (not the discrete one).
    curvature : Pair
        Pair of the mean update and <Hg>, which replaces y.
    across_product : array
        Inner product of the components of y and <Hg> across <g>, ``y.n - (y.g) (n.g) / g.g``.
    learning_rate : array
        eta.

    Returns
    -------
    array
        Lower bound of alpha (exclusive). 0 if every positive alpha is sufficient. NaN if there is no such alpha
        (y.<g> <= 0), or if eq. (19) is not defined (<Hg>.<g> = 0 or <ybar>.<g> = 0).
    """
    rate = np.asarray(learning_rate, dtype=np.float64)
    remaining = pair.alignment - rate * curvature.alignment
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = np.abs(curvature.alignment * remaining) * pair.alignment
        needed = rate * _stochastic_deviation(pair, curvature, across_product) / scale
    weight = np.where(remaining * curvature.alignment > 0, 0.0, needed)
    defined = (remaining != 0) & (curvature.alignment != 0) & (rate > 0)
    return where_effective(pair, np.where(defined, weight, np.nan))


def stochastic_learning_rate_bound(
    pair: Pair, curvature: Pair, across_product: ArrayLike, alpha: ArrayLike
) -> Array:
    """Return the largest eta for which the metric of a stochastic rule (eq. 19) is positive definite.

    y, <Hg> and alpha are kept constant.

    Parameters
    ----------
    pair, curvature, across_product
        See `stochastic_weight`.
    alpha : array
        Weight of the metric across <g>, positive.

    Returns
    -------
    array
        The metric is definite for all smaller eta. If <Hg>.<g> > 0, the bound is y.<g> / <Hg>.<g>, at which
        <ybar>.<g> becomes negative. Otherwise it is the eta at which alpha is no longer sufficient, or infinity. It
        goes to 0 as <Hg>.<g> approaches 0 from below, contrary to the "arbitrarily small" of the paper. NaN as in
        `stochastic_weight`.
    """
    weight = np.asarray(alpha, dtype=np.float64)
    slope = curvature.alignment
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        lacking = _stochastic_deviation(pair, curvature, across_product) - weight * slope**2 * pair.alignment
        until = np.where(lacking > 0, weight * -slope * pair.alignment**2 / lacking, np.inf)
        bound = np.where(slope > 0, pair.alignment / slope, until)
    return where_effective(pair, np.where((slope != 0) & (weight > 0), bound, np.nan))


def _stochastic_deviation(pair: Pair, curvature: Pair, across_product: ArrayLike) -> Array:
    """Return the squared norm of (n.g) y - (y.g) n, which is orthogonal to g."""
    one, other = curvature.alignment, pair.alignment
    mixed = 2.0 * one * other * np.asarray(across_product, dtype=np.float64)
    return np.maximum(one**2 * pair.across_square - mixed + other**2 * curvature.across_square, 0.0)
