"""Compare the results of replicates with vectors, one mean at a time."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from natgrad.kernel import ledger_sums
from natgrad.kernel import replicates as kernel
from natgrad.kernel.ledger_sums import roundoff_bound
from natgrad.results import replicates
from natgrad.results.replicate_variables import REPLICATE_VARIABLES
from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout
from natgrad.schema.variables import Status
from natgrad.theory import geometry
from natgrad.theory.metric_operators import jackknife, pair_of, stochastic_metric
from reference import exact, vectors_at

SHAPES = {"wide": ((2, 2), "float64"), "plane": ((2,), "float64"), "line": ((1,), "float64")}
LAYOUT = Layout.from_shapes(SHAPES)
PARTS = [slice(tensor.offset, tensor.stop) for tensor in LAYOUT.tensors]


def drawn(seed, rows=3, count=5, spread=1.0, size=7):
    """Return gradients, displacements, hvps and changes of the loss of a noisy rule on a quadratic loss."""
    rng = np.random.default_rng(seed)
    hessian = rng.standard_normal((size, size))
    hessian = hessian + hessian.T
    gradient = rng.standard_normal((rows, size))
    displacement = 0.1 * (spread * rng.standard_normal((rows, count, size)) - gradient[:, None])
    hvp = displacement @ hessian
    change = (displacement @ gradient[..., None])[..., 0] + np.vecdot(displacement, hvp) / 2
    return gradient, displacement, hvp, change


def by_tensor(gradient, displacement, hvp=None):
    cut = [
        replicates.ledger(*(x[..., part] for x in (gradient, displacement, hvp) if x is not None)) for part in PARTS
    ]
    return np.stack(cut, axis=1)


def lost(y, vectors, kept=slice(None)):
    """Return the relative rounding error of products of a mean of some vectors.

    It is larger if this mean is shorter than its terms: the vectors, the mean of all, and the deviations from it.
    """
    mean = vectors.mean(axis=0)
    parts = np.linalg.norm(vectors[kept], axis=-1).mean() + np.linalg.norm(mean)
    parts += np.linalg.norm(vectors[kept] - mean, axis=-1).mean()
    return 16 * roundoff_bound(len(y)) * (parts / np.linalg.norm(vectors[kept].mean(axis=0))) ** 2


def angle_tolerance(y, updates, kept=slice(None)):
    """Return the error of an angle from plain products, in which across^2 has the rounding error of |y|^2."""
    sine = np.sin(float(geometry.angle(pair_of(y, updates[kept].mean(axis=0)))))
    relative = lost(y, updates, kept)
    return min(np.sqrt(relative), relative / sine if sine else np.inf)


@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.1, 1.0, 5.0]))
@settings(max_examples=30)
def test_all_results_are_those_of_the_mean_vectors(seed, spread):
    gradient, displacement, hvp, change = drawn(seed, spread=spread)
    rate = np.array([0.1, 0.2, 0.4])
    tree = replicates.label(
        by_tensor(gradient, displacement, hvp), LAYOUT, replicates=5, learning_rate=rate, loss_change=change
    )
    for name, part in {None: slice(None), **dict(zip(SHAPES, PARTS, strict=True))}.items():
        dataset = (tree["model"] if name is None else tree["tensor"].sel(tensor=name)).to_dataset()
        for row in range(3):
            at, y = dataset.isel(step=row), -gradient[row, part]
            updates, bent = displacement[row][:, part] / rate[row], hvp[row][:, part] / (2 * rate[row])
            mean, curvature = updates.mean(axis=0), bent.mean(axis=0)
            pair = pair_of(y, mean)
            tolerance = angle_tolerance(y, updates)
            assert float(at["angle"]) == pytest.approx(float(geometry.angle(pair)), abs=tolerance)
            scale = np.linalg.norm(y) * np.linalg.norm(mean)
            assert float(at["alignment"]) == pytest.approx(y @ mean, abs=lost(y, updates) * scale)
            assert int(at["status"]) == (Status.EFFECTIVE if y @ mean > 0 else Status.OBTUSE)
            assert bool(at["effective"]) == (y @ mean > 0)
            for index, update in enumerate(updates):
                expected = float(geometry.angle(pair_of(y, update)))
                tolerance = angle_tolerance(y, updates, [index])
                assert float(at["replicate_angle"][index]) == pytest.approx(expected, abs=tolerance)
            _, error = jackknife(lambda mean, y=y: geometry.angle(pair_of(y, mean)), updates)
            worst = max(angle_tolerance(y, updates, np.arange(5) != index) for index in range(5))
            # The root of four times a mean square of five differences of angles.
            assert float(at["angle_error"]) == pytest.approx(float(error), abs=4 * worst)
            # The definiteness of eq. (19) compared with the operator, which refuses matrices that are not definite.
            try:
                metric = stochastic_metric(y, mean, curvature, rate[row])
            except InputError:
                assert not at["stochastic_definite"]
                continue
            assert at["stochastic_definite"]
            discrete = y - rate[row] * curvature
            parts = np.linalg.norm(y) + rate[row] * np.linalg.norm(bent, axis=-1).mean()
            cosine = float(geometry.cosine(pair_of(discrete, mean)))
            tolerance = lost(y, updates) * (parts / np.linalg.norm(discrete)) ** 2 / cosine
            assert float(at["stochastic_alpha"]) == pytest.approx(metric.alpha, rel=4 * tolerance)
        if name is None:
            decrease, error = jackknife(lambda mean: -mean, change.T)
            assert dataset["loss_decrease"].values == pytest.approx(decrease)
            assert dataset["loss_decrease_error"].values == pytest.approx(error)


def test_eq_19_is_definite_up_to_the_bound_of_the_learning_rate_and_not_above():
    seen = 0
    for seed in range(40):
        gradient, displacement, hvp, _ = drawn(seed, rows=1)
        gram = by_tensor(gradient, displacement, hvp)
        at = replicates.label(gram, LAYOUT, replicates=5, learning_rate=0.1)["model"].to_dataset().isel(step=0)
        bound, alpha = float(at["learning_rate_bound"]), float(at["stochastic_alpha"])
        y, mean, curvature = -gradient[0], displacement[0].mean(axis=0) / 0.1, hvp[0].mean(axis=0) / 0.2
        if not (np.isfinite(bound) and curvature @ mean < 0):
            continue
        seen += 1
        for share, definite in ((0.99, True), (1.01, False)):
            eta = share * bound
            discrete = y - eta * curvature
            flat = np.eye(7) - np.outer(mean, mean) / (mean @ mean)
            matrix = np.outer(discrete, discrete) / (discrete @ mean) + alpha * flat
            matrix += eta * np.outer(curvature, curvature) / (curvature @ mean)
            assert (np.linalg.eigvalsh(matrix)[0] > 0) == definite
    assert seen >= 5


def test_a_rule_may_descend_on_average_although_its_mean_update_does_not():
    # Erratum 3: two replicates that jump in opposite directions along a concave direction, and slightly uphill on
    # average.
    hessian, theta, rate = np.diag([1.0, -4.0]), np.array([1.0, 0.0]), 0.1
    displacement = rate * np.array([[0.2, 3.0], [0.2, -3.0]])
    gradient, hvp = hessian @ theta, displacement @ hessian
    change = [(theta + p) @ hessian @ (theta + p) / 2 - theta @ hessian @ theta / 2 for p in displacement]
    layout = Layout.from_shapes({"theta": ((2,), "float64")})
    gram = replicates.ledger(gradient, displacement, hvp)[None, None]
    tree = replicates.label(gram, layout, replicates=2, learning_rate=rate, loss_change=[change])
    model = tree["model"].to_dataset().isel(step=0)
    assert float(model["loss_decrease"]) == pytest.approx(0.1598)
    assert int(model["status"]) == Status.OBTUSE
    assert not model["stochastic_definite"]
    assert np.isnan(model["condition_number"])


def test_tensors_add_up_and_every_variable_is_described():
    gradient, displacement, hvp, change = drawn(1)
    gram = by_tensor(gradient, displacement, hvp)
    # Each tensor has its own ratio of the residual.
    together = replicates.ledger(gradient, displacement, hvp)
    keep = np.ix_(range(3), *2 * [np.delete(np.arange(gram.shape[-1]), 2)])
    np.testing.assert_allclose(gram.sum(axis=1)[keep], together[keep], atol=1e-12)
    np.testing.assert_allclose(together[:, 2, 1], 0.0, atol=1e-14)
    tree = replicates.label(gram, LAYOUT, replicates=5, learning_rate=0.1, steps=[3, 4, 9], loss_change=change)
    assert set(tree["model"].data_vars) == set(REPLICATE_VARIABLES)
    assert tree["tensor"]["tensor"].values.tolist() == list(SHAPES)
    assert tree["model"]["step"].values.tolist() == [3, 4, 9]
    assert tree["tensor"]["replicate_angle"].dims == ("step", "tensor", "replicate")
    for group in ("model", "tensor"):
        for variable in tree[group].data_vars.values():
            assert all(variable.attrs[key] for key in ("long_name", "units", "equation"))


def test_without_hvps_only_the_metric_19_is_not_known():
    gradient, displacement, hvp, _ = drawn(2)
    without = replicates.label(by_tensor(gradient, displacement), LAYOUT, replicates=5, learning_rate=0.1)
    with_hvp = replicates.label(by_tensor(gradient, displacement, hvp), LAYOUT, replicates=5, learning_rate=0.1)
    for group in ("model", "tensor"):
        for name in ("stochastic_weight", "stochastic_alpha", "learning_rate_bound"):
            assert np.isnan(without[group][name]).all()
        assert not without[group]["stochastic_definite"].any()
        for name in ("angle", "alignment", "condition_number", "angle_error", "replicate_angle"):
            xr.testing.assert_allclose(without[group][name], with_hvp[group][name])


@given(
    seed=st.integers(0, 1000),
    angle=st.sampled_from([0.0, 1e-13, 1e-11, 1e-9, 1e-8, 1e-7, 1e-4, 1.0]),
    spread=st.sampled_from([0.0, 1e-6, 0.1, 1.0]),
    sign=st.sampled_from([1.0, -1.0]),
    size=st.sampled_from([7, 3000]),
)
@settings(max_examples=25)
def test_the_angle_of_the_mean_is_as_accurate_as_promised(seed, angle, spread, sign, size):
    rng = np.random.default_rng(seed)
    y, g = vectors_at(angle, size, seed)
    noise = rng.standard_normal((4, size))
    states = sign * g + spread * (noise - noise.mean(axis=0))
    # Of two tensors, each in two segments that are added up.
    cuts = np.array([0, size // 4, size // 2, size - 2, size])
    layout = Layout.from_shapes({"a": ((size // 2,), "float64"), "b": ((size - size // 2,), "float64")})
    gram = np.empty((1, 4, 7, 7))
    kernel.replicate_products([np.zeros((1, size))], [-y[None]], [[state[None]] for state in states], cuts, gram)
    gram = ledger_sums.add_replicates(2, np.array([0, 0, 1, 1]), gram)
    tree = replicates.label(gram, layout, replicates=4, learning_rate=1.0)
    parts = {None: slice(None), "a": slice(0, size // 2), "b": slice(size // 2, size)}
    for name, part in parts.items():
        at = (tree["model"] if name is None else tree["tensor"].sel(tensor=name)).to_dataset().isel(step=0)
        with mp.workdps(60):
            mean = [mp.fsum(column) / 4 for column in zip(*map(exact, states[:, part]), strict=True)]
            minus = exact(y[part])
            along, length = mp.fdot(minus, mean), mp.norm(mean)
            across = mp.norm([a - along / length**2 * b for a, b in zip(minus, mean, strict=True)])
            psi = mp.atan2(across, along / length)
            # The mean of float64 numbers is also rounded: by up to six units of the mean length of the replicates.
            lengths = sum(np.linalg.norm(state[part]) for state in states) / 4
            rounding = 6 * 2.0**-53 * lengths / float(length)
            assert abs(mpf(float(at["angle"])) - psi) <= 1e-13 + rounding


def test_replicates_near_the_gradient_are_almost_as_accurate_as_their_mean():
    rng = np.random.default_rng(0)
    y, g = vectors_at(1e-6, 50)
    noise = rng.standard_normal((4, 50))
    states = g + 1e-7 * (noise - noise.mean(axis=0))
    gram = np.empty((1, 1, 7, 7))
    kernel.replicate_products(
        [np.zeros((1, 50))], [-y[None]], [[state[None]] for state in states], np.array([0, 50]), gram
    )
    layout = Layout.from_shapes({"w": ((50,), "float64")})
    tree = replicates.label(gram, layout, replicates=4, learning_rate=1.0)
    found = tree["model"]["replicate_angle"].squeeze().values
    for angle, state in zip(found, states, strict=True):
        with mp.workdps(60):
            minus, update = exact(y), exact(state)
            along, length = mp.fdot(minus, update), mp.norm(update)
            across = mp.norm([a - along / length**2 * b for a, b in zip(minus, update, strict=True)])
            psi = mp.atan2(across, along / length)
        # Products of the residual are off by 1e-14 of its square, which is about the square of the angle: the angle
        # by up to the root of four times that. Without the residual it would be off by 2e-7.
        assert abs(mpf(float(angle)) - psi) <= 2e-7 * max(psi, 1e-6) + 1e-13


def test_replicates_that_underflow_or_overflow_are_not_zero_and_not_infinite():
    rng = np.random.default_rng(0)
    gradient, draws = rng.standard_normal(5), rng.standard_normal((3, 5))
    cases = {
        Status.UNDERFLOW: (gradient, draws * 1e-200),
        Status.OVERFLOW: (gradient * 1e200, draws),
        Status.ZERO_UPDATE: (gradient, 0 * draws),
        Status.ZERO_GRADIENT: (0 * gradient, draws),
        Status.NON_FINITE: (gradient, np.where(np.arange(5) == 3, np.inf, draws)),
    }
    layout = Layout.from_shapes({"w": ((5,), "float64")})
    for expected, (slope, states) in cases.items():
        gram = np.empty((1, 1, 6, 6))
        kernel.replicate_products(
            [np.zeros((1, 5))], [slope[None]], [[state[None]] for state in states], np.array([0, 5]), gram
        )
        with np.errstate(invalid="ignore"):
            by_numpy = replicates.ledger(slope, states)[None, None]
        for products in (gram, by_numpy):
            tree = replicates.label(products, layout, replicates=3, learning_rate=0.5)
            for group in ("model", "tensor"):
                at = tree[group].to_dataset().squeeze()
                assert Status(int(at["status"])) == expected
                assert np.isnan([float(at["angle"]), *at["replicate_angle"].values]).all()


def test_one_replicate_has_no_standard_error():
    gradient, displacement, hvp, _ = drawn(3, count=1)
    tree = replicates.label(by_tensor(gradient, displacement, hvp), LAYOUT, replicates=1, learning_rate=0.1)
    assert np.isnan(tree["model"]["angle_error"]).all()
    assert np.isfinite(tree["model"]["angle"]).all()


def test_shapes_that_do_not_match_are_an_error():
    gradient, displacement, hvp, change = drawn(4)
    with pytest.raises(InputError, match=r"shapes of the gradient .* do not match"):
        replicates.ledger(gradient, displacement[..., :3])
    with pytest.raises(InputError, match=r"shapes of the gradient .* do not match"):
        replicates.ledger(gradient, displacement, hvp[:, :2])
    gram = by_tensor(gradient, displacement, hvp)
    with pytest.raises(InputError, match="does not match 4 replicates and 3 tensors"):
        replicates.label(gram, LAYOUT, replicates=4, learning_rate=0.1)
    with pytest.raises(InputError, match="a learning rate is not positive"):
        replicates.label(gram, LAYOUT, replicates=5, learning_rate=[0.1, 0.0, 0.1])
    with pytest.raises(InputError, match=r"pass one value for each update and replicate, shape \(3, 5\)"):
        replicates.label(gram, LAYOUT, replicates=5, learning_rate=0.1, loss_change=change[:2])
