"""Compare metrics that act on vectors with their matrices in 60 digits, and with logged runs."""

import contextlib
import doctest
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.optimize import rosen_hess, rosen_hess_prod
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg

from natgrad.kernel.ledger_sums import roundoff_bound
from natgrad.schema.errors import InputError
from natgrad.schema.variables import Status
from natgrad.theory import geometry
from natgrad.theory import metric_operators as metrics
from natgrad.theory import symmetric_operators as operators
from natgrad.theory.metric_operators import Metric, jackknife, pair_of, stochastic_metric
from natgrad.theory.symmetric_operators import Kronecker, canonical_form, extreme_eigenvalues, extremes_of_products
from opened import open_source
from reference import (
    assert_same_pair,
    exact,
    exact_metric,
    promised_angle_error,
    promised_relative_error,
    vectors_at,
)

DATA = Path(__file__).parents[2] / "data"
PERPENDICULAR = np.pi / 2
ANGLES = [0.0, 1e-9, 0.3, 1.2, PERPENDICULAR - 1e-3, PERPENDICULAR - 1e-7]
GAMMAS = [1e-6, 1.0, 1e4]
Y, G = np.array([1.0, 2.0, 3.0, -1.0]), np.array([0.5, -0.25, 1.0, 0.5])


def exact_power(matrix, exponent):
    values, vectors = mp.eigsy(matrix)
    return vectors * mp.diag([value**exponent for value in values]) * vectors.T


def error_of(actual, matrix, x):
    """Norm of the error of an action on x, relative to the norm of the matrix and of x."""
    difference = mp.matrix(exact(actual)) - matrix * mp.matrix(exact(x))
    norm = max(abs(value) for value in mp.eigsy(matrix, eigvals_only=True))
    return float(mp.norm(difference) / norm / mp.norm(mp.matrix(exact(x))))


def assert_acts_as(metric, matrix, tolerance, seed=0):
    """Compare all methods of a metric with its matrix."""
    size = matrix.rows
    x = np.random.default_rng(seed).standard_normal(size)
    for action, exponent in (
        (metric.matvec, 1),
        (metric.solve, -1),
        (metric.sqrt, mpf(1) / 2),
        (metric.inv_sqrt, -mpf(1) / 2),
    ):
        assert error_of(action(x), exact_power(matrix, exponent), x) <= tolerance
    dense = metric.to_dense()
    assert np.array_equal(dense, dense.T)
    for column, unit in zip(dense.T, np.eye(size), strict=True):
        assert error_of(column, matrix, unit) <= tolerance
    assert metric.logdet() == pytest.approx(float(mp.log(mp.det(matrix))), abs=2 * size * tolerance)
    values, counts = metric.eigenvalues()
    assert counts.sum() == size
    assert np.all(np.diff(values) <= 0)
    return np.repeat(values, counts), sorted(mp.eigsy(matrix, eigvals_only=True), reverse=True)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("angle", ANGLES)
def test_a_metric_of_the_family_acts_as_its_matrix(angle, size, gamma):
    y, g = vectors_at(angle if size > 1 else 0.0, size)
    with mp.workdps(60):
        matrix = exact_metric(y, g, gamma)
        tolerance = promised_relative_error(np.cos(angle))
        metric = Metric(y, g, gamma=gamma)
        values, truth = assert_acts_as(metric, matrix, tolerance)
        for value, expected in zip(values, truth, strict=True):
            assert value == pytest.approx(float(expected), rel=tolerance)
        assert metric.condition_number() == pytest.approx(float(truth[0] / truth[-1]), rel=tolerance)


