"""Compare the formulas of the paper with explicit matrices in 60 digits."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf

from natgrad.kernel import gram
from natgrad.schema.names import ledger_vectors
from natgrad.schema.variables import Status
from natgrad.theory import discrete_time, geometry
from natgrad.theory.geometry import Pair
from reference import (
    assert_same_pair,
    exact,
    exact_dot,
    exact_gram,
    exact_vectors,
    pair_of,
    promised_angle_error,
    promised_relative_error,
    vectors_at,
)

VECTORS = ledger_vectors(hvp=False)
PERPENDICULAR = np.pi / 2
ANGLES = [0.0, 1e-9, 1e-7, 1e-4, 0.3, 1.0, 1.5, PERPENDICULAR - 1e-4, PERPENDICULAR - 1e-7, PERPENDICULAR - 1e-9]
OBTUSE = [PERPENDICULAR + 1e-9, 2.0, 3.0, np.pi - 1e-4, np.pi - 1e-9]
GAMMAS = [1e-6, 0.3, 1.0, 4.0, 1e6]


@functools.cache
def exact_pair(angle, size, seed=0):
    y, g = vectors_at(angle, size, seed)
    with mp.workdps(60):
        y, g = exact(y), exact(g)
        along = exact_dot(y, g) / mp.sqrt(exact_dot(g, g))
        rest = [a - b * exact_dot(y, g) / exact_dot(g, g) for a, b in zip(y, g, strict=True)]
        across = mp.sqrt(exact_dot(rest, rest)) if size > 1 else mpf(0)
        return mp.matrix(y), mp.matrix(g), mp.atan2(across, along), mp.cos(mp.atan2(across, along))


def spectrum(angle, size, gamma):
    """Return the eigenvalues of the explicit matrix of eq. (22), ascending."""
    with mp.workdps(60):
        y, g, _, _ = exact_pair(angle, size)
        alignment, square = (y.T * g)[0], (g.T * g)[0]
        weight = mpf(gamma) * (y.T * y)[0] / alignment
        matrix = y * y.T / alignment + weight * (mp.eye(size) - g * g.T / square)
        return sorted(mp.eigsy(matrix, eigvals_only=True))


def relative_error(value, truth):
    return float(abs(mpf(float(value)) - truth) / abs(truth))


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("angle", [*ANGLES, *OBTUSE])
def test_the_angle_is_exact_from_zero_to_pi(size, angle):
    if size == 1:
        angle = 0.0 if angle < PERPENDICULAR else np.pi
    psi = geometry.angle(pair_of(*vectors_at(angle, size)))
    assert abs(mpf(float(psi)) - exact_pair(angle, size)[2]) <= promised_angle_error()


@pytest.mark.parametrize("size", range(2, 9))
@pytest.mark.parametrize("angle", ANGLES)
def test_the_spectrum_of_the_explicit_metric_is_equation_9(size, angle):
    pair = pair_of(*vectors_at(angle, size))
    explicit, tolerance = spectrum(angle, size, 1), promised_relative_error(exact_pair(angle, size)[3])
    maximum, middle, minimum = geometry.eigenvalues(pair)
    assert relative_error(maximum, explicit[-1]) <= tolerance
    assert relative_error(minimum, explicit[0]) <= tolerance
    for value in explicit[1:-1]:
        assert relative_error(middle, value) <= tolerance
    assert np.isnan(middle) == (size == 2)
    condition = explicit[-1] / explicit[0]
    assert relative_error(geometry.condition_number(pair), condition) <= tolerance
    assert relative_error(geometry.similarity(pair), 1 / condition) <= tolerance


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("angle", [1e-9, 0.3, PERPENDICULAR - 1e-7])
def test_lemma_1_with_its_multiplicities(size, angle, gamma):
    if size == 1:
        angle = 0.0
    pair = pair_of(*vectors_at(angle, size))
    explicit, tolerance = spectrum(angle, size, gamma), promised_relative_error(exact_pair(angle, size)[3])
    values = geometry.family_eigenvalues(pair, [gamma])
    listed = [float(v[0]) for v, n in zip(values, geometry.multiplicities(size), strict=True) for _ in range(n)]
    assert len(listed) == size
    for value, truth in zip(sorted(listed), explicit, strict=True):
        assert relative_error(value, truth) <= tolerance
    assert np.isnan(values[1][0]) == (size <= 2)
    condition = geometry.family_condition_number(pair, [gamma])[0]
    assert relative_error(condition, explicit[-1] / explicit[0]) <= tolerance


def test_on_a_line_there_is_one_eigenvalue_and_the_condition_number_is_one():
    pair = pair_of(np.array([0.7]), np.array([0.3]))
    maximum, middle, minimum = geometry.eigenvalues(pair)
    assert maximum == pytest.approx(0.7 / 0.3, rel=promised_relative_error(1))
    assert maximum == minimum
    assert np.isnan(middle)
    assert geometry.condition_number(pair) == 1.0
    assert geometry.angle(pair) == 0.0
    assert geometry.angle(pair_of(np.array([-0.7]), np.array([0.3]))) == np.pi


def pairs(minimum=1e-6, size=5):
    numbers = st.floats(minimum, 1e6)
    return st.builds(
        lambda square, along, across: Pair(*map(np.array, (square, along * np.sqrt(square), across**2, size))),
        numbers,
        numbers,
        st.one_of(st.just(0.0), numbers),
    )


@given(pair=pairs(), gamma=st.floats(1e-9, 1e9))
def test_proposition_1_the_smallest_condition_number_of_the_family_is_at_gamma_one(pair, gamma):
    least, other = geometry.family_condition_number(pair, [1.0, gamma])
    tolerance = promised_relative_error(geometry.cosine(pair))
    assert other >= least * (1 - tolerance)
    assert least == pytest.approx(float(geometry.condition_number(pair)), rel=tolerance)


@given(pair=pairs(), gamma=st.floats(1e-9, 1e9))
def test_propositions_2_and_3_bound_every_metric_of_the_family(pair, gamma):
    infimum, supremum = geometry.eigenvalue_bounds(pair)
    maximum, _, minimum = geometry.family_eigenvalues(pair, [gamma])
    tolerance = promised_relative_error(geometry.cosine(pair))
    assert maximum[0] >= infimum * (1 - tolerance)
    assert minimum[0] <= supremum * (1 + tolerance)


@given(pair=pairs())
def test_the_bounds_are_approached_at_both_ends_of_the_family(pair):
    infimum, supremum = geometry.eigenvalue_bounds(pair)
    # With e = gamma (or 1 / gamma), the relative error of the eigenvalue is e tan^2 psi, to first order.
    end = 1e-16
    bound = 2 * end * geometry.condition_number(pair) + promised_relative_error(geometry.cosine(pair))
    assert geometry.family_eigenvalues(pair, [end])[0][0] == pytest.approx(float(infimum), rel=float(bound))
    assert geometry.family_eigenvalues(pair, [1 / end])[2][0] == pytest.approx(float(supremum), rel=float(bound))


@given(pair=pairs(), gamma=st.floats(1e-9, 1e9))
def test_the_middle_eigenvalue_lies_between_the_others(pair, gamma):
    tolerance = promised_relative_error(geometry.cosine(pair))
    for maximum, middle, minimum in (geometry.eigenvalues(pair), geometry.family_eigenvalues(pair, [gamma])):
        assert np.all(minimum <= middle * (1 + tolerance))
        assert np.all(middle <= maximum * (1 + tolerance))


@given(pair=pairs(), scale=st.integers(-40, 40))
def test_the_angle_does_not_depend_on_the_lengths_of_the_vectors(pair, scale):
    factor = 2.0**scale
    longer = Pair(pair.update_square * factor**2, pair.alignment * factor, pair.across_square, pair.size)
    assert geometry.angle(longer) == geometry.angle(pair)
    assert geometry.condition_number(longer) == geometry.condition_number(pair)
    assert geometry.eigenvalues(longer)[0] == geometry.eigenvalues(pair)[0] / factor


# Sums of pairs -----------------------------------------------------------------------------------------------


def pair_close(actual, y, g):
    assert_same_pair(actual.update_square, actual.alignment, geometry.angle(actual), y, g)
    assert actual.size == len(g)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5, 0.7, PERPENDICULAR - 1e-9, np.pi - 1e-9])
def test_tensors_add_up_to_the_model(angle):
    y, g = vectors_at(angle, 60)
    cuts = [slice(0, 1), slice(1, 30), slice(30, 60)]
    pair_close(geometry.direct_sum([pair_of(y[cut], g[cut]) for cut in cuts]), y, g)


def test_a_tensor_that_does_not_move_adds_its_gradient_across_the_update():
    y, g = vectors_at(0.4, 10)
    frozen = pair_of(np.ones(3), np.zeros(3))
    moving = pair_of(y, g)
    total = geometry.direct_sum([moving, frozen])
    assert total.alignment == moving.alignment
    assert float(total.across_square) == pytest.approx(float(moving.across_square) + 3.0, rel=2.0**-50)


@given(m=st.integers(1, 6), seed=st.integers(0, 50))
def test_a_window_is_the_extended_state_of_the_averaged_loss(m, seed):
    rng = np.random.default_rng(seed)
    ys, gs = rng.standard_normal((2, 6, 4))
    rows = [pair_of(y, g) for y, g in zip(ys, gs, strict=True)]
    stacked = Pair(*(np.array([getattr(row, name) for row in rows]) for name in vars(rows[0])))
    windows = geometry.window(stacked, m)
    assert windows.alignment.shape == (7 - m,)
    for start in range(7 - m):
        pair_close(windows[start], ys[start : start + m].ravel() / m, gs[start : start + m].ravel())


@given(seed=st.integers(0, 50), change=st.floats(-10, 10))
def test_the_corrected_gradient_obeys_equation_12(seed, change):
    rng = np.random.default_rng(seed)
    y, g = rng.standard_normal((2, 12))
    rate = 0.5
    model = pair_of(y, g, rate)
    corrected = discrete_time.corrected(model, rate, change, model)
    # p.(grad L + s p) = dL with p = eta g, solved for s.
    s = (change + rate * (y @ g)) / (rate**2 * (g @ g))
    pair_close(corrected, y - s * rate * g, g)
    assert float(rate * corrected.alignment) == pytest.approx(-change, rel=2.0**-50)
    parts = [pair_of(y[:5], g[:5], rate), pair_of(y[5:], g[5:], rate)]
    together = geometry.direct_sum([discrete_time.corrected(part, rate, change, model) for part in parts])
    pair_close(together, y - s * rate * g, g)


@given(seed=st.integers(0, 50), ratio=st.sampled_from([-1.0, 0.0, 0.5, 3.0]), angle=st.floats(0.1, 3.0))
def test_half_of_another_vector_is_added_to_the_gradient_for_any_residual(seed, ratio, angle):
    y, g = vectors_at(angle, 12, seed)
    change = np.random.default_rng(seed).standard_normal(12)
    # With an inaccurate ratio, the residual also has a component along the displacement.
    states = exact_vectors(np.zeros(12), g, -y, change - y, ratio)
    half = geometry.pair(exact_gram(states), VECTORS, 1.0, 12, half="gradient_change")
    expected = y - change / 2
    pair_close(half, expected, g)
    floor = geometry.across_floor(exact_gram(states), VECTORS, "gradient_change", half)
    rest = expected - g * (expected @ g) / (g @ g)
    assert abs(float(half.across) - np.linalg.norm(rest)) <= floor


def test_without_a_displacement_the_corrected_gradient_is_the_gradient():
    pair = pair_of(np.array([1.0, 2.0]), np.zeros(2))
    corrected = discrete_time.corrected(pair, 0.5, 0.0, pair)
    assert corrected.gradient_norm == pair.gradient_norm


# Undefined values -----------------------------------------------------------------------------------------

Y, G = np.array([1.0, 2.0, 3.0]), np.array([0.5, -0.25, 1.0])
CASES = {
    Status.EFFECTIVE: (Y, G, 0.5, True),
    Status.ORTHOGONAL: (np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0]), 0.5, True),
    Status.OBTUSE: (-Y, G, 0.5, True),
    Status.ZERO_UPDATE: (Y, 0 * G, 0.5, True),
    Status.ZERO_GRADIENT: (0 * Y, G, 0.5, True),
    Status.NON_FINITE: (Y * np.nan, G, 0.5, True),
    Status.NO_LEARNING_RATE: (Y, G, np.nan, True),
    Status.UNVERIFIABLE: (Y, G, 0.5, False),
}


@pytest.mark.parametrize("expected", CASES)
def test_every_status_is_reached_and_only_effective_updates_have_a_metric(expected):
    y, g, rate, verifiable = CASES[expected]
    with np.errstate(invalid="ignore"):
        products = np.array([[a @ b for b in (g * 0.5, -y, -y)] for a in (g * 0.5, -y, -y)])
    pair = geometry.pair(products, ("displacement", "gradient", "residual"), rate, 3)
    assert geometry.status(pair, rate, np.isfinite(y).all(), verifiable) == expected
    metrics = [geometry.condition_number(pair), geometry.similarity(pair), *geometry.eigenvalues(pair)]
    metrics += [*geometry.eigenvalue_bounds(pair), *geometry.family_eigenvalues(pair, [2.0])]
    metrics += [geometry.family_condition_number(pair, [2.0])]
    exists = expected in (Status.EFFECTIVE, Status.UNVERIFIABLE)
    assert all(np.isfinite(value).all() == exists for value in metrics)
    has_angle = expected in (Status.EFFECTIVE, Status.UNVERIFIABLE, Status.ORTHOGONAL, Status.OBTUSE)
    assert np.isfinite(geometry.angle(pair)) == np.isfinite(geometry.cosine(pair)) == has_angle


@pytest.mark.parametrize(
    ("y", "g", "rate", "first"),
    [
        (Y * np.nan, G, np.nan, Status.NON_FINITE),
        (Y * np.inf, G, 0.5, Status.NON_FINITE),
        (Y, G, 0.0, Status.NO_LEARNING_RATE),
        (Y, G, -1.0, Status.NO_LEARNING_RATE),
        (0 * Y, 0 * G, 0.5, Status.ZERO_GRADIENT),
    ],
)
def test_the_first_of_several_reasons_is_the_status(y, g, rate, first):
    with np.errstate(invalid="ignore"):
        products = np.array([[a @ b for b in (g, -y, -y)] for a in (g, -y, -y)])
    pair = geometry.pair(products, ("displacement", "gradient", "residual"), rate, 3)
    assert geometry.status(pair, rate, np.isfinite(y).all(), known=False) == first


def test_a_pair_that_overflows_or_underflows_has_a_separate_status():
    pair = Pair(np.array(np.inf), np.array(np.inf), np.array(1.0), np.array(3))
    assert geometry.status(pair, 0.5) == Status.OVERFLOW
    pair = Pair(np.array(geometry.NONZERO), np.array(0.0), np.array(1.0), np.array(3))
    assert geometry.status(pair, 0.5) == Status.UNDERFLOW
    assert np.isnan(geometry.angle(pair))
    # The gradient of an update of infinite norm is not known to be zero.
    pair = Pair(np.array(np.inf), np.array(0.0), np.array(0.0), np.array(3))
    assert geometry.status(pair, 0.5) == Status.OVERFLOW


def test_a_multiple_of_an_update_is_zero_only_if_the_update_is():
    pair = Pair(np.array([0.0, 1e-100]), np.array([0.0, 1.0]), np.array([1.0, 1.0]), np.array([3, 3]))
    smaller = geometry.scaled(pair, 1e-120)
    np.testing.assert_array_equal(smaller.update_square, [0.0, geometry.NONZERO])


def test_a_gradient_whose_products_underflow_is_not_zero():
    small = np.array(1e-218)
    parts = [Pair(*map(np.array, (1e298, 0.0, 0.0, 3))), Pair(np.array(1.0), small, np.array(0.0), np.array(1))]
    model = geometry.direct_sum(parts)
    for pair in (model, geometry.window(model[None], 1), geometry.scaled(model, 1e-110)):
        assert not pair.zero_gradient.any()
        assert (geometry.status(pair, 0.5) == Status.UNDERFLOW).all()


def test_a_condition_number_is_infinite_if_the_component_along_the_update_underflows():
    pair = Pair(*map(np.array, (1e264, 1e-207, 1e-52, 3)))
    assert geometry.status(pair, 0.5) == Status.EFFECTIVE
    assert geometry.condition_number(pair) == np.inf
    assert (geometry.family_condition_number(pair, [0.5, 1.0]) == np.inf).all()


@pytest.mark.parametrize(
    ("vector", "square"),
    [
        ([0.0, -0.0], 0.0),
        ([3.0, 4.0], 25.0),
        ([5e-324, 0.0], geometry.NONZERO),
        ([1e200, 1e-200], np.inf),
        ([np.inf, 1.0], np.nan),
        ([np.nan, 0.0], np.nan),
    ],
)
def test_the_square_of_a_vector_classifies_the_vector(vector, square):
    np.testing.assert_equal(float(geometry.squared_norm(vector)), square)


def test_a_scalar_that_does_not_move_keeps_its_gradient():
    y, g = np.array([2.0]), np.array([0.0])
    pair = pair_of(y, g)
    assert geometry.status(pair, 0.5) == Status.ZERO_UPDATE
    assert pair.gradient_norm == 2.0


# Errors of stored values -----------------------------------------------------------------------------------


@given(seed=st.integers(0, 200), update_error=st.floats(1e-9, 3), gradient_error=st.floats(1e-9, 3))
def test_errors_change_the_angle_by_at_most_its_uncertainty(seed, update_error, gradient_error):
    rng = np.random.default_rng(seed)
    y, g, y_error, g_error = rng.standard_normal((4, 3))
    moved = pair_of(
        y + gradient_error * y_error / np.linalg.norm(y_error), g + update_error * g_error / np.linalg.norm(g_error)
    )
    pair = pair_of(y, g)
    uncertainty = geometry.angle_uncertainty(pair, update_error, gradient_error)
    assert abs(geometry.angle(moved) - geometry.angle(pair)) <= uncertainty + 2 * promised_angle_error()


@pytest.mark.parametrize("error", [1.0, 2.0])
def test_an_error_as_long_as_the_vector_makes_the_angle_unknown(error):
    pair = Pair(*map(np.array, (1.0, 1.0, 0.0, 2)))
    assert geometry.angle_uncertainty(pair, error, 0.0) == np.pi


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rounding_of_the_states_stays_below_the_floor_of_the_displacement(dtype):
    rng = np.random.default_rng(1)
    before = rng.standard_normal(1000)
    after = before + 0.01 * rng.standard_normal(1000)
    stored = after.astype(dtype).astype(float) - before.astype(dtype).astype(float)
    roundoff = float(np.finfo(dtype).eps) / 2
    floor = geometry.displacement_floor(np.linalg.norm(before), np.linalg.norm(after - before), roundoff)
    error = np.linalg.norm(stored - (after - before))
    assert 0 < error <= floor


# The kernel and the formulas together ------------------------------------------------------------------------


def chain(parameter, gradient, learning_rate=1.0):
    """Compute the pair of one update with the kernel, from two states."""
    out = np.empty((1, 1, len(VECTORS), len(VECTORS)))
    ratio = np.empty((1, 1))
    gram.products([parameter], [gradient], np.array([0, parameter.shape[1]]), out, ratio)
    return geometry.pair(out[0, 0], VECTORS, learning_rate, parameter.shape[1])


def assert_chain_has_the_guaranteed_accuracy(parameter, gradient):
    """Compare the angle and condition number of a float64 run of two states with exact arithmetic."""
    pair = chain(parameter, gradient)
    with mp.workdps(60):
        _, displacement, y, _, _ = exact_vectors(parameter[0], parameter[1], gradient[0], gradient[1], 0.0)
        alignment, square = -exact_dot(y, displacement), exact_dot(displacement, displacement)
        across = mp.sqrt(exact_dot(y, y) - alignment**2 / square)
        psi = mp.atan2(across, alignment / mp.sqrt(square))
        assert abs(mpf(float(geometry.angle(pair))) - psi) <= promised_angle_error()
        if psi < mp.pi / 2:
            sine, cosine = mp.sin(psi), mp.cos(psi)
            condition = ((1 + sine) / cosine) ** 2
            assert relative_error(geometry.condition_number(pair), condition) <= promised_relative_error(cosine)


@pytest.mark.parametrize(
    ("size", "angle"),
    [
        *((size, angle) for size in (7, 5000) for angle in [*ANGLES[1::2], *OBTUSE[::2]]),
        *((100_000, angle) for angle in (1e-9, ANGLES[-1])),
    ],
)
def test_kernel_and_formulas_have_the_guaranteed_accuracy(size, angle):
    y, g = vectors_at(angle, size)
    rng = np.random.default_rng(4)
    before = rng.standard_normal(size)
    assert_chain_has_the_guaranteed_accuracy(np.stack([before, before + 1e-3 * g]), np.stack([-y, y]))


@pytest.mark.parametrize("share", [1e-7, 1e-10, 1e-13])
def test_a_segment_with_a_poor_sample_has_the_guaranteed_accuracy(share):
    size = 20_000
    rng = np.random.default_rng(0)
    g = rng.standard_normal(size)
    # Most elements hardly move and have another ratio; nearly all of |g| is in runs that the sample skips.
    sampled = np.zeros(size, dtype=bool)
    for k in range(16):
        start = k * (size - 64) // 15
        sampled[start : start + 64] = True
    g[sampled] *= share
    y = np.where(sampled, -3.0, 1.0) * g
    assert_chain_has_the_guaranteed_accuracy(np.stack([np.zeros(size), g]), np.stack([-y, y]))
