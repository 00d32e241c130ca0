"""Apply metrics to vectors: the matrices M with M g = y as SciPy operators.

`natgrad.theory.geometry` describes a metric by numbers; an operator in this module acts on vectors. One step of
block elimination along g brings every metric to the canonical form of the paper (eqs. 6, 8, 14)::

    M = y y' / y.g + B,    B g = 0,  B positive definite across g,

so M is a small block on span(g, y, u_1, .., u_k) and a scalar on its complement. M v, M^-1 v and M^(1/2) v cost O(D
k) time and memory. No D x D array is formed, except by `Metric.to_dense`.

An operator belongs to one step. To compute numbers for many steps together (spectra, condition numbers,
determinants, bounds), apply the functions of `geometry` to `pair_of` the stacked vectors.

References
----------
Shoji, Suzuki, Kozachkov, "Is All Learning (Natural) Gradient Descent?"; equation numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator

from natgrad.schema.arguments import number, real_array
from natgrad.schema.errors import InputError
from natgrad.schema.variables import Status
from natgrad.theory import discrete_time, geometry
from natgrad.theory.geometry import Pair

__all__ = ["Metric", "effective_pair", "eigenvalue_rounding", "jackknife", "pair_of", "stochastic_metric"]

Array = NDArray[np.float64]

_UNIT = 2.0**-53


# Vectors -----------------------------------------------------------------------------------------------------


def pair_of(y: ArrayLike, g: ArrayLike) -> Pair:
    """Compute the pairs of vectors of negative gradients and updates, one for each leading index.

    Parameters
    ----------
    y, g : array, shape (..., D)
        Vectors, which are converted to float64.

    Returns
    -------
    Pair, shape (...)
        If a length is out of the range from `natgrad.theory.geometry.LEAST_NORM` to ``MOST_NORM``, the angle is NaN
        and the status is ``underflow`` or ``overflow``.

    Raises
    ------
    InputError
        If the shapes differ or there are no elements.
    """
    y, g = np.asarray(y, dtype=np.float64), np.asarray(g, dtype=np.float64)
    if y.shape != g.shape or not y.ndim or not y.shape[-1]:
        raise InputError(
            f"invalid shapes: y has {y.shape}, g has {g.shape}",
            remedy="pass two nonempty arrays of equal shape, with elements on the last axis",
        )
    size = np.full(y.shape[:-1], y.shape[-1])
    update_square, gradient_square = geometry.squared_norm(g), geometry.squared_norm(y)
    small, least = [(square > 0) & (square < geometry.LEAST_NORM**2) for square in (update_square, gradient_square)]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        across, alignment = _across(y, g), np.vecdot(y, g)
        across_square = np.where(least, geometry.NONZERO, np.vecdot(across, across))
        alignment = np.where(least, 0.0, np.where(np.isfinite(gradient_square), alignment, np.nan))
        alignment = np.where(small | ~np.isfinite(update_square), np.nan, alignment)
    return Pair(np.where(small, geometry.NONZERO, update_square), alignment, across_square, size)


def _across(y: Array, g: Array) -> Array:
    """Return the component of y across g. Subtracting twice makes its rounding error relative to it, not to y."""
    if y.shape[-1] == 1:
        return np.where(g == 0, y, 0.0 * y)
    for _ in range(2):
        y = y - Pair(np.vecdot(g, g), np.vecdot(y, g), np.zeros(()), np.zeros((), int)).ratio[..., None] * g
    return y


def effective_pair(y: Array, g: Array) -> Pair:
    """Return the pair of an effective update; raise InputError if no metric exists."""
    pair = pair_of(y, g)
    status = Status(int(geometry.status(pair, 1.0, np.isfinite([y, g]).all())))
    if status is not Status.EFFECTIVE:
        raise InputError(
            f"no metric maps g to y: the update is {status.name.lower()}",
            where=f"|g|^2 = {pair.update_square:.4g}, y.g = {pair.alignment:.4g}, D = {pair.size}",
            why="a symmetric positive definite M with M g = y exists if and only if y.g > 0",
            remedy="pass the negative gradient, and finite nonzero vectors whose squares are in range",
        )
    return pair


# The metric --------------------------------------------------------------------------------------------------


class Metric(LinearOperator):  # type: ignore[misc]  # SciPy has no types
    """The metric M with M g = y: ``y y' / y.g + alpha (I - g g' / g.g) + sum_i w_i u_i u_i'`` (eqs. 6, 8, 14, 22).

    Parameters
    ----------
    y, g : array, shape (D,)
        Negative (discrete) gradient and update, y.g > 0.
    gamma, alpha : float, optional
        Weight across g: either alpha itself (eq. 8), or gamma = alpha y.g / y.y (eq. 22). Default: gamma is 1, the
        metric with the smallest condition number. With directions the default is alpha = 0 (eq. 6), and the
        directions must span the complement of g.
    directions : array, shape (D, k), optional
        Columns u_i orthogonal to g.
    weights : array, shape (k,), optional
        w_i, which may be negative if M remains positive definite. Default: 1.

    Attributes
    ----------
    pair : Pair
    alpha : float

    Raises
    ------
    InputError
        If no metric maps g to y (`geometry.status` gives the reason), a direction is not orthogonal to g up to
        rounding, or M would not be positive definite.

    Notes
    -----
    A metric is a `scipy.sparse.linalg.LinearOperator`: use ``metric @ x``, ``metric + eta * H``, and functions that
    accept operators. x is a vector (D,), or an array (D, n) whose columns are vectors.

    Examples
    --------
    >>> y, g = np.array([3.0, 1.0, 0.0]), np.array([1.0, 0.0, 1.0])
    >>> metric = Metric(y, g)
    >>> np.allclose(metric @ g, y), np.allclose(metric.solve(y), g)
    (True, True)
    """

    def __init__(
        self,
        y: ArrayLike,
        g: ArrayLike,
        *,
        gamma: float | None = None,
        alpha: float | None = None,
        directions: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> None:
        y, g = _array("y", y), _array("g", g)
        if y.ndim != 1:
            raise InputError(
                f"a metric requires two vectors, got shape {y.shape}", remedy="create one metric for each step"
            )
        if gamma is not None and alpha is not None:
            raise InputError(f"gamma = {gamma} and alpha = {alpha} are mutually exclusive", remedy="pass only one")
        gamma, alpha = _weight("gamma", gamma), _weight("alpha", alpha)
        directions = None if directions is None else _array("directions", directions)
        weights = None if weights is None else _array("weights", weights)
        self.pair = effective_pair(y, g)
        optimum = float(geometry.eigenvalue_bounds(self.pair)[0])
        if alpha is None:
            alpha = optimum * gamma if gamma is not None else (optimum if directions is None else 0.0)
        self.alpha = alpha
        self._gamma = self.alpha / optimum if directions is None else None
        super().__init__(np.float64, (len(g), len(g)))
        unit, across = g / self.pair.update_norm, _across(y, g)
        basis, added = _diagonalized(unit, directions, weights)
        basis, added = _completed(unit, basis, added, across)
        # In this basis M is L diag(pivot, weights) L', where L is the identity with the slope below its first 1.
        self._basis = np.column_stack([unit, basis])
        self._pivot, self._weights = float(self.pair.ratio), self.alpha + added
        self._slope = basis.T @ across / self.pair.along
        self._require_definite()

    def _require_definite(self) -> None:
        size, spanned = self._basis.shape
        least = min([*self._weights, *([self.alpha] if spanned < size else [])], default=np.inf)
        if not least > 0 or not np.isfinite(self.alpha):
            raise InputError(
                f"the metric would not be positive definite: its smallest weight across g is {least:.4g}",
                where=f"alpha = {self.alpha:.4g}, D = {size}",
                why="alpha is not positive, a weight is too negative, or the directions span too little",
                remedy="pass a larger alpha, or directions that span the complement of g",
            )

    def _matvec(self, x: Array) -> Array:
        return self._apply(x, self._forward, self.alpha)

    _matmat = _matvec

    def _adjoint(self) -> Metric:
        return self

    _transpose = _adjoint

    def solve(self, x: ArrayLike) -> Array:
        """Return M^-1 x. The next state is ``theta + eta * metric.solve(y)`` (eqs. 4, 15, 18, 20)."""
        return self._apply(x, self._backward, self._complement_inverse)

    @property
    def inverse(self) -> LinearOperator:
        """M^-1 as an operator, for example the preconditioner of `scipy.sparse.linalg.cg`."""
        act = self.solve
        return LinearOperator(self.shape, matvec=act, rmatvec=act, matmat=act, rmatmat=act, dtype=np.float64)

    def sqrt(self, x: ArrayLike) -> Array:
        """Return M^(1/2) x with the symmetric root. It maps the unit ball of M to the Euclidean ball (Figure 1)."""
        root = _root(self._factor)
        return self._apply(x, lambda c: root @ c, np.sqrt(self.alpha))

    def inv_sqrt(self, x: ArrayLike) -> Array:
        """Return M^(-1/2) x, which maps the Euclidean unit ball to the unit ball of M, v' M v = 1 (Figure 1)."""
        inverse = np.eye(self._basis.shape[1])
        inverse[1:, 0] = -self._slope
        root = _root((inverse / np.sqrt([[self._pivot], *self._weights[:, None]])).T)
        return self._apply(x, lambda c: root @ c, np.sqrt(self._complement_inverse))

    def eigenvalues(self) -> tuple[Array, NDArray[np.int64]]:
        """Return the eigenvalues in descending order, and their multiplicities. Lemma 1 gives those of the family.

        Returns
        -------
        values, multiplicities : arrays
            The multiplicities add up to D.
        """
        if self._gamma is not None:
            values = np.concatenate(geometry.family_eigenvalues(self.pair, [self._gamma]))
            counts = np.stack(geometry.multiplicities(self.shape[0]))
        else:
            block = np.linalg.svd(self._factor, compute_uv=False) ** 2
            complement = self.shape[0] - len(block)
            values, counts = np.append(block, self.alpha), np.append(np.ones(len(block), int), complement)
        values, counts = values[counts > 0], counts[counts > 0]
        order = np.argsort(-values, kind="stable")
        return values[order], counts[order]

    def condition_number(self) -> float:
        """Return the condition number. `geometry.condition_number` of the pair is the smallest possible."""
        if self._gamma is not None:
            return float(geometry.family_condition_number(self.pair, [self._gamma])[0])
        values, _ = self.eigenvalues()
        return float(values[0] / values[-1])

    def logdet(self) -> float:
        """Return the logarithm of the determinant."""
        complement = self.shape[0] - len(self._weights) - 1
        logarithms = np.log([self._pivot, *self._weights])
        return float(logarithms.sum() + (complement * np.log(self.alpha) if complement else 0.0))

    def to_dense(self) -> Array:
        """Return a D x D array, symmetric to the last bit."""
        block = self._factor @ self._factor.T - self.alpha * np.eye(self._basis.shape[1])
        dense = self.alpha * np.eye(self.shape[0]) + self._basis @ block @ self._basis.T
        return np.asarray((dense + dense.T) / 2.0)

    # M is a block in the basis and a scalar on its complement --------------------------------------------------

    def _apply(self, x: ArrayLike, block: Callable[[Array], Array], complement: float) -> Array:
        x = _array("x", x)
        if x.ndim not in (1, 2) or x.shape[0] != self.shape[0]:
            raise InputError(
                f"a metric with D = {self.shape[0]} cannot act on shape {x.shape}",
                remedy="pass a vector of D elements, or vectors as the columns of an array",
            )
        inside = self._basis.T @ x
        return np.asarray(complement * (x - self._basis @ inside) + self._basis @ block(inside))

    def _forward(self, c: Array) -> Array:
        first = self._pivot * (c[0] + self._slope @ c[1:])
        return np.concatenate([first[None], np.multiply.outer(self._slope, first) + (self._weights * c[1:].T).T])

    def _backward(self, c: Array) -> Array:
        rest = ((c[1:] - np.multiply.outer(self._slope, c[0])).T / self._weights).T
        return np.concatenate([(c[0] / self._pivot - self._slope @ rest)[None], rest])

    @property
    def _factor(self) -> Array:
        lower = np.eye(self._basis.shape[1])
        lower[1:, 0] = self._slope
        return np.asarray(lower * np.sqrt([self._pivot, *self._weights]))

    @property
    def _complement_inverse(self) -> float:
        # Without alpha, the directions span the complement of g, so that the basis has no complement.
        return 1.0 / self.alpha if self.alpha else 0.0