@given(size=st.integers(2, 6), count=st.integers(0, 7), seed=st.integers(0, 1000), signed=st.booleans())
def test_a_metric_with_directions_of_the_user_acts_as_its_matrix(size, count, seed, signed):
    rng = np.random.default_rng(seed)
    y, g = vectors_at(rng.uniform(0, 1.5), size, seed)
    directions = rng.standard_normal((size, count)) * 10.0 ** rng.uniform(-2, 2, count)
    directions -= np.outer(g, g @ directions) / (g @ g)
    directions -= np.outer(g, g @ directions) / (g @ g)
    # Negative weights that together do not exceed alpha.
    shares = rng.uniform(-0.9, 1, count) if signed else np.ones(count)
    weights = shares / np.sum(directions**2, axis=0) / max(count, 1)
    with mp.workdps(60):
        metric = Metric(y, g, alpha=1.0, directions=directions, weights=weights)
        matrix = exact_metric(y, g, alpha=1, directions=directions.T, weights=weights)
        truth = sorted(mp.eigsy(matrix, eigvals_only=True))
        condition = float(truth[-1] / truth[0])
        # Eigenvectors of the block, and roots by its singular values: a backward error of the norm.
        tolerance = 16 * size * (size + count) * condition * 2.0**-53
        values, expected = assert_acts_as(metric, matrix, tolerance)
        assert values == pytest.approx([float(value) for value in expected], rel=tolerance)
        assert metric.condition_number() == pytest.approx(condition, rel=2 * tolerance)
        assert error_of(y, matrix, g) <= tolerance


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("angle", ANGLES)
def test_a_metric_maps_g_to_y_and_back_to_rounding(angle, size):
    y, g = vectors_at(angle if size > 1 else 0.0, size, seed=3)
    metric = Metric(y, g)
    values, _ = metric.eigenvalues()
    # Into the basis, through the block, out of the basis: an inner product and a few roundings each.
    bound = 8 * roundoff_bound(size)
    assert np.linalg.norm(metric @ g - y) <= bound * values[0] * np.linalg.norm(g)
    assert np.linalg.norm(metric.solve(y) - g) <= bound * np.linalg.norm(y) / values[-1]
    root = metric.sqrt(metric.sqrt(g))
    assert np.linalg.norm(root - y) <= 2 * bound * values[0] * np.linalg.norm(g)
    assert np.linalg.norm(metric.inv_sqrt(metric.inv_sqrt(y)) - g) <= 2 * bound * np.linalg.norm(y) / values[-1]


@pytest.mark.parametrize("factor", [1 / 3, 3.0, 1e-5])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parallel_vectors_have_a_metric_despite_rounding(size, factor):
    for seed in range(40):
        g = np.random.default_rng(seed).standard_normal(size)
        y = g * factor
        values, counts = Metric(y, g).eigenvalues()
        assert counts.sum() == size
        assert values == pytest.approx(np.full(len(values), factor), rel=1e-13)
        assert Metric(y, g).to_dense() == pytest.approx(
            factor * np.eye(size), abs=2 * roundoff_bound(size) * factor
        )


def test_columns_are_mapped_one_by_one():
    metric, columns = Metric(Y, G, gamma=2.0), np.random.default_rng(0).standard_normal((4, 3))
    for action in (lambda x: metric @ x, metric.solve, metric.sqrt, metric.inv_sqrt, lambda x: metric.inverse @ x):
        together = action(columns)
        assert together.shape == columns.shape
        for column, image in zip(columns.T, together.T, strict=True):
            assert image == pytest.approx(action(column), rel=1e-13, abs=1e-13)
    assert metric.T is metric
    assert metric.H is metric


def test_a_metric_is_its_own_perfect_preconditioner():
    y, g = vectors_at(1.5, 500)
    metric, iterations = Metric(y, g), []
    solution, failed = cg(metric, y, M=metric.inverse, rtol=1e-8, callback=iterations.append)
    assert not failed
    assert len(iterations) == 1
    assert solution == pytest.approx(g, rel=1e-8)


