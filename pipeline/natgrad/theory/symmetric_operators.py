"""Compute extreme eigenvalues of symmetric operators, and test whether an operator is a metric of an update.

A preconditioner is an array, its diagonal, or an operator such as a `Kronecker` product. `canonical_form`
decomposes it into the paper's form (eq. 7) and returns the residuals of this decomposition.

References
----------
Shoji, Suzuki, Kozachkov, "Is All Learning (Natural) Gradient Descent?"; equation numbers are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import diags_array
from scipy.sparse.linalg import ArpackError, LinearOperator, aslinearoperator, eigsh

from natgrad.schema.errors import InputError
from natgrad.theory import geometry
from natgrad.theory.geometry import Pair
from natgrad.theory.metric_operators import effective_pair, eigenvalue_rounding

__all__ = ["CanonicalForm", "Kronecker", "canonical_form", "extreme_eigenvalues", "extremes_of_products"]

Array = NDArray[np.float64]

_MOST_RESTARTS = 100
"""Restarts of a Lanczos iteration of rounded products; each takes up to 20 products."""

_SMALL = 256
"""Largest dimension for which the eigenvalues of an operator are computed from its dense matrix."""


class Kronecker(LinearOperator):  # type: ignore[misc]  # SciPy has no types
    """A Kronecker product of powers of symmetric matrices, as in K-FAC for a layer and in Shampoo for a tensor.

    It is (F_0 + damping_0)^exponent (x) (F_1 + damping_1)^exponent (x) .. + shift.

    Parameters
    ----------
    *factors : arrays, shape (n, n) or (n,)
        Symmetric matrices, or their diagonals: one for each dimension of the tensor, in this order. Two factors act
        on weights W of shape (m, n), flattened in C order, as vec(left W right): left belongs to the outputs
        (gradients), right to the inputs (activations).
    exponent : float
        -1 for the factors of a preconditioner, 1/4 for the statistics of Shampoo.
    damping : float or sequence of float
        Number added to all factors, or one number for each factor.
    shift : float
        Number added to the product, as in the exact damping of K-FAC.

    Raises
    ------
    InputError
        If a factor is not symmetric, or this power of it does not exist.
    """

    def __init__(
        self,
        *factors: ArrayLike,
        exponent: float = 1.0,
        damping: float | Sequence[float] = 0.0,
        shift: float = 0.0,
    ) -> None:
        arrays = [np.asarray(factor, dtype=np.float64) for factor in factors]
        added = [damping] * len(arrays) if isinstance(damping, int | float) else list(damping)
        if len(added) != len(arrays):
            raise InputError(
                f"got {len(added)} dampings for {len(arrays)} factors", remedy="pass one, or one for each factor"
            )
        self.shift, self.exponent = shift, exponent
        self._sizes = [len(array) for array in arrays]
        self._values, self._powers = [], []
        for array, term in zip(arrays, added, strict=True):
            values, power = _power(array, term, exponent)
            self._values.append(values)
            self._powers.append(power)
        size = math.prod(self._sizes)
        super().__init__(np.float64, (size, size))

    def _matvec(self, x: Array) -> Array:
        image = x.reshape(self._sizes)
        for axis, power in enumerate(self._powers):
            if power.ndim == 1:
                image = image * power.reshape([-1 if axis == other else 1 for other in range(image.ndim)])
            else:
                image = np.moveaxis(np.tensordot(power, image, axes=(1, axis)), 0, axis)
        return np.asarray(image.reshape(x.shape) + self.shift * x)

    def _adjoint(self) -> Kronecker:
        return self

    def eigenvalues(self) -> tuple[Array, NDArray[np.int64]]:
        """Return all eigenvalues (products of those of the factors), descending, and their multiplicities."""
        values = np.ones(1)
        for of_factor in self._values:
            values = np.multiply.outer(values, of_factor).ravel()
        return np.sort(values + self.shift)[::-1], np.ones(len(values), int)


def _power(factor: Array, damping: float, exponent: float) -> tuple[Array, Array]:
    """Return the eigenvalues of a power of a symmetric matrix or diagonal, and the power."""
    if factor.ndim not in (1, 2) or (factor.ndim == 2 and not np.array_equal(factor, factor.T)):
        raise InputError(f"a factor of shape {factor.shape} is not symmetric", remedy="pass (F + F') / 2")
    damped = np.asarray(factor + (damping if factor.ndim == 1 else damping * np.eye(len(factor))), dtype=np.float64)
    if exponent == 1.0:
        return np.asarray(damped if factor.ndim == 1 else np.linalg.eigvalsh(damped), dtype=np.float64), damped
    values, vectors = (damped, np.eye(0)) if factor.ndim == 1 else np.linalg.eigh(damped)
    if not values.min() > 0:
        raise InputError(
            f"the power {exponent:g} of a factor does not exist: its smallest eigenvalue is {values.min():.3g}",
            where=f"shape {factor.shape}, damping {damping:g}",
            remedy="pass a positive definite factor, or a larger damping",
        )
    raised = np.asarray(values**exponent, dtype=np.float64)
    if factor.ndim == 1:
        return raised, raised
    power = (vectors * raised) @ vectors.T
    return raised, np.asarray((power + power.T) / 2.0)


def extreme_eigenvalues(matrix: Any) -> tuple[float, float]:
    """Return the smallest and the largest eigenvalue of a symmetric matrix.

    The smallest eigenvalue of a Hessian is an argument of `discrete_time.learning_rate_bounds`. The smallest
    eigenvalue of ``metric + eta * H`` is positive if and only if eq. (17) is definite.

    Parameters
    ----------
    matrix : array, operator or sparse array
        The diagonal of a diagonal matrix, shape (D,); a matrix, shape (D, D), assumed to be symmetric; `Metric`,
        `Kronecker`, or any argument of `scipy.sparse.linalg.aslinearoperator`. For a function ``hvp`` pass
        ``LinearOperator((D, D), matvec=hvp, dtype=float)``.

    Raises
    ------
    InputError
        If the Lanczos iteration does not converge.

    Notes
    -----
    For D > 256 the eigenvalues of an operator are Ritz values (`scipy.sparse.linalg.eigsh`). The smallest exceeds
    the true eigenvalue by at most its residual. Equal operators give equal results.
    """
    if hasattr(matrix, "eigenvalues"):
        values, _ = matrix.eigenvalues()
        return float(values[-1]), float(values[0])
    operator = _operator(matrix)
    if _is_diagonal(matrix):
        return float(np.min(matrix)), float(np.max(matrix))
    size = operator.shape[0]
    if _is_array(matrix) or size <= _SMALL:
        dense = np.asarray(operator @ np.eye(size), dtype=np.float64)
        values = np.linalg.eigvalsh((dense + dense.T) / 2.0)
        return float(values[0]), float(values[-1])
    start = np.random.default_rng(0).standard_normal(size)
    try:
        smallest, largest = (
            float(eigsh(operator, 1, which=which, v0=start, return_eigenvectors=False)[0]) for which in ("SA", "LA")
        )
    except ArpackError as error:
        raise InputError(
            "the extreme eigenvalues did not converge",
            where=f"operator of D = {size}",
            why="its smallest eigenvalues are very close to each other, relative to the largest",
            remedy="pass an array, a diagonal, or a shifted operator",
        ) from error
    return smallest, largest


def extremes_of_products(
    product: Callable[[NDArray[np.float64]], ArrayLike], size: int, tolerance: float
) -> tuple[float, float]:
    """Return the smallest and the largest eigenvalue of a symmetric matrix whose products are rounded.

    Parameters
    ----------
    product : callable
        Function from a vector of shape (D,) to its product with the matrix, such as an hvp in single precision.
    size : int
        D.
    tolerance : float
        Accepted error, relative to the largest magnitude of the eigenvalues, and larger than the rounding errors.

    Raises
    ------
    InputError
        If the Lanczos iteration does not converge.

    Notes
    -----
    The Lanczos iteration measures its error by the eigenvalue that it computes. A shift by the one of the largest
    magnitude makes the other end of the spectrum that of the largest magnitude, however small it is itself.
    """
    start = np.random.default_rng(0).standard_normal(size)

    def largest_magnitude(shift: float) -> float:
        def shifted(vector: NDArray[np.float64]) -> NDArray[np.float64]:
            flat = vector.ravel()
            return np.asarray(product(flat), np.float64) - shift * flat

        if size == 1:
            return float(shifted(np.ones(1))[0])
        if not shifted(start).any():  # all eigenvalues are zero, which the iteration refuses
            return 0.0
        matrix = LinearOperator((size, size), matvec=shifted, dtype=np.float64)
        found = eigsh(matrix, 1, v0=start, tol=tolerance, return_eigenvectors=False, maxiter=_MOST_RESTARTS)
        return float(found[0])

    try:
        one = largest_magnitude(0.0)
        other = one + largest_magnitude(one)
    except ArpackError as error:
        raise InputError(
            "the extreme eigenvalues did not converge",
            where=f"products of D = {size}",
            why="several eigenvalues are close to the extreme ones, or the products are not those of a symmetric "
            "matrix",
            remedy="compute the products in double precision",
        ) from error
    return min(one, other), max(one, other)


@dataclass(frozen=True)
class CanonicalForm:
    """The decomposition of a matrix into y y' / y.g and the remainder B, with its residuals.

    Attributes
    ----------
    rest : LinearOperator
        B = M - y y' / y.g.
    g : array, shape (D,)
    pair : Pair
        Pair of y and g.
    mapping_residual : float
        |M g - y| / (|M| |g|), which is also the residual of B g = 0 (eq. 7).
    symmetry_residual : float
        |M - M'| / |M|; for an operator |u' M v - v' M u| / |M| with two random unit vectors.
    eigenvalue_min, eigenvalue_max : float
        Smallest and largest eigenvalue of M.
    floor : float
        Largest error of the smallest eigenvalue.
    """

    rest: LinearOperator
    g: Array
    pair: Pair
    mapping_residual: float
    symmetry_residual: float
    eigenvalue_min: float
    eigenvalue_max: float
    floor: float

    @property
    def valid(self) -> bool:
        """True for a metric that maps g to y: symmetric, positive definite beyond rounding, and M g = y."""
        rounding = eigenvalue_rounding(len(self.g))
        exact = self.mapping_residual <= rounding and self.symmetry_residual <= rounding
        return exact and self.eigenvalue_min > self.floor

    @property
    def condition_number(self) -> float:
        """Condition number of M; NaN if it is not positive definite beyond rounding."""
        return self.eigenvalue_max / self.eigenvalue_min if self.eigenvalue_min > self.floor else np.nan

    @property
    def smallest_condition_number(self) -> float:
        """Smallest condition number of any metric with the same y and g (Prop. 1)."""
        return float(geometry.condition_number(self.pair))

    def rest_eigenvalue_min(self) -> float:
        """Return the smallest eigenvalue of B across g, which is positive for a metric; NaN for D = 1.

        The paper proves that it is positive if the smallest eigenvalue of M is positive. For large D it is computed
        by Lanczos iteration.
        """
        if len(self.g) == 1:
            return np.nan
        unit = self.g / self.pair.update_norm

        def across(x: Array) -> Array:
            # B across g. Along g, B is 0 and is replaced by a value that is not the smallest eigenvalue.
            along = unit * (unit @ x.ravel())
            mapped = self.rest @ (x.ravel() - along)
            return np.asarray(mapped - unit * (unit @ mapped) + self.eigenvalue_max * along)

        return extreme_eigenvalues(LinearOperator(self.rest.shape, matvec=across, dtype=np.float64))[0]


def canonical_form(matrix: Any, g: ArrayLike, y: ArrayLike | None = None) -> CanonicalForm:
    """Decompose a symmetric matrix with M g = y into the canonical form of the paper (section 2.1).

    For a preconditioner, such as ``sqrt(v) + eps`` of Adam or a `Kronecker` of K-FAC, the result compares its
    condition number with the smallest condition number that explains the update.

    Parameters
    ----------
    matrix : array, operator or sparse array
        See `extreme_eigenvalues`.
    g : array, shape (D,)
        Update.
    y : array, shape (D,), optional
        Negative gradient. Default: M g, the y that the matrix explains. With the gradient itself,
        ``mapping_residual`` measures how far the preconditioner is from mapping the update to the gradient. The
        preconditioner of a rule with momentum maps g to the momentum.

    Returns
    -------
    CanonicalForm

    Raises
    ------
    InputError
        If no metric maps g to y, the shapes differ, or the eigenvalues of an operator do not converge.

    Examples
    --------
    >>> second_moment, gradient = np.array([4.0, 1.0, 0.25]), np.array([1.0, -2.0, 0.5])
    >>> preconditioner = np.sqrt(second_moment)
    >>> form = canonical_form(preconditioner, g=-gradient / preconditioner, y=-gradient)
    >>> form.valid, form.condition_number, round(form.smallest_condition_number, 3)
    (True, 4.0, 1.877)
    """
    g = np.asarray(g, dtype=np.float64)
    operator = _operator(matrix)
    if g.ndim != 1 or operator.shape != (len(g), len(g)):
        raise InputError(
            f"a matrix of shape {operator.shape} cannot act on g of shape {g.shape}",
            remedy="pass a square matrix, or a diagonal, with as many rows as g has elements",
        )
    image = np.asarray(operator @ g, dtype=np.float64)
    y = image if y is None else np.asarray(y, dtype=np.float64)
    pair = effective_pair(y, g)
    smallest, largest = extreme_eigenvalues(matrix)
    norm = np.float64(max(abs(smallest), abs(largest)))
    closed = hasattr(matrix, "eigenvalues") or _is_diagonal(matrix)

    def rest(x: Array) -> Array:
        return np.asarray(operator @ x.ravel() - y * (y @ x.ravel() / pair.alignment))

    with np.errstate(divide="ignore", invalid="ignore"):
        return CanonicalForm(
            rest=LinearOperator(operator.shape, matvec=rest, rmatvec=rest, dtype=np.float64),
            g=g,
            pair=pair,
            mapping_residual=float(np.linalg.norm(image - y) / (norm * pair.update_norm)),
            symmetry_residual=float(_asymmetry(matrix, operator) / norm),
            eigenvalue_min=smallest,
            eigenvalue_max=largest,
            floor=0.0 if closed else float(eigenvalue_rounding(len(g)) * norm),
        )


def _is_array(matrix: Any) -> bool:
    return isinstance(matrix, np.ndarray | list | tuple)


def _is_diagonal(matrix: Any) -> bool:
    return _is_array(matrix) and np.ndim(matrix) == 1


def _operator(matrix: Any) -> LinearOperator:
    if not _is_array(matrix):
        return aslinearoperator(matrix)
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim not in (1, 2) or not array.size or not np.isfinite(array).all():
        raise InputError(
            f"an array of shape {array.shape} is not a finite matrix",
            remedy="pass a finite square matrix or its diagonal",
        )
    return aslinearoperator(diags_array(array) if array.ndim == 1 else array)


def _asymmetry(matrix: Any, operator: LinearOperator) -> float:
    if _is_diagonal(matrix):
        return 0.0
    if _is_array(matrix):
        dense = np.asarray(matrix, dtype=np.float64)
        return float(np.linalg.norm(dense - dense.T, 2))
    one, other = np.random.default_rng(0).standard_normal((2, operator.shape[0]))
    product = abs(one @ (operator @ other) - other @ (operator @ one))
    return float(product / np.linalg.norm(one) / np.linalg.norm(other))
