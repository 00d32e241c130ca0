"""Test discrete gradients of objectives: eq. (12) for each, and known values."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from natgrad.schema.errors import InputError
from natgrad.theory import discrete_gradients
from natgrad.theory.discrete_gradients import (
    gonzalez,
    identity_residual,
    itoh_abe,
    mean_value,
    taylor,
    taylor_points,
)
from natgrad.theory.metric_operators import Metric

U = 2.0**-53


class Quartic:
    """L = theta' A theta / 2 + b.theta + sum(w theta^4) + sin(u.theta), with all derivatives."""

    def __init__(self, size, seed, strength=1.0):
        rng = np.random.default_rng(seed)
        square = rng.standard_normal((size, size))
        self.hessian, self.slope = square + square.T, rng.standard_normal(size)
        self.weights, self.wave = strength * rng.standard_normal((2, size))

    def loss(self, x):
        quadratic = x @ self.hessian @ x / 2.0 + self.slope @ x
        return float(quadratic + self.weights @ x**4 + np.sin(self.wave @ x))

    def gradient(self, x):
        return self.hessian @ x + self.slope + 4.0 * self.weights * x**3 + np.cos(self.wave @ x) * self.wave

    def hvp(self, x, v):
        bent = -np.sin(self.wave @ x) * (self.wave @ v) * self.wave
        return self.hessian @ v + 12.0 * self.weights * x**2 * v + bent

    def rounding(self, *states):
        """Error of a loss at one of the states: a few roundings of each of its D^2 + 3 D terms."""
        sizes = [np.abs(x) for x in states]
        terms = [
            x @ np.abs(self.hessian) @ x
            + np.abs(self.slope) @ x
            + np.abs(self.weights) @ x**4
            + 1.0
            + np.abs(self.wave) @ x
            for x in sizes
        ]
        return (len(states[0]) + 8) * U * max(terms)


MAKES = {
    "gonzalez": lambda f, *states: gonzalez(f.loss, f.gradient, *states),
    "mean_value": lambda f, *states: mean_value(f.loss, f.gradient, *states),
    "itoh_abe": lambda f, *states: itoh_abe(f.loss, f.gradient, *states),
    "taylor": lambda f, *states: taylor(f.loss, f.gradient, f.hvp, *states),
}
segments = st.tuples(st.integers(1, 4), st.integers(0, 10_000), st.sampled_from([1e-3, 0.1, 1.0, 3.0]))


def segment(size, seed, length):
    rng = np.random.default_rng([seed, 1])
    theta = rng.standard_normal(size)
    return theta, theta + length * rng.standard_normal(size)


@pytest.mark.parametrize("make", MAKES)
@given(drawn=segments)
def test_every_discrete_gradient_explains_the_change_of_loss(make, drawn):
    size, seed, length = drawn
    function, (start, end) = Quartic(size, seed), segment(*drawn)
    discrete = MAKES[make](function, start, end)
    change = function.loss(end) - function.loss(start)
    # The rounding of the losses, of an inner product and of theta1 - theta0, and the tolerance of the quadrature.
    scale = np.abs(discrete) @ (np.abs(start) + np.abs(end))
    bound = 8 * function.rounding(start, end) + 8 * size * U * scale + 2e-12 * np.linalg.norm(discrete) * length * 8
    assert discrete @ (end - start) == pytest.approx(change, abs=bound)
    assert abs(identity_residual(function.loss, discrete, start, end)) <= bound / abs(change) + 4 * U