def test_memory_is_linear_in_the_number_of_elements():
    size = 200_000
    y, g = vectors_at(1.0, size)
    tracemalloc.start()
    metric = Metric(y, g)
    metric.solve(metric @ y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The basis takes two vectors; a matrix would take 200,000.
    assert peak <= 16 * 8 * size


# Logged runs -------------------------------------------------------------------------------------------------


def logged(folder):
    """Parameters and gradients (step, element), and learning rates, of a log of one tensor."""
    source, states = open_source(folder), []
    for step in source.steps():
        with source.open(step) as reader:
            arrays = {name: np.empty(8) for name in ("parameter", "gradient")}
            for name, values in arrays.items():
                reader.read(name, "theta", 0, values)
            states.append([arrays["parameter"], arrays["gradient"], reader.content().scalars["learning_rate"]])
    parameter, gradient, rate = zip(*states, strict=True)
    return np.stack(parameter), np.stack(gradient), np.array(rate)


@pytest.mark.parametrize("gamma", [0.01, 1.0, 100.0])
def test_every_logged_update_is_natural_gradient_descent(gamma):
    parameter, gradient, rate = logged(DATA / "linear_system")
    assert len(parameter) == 41
    for theta, after, grad, eta in zip(parameter, parameter[1:], gradient, rate, strict=False):
        update = (after - theta) / eta
        metric = Metric(-grad, update, gamma=gamma)
        values, _ = metric.eigenvalues()
        bound = 8 * roundoff_bound(8)
        assert np.linalg.norm(metric @ update + grad) <= bound * values[0] * np.linalg.norm(update)
        error = np.linalg.norm(theta + eta * metric.solve(-grad) - after)
        # The sum is rounded once, and the update itself contains the rounding of the logged states.
        assert error <= bound * eta * np.linalg.norm(grad) / values[-1] + 2.0**-52 * np.linalg.norm(theta)


def test_the_numbers_of_many_steps_are_computed_together():
    parameter, gradient, rate = logged(DATA / "linear_system")
    update = np.diff(parameter, axis=0) / rate[:-1, None]
    pairs = pair_of(-gradient[:-1], update)
    gammas = np.geomspace(1e-3, 1e3, 7)
    together = geometry.family_condition_number(pairs, gammas)
    determinants = geometry.family_log_determinant(pairs, gammas)
    assert together.shape == determinants.shape == (40, 7)
    for step in (0, 17, 39):
        for column, gamma in enumerate(gammas):
            metric = Metric(-gradient[step], update[step], gamma=gamma)
            assert metric.condition_number() == pytest.approx(together[step, column], rel=1e-13)
            assert metric.logdet() == pytest.approx(determinants[step, column], abs=1e-12)


# Pairs of vectors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 40])
@pytest.mark.parametrize("angle", [*ANGLES, 2.0, np.pi - 1e-9])
def test_vectors_and_ledger_give_the_same_pair(angle, size):
    if size == 1:
        angle = 0.0 if angle < PERPENDICULAR else np.pi
    stacked = [vectors_at(angle, size, seed) for seed in range(3)]
    pairs = pair_of(*map(np.stack, zip(*stacked, strict=True)))
    for row, (y, g) in enumerate(stacked):
        assert_same_pair(pairs.update_square[row], pairs.alignment[row], geometry.angle(pairs)[row], y, g)
        assert abs(geometry.angle(pairs)[row] - angle) <= 4 * promised_angle_error()


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1e-200, Status.UNDERFLOW), (1e200, Status.OVERFLOW), (1e-155, Status.UNDERFLOW)],
)
def test_lengths_whose_squares_are_out_of_range_give_nan(scale, expected):
    for y, g in ((Y * scale, G), (Y, G * scale)):
        pair = pair_of(y, g)
        assert geometry.status(pair, 1.0) == expected
        assert np.isnan(geometry.angle(pair))
        assert np.isnan(geometry.condition_number(pair))


