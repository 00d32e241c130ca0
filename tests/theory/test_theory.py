"""Test each statement of the paper for random and adversarial vectors, in 60 digits.

docs/explanation/paper.md has the table from statement to function, test and variable.
docs/explanation/errata.md lists the statements that do not hold as printed.
"""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mpmath import mp, mpf

from natgrad.kernel.ledger_sums import roundoff_bound
from natgrad.results.replicate_variables import REPLICATE_VARIABLES
from natgrad.results.variables import VARIABLES
from natgrad.schema.errors import InputError
from natgrad.theory import discrete_time, geometry
from natgrad.theory.metric_operators import Metric, pair_of, stochastic_metric
from natgrad.theory.symmetric_operators import canonical_form, extreme_eigenvalues
from reference import exact, exact_metric, promised_relative_error, vectors_at

ROOT = Path(__file__).parents[2]
U = 2.0**-53
# Parallel, nearly parallel, in general position, nearly orthogonal.
angles = st.one_of(st.sampled_from([0.0, 1e-9, 1e-4, np.pi / 2 - 1e-4, np.pi / 2 - 1e-7]), st.floats(0.01, 1.55))
vectors = st.builds(
    lambda angle, size, seed, length: vectors_at(angle if size > 1 else 0.0, size, seed, length),
    angles,
    st.integers(1, 5),
    st.integers(0, 10_000),
    st.sampled_from([1e-60, 1e-3, 1.0, 1e60]),
)
seeds = st.integers(0, 10_000)
gammas = st.one_of(st.floats(1e-6, 1e6), st.just(1.0))


@st.composite
def any_metrics(draw):
    """An unstructured symmetric positive definite matrix, with eigenvalues over up to 12 decades, and an update."""
    size, rng = draw(st.integers(1, 5)), np.random.default_rng(draw(seeds))
    decades = draw(st.sampled_from([0.0, 1.0, 6.0]))
    turn, _ = np.linalg.qr(rng.standard_normal((size, size)))
    matrix = turn @ np.diag(10.0 ** rng.uniform(-decades, decades, size)) @ turn.T
    return (matrix + matrix.T) / 2.0, rng.standard_normal(size)


def column(vector):
    return mp.matrix(exact(vector))


def matrix_of(array):
    return mp.matrix([exact(row) for row in array])


def dot(x, y):
    return (x.T * y)[0]


def rounded(vector):
    return np.array([float(x) for x in vector])


def spectrum(matrix):
    """Eigenvalues, ascending."""
    return sorted(mp.eigsy(matrix, eigvals_only=True))


def across(x, g):
    """Component of a vector across g, orthogonal to it to rounding."""
    for _ in range(3):
        x = x - g * ((g @ x) / (g @ g))
    return x


def exact_cosine(y, g):
    return float(dot(y, g) / mp.norm(y) / mp.norm(g))


# Section 2.1 -------------------------------------------------------------------------------------------------


@given(pair=vectors, seed=seeds)
def test_equation_6_is_symmetric_positive_definite_and_maps_g_to_y(pair, seed):
    y, g = pair
    size, rng = len(g), np.random.default_rng(seed)
    # More directions than needed, over four decades, in the unit of a metric.
    unit = np.sqrt(np.linalg.norm(y) / np.linalg.norm(g))
    raw = unit * 10.0 ** rng.uniform(-2, 2, 2 * size)[:, None] * rng.standard_normal((2 * size, size))
    directions = np.stack([across(x, g) if size > 1 else 0.0 * x for x in raw])
    with mp.workdps(60):
        matrix = exact_metric(y, g, alpha=0, directions=directions, weights=np.ones(2 * size))
        assert mp.norm(matrix - matrix.T) == 0
        least, greatest = spectrum(matrix)[0], spectrum(matrix)[-1]
        assert least > 0
        # Float64 directions are orthogonal to g up to rounding, and so the error of M g - y is of the same size.
        slip = sum(mp.norm(column(u)) * abs(dot(column(u), column(g))) for u in directions)
        negligible = mpf(10) ** -50 * greatest * mp.norm(column(g))
        assert mp.norm(matrix * column(g) - column(y)) <= slip + negligible
    metric = Metric(y, g, directions=directions.T)
    assert metric.eigenvalues()[0][-1] > 0
    bound = 8 * roundoff_bound(size) * float(greatest) * np.linalg.norm(g)
    assert np.linalg.norm(metric @ g - y) <= bound