@pytest.mark.parametrize("make", MAKES)
@given(size=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_every_discrete_gradient_converges_to_the_gradient_linearly(make, size, seed):
    function, (start, end) = Quartic(size, seed), segment(size, seed, 1.0)
    gradient, direction = function.gradient(start), (end - start) / np.linalg.norm(end - start)
    # A bound on the curvature within a step of length 1.
    reach = np.abs(start) + 1.0
    curvature = np.linalg.norm(function.hessian, 2) + 12 * (np.abs(function.weights) * reach**2).max()
    curvature += function.wave @ function.wave
    for length in 2.0 ** -np.arange(1, 20, 3):
        step = start + length * direction
        off = np.linalg.norm(MAKES[make](function, start, step) - gradient)
        shortest = np.abs(step - start).min() if make == "itoh_abe" else length
        # The error of a difference quotient is the rounding of the losses divided by the length of the move.
        assert off <= 2 * np.sqrt(size) * curvature * length + 16 * size * function.rounding(start, step) / shortest
    assert np.array_equal(MAKES[make](function, start, start), gradient)


@given(size=st.integers(1, 4), seed=st.integers(0, 10_000), length=st.sampled_from([0.01, 1.0]))
def test_all_except_itoh_abe_are_the_gradient_at_the_midpoint_of_a_quadratic_loss(size, seed, length):
    function, (start, end) = Quartic(size, seed, strength=0.0), segment(size, seed, length)
    middle = function.gradient((start + end) / 2.0)
    step = np.linalg.norm(end - start)
    assume(step > 0)
    bound = 16 * function.rounding(start, end) / step + 1e-12 * np.linalg.norm(middle)
    for make in ("gonzalez", "mean_value", "taylor"):
        assert np.linalg.norm(MAKES[make](function, start, end) - middle) <= bound
    assert taylor_points(function.loss, function.gradient, function.hvp, start, end).tolist() == [0.5]


def test_itoh_abe_has_the_known_value_for_a_product():
    # L = x y from (1, 2) to (3, 5): (L(3, 2) - L(1, 2)) / 2, then (L(3, 5) - L(3, 2)) / 3.
    discrete = itoh_abe(lambda x: x[0] * x[1], lambda x: x[::-1], [1.0, 2.0], [3.0, 5.0])
    assert discrete.tolist() == [2.0, 3.0]
    # A coordinate that does not change has its derivative at the current values of the others.
    assert itoh_abe(lambda x: x[0] * x[1], lambda x: x[::-1], [1.0, 2.0], [3.0, 2.0]).tolist() == [2.0, 3.0]


def test_the_mean_value_of_a_cubic_is_that_of_simpsons_rule():
    # The gradient 3 x^2 is integrated exactly by Simpson's rule, and by x^3 at the ends: 7 / 1.
    assert mean_value(lambda x: x[0] ** 3, lambda x: 3 * x**2, [1.0], [2.0])[0] == pytest.approx(7.0, rel=1e-12)


def test_lambda_of_a_quartic_is_the_point_of_mean_curvature():
    # L = x^4 from 1 to 1 + p: 12 (1 + lambda p)^2 = 12 + 8 p + 2 p^2.
    for p in (0.5, -0.3, 2.0):
        found = taylor_points(lambda x: x[0] ** 4, lambda x: 4 * x**3, lambda x, v: 12 * x**2 * v, [1.0], [1.0 + p])
        assert found == pytest.approx([(np.sqrt(1 + 2 * p / 3 + p**2 / 6) - 1) / p], rel=1e-13)


def test_all_three_values_of_lambda_in_the_errata_are_found():
    def loss(x):
        return float(x[0] ** 5 / 20 - x[0] ** 4 / 8 + x[0] ** 3 / 10)

    def gradient(x):
        return x**4 / 4 - x**3 / 2 + 3 * x**2 / 10

    def hvp(x, v):
        return (x**3 - 1.5 * x**2 + 0.6 * x) * v

    found = taylor_points(loss, gradient, hvp, [0.0], [1.47])
    assert len(found) in (1, 3)
    second = 1.47**3 / 10 - 1.47**2 / 4 + 1.47 / 5
    roots = np.roots([1, -1.5, 0.6, -second]).real / 1.47
    for share in found:
        assert np.abs(roots - share).min() <= 1e-9
    assert len(taylor_points(loss, gradient, hvp, [0.0], [1.49])) == 1


def test_lambda_of_functions_in_single_precision_has_their_error():
    def single(function):
        return lambda *arguments: np.float32(function(*map(np.float32, arguments)))

    functions = (single(lambda x: x[0] ** 4), single(lambda x: 4 * x**3), single(lambda x, v: 12 * x**2 * v))
    with pytest.raises(InputError, match="no lambda"):
        taylor_points(*functions, [1.0], [1.3])
    (found,) = taylor_points(*functions, [1.0], [1.3], unit=2.0**-24)
    # The curvature rounds to 4 u; lambda has this error, divided by the relative slope of the curvature, 2 p.
    assert abs(found - (np.sqrt(1 + 0.2 + 0.015) - 1) / 0.3) <= 8 * 2.0**-24 / 0.6


@given(drawn=segments)
def test_equation_15_holds_with_every_discrete_gradient(drawn):
    size, seed, _ = drawn
    function, (start, end) = Quartic(size, seed), segment(*drawn)
    change = function.loss(end) - function.loss(start)
    assume(change < -1e-6)
    update = (end - start) / 0.5
    for make in MAKES.values():
        metric = Metric(-make(function, start, end), update)
        values, _ = metric.eigenvalues()
        assert values[-1] > 0
        # As accurate as solving with a metric of this condition number.
        bound = 64 * size * U * metric.condition_number() * np.linalg.norm(update)
        assert np.linalg.norm(metric.solve(-make(function, start, end)) - update) <= bound


def test_an_invalid_objective_is_an_error():
    good = Quartic(2, 0)
    start, end = np.zeros(2), np.ones(2)
    with pytest.raises(InputError, match="two vectors of equal length"):
        gonzalez(good.loss, good.gradient, start, np.ones(3))
    with pytest.raises(InputError, match="a state is not finite"):
        gonzalez(good.loss, good.gradient, start, end * np.nan)
    with pytest.raises(InputError, match="the loss is inf"):
        itoh_abe(lambda x: np.inf, good.gradient, start, end)
    with pytest.raises(InputError, match="is not a finite vector of 2 elements"):
        mean_value(good.loss, lambda x: 1.0, start, end)
    with pytest.raises(InputError, match="is not a finite vector of 2 elements"):
        gonzalez(good.loss, lambda x: x * np.nan, start, end)


def test_a_gradient_of_another_loss_has_no_lambda():
    good = Quartic(2, 0, strength=0.0)
    with pytest.raises(InputError, match=r"no lambda of eq\. \(11\) was found"):
        taylor_points(good.loss, lambda x: good.gradient(x) + 1.0, good.hvp, np.zeros(2), np.ones(2))


def test_a_curvature_that_jumps_over_zero_has_no_root():
    # L = |x| x: the curvature is -2 or 2, and from -1 to 3 neither satisfies eq. (11).
    with pytest.raises(InputError, match=r"no lambda of eq\. \(11\) was found"):
        taylor_points(
            lambda x: float(abs(x[0]) * x[0]),
            lambda x: 2 * np.abs(x),
            lambda x, v: 2 * np.sign(x) * v,
            [-1.0],
            [3.0],
        )


def test_a_gradient_that_cannot_be_integrated_is_an_error():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="the mean gradient has the norm"):
        mean_value(lambda x: 0.0, lambda x: rng.standard_normal(1), [0.0], [1.0])