# Invalid input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "g", "reason"),
    [
        (-Y, G, "obtuse"),
        (np.array([1.0, 0, 0, 0]), np.array([0, 1.0, 0, 0]), "orthogonal"),
        (0 * Y, G, "zero_gradient"),
        (Y, 0 * G, "zero_update"),
        (Y * np.nan, G, "non_finite"),
        (Y * np.inf, G, "non_finite"),
        (Y, G * 1e200, "overflow"),
        (Y * 1e-200, G, "underflow"),
        (np.array([-1.0]), np.array([2.0]), "obtuse"),
    ],
)
def test_the_error_states_why_no_metric_exists(y, g, reason):
    with pytest.raises(InputError, match=f"no metric maps g to y: the update is {reason}"):
        Metric(y, g)
    with pytest.raises(InputError, match=r"no metric maps g to y|finite"):
        canonical_form(np.ones(len(g)), g, y)


@pytest.mark.parametrize(("roundings", "accepted"), [(19, True), (21, False)])
def test_directions_are_orthogonal_to_g_except_for_rounding(roundings, accepted):
    """The cosine of a direction to g has up to 2 (D + 2) rounding errors of 2^-53; D is 8."""
    unit = np.eye(8)
    with contextlib.nullcontext() if accepted else pytest.raises(InputError, match="not orthogonal to g"):
        Metric(unit[0], unit[0], alpha=1.0, directions=unit[:, 1:2] + roundings * 2.0**-53 * unit[:, :1])


ACROSS = np.array([0.0, 4.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.0, "alpha": 1.0}, "mutually exclusive"),
        ({"alpha": 0.0}, "would not be positive definite: its smallest weight across g is 0"),
        ({"alpha": -1.0}, "would not be positive definite"),
        ({"gamma": np.nan}, "gamma must be finite, got nan"),
        ({"gamma": np.inf}, "gamma must be finite, got inf"),
        ({"directions": ACROSS[:, None]}, "the directions span too little"),
        ({"alpha": 1.0, "directions": ACROSS[:, None], "weights": [-1.0]}, "smallest weight across g is -16"),
        ({"alpha": 1.0, "directions": np.eye(4)}, "direction 2 is not orthogonal to g: its cosine is 0.8"),
        (
            {"alpha": 1.0, "directions": np.stack([100 * ACROSS + np.eye(4)[2], np.eye(4)[2]], axis=1)},
            "direction 1 is not orthogonal to g: its cosine is 0.8",
        ),
        ({"alpha": 1.0, "directions": ACROSS}, r"invalid directions of shape \(4,\)"),
        ({"alpha": 1.0, "directions": np.nan * ACROSS[:, None]}, "pass finite columns"),
        (
            {"alpha": 1.0, "directions": ACROSS[:, None], "weights": [1.0, 2.0]},
            "pass one weight for each direction",
        ),
        ({"weights": [1.0]}, "pass one weight for each direction"),
    ],
)
def test_options_that_define_no_metric_are_an_error(options, message):
    with pytest.raises(InputError, match=message):
        Metric(Y, G, **options)


def test_a_factor_without_an_exponent_may_be_indefinite():
    exchange, diagonal = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1.0, 3.0])
    np.testing.assert_allclose(extreme_eigenvalues(Kronecker(exchange, diagonal)), (-3.0, 3.0), rtol=1e-14)
    with pytest.raises(InputError, match=r"the power 0\.5 of a factor does not exist"):
        Kronecker(exchange, diagonal, exponent=0.5)