@given(given_metric=any_metrics())
def test_the_canonical_form_is_the_only_form(given_metric):
    matrix, g = given_metric
    size = len(g)
    with mp.workdps(60):
        dense, update = matrix_of(matrix), column(g)
        y = dense * update
        greatest = spectrum(dense)[-1]
        assert spectrum(dense)[0] > 0
        rest = dense - y * y.T / dot(y, update)
        assert mp.norm(rest * update) <= mpf(10) ** -50 * greatest
        # Move the zero eigenvalue along g out of the way.
        lifted = rest + greatest * update * update.T / dot(update, update)
        values, turn = mp.eigsy(lifted)
        assert min(values) > 0
        form = canonical_form(matrix, g)
        assert form.valid
        tolerance = 8 * size * U / exact_cosine(y, update) * float(greatest)
        if size > 1:
            assert form.rest_eigenvalue_min() == pytest.approx(float(min(values)), abs=tolerance)
        # Conversely, the eigenvectors of the remainder are the u_i of eq. (6), and reproduce the matrix.
        along = [abs(dot(turn[:, k], update)) / mp.norm(update) for k in range(size)]
        kept = sorted(range(size), key=lambda k: along[k])[: size - 1]
        if size > 1 and max(along[k] for k in kept) < mpf(10) ** -40:
            directions = np.stack([rounded(mp.sqrt(values[k]) * turn[:, k]) for k in kept], axis=1)
            again = Metric(rounded(y), g, directions=directions).to_dense()
            assert np.linalg.norm(again - matrix, 2) <= 4 * tolerance
        # If more is subtracted across g, the rest and the matrix are not definite.
        weakest = min(kept, key=lambda k: values[k], default=None)
        if weakest is not None:
            less = dense - mpf("1.001") * values[weakest] * turn[:, weakest] * turn[:, weakest].T
            assert spectrum(less)[0] < 0


# Appendix A --------------------------------------------------------------------------------------------------


@given(pair=vectors, gamma=gammas)
def test_lemma_1_gives_the_spectrum_of_the_family(pair, gamma):
    y, g = pair
    with mp.workdps(60):
        explicit = spectrum(exact_metric(y, g, gamma))
        tolerance = promised_relative_error(exact_cosine(column(y), column(g)))
    numbers = pair_of(y, g)
    values = np.concatenate(geometry.family_eigenvalues(numbers, [gamma]))
    listed = np.sort(np.repeat(values, np.stack(geometry.multiplicities(len(g)))))
    assert listed == pytest.approx([float(value) for value in explicit], rel=tolerance)
    determinant = geometry.family_log_determinant(numbers, [gamma])[0]
    assert determinant == pytest.approx(float(sum(map(mp.log, explicit))), abs=4 * len(g) * tolerance + 1000 * U)
    maximum, minimum = geometry.family_asymptotes(numbers, [gamma])
    assert listed[-1] >= maximum[0] * (1 - tolerance)
    assert listed[0] <= minimum[0] * (1 + tolerance)


@given(given_metric=any_metrics(), pair=vectors, seed=seeds, exponent=st.floats(-12, 0))
def test_proposition_1_no_metric_has_a_smaller_condition_number(given_metric, pair, seed, exponent):
    matrix, g = given_metric
    with mp.workdps(60):
        values = spectrum(matrix_of(matrix))
        y = matrix_of(matrix) * column(g)
        tolerance = promised_relative_error(exact_cosine(y, column(g)))
        assert geometry.condition_number(pair_of(rounded(y), g)) <= values[-1] / values[0] * (1 + tolerance)

        # The optimal metric attains it, and no perturbation across g improves it.
        y, g = pair
        optimal = exact_metric(y, g, gamma=1)
        best = spectrum(optimal)
        condition = best[-1] / best[0]
        tolerance = promised_relative_error(exact_cosine(column(y), column(g)))
        assert float(geometry.condition_number(pair_of(y, g))) == pytest.approx(float(condition), rel=tolerance)
        noise = np.random.default_rng(seed).standard_normal((len(g), len(g)))
        projection = mp.eye(len(g)) - column(g) * column(g).T / dot(column(g), column(g))
        step = projection * matrix_of(noise + noise.T) * projection
        other = spectrum(optimal + mpf(10) ** exponent * best[0] * step)
        if other[0] > 0:
            assert other[-1] / other[0] >= condition * (1 - mpf(10) ** -40)