def test_the_residual_is_nan_if_the_loss_does_not_change():
    assert np.isnan(identity_residual(lambda x: 1.0, [0.0], [0.0], [1.0]))
    assert identity_residual(lambda x: float(x[0]), [1.5], [0.0], [2.0]) == 0.5
    assert set(discrete_gradients.__all__) == {*MAKES, "identity_residual", "taylor_points"}


def test_the_taylor_discrete_gradient_uses_the_smallest_of_several_lambda():
    # L = -cos(4 pi x) + x^2 y / 2 from (0, 0) to (1, 0): the second element of the product is lambda.
    frequency = 4 * np.pi

    def loss(v):
        return float(-np.cos(frequency * v[0]) + v[0] ** 2 * v[1] / 2)

    def gradient(v):
        return np.array([frequency * np.sin(frequency * v[0]) + v[0] * v[1], v[0] ** 2 / 2])

    def hvp(v, p):
        return np.array([[frequency**2 * np.cos(frequency * v[0]) + v[1], v[0]], [v[0], 0.0]]) @ p

    start, end = np.zeros(2), np.array([1.0, 0.0])
    points = taylor_points(loss, gradient, hvp, start, end)
    assert len(points) > 1
    assert taylor(loss, gradient, hvp, start, end)[1] == pytest.approx(points[0] / 2, rel=1e-15)