def test_invalid_shapes_are_an_error():
    for y, g in ((Y, G[:3]), (np.zeros(0), np.zeros(0)), (np.float64(1), np.float64(1))):
        with pytest.raises(InputError, match="invalid shapes: y has"):
            pair_of(y, g)
    with pytest.raises(InputError, match="create one metric for each step"):
        Metric(np.stack([Y, Y]), np.stack([G, G]))
    with pytest.raises(InputError, match="cannot act on shape"):
        Metric(Y, G).solve(Y[:2])
    with pytest.raises(InputError, match="cannot act on g"):
        canonical_form(np.eye(3), G)
    for invalid in (np.full((2, 2), np.nan), np.ones((2, 2, 2)), np.ones((0, 0))):
        with pytest.raises(InputError, match="is not a finite matrix"):
            extreme_eigenvalues(invalid)
    with pytest.raises(InputError, match="is not symmetric"):
        Kronecker(np.array([[1.0, 2.0], [0.0, 1.0]]), np.eye(2))


# Any metric --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(-1.0, 4.0, 40),
        np.linspace(-4.0, 1.0, 40),
        np.append(np.linspace(1e-6, 2e-6, 39), 1e3),  # the smallest is far below the tolerance
        np.full(30, 2.5),
        np.array([3.0]),
        np.array([-1.0, 2.0]),
        np.zeros(20),
    ],
)
def test_extreme_eigenvalues_of_rounded_products_are_within_the_tolerance(values):
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((len(values),) * 2))[0]
    matrix = ((rotation * values) @ rotation.T).astype(np.float32)
    low, high = extremes_of_products(lambda vector: matrix @ vector.astype(np.float32), len(values), 2.0**-12)
    bound = 2.0**-12 * abs(values).max()
    assert abs(low - values.min()) <= bound
    assert abs(high - values.max()) <= bound


def test_eigenvalues_that_are_too_close_for_the_tolerance_are_an_error():
    def second_difference(vector):
        found = 2 * vector
        found[1:] -= vector[:-1]
        found[:-1] -= vector[1:]
        return found

    with pytest.raises(InputError, match="did not converge"):
        extremes_of_products(second_difference, 2000, 1e-12)


def test_the_extreme_eigenvalues_are_the_same_for_every_kind_of_matrix():
    rng = np.random.default_rng(0)
    left, right = (a @ a.T + np.eye(len(a)) for a in (rng.standard_normal((18, 18)), rng.standard_normal((17, 17))))
    product = Kronecker(left, right)
    dense = np.kron(left, right)
    x = rng.standard_normal(18 * 17)
    assert product @ x == pytest.approx(dense @ x, rel=1e-12)
    truth = np.linalg.eigvalsh(dense)
    expected = pytest.approx((truth[0], truth[-1]), rel=1e-10)
    # Above 256 elements an operator is not made dense.
    assert dense.shape[0] > 256
    for kind in (product, dense, aslinearoperator(dense), dense.tolist()):
        assert extreme_eigenvalues(kind) == expected
    values = rng.standard_normal(300)
    assert extreme_eigenvalues(values) == (values.min(), values.max())
    y, g = vectors_at(1.0, 300)
    metric = Metric(y, g, gamma=3.0)
    assert extreme_eigenvalues(aslinearoperator(metric) + 0.0 * metric) == pytest.approx(
        extreme_eigenvalues(metric)
    )


def test_the_smallest_eigenvalue_of_a_hessian_comes_from_its_products_with_vectors():
    point = np.random.default_rng(1).standard_normal(300)
    hessian = LinearOperator((300, 300), matvec=lambda v: rosen_hess_prod(point, v.ravel()), dtype=float)
    truth = np.linalg.eigvalsh(rosen_hess(point))
    smallest, largest = extreme_eigenvalues(hessian)
    assert smallest < 0
    assert (smallest, largest) == pytest.approx((truth[0], truth[-1]), rel=1e-9)
    assert extreme_eigenvalues(hessian) == (smallest, largest)


def test_a_lanczos_iteration_that_does_not_converge_is_an_error():
    # The distance between the smallest eigenvalues is below the rounding error of the largest.
    values = np.geomspace(1e-12, 1.0, 257)
    operator = LinearOperator((257, 257), matvec=lambda x: values * x.ravel(), dtype=float)
    with pytest.raises(InputError, match="did not converge"):
        extreme_eigenvalues(operator)
    assert extreme_eigenvalues(values) == (1e-12, 1.0)