@given(given_metric=any_metrics(), pair=vectors)
def test_proposition_2_bounds_the_smallest_eigenvalue_of_every_metric(given_metric, pair):
    matrix, g = given_metric
    with mp.workdps(60):
        y = matrix_of(matrix) * column(g)
        tolerance = promised_relative_error(exact_cosine(y, column(g)))
        _, supremum = geometry.eigenvalue_bounds(pair_of(rounded(y), g))
        assert spectrum(matrix_of(matrix))[0] <= float(supremum) * (1 + tolerance)
        y, g = pair
        numbers = pair_of(y, g)
        _, supremum = geometry.eigenvalue_bounds(numbers)
        # The eigenvalue is below the supremum by a relative tan^2 psi / gamma, to first order.
        condition = float(geometry.condition_number(numbers))
        tolerance = promised_relative_error(exact_cosine(column(y), column(g)))
        approached = spectrum(exact_metric(y, g, gamma=1e20))[0]
        assert float(approached) == pytest.approx(float(supremum), rel=2 * condition * 1e-20 + tolerance)


@given(given_metric=any_metrics(), pair=vectors)
def test_proposition_3_bounds_the_largest_eigenvalue_of_every_metric(given_metric, pair):
    matrix, g = given_metric
    with mp.workdps(60):
        y = matrix_of(matrix) * column(g)
        tolerance = promised_relative_error(exact_cosine(y, column(g)))
        infimum, _ = geometry.eigenvalue_bounds(pair_of(rounded(y), g))
        assert spectrum(matrix_of(matrix))[-1] >= float(infimum) * (1 - tolerance)
        y, g = pair
        numbers = pair_of(y, g)
        infimum, _ = geometry.eigenvalue_bounds(numbers)
        condition = float(geometry.condition_number(numbers))
        tolerance = promised_relative_error(exact_cosine(column(y), column(g)))
        approached = spectrum(exact_metric(y, g, gamma=1e-20))[-1]
        assert float(approached) == pytest.approx(float(infimum), rel=2 * condition * 1e-20 + tolerance)


@given(pair=vectors)
def test_the_optimum_over_gamma_is_at_one_and_the_ends_follow_their_asymptotes(pair):
    y, g = pair
    numbers, grid = pair_of(y, g), np.geomspace(1e-20, 1e20, 81)
    tolerance = promised_relative_error(geometry.cosine(numbers))
    conditions = geometry.family_condition_number(numbers, grid)
    assert conditions.min() >= conditions[40] * (1 - tolerance)
    assert grid[40] == pytest.approx(1.0)
    # gamma and 1 / gamma give the same condition number.
    assert conditions == pytest.approx(conditions[::-1], rel=2 * tolerance)
    maximum, minimum = geometry.family_asymptotes(numbers, grid)
    values = geometry.family_eigenvalues(numbers, grid)
    near = float(2e-20 * geometry.condition_number(numbers)) + tolerance
    for end in (0, -1):
        assert values[0][end] == pytest.approx(maximum[end], rel=near)
        assert values[2][end] == pytest.approx(minimum[end], rel=near)
    # Between the asymptotes, each is off by a factor of at most 1 + |sin psi|, which is attained at gamma = 1.
    sine = np.sin(geometry.angle(numbers))
    for ratio in (values[0] / maximum, minimum / values[2]):
        assert ratio.max() <= (1 + sine) * (1 + tolerance)
        assert ratio[40] == pytest.approx(1 + sine, rel=tolerance)


