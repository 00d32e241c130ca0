"""Compute the condition numbers of the metrics of adaptive optimizers, for comparison with the smallest (eq. 9).

Adam moves by -eta m / (sqrt(v) + epsilon), so the metric diag(sqrt(v) + epsilon) maps its update to the momentum m.
If m is not the gradient, this is not a metric of eq. (6) for the gradient, but it is the metric that the rule uses.
Shampoo, PSGD and K-FAC use Kronecker products of factors, and SOAP uses a diagonal in another basis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from natgrad.schema.errors import InputError

__all__ = [
    "adam_eigenvalues",
    "balanced_damping",
    "condition_number",
    "factor_eigenvalues",
    "kronecker_eigenvalues",
    "rotated_eigenvalues",
    "symmetric_factor",
]

Array = NDArray[np.float64]

_UNIT = 2.0**-53
ASYMMETRY = 0.1
"""Largest asymmetric part of a preconditioner, measured in its own metric. The eigenvalues of the symmetric part
are off by its square, because a skew matrix does not change singular values to first order."""


def adam_eigenvalues(
    smallest: ArrayLike, largest: ArrayLike, beta2: ArrayLike, epsilon: ArrayLike, updates: ArrayLike
) -> tuple[Array, Array]:
    """Return the smallest and largest eigenvalue of Adam's metric in an update, with bias correction.

    Parameters
    ----------
    smallest, largest : array
        Elements of ``exp_avg_sq`` after the update, in squared loss per squared parameter.
    beta2, epsilon : array
    updates : array
        Number of updates in ``exp_avg_sq``, including this one.

    Returns
    -------
    tuple of arrays
        In loss per parameter; NaN if a value is not known, no update has been made, or an element is negative.
    """
    beta2, updates = np.asarray(beta2, np.float64), np.asarray(updates, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        bias = np.where(updates > 0, 1.0 - beta2**updates, np.nan)
        low, high = (np.sqrt(np.asarray(v, np.float64) / bias) + epsilon for v in (smallest, largest))
    return np.asarray(low), np.asarray(high)


def symmetric_factor(factor: ArrayLike, roundoff: float, *, definite: bool) -> Array:
    """Return the symmetric part of a factor, which must be symmetric up to the rounding of the training program.

    Parameters
    ----------
    factor : array, shape (n, n) or (n,)
        A matrix, or the diagonal of one.
    roundoff : float
        Unit roundoff of the dtype in which it was computed.
    definite : bool
        True if the factor is the root of an inverse, which is applied to the gradient directly. It is computed from
        a singular value decomposition, whose two bases differ for the smallest singular values of the statistics,
        where the root is largest. Its asymmetry is therefore measured as |S^(-1/2) K S^(-1/2)| for F = S + K, and
        may be up to `ASYMMETRY`. Otherwise |F - F'| may be up to the rounding error of n terms.

    Raises
    ------
    InputError
        If the factor is not finite, not symmetric, or, with ``definite``, not positive definite.
    """
    factor = np.asarray(factor, np.float64)
    if not np.isfinite(factor).all():
        raise InputError("a factor is not finite")
    if factor.ndim == 1:
        if definite and not factor.min() > 0:
            raise InputError(f"a factor is not positive definite: its smallest element is {factor.min():.3g}")
        return factor
    symmetric: Array = np.asarray((factor + factor.T) / 2.0)
    skew = factor - symmetric
    size, norm = len(factor), float(np.linalg.norm(symmetric))
    if not definite:
        if np.linalg.norm(skew) > size * roundoff * norm:
            raise InputError(
                f"a factor is not symmetric: its asymmetric part is {np.linalg.norm(skew) / norm:.3g} of it"
            )
        return symmetric
    values = np.linalg.eigvalsh(symmetric)
    if not values[0] > 2.0 * size * _UNIT * norm:
        why = "is zero: it has not been computed yet" if not factor.any() else "is not positive definite"
        raise InputError(f"a factor {why}; its eigenvalues are {values[0]:.3g} to {values[-1]:.3g}")
    # Two bounds of the norm, the second sharper and more expensive than the first, and then the norm itself.
    part = float(np.linalg.norm(skew) / values[0])
    if part > ASYMMETRY:
        values, vectors = np.linalg.eigh(symmetric)
        scaled = vectors / np.sqrt(values)
        skew = scaled.T @ skew @ scaled
        part = float(np.linalg.norm(skew))
    if part > ASYMMETRY:
        part = float(np.abs(np.linalg.eigvalsh(1j * skew)).max())
    if part > ASYMMETRY:
        raise InputError(
            f"a factor is not symmetric: its asymmetric part is {part:.3g}, measured in the metric of the factor"
        )
    return symmetric


def factor_eigenvalues(
    factor: ArrayLike, *, exponent: float = 1.0, damping: float = 0.0, root: bool = False
) -> tuple[float, float]:
    """Return the extreme eigenvalues of (F + damping)^exponent, or of (Q'Q + damping)^exponent for a root Q.

    Parameters
    ----------
    factor : array, shape (n, n) or (n,)
        A symmetric matrix F, or any Q; or the diagonal of one.
    exponent, damping : float
    root : bool

    Raises
    ------
    InputError
        If the factor is not finite, or if it is not positive definite and the exponent is negative.

    Notes
    -----
    LAPACK computes the eigenvalues in float64. The error of an eigenvalue of F is at most about n 2^-53 of the
    largest.
    """
    factor = np.asarray(factor, np.float64)
    if not np.isfinite(factor).all():
        raise InputError("a factor is not finite")
    if root:
        values = np.sort(np.abs(factor)) if factor.ndim == 1 else np.linalg.svd(factor, compute_uv=False)[::-1]
        floor, values = values[-1] * 2.0 * len(values) * _UNIT, values**2
        floor = floor**2
    else:
        values = np.sort(factor) if factor.ndim == 1 else np.linalg.eigvalsh(factor)
        floor = 0.0 if factor.ndim == 1 else 2.0 * len(values) * _UNIT * np.abs(values).max()
    low, high = float(values[0]) + damping, float(values[-1]) + damping
    if exponent < 0 and not low > floor:
        raise InputError(f"a factor is not positive definite: its eigenvalues are {low:.3g} to {high:.3g}")
    with np.errstate(over="ignore", divide="ignore"):
        ends = np.array([low, high]) ** exponent
    return float(ends.min()), float(ends.max())


def balanced_damping(factors: tuple[ArrayLike, ArrayLike], damping: float, least: float) -> tuple[float, float]:
    """Return the damping of the two factors of K-FAC, balanced by their mean eigenvalues.

    Parameters
    ----------
    factors : pair of arrays, shape (m, m) and (n, n)
        Factors of the gradients and of the inputs.
    damping : float
        Damping of their product.
    least : float
        Smallest damping of each factor.

    Notes
    -----
    If pi^2 is the ratio of the mean eigenvalue of the second factor to that of the first, the dampings are
    sqrt(damping) divided and multiplied by pi (Martens and Grosse, Optimizing Neural Networks with
    Kronecker-factored Approximate Curvature, section 6.3).
    """
    of_gradients, of_inputs = (float(np.trace(np.asarray(f, np.float64))) / len(np.asarray(f)) for f in factors)
    if not (of_gradients > 0 and of_inputs >= 0 and damping >= 0):
        raise InputError(
            f"cannot balance damping {damping:.3g} for mean eigenvalues {of_gradients:.3g} and {of_inputs:.3g}"
        )
    ratio = math.sqrt(of_inputs / of_gradients)
    return max(math.sqrt(damping) / ratio if ratio else math.inf, least), max(math.sqrt(damping) * ratio, least)


def kronecker_eigenvalues(
    factors: Sequence[tuple[float, float]], shift: float = 0.0, *, rows: int = 0
) -> tuple[float, float]:
    """Return the smallest and largest eigenvalue of a Kronecker product of factors, plus a shift.

    Parameters
    ----------
    factors : sequence of (smallest, largest)
        Eigenvalues of each factor. The product of no factors is 1.
    shift : float
    rows : int
        Total number of rows of the factors whose smallest eigenvalue has the rounding error of their largest
        eigenvalue. The product must be positive definite beyond this error.

    Raises
    ------
    InputError
        If the product is not positive definite, or not finite.

    Examples
    --------
    >>> kronecker_eigenvalues([(1.0, 4.0), (0.5, 2.0)], shift=1.0)
    (1.5, 9.0)
    """
    # If a factor has negative eigenvalues, the extremes are not at (smallest, smallest) and (largest, largest).
    corners = [math.prod(corner) for corner in itertools.product(*factors)]
    low, high = min(corners) + shift, max(corners) + shift
    floor = 2.0 * rows * _UNIT * max(map(abs, corners))
    if not all(floor < corner + shift < math.inf for corner in corners):
        raise InputError(f"the metric is not positive definite: its eigenvalues are {low:.3g} to {high:.3g}")
    return low, high


def rotated_eigenvalues(smallest: float, largest: float, epsilon: float, bias: float) -> tuple[float, float]:
    """Return the smallest and largest eigenvalue of the metric of SOAP, Q diag(sqrt(v) + epsilon) Q' / bias.

    Parameters
    ----------
    smallest, largest : float
        Elements of v, which is ``exp_avg_sq`` in the basis of Q.
    epsilon, bias : float

    Raises
    ------
    InputError
        If a value is not known or negative.
    """
    if not 0 <= smallest <= largest < math.inf or not bias > 0 or not math.sqrt(smallest) + epsilon > 0:
        raise InputError(f"exp_avg_sq ranges from {smallest:.3g} to {largest:.3g}, epsilon is {epsilon:.3g}")
    return (math.sqrt(smallest) + epsilon) / bias, (math.sqrt(largest) + epsilon) / bias


def condition_number(smallest: ArrayLike, largest: ArrayLike, learning_rate: ArrayLike) -> tuple[Array, Array]:
    """Return the condition numbers of a block-diagonal metric, for each tensor and for the model.

    Parameters
    ----------
    smallest, largest : array, shape (updates, tensors)
        Eigenvalues of the block of each tensor.
    learning_rate : array, shape (updates, tensors)
        Learning rate of each tensor. A tensor with ten times the rate has a tenth of the metric.

    Returns
    -------
    tensors : array, shape (updates, tensors)
    model : array, shape (updates,)
        NaN if it is not known for a tensor.
    """
    low, high = np.asarray(smallest, np.float64), np.asarray(largest, np.float64)
    rate = np.asarray(learning_rate, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = np.where(rate > 0, rate, np.nan)
        return np.asarray(high / low), np.asarray((high / rate).max(axis=-1) / (low / rate).min(axis=-1))