def _array(name: str, value: ArrayLike) -> Array:
    try:
        return real_array(value)
    except ValueError as error:
        raise InputError(f"{name} {error}", where="Metric", remedy="pass an array of floats") from error


def _weight(name: str, value: float | None) -> float | None:
    try:
        return None if value is None else float(number(value, float))
    except ValueError as error:
        raise InputError(f"{name} {error}", where="Metric", remedy="pass a float, or omit it") from error


def _diagonalized(unit: Array, directions: ArrayLike | None, weights: ArrayLike | None) -> tuple[Array, Array]:
    """Return an orthonormal basis in which sum_i w_i u_i u_i' is diagonal, shape (D, rank), and the diagonal."""
    size = len(unit)
    columns = np.zeros((size, 0)) if directions is None else np.asarray(directions, dtype=np.float64)
    if columns.ndim != 2 or len(columns) != size or not np.isfinite(columns).all():
        raise InputError(
            f"invalid directions of shape {columns.shape}", remedy=f"pass finite columns, shape ({size}, k)"
        )
    if weights is not None and np.shape(weights) != columns.shape[1:]:
        raise InputError(
            f"weights have shape {np.shape(weights)}, but there are {columns.shape[1]} directions",
            remedy="pass one weight for each direction",
        )
    along, lengths = unit @ columns, np.linalg.norm(columns, axis=0)
    # The rounding errors of an inner product of D terms, and of the two operations that make the columns
    # orthogonal.
    slipped = np.abs(along) > 2 * (size + 2) * _UNIT * lengths
    if slipped.any():
        worst = int(np.argmax(np.abs(along) / np.where(lengths > 0, lengths, 1.0)))
        raise InputError(
            f"direction {worst} is not orthogonal to g: its cosine is {along[worst] / lengths[worst]:.3g}",
            why="M would not map g to y",
            remedy="subtract from each direction its component along g",
        )
    signed = np.ones(columns.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    # The columns are scaled by the weights, so that a short direction with a large weight is not lost.
    columns = columns * np.sqrt(np.abs(signed))
    # A reflection makes g the first axis, which is omitted, so that even the weakest directions stay orthogonal to
    # g.
    rows, lengths, mixing = np.linalg.svd(_reflected(unit, columns)[1:], full_matrices=False)
    kept = lengths > 2 * max(columns.shape) * _UNIT * lengths.max(initial=0.0)
    rows, lengths, mixing = rows[:, kept], lengths[kept], mixing[kept]
    basis = _reflected(unit, np.vstack([np.zeros(len(lengths)), rows]))
    if (signed >= 0).all():
        return basis, lengths**2
    scaled = lengths[:, None] * mixing
    added, turn = np.linalg.eigh((scaled * np.sign(signed)) @ scaled.T)
    return basis @ turn, added


def _reflected(unit: Array, x: Array) -> Array:
    """Apply the Householder reflection that exchanges a unit vector and the first axis, up to sign."""
    normal = unit.copy()
    normal[0] += np.copysign(1.0, unit[0])
    return x - np.outer(normal, (2.0 / (normal @ normal)) * (normal @ x))


def _completed(unit: Array, basis: Array, added: Array, across: Array) -> tuple[Array, Array]:
    """Add the direction of y across g to the basis, with 0 on the diagonal, unless the basis contains it."""
    rest = across - basis @ (basis.T @ across)
    length = np.linalg.norm(rest)
    if basis.shape[1] == len(unit) - 1 or length <= 2 * len(unit) * _UNIT * np.linalg.norm(across):
        return basis, added
    rest = rest / length
    rest = rest - basis @ (basis.T @ rest) - unit * (unit @ rest)
    length = np.linalg.norm(rest)
    # If little remains, it consists of rounding errors: y is parallel to g.
    return (np.column_stack([basis, rest / length]), np.append(added, 0.0)) if length > 0.5 else (basis, added)


def _root(factor: Array) -> Array:
    """Return the symmetric square root of F F', for a triangular factor F."""
    if len(factor) != 2:
        vectors, lengths, _ = np.linalg.svd(factor)
        return np.asarray((vectors * lengths) @ vectors.T)
    # In two dimensions all terms have the same sign, so the root is accurate even if F is ill-conditioned.
    square, volume = factor @ factor.T, abs(factor[0, 0] * factor[1, 1])
    return np.asarray((square + volume * np.eye(2)) / np.sqrt(np.trace(square) + 2.0 * volume))


# Stochastic rules --------------------------------------------------------------------------------------------


def stochastic_metric(
    y: ArrayLike, g: ArrayLike, curvature: ArrayLike, learning_rate: float, *, alpha: float | None = None
) -> Metric:
    """Return the metric of a stochastic rule, Mbar + eta <Hg> <Hg>' / <Hg>.<g> (eq. 19), which maps <g> to y.

    Parameters
    ----------
    y : array, shape (D,)
        Negative gradient -grad L(theta_t), equal to <ybar> + eta <Hg>.
    g : array, shape (D,)
        Mean update <g>.
    curvature : array, shape (D,)
        Mean <Hg> of half the Hessian times the update; not <H><g>.
    learning_rate : float
        eta.
    alpha : float, optional
        Weight across <g>. Default: the weight of the best conditioned Mbar.

    Returns
    -------
    Metric

    Raises
    ------
    InputError
        If eq. (19) is not defined or not positive definite (the message has the required alpha, see
        `discrete_time.stochastic_weight`), or no metric maps <g> to y. If y.<g> > 0, `Metric` of y and <g> exists
        nevertheless.

    Notes
    -----
    Eq. (20) of the paper lacks a minus sign: <g> = -M^-1 grad L, here ``metric.solve(y)``.
    """
    y, g, curvature = (np.asarray(vector, dtype=np.float64) for vector in (y, g, curvature))
    pair, mean = effective_pair(y, g), pair_of(curvature, g)
    product = np.vecdot(_across(y, g), _across(curvature, g))
    needed = float(discrete_time.stochastic_weight(pair, mean, product, learning_rate))
    discrete = y - learning_rate * curvature
    remaining = float(pair.alignment - learning_rate * mean.alignment)
    if alpha is None and remaining > 0:
        alpha = float(discrete @ discrete) / remaining
    if alpha is None or not alpha > needed:
        raise InputError(
            f"the metric (19) is not positive definite with alpha = {alpha}",
            where=f"<Hg>.<g> = {mean.alignment:.4g}, <ybar>.<g> = {remaining:.4g}, eta = {learning_rate:.4g}",
            why="if <Hg>.<g> is negative, the curvature term is subtracted; if it is 0, the term is not defined",
            remedy=f"pass an alpha above {needed:.4g}" if needed < np.inf else "use Metric(y, g), which exists",
        )
    # The term added to y y' / y.<g> has rank one, and its direction does not depend on eta.
    parts = mean.alignment * y, pair.alignment * curvature
    direction = _across(parts[0] - parts[1], g)
    if np.linalg.norm(direction) <= eigenvalue_rounding(len(g)) * sum(map(np.linalg.norm, parts)):
        direction = np.zeros_like(g)
    weight = learning_rate / (remaining * mean.alignment * pair.alignment)
    return Metric(y, g, alpha=alpha, directions=direction[:, None], weights=[float(weight)])


def jackknife(statistic: Callable[..., ArrayLike], *replicates: ArrayLike) -> tuple[Array, Array]:
    """Return the value and the standard error of a function of means over replicates.

    Parameters
    ----------
    statistic : callable
        Takes the mean of each array, and returns numbers of any shape, for example an angle.
    *replicates : arrays, shape (R, ...)
        Replicates on the first axis; all arrays have the same R.

    Returns
    -------
    value, error : arrays
        The value for the means, and its error from the values with one replicate omitted; NaN if R = 1.

    Raises
    ------
    InputError
        If the arrays differ in the number of replicates, or have none.

    References
    ----------
    Efron, The Jackknife, the Bootstrap and Other Resampling Plans, eq. (3.3).

    Examples
    --------
    >>> value, error = jackknife(lambda mean: mean, [1.0, 2.0, 6.0])
    >>> float(value), round(float(error), 6)
    (3.0, 1.527525)
    """
    arrays = [np.asarray(array, dtype=np.float64) for array in replicates]
    counts = {len(array) if array.ndim else 0 for array in arrays}
    if len(counts) != 1 or 0 in counts:
        raise InputError(
            f"replicates have shapes {[array.shape for array in arrays]}", remedy="pass arrays with equal R >= 1"
        )
    value = np.asarray(statistic(*(array.mean(axis=0) for array in arrays)), dtype=np.float64)
    (count,) = counts
    if count == 1:
        return value, np.full_like(value, np.nan)
    # Each mean is summed separately: subtracting a replicate from the total would cancel if the others agree.
    others = [~np.eye(count, dtype=bool)[left_out] for left_out in range(count)]
    values = np.stack([statistic(*(array[kept].mean(axis=0) for array in arrays)) for kept in others])
    return value, np.asarray(np.sqrt((count - 1) * values.var(axis=0)))


def eigenvalue_rounding(size: int) -> float:
    """Return the backward error of a symmetric eigenvalue, D units in the last place for D terms per row."""
    return 2.0 * size * _UNIT