# Section 2.2 -------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 5), seed=seeds, rate=st.sampled_from([1e-3, 0.1, 0.5, 2.0]))
def test_equation_15_the_update_is_natural_gradient_descent_of_the_discrete_gradient(size, seed, rate):
    rng = np.random.default_rng(seed)
    hessian = rng.standard_normal((size, size))
    hessian = hessian + hessian.T
    theta, g, slope = rng.standard_normal((3, size))
    after = theta + rate * g
    gradient = [hessian @ point + slope for point in (theta, after)]
    # For a quadratic loss, the mean of the two gradients is a discrete gradient.
    discrete = -(gradient[0] + gradient[1]) / 2.0
    with mp.workdps(60):
        points, slopes, quadratic = [column(theta), column(after)], column(slope), matrix_of(hessian)
        losses = [dot(point, quadratic * point) / 2 + dot(slopes, point) for point in points]
        change = float(losses[1] - losses[0])
    scale = np.linalg.norm(hessian, 2) * (np.linalg.norm(theta) + np.linalg.norm(after)) + np.linalg.norm(slope)
    bound = 8 * roundoff_bound(size) * scale * np.linalg.norm(after - theta)
    assert discrete @ (after - theta) == pytest.approx(-change, abs=bound)
    assume(change < -bound)
    update = (after - theta) / rate
    metric = Metric(discrete, update)
    values, _ = metric.eigenvalues()
    rounding = 8 * roundoff_bound(size) * rate * np.linalg.norm(discrete) / values[-1]
    assert np.linalg.norm(theta + rate * metric.solve(discrete) - after) <= rounding + 2 * U * np.linalg.norm(after)
    # The corrected gradient of the ledger has the same y.g, so a metric exists for every loss that decreased.
    plain = pair_of(-gradient[0], update)
    corrected = discrete_time.corrected(plain, rate, change, plain)
    assert float(corrected.alignment) == pytest.approx(-change / rate, rel=4 * U)
    assert np.isfinite(geometry.condition_number(corrected))


@given(pair=vectors, seed=seeds, share=st.sampled_from([0.01, 0.5, 0.999]))
def test_equation_18_below_the_bound_the_shifted_metric_is_a_metric_of_the_true_gradient(pair, seed, share):
    discrete, g = pair
    size, rng = len(g), np.random.default_rng(seed)
    half_hessian = rng.standard_normal((size, size)) * np.linalg.norm(discrete) / np.linalg.norm(g)
    half_hessian = half_hessian + half_hessian.T
    least, _ = extreme_eigenvalues(2 * half_hessian)
    numbers = pair_of(discrete, g)
    supremum, optimal = discrete_time.learning_rate_bounds(numbers, least)
    if least >= 0:
        assert supremum == optimal == np.inf
        return
    assert optimal <= supremum * (1 + 4 * U)
    tolerance = promised_relative_error(geometry.cosine(numbers)) + 8 * size * U
    # Near its supremum, the smallest eigenvalue is below it by a relative tan^2 psi / gamma.
    near = max(1.0, 100 * float(geometry.condition_number(numbers)) / (1 - share))
    with mp.workdps(80):
        for bound, gamma in ((optimal, 1.0), (supremum, near)):
            rate = mpf(float(bound)) * (share - mpf(tolerance))
            shifted = exact_metric(discrete, g, gamma) + rate * matrix_of(half_hessian)
            assert spectrum(shifted)[0] > 0
            y = column(discrete) + rate * matrix_of(half_hessian) * column(g)
            assert mp.norm(shifted * column(g) - y) <= mpf(10) ** -50 * mp.norm(y) * gamma / share
            assert dot(y, column(g)) > 0
            solved = mp.lu_solve(shifted, y)
            assert mp.norm(solved - column(g)) <= mpf(10) ** -30 * mp.norm(column(g))


def test_the_learning_rate_bound_is_sharp_along_the_weakest_direction():
    y, g = vectors_at(1.0, 4)
    metric = Metric(y, g)
    values, turn = np.linalg.eigh(metric.to_dense())
    # If the most concave direction is the weakest of the metric, it is no longer definite beyond the bound.
    hessian = -2.0 * np.outer(turn[:, 0], turn[:, 0])
    _, bound = discrete_time.learning_rate_bounds(pair_of(y, g), extreme_eigenvalues(hessian)[0])
    for share, definite in ((0.999, True), (1.001, False)):
        smallest, _ = extreme_eigenvalues(metric.to_dense() + share * bound * hessian / 2.0)
        assert (smallest > 0) == definite
    assert bound == pytest.approx(values[0], rel=1e-13)