@given(seed=st.integers(0, 300))
def test_the_preconditioner_of_adam_is_a_metric_only_of_its_own_momentum(seed):
    rng = np.random.default_rng(seed)
    gradient, momentum = rng.standard_normal((2, 30))
    preconditioner = np.sqrt(rng.exponential(size=30)) + 1e-8
    update = -momentum / preconditioner
    form = canonical_form(preconditioner, update, -momentum)
    assert form.valid
    assert form.condition_number == preconditioner.max() / preconditioner.min()
    assert form.condition_number >= form.smallest_condition_number
    assert canonical_form(preconditioner, update).pair.alignment == pytest.approx(float(form.pair.alignment))
    if -gradient @ update > 0:
        other = canonical_form(preconditioner, update, -gradient)
        assert not other.valid
        assert other.mapping_residual > 1e-3


def test_a_preconditioner_of_kronecker_factors_is_worse_conditioned_than_necessary():
    rng = np.random.default_rng(3)
    left, right = (
        a @ a.T + 0.1 * np.eye(len(a)) for a in (rng.standard_normal((4, 4)), rng.standard_normal((6, 6)))
    )
    gradient = rng.standard_normal((4, 6))
    update = -np.linalg.solve(left, gradient) @ np.linalg.inv(right)
    form = canonical_form(Kronecker(left, right), update.ravel(), -gradient.ravel())
    # The update is the solution of a linear system, whose residual grows with the condition number of the factors.
    assert form.mapping_residual <= 24 * 2.0**-52 * np.linalg.cond(left) * np.linalg.cond(right)
    assert form.condition_number == pytest.approx(np.linalg.cond(left) * np.linalg.cond(right))
    assert 1 < form.smallest_condition_number < form.condition_number
    assert form.rest_eigenvalue_min() > 0


def test_a_matrix_that_is_not_a_metric_is_not_valid():
    metric = Metric(Y, G).to_dense()
    assert canonical_form(metric, G, Y).valid
    across = ACROSS / np.linalg.norm(ACROSS)
    indefinite = metric - 100 * np.outer(across, across)
    skew = np.outer(across, np.array([0, 0, 0, 1.0])) - np.outer(np.array([0, 0, 0, 1.0]), across)
    for matrix in (indefinite, metric + 1e-6 * skew, 1.001 * metric, np.zeros((4, 4)), -np.eye(4)):
        form = canonical_form(matrix, G, Y)
        assert not form.valid
    form = canonical_form(indefinite, G, Y)
    assert form.mapping_residual <= 8 * 2.0**-52
    assert form.rest_eigenvalue_min() < 0
    assert np.isnan(form.condition_number)
    asymmetric = canonical_form(aslinearoperator(metric + 1e-6 * skew), G)
    assert asymmetric.symmetry_residual > 1e-9
    assert np.isnan(canonical_form([2.0], [1.0]).rest_eigenvalue_min())
    assert canonical_form([2.0], [1.0]).valid


def test_the_asymmetry_of_a_matrix_is_measured_in_units_of_its_norm():
    rng = np.random.default_rng(0)
    skew = np.triu(rng.standard_normal((5, 5)), 1)
    matrix = np.diag(np.arange(1.0, 6.0)) + 1e-3 * (skew - skew.T)
    form = canonical_form(matrix, np.ones(5))
    expected = np.linalg.norm(matrix - matrix.T, 2) / form.eigenvalue_max
    assert form.symmetry_residual == pytest.approx(expected, rel=1e-12)
    # The asymmetry of an operator is sampled, so only zero is known exactly.
    operator = canonical_form(aslinearoperator(matrix), np.ones(5))
    assert 0 < operator.symmetry_residual <= expected * (1 + 1e-12)
    symmetric = canonical_form(aslinearoperator(matrix + matrix.T), np.ones(5))
    assert symmetric.symmetry_residual <= 5 * 2.0**-52


def test_exact_eigenvalues_may_be_far_apart_and_computed_ones_may_not():
    update = np.array([1.0, 1.0])
    # 1e-20 is below the rounding of the eigenvalues of a matrix, but not of a diagonal or of its factors.
    small, one = np.array([1e-20, 1.0]), np.ones(1)
    for closed in (small, Kronecker(small, one)):
        assert canonical_form(closed, update).condition_number == pytest.approx(1e20, rel=1e-14)
    for computed in (np.diag(small), aslinearoperator(np.diag(small))):
        assert np.isnan(canonical_form(computed, update).condition_number)


# Replicates --------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 100), count=st.integers(2, 9))
def test_the_jackknife_of_a_mean_is_its_standard_error(seed, count):
    sample = np.random.default_rng(seed).standard_normal((count, 3))
    value, error = jackknife(lambda mean: mean, sample)
    assert value == pytest.approx(sample.mean(axis=0))
    assert error == pytest.approx(sample.std(axis=0, ddof=1) / np.sqrt(count))


def test_the_jackknife_of_an_angle_of_means_covers_the_true_angle():
    rng, within = np.random.default_rng(5), 0
    y, g = vectors_at(0.8, 6)
    for _ in range(200):
        noise = rng.standard_normal((2, 40, 6))
        value, error = jackknife(lambda a, b: geometry.angle(pair_of(a, b)), y + noise[0] / 4, g + noise[1] / 4)
        within += abs(value - 0.8) <= 2 * error
    # About 95 % of 200 for a normal angle; 4 standard deviations of the count is 12.
    assert within >= 190 - 12


def test_replicates_of_different_numbers_are_an_error():
    value, error = jackknife(lambda mean: mean, [3.0])
    assert value == 3.0
    assert np.isnan(error)
    for samples in ((np.ones(3), np.ones(2)), (np.ones(0),), (np.float64(1),), ()):
        with pytest.raises(InputError, match="replicates have shapes"):
            jackknife(lambda *means: means[0], *samples)


def test_the_error_of_an_indefinite_stochastic_metric_states_a_sufficient_weight():
    curvature = -np.array([1.0, 2.0, 3.0, 0.0]) + 5 * ACROSS
    with pytest.raises(InputError, match=r"is not positive definite.*(\n.*)*pass an alpha above") as refusal:
        stochastic_metric(Y, G, curvature, 0.5, alpha=1e-3)
    needed = float(refusal.value.remedy.split()[-1])
    assert stochastic_metric(Y, G, curvature, 0.5, alpha=1.001 * needed).condition_number() > 1
    with pytest.raises(InputError, match="not positive definite"):
        stochastic_metric(Y, G, curvature, 0.5, alpha=0.999 * needed)
    with pytest.raises(InputError, match="the term is not defined"):
        stochastic_metric(Y, G, ACROSS, 0.5)


def test_the_examples_of_the_docstrings_hold():
    for module in (metrics, operators, geometry):
        failed, tried = doctest.testmod(module)
        assert tried
        assert not failed


@pytest.mark.parametrize("argument", ["y", "g", "gamma", "alpha", "directions", "weights"])
def test_a_wrong_value_of_any_argument_is_refused(argument):
    valid = {"y": [3.0, 1, 0], "g": [1.0, 0, 1], "directions": np.array([[0.0], [1], [0]])}
    if argument in ("y", "g", "weights"):
        del valid["directions"]
    for value in ("text", 1j, [1j, 0, 0], [[1], [1, 2]], object(), {"a": 1}, True, np.ones((2, 2, 2))):
        with pytest.raises(InputError):
            Metric(**valid | {argument: value})
    with pytest.raises(InputError):
        Metric(valid["y"], valid["g"]).solve("text")