@given(size=st.integers(2, 5), seed=seeds)
def test_in_the_limit_of_small_learning_rates_the_discrete_metric_is_that_of_the_gradient(size, seed):
    rng = np.random.default_rng(seed)
    y, g = vectors_at(rng.uniform(0, 1.5), size, seed)
    curvature = rng.standard_normal((size, size))
    curvature = (curvature + curvature.T) @ g
    pair, metric = pair_of(y, g), Metric(y, g).to_dense()
    first = 0.5 * (y @ g) / (np.linalg.norm(curvature) * np.linalg.norm(g))
    for halvings in range(40):
        rate = first / 2**halvings
        discrete = y - rate * curvature
        other, change = pair_of(discrete, g), rate * np.linalg.norm(curvature)
        turned = abs(float(geometry.angle(other) - geometry.angle(pair)))
        # A change of norm |eta H g| rotates y by at most asin(|eta H g| / |y|).
        assert turned <= float(geometry.angle_uncertainty(pair, 0.0, change)) + 16 * U
        # y y' / y.g and alpha, each as the difference of two quotients.
        lengths, along = np.linalg.norm(y) + np.linalg.norm(discrete), (y @ g, discrete @ g)
        bound = lengths / along[0] + discrete @ discrete * np.linalg.norm(g) / (along[0] * along[1])
        difference = np.linalg.norm(Metric(discrete, g).to_dense() - metric, 2)
        rounding = 64 * roundoff_bound(size) * np.linalg.norm(metric, 2) / float(geometry.cosine(pair))
        assert difference <= 2 * change * bound + rounding
    assert change <= 1e-11 * np.linalg.norm(y)


@st.composite
def stochastic_rules(draw):
    """Negative gradient, mean update and mean <Hg>, with a learning rate on their scale."""
    size, rng = draw(st.integers(1, 5)), np.random.default_rng(draw(seeds))
    y, g = vectors_at(rng.uniform(0, 1.5) if size > 1 else 0.0, size, rng.integers(1000))
    curvature = rng.standard_normal(size) * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    return y, g, curvature, draw(st.sampled_from([1e-6, 0.01, 0.3, 3.0]))


def products(y, g, curvature):
    """Arguments of the closed forms."""
    one, other = (across(x, g) if len(g) > 1 else 0.0 * x for x in (y, curvature))
    return pair_of(y, g), pair_of(curvature, g), one @ other


def printed_metric(y, g, curvature, rate, alpha):
    """Eq. (19) term by term, exact."""
    discrete = column(y) - mpf(rate) * column(curvature)
    update, bent = column(g), column(curvature)
    flat = mp.eye(len(g)) - update * update.T / dot(update, update)
    mean = discrete * discrete.T / dot(discrete, update) + mpf(alpha) * flat
    return mean + mpf(rate) * bent * bent.T / dot(bent, update)


@given(rule=stochastic_rules(), share=st.sampled_from([0.5, 0.99, 1.01, 2.0]))
def test_equation_20_holds_with_a_minus_sign_exactly_if_equation_19_is_definite(rule, share):
    y, g, curvature, rate = rule
    arguments = products(y, g, curvature)
    weight = float(discrete_time.stochastic_weight(*arguments, rate))
    optimum = float(geometry.eigenvalue_bounds(arguments[0])[0])
    alpha = share * (weight if weight > 0 else optimum)
    with mp.workdps(60):
        matrix = printed_metric(y, g, curvature, rate, alpha)
        definite = spectrum(matrix)[0] > 0
        assert definite == (weight == 0 or share > 1)
        assert mp.norm(matrix * column(g) - column(y)) <= mpf(10) ** -40 * mp.norm(matrix) * mp.norm(column(g))
        if not definite:
            with pytest.raises(InputError, match="not positive definite"):
                stochastic_metric(y, g, curvature, rate, alpha=alpha)
            return
        metric = stochastic_metric(y, g, curvature, rate, alpha=alpha)
        values, _ = metric.eigenvalues()
        # A weight within 1 % of its threshold loses two digits, in addition to the rounding of y.g and <Hg>.g.
        conditions = [1 / abs(exact_cosine(column(x), column(g))) for x in (y, curvature, y - rate * curvature)]
        tolerance = 1000 * len(g) * U * sum(conditions) ** 2
        truth = spectrum(matrix)
        assert values[0] == pytest.approx(float(truth[-1]), rel=tolerance)
        if tolerance * truth[-1] < truth[0]:
            assert values[-1] == pytest.approx(float(truth[0]), abs=tolerance * float(truth[-1]))
    # <g> = -M^-1 grad L; the paper lacks the minus sign.
    bound = 8 * roundoff_bound(len(g)) * np.linalg.norm(y) / values[-1]
    assert np.linalg.norm(-metric.solve(-y) - g) <= bound
    assert np.linalg.norm(metric.solve(-y) - g) >= 2 * np.linalg.norm(g) - bound


@given(rule=stochastic_rules(), size=st.floats(0.01, 100))
def test_the_largest_learning_rate_of_equation_19_is_where_it_stops_being_definite(rule, size):
    y, g, curvature, _ = rule
    arguments = products(y, g, curvature)
    alpha = size * float(geometry.eigenvalue_bounds(arguments[0])[0])
    bound = float(discrete_time.stochastic_learning_rate_bound(*arguments, alpha))
    assert bound > 0
    slope = float(arguments[1].alignment)
    with mp.workdps(60):
        for share in (1e-3, 0.99, 1.01):
            rate = share * bound if np.isfinite(bound) else share * 1e6
            definite = spectrum(printed_metric(y, g, curvature, rate, alpha))[0] > 0
            if share < 1 or not np.isfinite(bound):
                assert definite
                assert discrete_time.stochastic_weight(*arguments, rate) < alpha
            elif slope < 0:
                assert not definite
            else:
                # Beyond it, the mean update no longer descends along the discrete gradient, and Mbar does not
                # exist.
                assert dot(column(y) - mpf(rate) * column(curvature), column(g)) < 0


# Undefined cases ------------------------------------------------------------------------------------

ONE = np.array([1.0, 0.0])
UNDEFINED = {
    "obtuse": (ONE, -ONE),
    "orthogonal": (ONE, ONE[::-1]),
    "no update": (ONE, 0 * ONE),
    "no gradient": (0 * ONE, ONE),
}


@pytest.mark.parametrize("case", UNDEFINED)
def test_without_a_metric_there_is_no_number(case):
    y, g = UNDEFINED[case]
    pair, curvature = pair_of(y, g), pair_of(np.ones(2), g)
    values = [
        *discrete_time.learning_rate_bounds(pair, -1.0),
        *discrete_time.learning_rate_bounds(pair, 1.0),
        *geometry.family_asymptotes(pair, [0.5, 2.0]),
        geometry.family_log_determinant(pair, [0.5, 2.0]),
        discrete_time.stochastic_weight(pair, curvature, 0.0, 0.1),
        discrete_time.stochastic_learning_rate_bound(pair, curvature, 0.0, 1.0),
    ]
    assert all(np.isnan(value).all() for value in values)
    for refused in (
        Metric,
        lambda y, g: canonical_form(np.eye(2), g, y),
        lambda y, g: stochastic_metric(y, g, ONE, 1.0),
    ):
        with pytest.raises(InputError, match="no metric maps g to y"):
            refused(y, g)


def test_undefined_bounds_of_the_learning_rate_are_nan():
    pair = pair_of(np.array([3.0, 1.0]), ONE)
    assert np.isnan(discrete_time.learning_rate_bounds(pair, np.nan)).all()
    assert discrete_time.learning_rate_bounds(pair, [0.0, 2.0])[0].tolist() == [np.inf, np.inf]
    level = pair_of(ONE[::-1], ONE)
    # <Hg>.<g> = 0: eq. (19) divides by it. If y - <Hg> is orthogonal to <g>, it divides by <ybar>.<g> = 0.
    assert np.isnan(discrete_time.stochastic_weight(pair, level, 0.0, 1.0))
    assert np.isnan(discrete_time.stochastic_learning_rate_bound(pair, level, 0.0, 1.0))
    assert np.isnan(discrete_time.stochastic_weight(pair, pair_of(np.array([3.0, 0.0]), ONE), 0.0, 1.0))
    for rate in (0.0, -1.0, np.nan):
        assert np.isnan(discrete_time.stochastic_weight(pair, pair_of(ONE, ONE), 0.0, rate))
    for alpha in (0.0, -1.0, np.nan):
        assert np.isnan(discrete_time.stochastic_learning_rate_bound(pair, pair_of(-ONE, ONE), 0.0, alpha))


# The table of the documentation ------------------------------------------------------------------------------


def test_the_table_of_statements_refers_to_existing_functions_and_tests():
    rows = [
        line.split(" | ")
        for line in (ROOT / "docs" / "explanation" / "paper.md").read_text().splitlines()
        if line.count(" | ") == 4
    ]
    tests = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = [[re.findall(r"`([\w.]+)`", cell) for cell in row] for row in rows[2:]]
    assert len(named) >= 12
    for _, _, functions, examined, variables in named:
        assert functions
        assert examined
        for function in functions:
            package, module, attribute = function.split(".", 2)
            found = importlib.import_module(f"natgrad.{package}.{module}")
            for name in attribute.split("."):
                found = getattr(found, name)
        assert set(examined) <= tests
        assert set(variables) <= {*VARIABLES, *REPLICATE_VARIABLES}
