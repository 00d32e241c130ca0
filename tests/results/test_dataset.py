"""Compare labelled results with the definition: complete vectors, one update at a time."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from lazy import Lazy
from logs import random_walk
from natgrad.kernel import gram
from natgrad.results import dataset
from natgrad.results.inputs import Optimizer, UpdateTable
from natgrad.results.recovery import Recovery
from natgrad.results.variables import METRIC_BITS, NORM_BITS, VARIABLES
from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout
from natgrad.schema.names import DESCENTS, HESSIAN_NUMBERS, ledger_vectors
from natgrad.schema.variables import ShiftedMetric, Status
from natgrad.schema.version import RESULTS_VERSION, __version__
from natgrad.store import open_store
from natgrad.theory import geometry
from natgrad.theory.metric_operators import Metric
from reference import assert_same_pair, exact, exact_dot, exact_vectors, pair_of, promised_relative_error

figure = Lazy("matplotlib.figure")

TENSORS = {"wide": (3, 4), "line": (), "plane": (2,)}


def table_of(states, numbers=None, learning_rate=None, dtype="float64"):
    """Compute the UpdateTable of a log for `dataset.label`, with the kernel on complete vectors."""
    shapes = {k.partition("/")[2]: (np.shape(v), dtype) for k, v in states[0].items() if k.startswith("parameter/")}
    layout = Layout.from_shapes(shapes)
    parameter, gradient = (
        np.stack([np.concatenate([np.ravel(s[f"{kind}/{name}"]) for name in shapes]) for s in states])
        for kind in ("parameter", "gradient")
    )
    starts = np.array([tensor.offset for tensor in layout.tensors] + [layout.elements])
    hvp = None
    if f"hvp/{layout.names[0]}" in states[0]:
        hvp = [np.stack([np.concatenate([np.ravel(s[f"hvp/{name}"]) for name in shapes]) for s in states])]
    vectors = ledger_vectors(hvp=hvp is not None)
    products = np.empty((len(states) - 1, len(shapes), len(vectors), len(vectors)))
    gram.products([parameter], [gradient], starts, products, np.empty(products.shape[:2]), hvp)
    steps = np.array(numbers or range(len(states)))
    logged = np.array([s["learning_rate"] for s in states[:-1]])
    return UpdateTable(
        gram=products,
        vectors=vectors,
        layout=layout,
        steps=steps[:-1],
        spans=np.diff(steps),
        loss=np.array([s["loss"] for s in states[:-1]]),
        next_loss=np.array([s["loss"] for s in states[1:]]),
        learning_rate=logged if learning_rate is None else np.asarray(learning_rate, dtype=float),
        dtypes={"gradient": dtype, "hvp": dtype},
    )


def walk(steps=6, dtype="float64", **options):
    return random_walk(steps, TENSORS, dtype, learning_rate=0.25, **options)


def update_of(states, row, tensor=None, span=1, learning_rate=0.25):
    """Return the negative gradient and the update of a step, for a tensor or for the model."""
    names = [tensor] if tensor else list(TENSORS)

    def vector(kind, state):
        return np.concatenate([np.ravel(np.float64(state[f"{kind}/{name}"])) for name in names])

    displacement = vector("parameter", states[row + 1]) - vector("parameter", states[row])
    return -vector("gradient", states[row]), displacement / (span * learning_rate)


def assert_results_of(at, y, g):
    """Compare the results of an update with explicit vectors. The norm is rounded."""
    assert_same_pair(at["update_norm"] ** 2, at["alignment"], at["angle"], y, g, rounding=2.0**-NORM_BITS)


@pytest.mark.parametrize("tensor", [None, *TENSORS])
def test_every_result_is_computed_from_the_pair_of_its_update(tensor):
    states = walk()
    tree = dataset.label(table_of(states))
    group = tree["model"] if tensor is None else tree["tensor"].sel(tensor=tensor)
    for row in range(5):
        at = group.to_dataset().isel(step=row).sel(descent="gradient", window=1)
        y, g = update_of(states, row, tensor)
        pair = pair_of(y, g)
        assert_results_of(at, y, g)
        expected = {
            "condition_number": geometry.condition_number(pair),
            "eigenvalue_max": geometry.eigenvalues(pair)[0],
            "eigenvalue_mid": geometry.eigenvalues(pair)[1],
            "eigenvalue_min": geometry.eigenvalues(pair)[2],
            "eigenvalue_max_infimum": geometry.eigenvalue_bounds(pair)[0],
            "eigenvalue_min_supremum": geometry.eigenvalue_bounds(pair)[1],
            "similarity": geometry.similarity(pair),
        }
        effective = y @ g > 0
        assert bool(at["effective"]) == effective
        assert int(at["status"]) == (Status.EFFECTIVE if effective else Status.OBTUSE)
        # The guaranteed error of the angle is 1e-13, and the derivative of kappa with respect to it is 2 kappa /
        # cos psi. Values are rounded.
        relative = 4e-13 / abs(float(geometry.cosine(pair))) + 2.0 ** -(METRIC_BITS + 1)
        for name, value in expected.items():
            np.testing.assert_allclose(at[name], value if effective else np.nan, rtol=relative, err_msg=name)


def test_the_last_state_has_no_update_and_spans_are_reported():
    states = walk(4)
    tree = dataset.label(table_of(states, numbers=[0, 10, 20, 50]))
    model = tree["model"].to_dataset().sel(window=1, descent="gradient")
    assert model["step"].values.tolist() == [0, 10, 20]
    assert model["step_span"].values.tolist() == [10, 10, 30]
    for row, span in enumerate([10, 10, 30]):
        y, g = update_of(states, row, span=span)
        at = model.isel(step=row)
        assert_results_of(at, y, g)


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_a_window_is_the_extended_state_of_the_averaged_loss(m):
    states = walk(6)
    loss = np.array([s["loss"] for s in states])
    model = dataset.label(table_of(states), windows=[m])["model"].to_dataset().sel(window=m, descent="gradient")
    for row in range(6 - m):
        ys, gs = zip(*(update_of(states, i) for i in range(row, row + m)), strict=True)
        at = model.isel(step=row)
        y, g = np.concatenate(ys) / m, np.concatenate(gs)
        assert_results_of(at, y, g)
        np.testing.assert_allclose(at["loss_average"], loss[row : row + m].mean(), rtol=m * 2.0**-52)
        assert at["loss_decrease"] == loss[row] - loss[row + m]
    incomplete = model.isel(step=slice(6 - m, None))
    assert (incomplete["status"] == Status.UNVERIFIABLE).all()
    for name in ("angle", "loss_average", "loss_decrease", "condition_number", "update_norm"):
        assert np.isnan(incomplete[name]).all()


def test_a_window_is_natural_gradient_descent_of_the_averaged_loss_in_the_extended_state():
    # By brute force: the state (theta_t, .., theta_{t+m-1}), the gradient of its mean loss, the dense metric.
    states = random_walk(5, {"w": (2,)}, "float64", learning_rate=0.25)
    thetas = np.stack([s["parameter/w"] for s in states])
    for m in (1, 2, 3):
        model = dataset.label(table_of(states), windows=[m])["model"].to_dataset()
        effective = 0
        for row in range(5 - m):
            at = model.isel(step=row).sel(descent="gradient", window=m)
            with mp.workdps(60):
                before, after = exact(thetas[row : row + m]), exact(thetas[row + 1 : row + 1 + m])

                def averaged(extended, m=m):
                    return sum(x * x for x in extended) / (2 * m)

                # The gradient by central differences, which are exact for a quadratic.
                y = [
                    averaged([x - (i == k) for i, x in enumerate(before)])
                    - averaged([x + (i == k) for i, x in enumerate(before)])
                    for k in range(2 * m)
                ]
                y = mp.matrix([value / 2 for value in y])
                g = mp.matrix([4 * (b - a) for a, b in zip(before, after, strict=True)])
                alignment, lengths = (y.T * g)[0], mp.norm(y) * mp.norm(g)
                assert float(abs(mp.acos(alignment / lengths) - mpf(float(at["angle"])))) <= 1e-13
                assert bool(at["effective"]) == (alignment > 0)
                if alignment <= 0:
                    continue
                effective += 1
                weight = (y.T * y)[0] / alignment
                metric = y * y.T / alignment + weight * (mp.eye(2 * m) - g * g.T / (g.T * g)[0])
                values = sorted(mp.eigsy(metric, eigvals_only=True))
                tolerance = promised_relative_error(alignment / lengths)
                assert float(at["condition_number"]) == pytest.approx(float(values[-1] / values[0]), rel=tolerance)
                assert float(at["eigenvalue_min"]) == pytest.approx(float(values[0]), rel=tolerance)
        assert effective


def test_the_corrected_gradient_explains_the_change_of_loss_of_the_model():
    states = walk()
    tree = dataset.label(table_of(states), windows=[1, 3])
    corrected = tree["model"].to_dataset().sel(descent="corrected")
    loss = np.array([s["loss"] for s in states])
    np.testing.assert_allclose(0.25 * corrected["alignment"].sel(window=1), loss[:-1] - loss[1:], rtol=2.0**-48)
    residual = corrected["discrete_identity_residual"]
    # A window adds three such terms, whose sum may be smaller than each of them.
    cancelled = np.abs(np.diff(loss)).sum() / np.abs(corrected["loss_decrease"]).min()
    assert (np.abs(residual.sel(window=1)) <= 2.0**-48).all()
    assert (np.abs(residual.sel(window=3).dropna("step")) <= 2.0**-48 * float(cancelled)).all()
    plain = tree["model"].to_dataset().sel(descent="gradient", window=1)
    y, g = update_of(states, 0)
    decrease = loss[0] - loss[1]
    expected = (0.25 * (y @ g) - decrease) / abs(decrease)
    np.testing.assert_allclose(plain["discrete_identity_residual"][0], expected, rtol=2.0**-44)
    shares = tree["tensor"].to_dataset().sel(descent="corrected", window=1)["alignment"].sum("tensor")
    np.testing.assert_allclose(shares, corrected["alignment"].sel(window=1), rtol=2.0**-44)


def test_the_family_of_the_results_has_its_minimum_at_gamma_one():
    states, _ = quadratic_walk()
    grid = np.geomspace(1e-4, 1e4, 17)
    tensors = dataset.label(table_of(states), gammas=grid)["tensor"].to_dataset()
    conditions = tensors["family_condition_number"].where(tensors["effective"], drop=True)
    best = conditions.idxmin("gamma").values
    effective = np.isfinite(best)
    # A scalar has the condition number 1 for every gamma.
    several = np.broadcast_to((tensors["tensor"] != "line").values[:, None, None], best.shape[1:])
    assert effective[:, several].any()
    assert (best[:, several][effective[:, several]] == grid[8]).all()
    at_one = conditions.isel(gamma=8)
    np.testing.assert_allclose(at_one, tensors["condition_number"].where(tensors["effective"]), rtol=1e-12)
    # There alpha is the infimum of Prop. 3, which is the eigenvalue of multiplicity D - 2.
    wide = tensors.sel(tensor="wide")
    np.testing.assert_allclose(wide["eigenvalue_mid"], wide["eigenvalue_max_infimum"], rtol=2.0**-50)


# Learning rates ----------------------------------------------------------------------------------------------


def dense_metric(y, g, gamma=1.0):
    return Metric(y, g, gamma=gamma).to_dense()


@given(seed=st.integers(0, 500), rate=st.sampled_from([0.05, 0.5, 1.5]), m=st.sampled_from([1, 2]))
@settings(max_examples=40)
def test_the_shifted_metric_agrees_with_dense_matrices_of_the_extended_state(seed, rate, m):
    states, hessian = quadratic_walk(4, seed, rate=rate, noise=2.0)
    least = np.full(3, np.linalg.eigvalsh(hessian)[0])
    tree = dataset.label(replace(table_of(states), hessian_min_eigenvalue=least), windows=[m])
    model = tree["model"].to_dataset().sel(window=m)
    assert "shifted_metric" not in tree["tensor"]
    blocks = np.kron(np.eye(m), hessian / 2 / m)
    for row in range(4 - m):
        at = model.isel(step=row).sel(descent="taylor")
        parts = [discrete_of(states, i, "taylor", learning_rate=rate) for i in range(row, row + m)]
        y, g = (np.concatenate(vectors) for vectors in zip(*parts, strict=True))
        y = y / m
        flag = ShiftedMetric(int(at["shifted_metric"]))
        if y @ g <= 0:
            assert flag == ShiftedMetric.UNKNOWN
            continue
        h = -least[0] / 2 / m
        assert at["learning_rate_bound"] == pytest.approx(y @ g / (g @ g) / h, rel=1e-11)
        smallest = np.linalg.eigvalsh(dense_metric(y, g))[0]
        tolerance = 2.0**-40 / float(np.cos(at["angle"]))
        assert at["learning_rate_bound_optimal"] == pytest.approx(smallest / h, rel=tolerance)
        true = (y + rate * blocks @ g) @ g
        shifted = [np.linalg.eigvalsh(dense_metric(y, g, gamma) + rate * blocks)[0] for gamma in (1.0, 1e6)]
        assert (flag == ShiftedMetric.INDEFINITE) == (true <= 0)
        if flag == ShiftedMetric.DEFINITE_OPTIMAL:
            assert shifted[0] > 0
        elif flag == ShiftedMetric.DEFINITE:
            assert shifted[1] > 0
        elif flag == ShiftedMetric.UNDECIDED:
            assert rate >= at["learning_rate_bound"]
        else:
            assert max(shifted) <= 2.0**-40


def test_bounds_are_defined_for_discrete_gradients_and_logged_hessian_eigenvalues():
    states, hessian = quadratic_walk()
    least = np.full(5, np.linalg.eigvalsh(hessian)[0])
    least[2] = np.nan
    model = dataset.label(replace(table_of(states), hessian_min_eigenvalue=least))["model"].to_dataset()
    bound = model["learning_rate_bound"].sel(window=1)
    assert np.isnan(bound.sel(descent="gradient")).all()
    assert np.isnan(bound.isel(step=2)).all()
    assert (model["shifted_metric"].isel(step=2) == ShiftedMetric.UNKNOWN).all()
    # Every discrete gradient has the same bound, -dL eta / (h |p|^2).
    np.testing.assert_allclose(bound.sel(descent="trapezoid"), bound.sel(descent="corrected"), rtol=2.0**-40)
    assert np.isfinite(bound.sel(descent="corrected")).any()
    assert np.isnan(dataset.label(table_of(states))["model"]["learning_rate_bound"]).all()
    convex = dataset.label(replace(table_of(states), hessian_min_eigenvalue=np.ones(5)))["model"].to_dataset()
    corrected = convex.sel(descent="corrected", window=1)
    assert (np.isinf(corrected["learning_rate_bound"]) == corrected["effective"]).all()
    # For one update and for the sum of two, -dL must exceed h |p|^2: the learning rate is half as large.
    twice = replace(table_of(states, numbers=[0, 2, 4, 6, 8, 10]), hessian_min_eigenvalue=least)
    spanned = dataset.label(twice)["model"].to_dataset().sel(window=1, descent="corrected")
    np.testing.assert_allclose(spanned["learning_rate_bound"], bound.sel(descent="corrected"), rtol=2.0**-40)


# The smallest window -----------------------------------------------------------------------------------------


def brute_force_smallest(found, longest, complete):
    """Return the smallest m for which all complete windows are effective, from windows of every m."""
    for m in range(1, longest + 1):
        status = found["status"].sel(window=m).values[complete(m)]
        if len(status) and (status == Status.EFFECTIVE).all():
            return m, len(status)
    return np.nan, 0


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 14),
    noise=st.sampled_from([1.0, 3.0]),
    lost=st.sampled_from([None, "loss", "learning_rate", "gradient", "restart", "still"]),
)
@settings(max_examples=40)
def test_the_smallest_effective_window_is_the_first_of_all_windows_tried(seed, rows, noise, lost):
    rng = np.random.default_rng(seed)
    states, _ = quadratic_walk(rows + 1, seed, noise=noise)
    numbers, place = np.arange(rows + 1), int(rng.integers(rows))
    if lost == "restart":
        # An update that does not continue the one before it.
        numbers[place + 1 :] += 3
    elif lost == "still":
        for name in TENSORS:
            states[place + 1][f"parameter/{name}"] = states[place][f"parameter/{name}"]
    elif lost == "gradient":
        states[place]["gradient/plane"] = np.array([np.nan, 1.0])
    elif lost:
        states[place][lost] = np.float64(np.nan)
    table = table_of(states, numbers.tolist())
    if lost == "restart":
        table = replace(table, spans=np.ones(rows, np.int64))
    tree = dataset.label(table, windows=range(1, rows + 1))
    for descent in DESCENTS:
        model = tree["model"].to_dataset().sel(descent=descent)
        found = (float(model["effective_window"]), int(model["effective_window_count"]))
        np.testing.assert_equal(found, brute_force_smallest(model, rows, table.complete))
        for tensor in TENSORS:
            part = tree["tensor"].to_dataset().sel(descent=descent, tensor=tensor)
            found = (float(part["effective_window"]), int(part["effective_window_count"]))
            np.testing.assert_equal(found, brute_force_smallest(part, rows, table.complete))
    decreases = tree["model"]["loss_decrease"].values
    expected = (np.nan, 0)
    for m in range(rows, 0, -1):
        compared = decreases[: rows - m + 1, m - 1][table.complete(m)[: rows - m + 1]]
        if len(compared) and (compared > 0).all():
            expected = (m, len(compared))
    model = tree["model"].to_dataset()
    np.testing.assert_equal((float(model["decreasing_window"]), int(model["decreasing_window_count"])), expected)


def test_the_smallest_window_is_found_although_windows_are_not_monotone():
    losses = [3, 1, 2.5, 0.5, 2, 0.25]
    states = [
        {"parameter/w": np.array([float(k)]), "gradient/w": np.array([1.0]), "loss": loss, "learning_rate": 1.0}
        for k, loss in enumerate(losses)
    ]
    model = dataset.label(table_of(states), windows=range(1, 6))["model"].to_dataset()
    assert (model["decreasing_window"], model["decreasing_window_count"]) == (2, 4)
    # With a constant learning rate, the corrected gradients of a window add up to the change of the loss.
    corrected = model.sel(descent="corrected")
    assert (corrected["effective_window"], corrected["effective_window_count"]) == (2, 4)
    always = [corrected["effective"].sel(window=m)[: 6 - m].all().item() for m in range(1, 6)]
    assert always == [False, True, False, True, True]
    assert np.isnan(model.sel(descent="gradient")["effective_window"])


@pytest.mark.parametrize("lost", range(5))
def test_a_window_that_needs_an_unknown_loss_supports_no_claim(lost):
    # Each known loss is below the preceding known loss in a window of 1, but across the unknown loss it may rise.
    losses = [5.0, 4.0, 3.0, 2.0, 1.0]
    losses[lost] = np.nan
    if 0 < lost < 4:
        losses[lost + 1 :] = [loss + 10 for loss in losses[lost + 1 :]]
    states = [
        {"parameter/w": np.array([float(k)]), "gradient/w": np.array([-1.0]), "loss": loss, "learning_rate": 1.0}
        for k, loss in enumerate(losses)
    ]
    model = dataset.label(table_of(states), windows=range(1, 5))["model"].to_dataset()
    assert np.isnan(model["decreasing_window"])
    assert model["decreasing_window_count"] == 0
    needs_losses = model.sel(descent=["corrected", "trapezoid"])
    assert np.isnan(needs_losses["effective_window"]).all()
    assert (needs_losses["effective_window_count"] == 0).all()
    assert model.sel(descent="gradient")["effective_window"] == 1


def test_a_window_across_a_restart_does_not_count():
    # Within each part, two updates always descend together; the two next to the restart would not.
    moves = [2.0, -1.0, 2.0, -1.0, -1.0, 2.0, -1.0, 2.0]
    theta = np.concatenate([[0.0], np.cumsum(moves)])
    states = [
        {"parameter/w": np.array([x]), "gradient/w": np.array([-1.0]), "loss": -x, "learning_rate": 1.0}
        for x in theta
    ]
    whole = table_of(states)
    parted = replace(whole, steps=whole.steps + 5 * (whole.steps >= 4))
    for table, window, count in ((whole, 5, 4), (parted, 2, 6)):
        model = dataset.label(table, windows=[8])["model"].to_dataset()
        assert (model["decreasing_window"], model["decreasing_window_count"]) == (window, count)
        for descent in ("gradient", "corrected", "trapezoid"):
            at = model.sel(descent=descent)
            assert (at["effective_window"], at["effective_window_count"]) == (window, count)


def test_the_search_extends_to_half_the_run_or_to_the_longest_requested_window():
    # This loss always falls only over nine updates.
    losses = [float(k % 9 == 0) - k / 1000 for k in range(14)]
    states = [
        {"parameter/w": np.array([float(k)]), "gradient/w": np.array([1.0]), "loss": loss, "learning_rate": 1.0}
        for k, loss in enumerate(losses)
    ]
    assert np.isnan(dataset.label(table_of(states))["model"]["decreasing_window"])
    assert dataset.label(table_of(states), windows=[9])["model"]["decreasing_window"] == 9


# Discrete gradients ------------------------------------------------------------------------------------------


def quadratic_walk(steps=6, seed=0, rate=0.25, noise=0.5, dtype="float64"):
    """Return states of a noisy descent on theta' A theta / 2, with hvp and losses of the exact states, and A."""
    rng = np.random.default_rng(seed)
    sizes = [int(np.prod(shape)) for shape in TENSORS.values()]
    matrix = rng.standard_normal((sum(sizes), sum(sizes))) / np.sqrt(sum(sizes))
    matrix, theta, states = matrix + matrix.T, rng.standard_normal(sum(sizes)), []
    for _ in range(steps):
        gradient = matrix @ theta
        after = theta - rate * (gradient + noise * rng.standard_normal(len(theta)))
        state = {"loss": np.float64(theta @ gradient / 2), "learning_rate": np.float64(rate)}
        for kind, vector in (("parameter", theta), ("gradient", gradient), ("hvp", matrix @ (after - theta))):
            for name, part in zip(TENSORS, np.split(vector, np.cumsum(sizes)[:-1]), strict=True):
                state[f"{kind}/{name}"] = part.reshape(TENSORS[name]).astype(dtype)
        states.append(state)
        theta = after
    return states, matrix


def discrete_of(states, row, descent, tensor=None, learning_rate=0.25):
    """Return the negative discrete gradient and the update of a step by definition, corrected for the model."""

    def vectors(names):
        parts = [
            [np.ravel(np.float64(state[f"{kind}/{name}"])) for name in names]
            for kind, state in (
                ("parameter", states[row]),
                ("parameter", states[row + 1]),
                ("gradient", states[row]),
                ("gradient", states[row + 1]),
                ("hvp", states[row]),
            )
        ]
        before, after, gradient, next_gradient, hvp = map(np.concatenate, parts)
        half = {"trapezoid": (next_gradient - gradient) / 2, "taylor": hvp / 2}.get(descent, 0.0)
        return gradient + half, after - before

    whole, step = vectors(list(TENSORS))
    change = states[row + 1]["loss"] - states[row]["loss"]
    factor = (change - whole @ step) / (step @ step) if descent in ("corrected", "trapezoid") else 0.0
    part, moved = vectors([tensor] if tensor else list(TENSORS))
    return -(part + factor * moved), moved / learning_rate


@pytest.mark.parametrize("tensor", [None, *TENSORS])
@pytest.mark.parametrize("descent", DESCENTS)
def test_every_descent_is_the_pair_of_its_discrete_gradient(descent, tensor):
    states, _ = quadratic_walk()
    tree = dataset.label(table_of(states), windows=[1, 3])
    group = tree["model"] if tensor is None else tree["tensor"].sel(tensor=tensor)
    for m in (1, 3):
        for row in range(6 - m):
            at = group.to_dataset().isel(step=row).sel(descent=descent, window=m)
            parts = [discrete_of(states, i, descent, tensor) for i in range(row, row + m)]
            y, g = (np.concatenate(vectors) for vectors in zip(*parts, strict=True))
            assert_results_of(at, y / m, g)
            assert at["gradient_norm"] == pytest.approx(np.linalg.norm(y / m), rel=2.0**-44)


def test_trapezoid_and_hvp_explain_the_change_of_a_quadratic_loss():
    states, _ = quadratic_walk()
    model = dataset.label(table_of(states))["model"].to_dataset().sel(window=1)
    residual = np.abs(model["discrete_identity_residual"])
    # The losses are inner products of 15 terms, and their difference cancels.
    losses = np.abs(np.array([s["loss"] for s in states]))
    bound = 64 * 15 * 2.0**-53 * losses.max() / np.abs(model["loss_decrease"]).min()
    for descent in ("corrected", "trapezoid", "taylor"):
        assert (residual.sel(descent=descent) <= bound).all()
    assert (residual.sel(descent="gradient") > 1e-3).any()
    trapezoid, taylor = model.sel(descent="trapezoid"), model.sel(descent="taylor")
    np.testing.assert_allclose(trapezoid["angle"], taylor["angle"], atol=4 * float(bound) + 1e-13)


def test_without_hessian_vector_products_only_eq_16_is_unverifiable():
    states = walk()
    status = status_of(states)["status"]
    assert (status.sel(descent="taylor") == Status.UNVERIFIABLE).all()
    assert not (status.sel(descent=["gradient", "corrected", "trapezoid"]) == Status.UNVERIFIABLE).any()
    lost = status_of(states).sel(descent="taylor")
    assert all(np.isnan(lost[name]).all() for name in ("angle", "alignment", "gradient_norm", "condition_number"))


def test_a_gradient_that_is_not_finite_also_affects_the_trapezoid_of_the_update_before():
    states = walk()
    states[2]["gradient/plane"] = np.array([np.nan, 1.0])
    status = status_of(states)["status"] == Status.NON_FINITE
    assert status.sel(descent="gradient").values.tolist() == [False, False, True, False, False]
    assert status.sel(descent="trapezoid").values.tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("descent", DESCENTS)
@pytest.mark.parametrize("group", ["model", "tensor"])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_uncertainty_of_every_descent_covers_the_error_of_storage(descent, group, noise):
    states, _ = quadratic_walk(12, seed=3, rate=0.01, noise=noise)
    stored, _ = quadratic_walk(12, seed=3, rate=0.01, noise=noise, dtype="float32")
    rates = np.full(11, 0.01)
    trees = [
        dataset.label(table_of(states, learning_rate=rates), windows=[1, 4]),
        dataset.label(table_of(stored, learning_rate=rates, dtype="float32"), windows=[1, 4]),
    ]
    exact, rounded = (tree[group].to_dataset().sel(descent=descent) for tree in trees)
    moved = np.abs(rounded["angle"] - exact["angle"])
    assert (moved > 0).any()
    seen = np.isfinite(moved)
    assert seen.sum() > 11
    assert (moved <= rounded["angle_uncertainty"] + 1e-13).where(seen, True).all()


def test_rounding_of_a_step_across_a_valley_affects_the_corrected_gradient_more_than_the_update():
    # The loss hardly changes, so the correction removes nearly all of a gradient along the step.
    rng = np.random.default_rng(2)
    step, across = rng.standard_normal((2, 50))
    across -= step * (across @ step) / (step @ step)
    step *= 1e-2 / np.linalg.norm(step)
    before = rng.uniform(1.0, 2.0, 50)
    gradient = -step / np.linalg.norm(step) + 1e-3 * across / np.linalg.norm(across)

    def labelled(dtype):
        states = [
            {
                "parameter/w": theta.astype(dtype),
                "gradient/w": gradient,
                "loss": np.float64(loss),
                "learning_rate": np.float64(1.0),
            }
            for theta, loss in ((before, 1.0), (before + step, 1.0 - 1e-5))
        ]
        layout = Layout.from_shapes({"w": ((50,), dtype)})
        table = replace(table_of(states), layout=layout)
        return dataset.label(table)["model"].to_dataset().isel(step=0).sel(window=1)

    exact, rounded = labelled("float64"), labelled("float32")
    moved = np.abs(rounded["angle"] - exact["angle"])
    assert moved.sel(descent="corrected") <= rounded["angle_uncertainty"].sel(descent="corrected")
    # The uncertainty of the update alone would not cover it.
    assert moved.sel(descent="corrected") > rounded["angle_uncertainty"].sel(descent="gradient")


def test_a_trapezoid_nearly_along_the_update_is_accurate_to_the_precision_of_the_ledger():
    # The gradients at both ends, and their difference, are nearly parallel to the update.
    rng = np.random.default_rng(5)
    step, across = rng.standard_normal((2, 400))
    across -= step * (across @ step) / (step @ step)
    worst = []
    for tilt in (0.0, 1e-11, 1e-8, 1e-5, 1e-2):
        states = [
            {
                "parameter/w": theta,
                "gradient/w": gradient,
                "loss": np.float64(loss),
                "learning_rate": np.float64(1.0),
            }
            for theta, gradient, loss in (
                (np.zeros(400), -2.0 * step, 0.0),
                (step, -step + 2 * tilt * across, -1.5 * float(step @ step)),
            )
        ]
        at = dataset.label(table_of(states))["model"].to_dataset().isel(step=0).sel(descent="trapezoid", window=1)
        with mp.workdps(60):
            _, d, g, e, _ = exact_vectors(
                np.zeros(400), step, states[0]["gradient/w"], states[1]["gradient/w"], 0.0
            )
            y = [a + b / 2 for a, b in zip(g, e, strict=True)]
            rest = exact_dot(y, y) - exact_dot(y, d) ** 2 / exact_dot(d, d)
            psi = mp.atan2(mp.sqrt(rest), mpf(1.5) * mp.sqrt(exact_dot(d, d)))
            worst.append(float(abs(mpf(float(at["angle"])) - psi)))
        assert worst[-1] <= at["angle_uncertainty"]
        # rho = (|r| + |v| / 2) / |y| is 1/3 here: r is small, v is the step, y 3/2 of it.
        rho = float(0.5 + tilt) / 1.5
        storage = 4 * 2.0**-53
        assert (
            at["angle_uncertainty"]
            <= min(2e-7 * rho, 4e-14 * rho**2 / max(float(mp.sin(psi)), 1e-300)) * 1.1 + storage * 4
        )
    assert worst[-1] <= 1e-13 < max(worst)


def status_of(states, group="model", **options):
    tree = dataset.label(table_of(states, **options))
    return tree[group].to_dataset().sel(window=1)


def test_a_gradient_that_is_not_finite_affects_only_its_own_update():
    states = walk()
    clean = status_of(states).sel(descent="gradient")
    states[2]["gradient/plane"] = np.array([np.nan, 1.0])
    model, tensors = status_of(states), status_of(states, "tensor")
    spoiled = model.sel(descent="gradient")
    assert spoiled["status"][2] == Status.NON_FINITE
    assert np.isnan(spoiled["angle"][2])
    rest = [0, 1, 3, 4]
    # The residual of the objective needs the gradients of both states.
    both = {"objective_residual"}
    windows = [name for name in VARIABLES if name.endswith(("_window", "_window_count")) or name in both]
    assert np.isnan(spoiled["objective_residual"]).values.tolist() == [False, True, True, False, False]
    xr.testing.assert_identical(
        spoiled.isel(step=rest).drop_vars(windows), clean.isel(step=rest).drop_vars(windows)
    )
    assert (tensors["status"].sel(descent="gradient").isel(step=2) == Status.NON_FINITE).values.tolist() == [
        False,
        False,
        True,
    ]


def test_with_a_learning_rate_that_is_not_positive_there_is_no_metric():
    model = status_of(walk(), learning_rate=[0.25, -1.0, 0.0, 0.25, 0.25]).sel(descent="gradient")
    assert (model["status"] == Status.NO_LEARNING_RATE).values.tolist() == [False, True, True, False, False]
    for name in ("angle", "condition_number", "update_norm", "alignment"):
        assert np.isnan(model[name][1:3]).all()
        assert np.isfinite(model[name][[0, 3, 4]]).all()


NEEDS_RATE = {
    "update_norm",
    "alignment",
    *(f"eigenvalue_{name}" for name in ("max", "mid", "min", "max_infimum", "min_supremum")),
    *(f"family_eigenvalue_{name}" for name in ("max", "mid", "min")),
    "learning_rate_bound",
    "learning_rate_bound_optimal",
    "shifted_metric",
    "learning_rate",
}


@pytest.mark.parametrize("rate", [2.0**-20, 1.0, 1024.0])
def test_without_a_learning_rate_results_that_do_not_depend_on_it_are_known(rate):
    # A power of two scales every product exactly.
    states, _ = quadratic_walk(8, noise=5.0)
    table = replace(table_of(states), hessian_min_eigenvalue=np.full(7, -0.01))
    trees = [
        dataset.label(replace(table, learning_rate=np.full(7, eta)), gammas=[0.5, 2.0], windows=[3], variables=[])
        for eta in (np.nan, rate)
    ]
    flag = "shifted_metric"
    for group in ("model", "tensor"):
        without, known = (tree[group].to_dataset() for tree in trees)
        # The smallest window compares windows of several updates.
        for name in {*known} - {"effective_window", "effective_window_count"}:
            one, other = (dataset_[name] for dataset_ in (without, known))
            if "window" in one.dims:
                of_windows = one.sel(window=3)
                one, other = one.sel(window=1), other.sel(window=1)
                if name == "status":
                    assert (of_windows[:-2] == Status.NO_LEARNING_RATE).all()
                elif name in ("angle", "condition_number", "cosine", "similarity", *NEEDS_RATE) and name != flag:
                    assert np.isnan(of_windows).all()
            if name in NEEDS_RATE:
                undefined = one == ShiftedMetric.UNKNOWN if name == flag else np.isnan(one)
                assert undefined.all()
            else:
                xr.testing.assert_equal(one, other)


def test_the_direction_of_an_update_in_time_depends_on_the_learning_rate():
    table = replace(table_of(walk()), loss_time_derivative=np.full(5, -1.0))
    model = dataset.label(replace(table, learning_rate=np.full(5, np.nan)), variables=[])["model"]
    assert (model["status"] == Status.NO_LEARNING_RATE).all()
    assert np.isnan(model["angle"]).all()


def test_without_a_loss_only_the_corrected_gradient_is_unverifiable():
    states = walk()
    states[3]["loss"] = np.nan
    model = status_of(states)
    corrected = (model["status"].sel(descent="corrected") == Status.UNVERIFIABLE).values
    assert corrected.tolist() == [False, False, True, True, False]
    assert not (model["status"].sel(descent="gradient") == Status.UNVERIFIABLE).any()


def test_an_update_that_is_zero_has_no_angle():
    states = walk()
    for name in TENSORS:
        states[3][f"parameter/{name}"] = states[2][f"parameter/{name}"]
    model = status_of(states)
    assert (model["status"].isel(step=2) == Status.ZERO_UPDATE).all()
    assert np.isnan(model["angle"].isel(step=2)).all()


def test_an_update_within_the_rounding_of_bfloat16_is_unverifiable():
    states = random_walk(4, {"w": (2000,)}, "bfloat16", learning_rate=1e-5)
    model = status_of(states, dtype="bfloat16").sel(descent="gradient")
    assert set(model["status"].values.tolist()) <= {int(Status.UNVERIFIABLE), int(Status.ZERO_UPDATE)}
    assert np.isnan(model["condition_number"]).all()
    same = status_of(random_walk(4, {"w": (2000,)}, "float64", learning_rate=1e-5)).sel(descent="gradient")
    assert (same["status"] == Status.EFFECTIVE).all()


def test_the_uncertainty_of_the_angle_covers_the_error_of_float32_storage():
    exact = status_of(random_walk(20, {"w": (50,)}, "float64", learning_rate=1e-4)).sel(descent="gradient")
    stored = random_walk(20, {"w": (50,)}, "float32", learning_rate=1e-4)
    rounded = status_of(stored, dtype="float32").sel(descent="gradient")
    moved = np.abs(rounded["angle"] - exact["angle"])
    assert (moved > 0).any()
    assert (moved <= rounded["angle_uncertainty"]).all()


@given(seed=st.integers(0, 10_000), tensors=st.integers(1, 4))
@settings(max_examples=25)
def test_metrics_exist_if_and_only_if_the_status_is_effective(seed, tensors):
    rng = np.random.default_rng(seed)
    states = random_walk(5, {f"t{k}": (int(rng.integers(1, 5)),) for k in range(tensors)}, "float64", seed)
    for value in (np.nan, np.inf, 0.0):
        state, key = states[rng.integers(5)], rng.choice(list(states[0]))
        state[key] = np.full_like(state[key], value)
    tree = dataset.label(table_of(states), windows=[1, 2], gammas=[0.1, 1.0])
    for group in ("model", "tensor"):
        found = tree[group].to_dataset()
        effective = found["status"] == Status.EFFECTIVE
        np.testing.assert_array_equal(found["effective"], effective)
        for name in ("condition_number", "similarity"):
            np.testing.assert_array_equal(np.isfinite(found[name]), effective)
        known = (effective & ~np.isnan(found["learning_rate"])).transpose(*effective.dims)
        for name in ("eigenvalue_max", "eigenvalue_min", "eigenvalue_max_infimum"):
            np.testing.assert_array_equal(np.isfinite(found[name]), known)
        family = np.isfinite(found["family_condition_number"])
        np.testing.assert_array_equal(family, effective.expand_dims(gamma=family["gamma"]).transpose(*family.dims))
        np.testing.assert_array_equal(np.isfinite(found["angle"]), found["status"] <= Status.OBTUSE)


# Limits of float64 -------------------------------------------------------------------------------------------

UNDEFINED = (Status.UNDERFLOW, Status.OVERFLOW, Status.ZERO_UPDATE, Status.ZERO_GRADIENT, Status.UNVERIFIABLE)


@st.composite
def scaled_vectors(draw, size):
    """Return finite vectors of any scale: zero, of one scale, or with elements of different scales."""
    center, width = draw(st.floats(-320, 308)), draw(st.sampled_from([0.0, 0.0, 5.0, 150.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    exponents = np.clip(center + width * rng.uniform(-1, 1, size), -323.0, 307.9)
    factor = draw(st.sampled_from([0.0, *[1.0] * 9]))
    return factor * rng.uniform(-1, 1, size) * 10.0**exponents


@st.composite
def updates_of_any_scale(draw):
    states = [{"loss": np.float64(1.0), "learning_rate": np.float64(draw(st.sampled_from([1.0, 2.0**-20, 1e3])))}]
    states.append({**states[0], "loss": np.float64(0.5)})
    parallel = draw(st.sampled_from([None, None, 0.0, 1e-9]))
    for name, shape in TENSORS.items():
        size = int(np.prod(shape))
        gradient = draw(scaled_vectors(size))
        if parallel is None:
            before, step = draw(scaled_vectors(size)), draw(scaled_vectors(size))
        else:
            # Nearly parallel, with a ratio of any scale.
            before, ratio = np.zeros(size), 10.0 ** draw(st.floats(-300, 300))
            with np.errstate(all="ignore"):
                noise = np.random.default_rng(size).uniform(-1, 1, size)
                step = np.nan_to_num(-gradient * ratio * (1 + parallel * noise), posinf=1e307, neginf=-1e307)
        with np.errstate(over="ignore"):
            after = np.clip(before + step, -1.7e308, 1.7e308)
        for state, parameter in zip(states, (before, after), strict=True):
            state[f"parameter/{name}"], state[f"gradient/{name}"] = (
                parameter.reshape(shape),
                gradient.reshape(shape),
            )
    return states


def test_an_update_below_the_range_leaves_its_gradient_to_the_model():
    # The displacement of the plane is in range, but its update is not: its residual lacks most of y.
    gradient = {"wide": np.zeros((3, 4)), "line": np.array(-0.5), "plane": np.array([-1.0, -2.0])}
    step = {"wide": np.zeros((3, 4)), "line": np.array(0.5), "plane": np.array([1e-145, 2e-145])}
    states = [
        {"loss": np.float64(loss), "learning_rate": np.float64(1000.0)}
        | {f"gradient/{name}": value for name, value in gradient.items()}
        | {f"parameter/{name}": factor * value for name, value in step.items()}
        for loss, factor in ((1.0, 0.0), (0.5, 1.0))
    ]
    model = dataset.label(table_of(states))["model"].sel(descent="gradient", window=1).isel(step=0)
    assert abs(float(model["angle"]) - np.arctan2(5**0.5, 0.5)) <= 1e-13


@given(states=updates_of_any_scale())
@settings(max_examples=150)
def test_at_any_scale_a_number_is_exact_and_a_status_is_true(states):
    tree = dataset.label(table_of(states))
    rate = mpf(float(states[0]["learning_rate"]))
    for tensor in (None, *TENSORS):
        group = tree["model"] if tensor is None else tree["tensor"].sel(tensor=tensor)
        at = group.to_dataset().isel(step=0).sel(window=1)
        # Components differ by up to 1e630, and the cosine by as much from 1.
        with mp.workdps(700):
            theta, d, g, _, _ = (
                [x for part in parts for x in part]
                for parts in zip(
                    *(
                        exact_vectors(
                            *(s[f"parameter/{n}"] for s in states), *(s[f"gradient/{n}"] for s in states), 0.0
                        )
                        for n in ([tensor] if tensor else TENSORS)
                    ),
                    strict=True,
                )
            )
            length = {"theta": mp.norm(theta), "d": mp.norm(d), "y": mp.norm(g), "g": mp.norm(d) / rate}
            product = -mp.fsum(a * b for a, b in zip(g, d, strict=True))
            rest = (
                mp.norm([b * length["d"] - -product / length["d"] * a for a, b in zip(d, g, strict=True)])
                if (length["d"])
                else mpf(0)
            )
            psi = mp.atan2(rest, product)
        checked = at.sel(descent="gradient")
        status = Status(int(checked["status"]))
        small = min(length["d"], length["g"], length["y"]) < 1.01 * geometry.LEAST_NORM
        large = max(length.values()) > 0.99 * geometry.MOST_NORM
        if status in (Status.ZERO_GRADIENT, Status.ZERO_UPDATE):
            assert length["y" if status == Status.ZERO_GRADIENT else "d"] == 0
        elif not min(length["y"], length["d"]):
            assert status == Status.OVERFLOW
        floor = mpf(2) ** -53 * (2 * length["theta"] + length["d"])
        if status == Status.UNDERFLOW:
            assert small
        elif status == Status.OVERFLOW:
            assert large
        elif status == Status.UNVERIFIABLE:
            assert floor >= 0.99 * length["d"]
        else:
            assert status <= Status.OBTUSE or status in UNDEFINED
        if status <= Status.OBTUSE:
            assert abs(mpf(float(checked["angle"])) - psi) <= 1e-13
            if status == Status.EFFECTIVE:
                cosine, sine, ratio = mp.cos(psi), mp.sin(psi), length["y"] / length["g"]
                promised = promised_relative_error(cosine)
                root, middle, largest, smallest = (
                    mpf(float(checked[name]))
                    for name in (
                        "condition_number",
                        "eigenvalue_max_infimum",
                        "eigenvalue_max",
                        "eigenvalue_min",
                    )
                )
                root = mp.sqrt(root)
                for value, found, implied_cosine in (
                    ((1 + sine) / cosine, root, 2 / (root + 1 / root)),
                    (ratio / cosine, middle, ratio / middle),
                    (ratio / cosine * (1 + sine), largest, ratio / largest * (1 + sine)),
                    (ratio * cosine / (1 + sine), smallest, smallest / ratio * (1 + sine)),
                ):
                    if promised >= 0.5:
                        # Nearly orthogonal vectors: the value belongs to an angle that is off by at most 1e-13.
                        assert abs(implied_cosine - cosine) <= 1e-13
                    elif mpf(1e-300) < value < mpf(1e300):
                        assert abs(found / value - 1) <= promised
        else:
            assert np.isnan(checked["angle"])
            assert np.isnan(checked["condition_number"])
            assert status in UNDEFINED
        for name, value in (("parameter_norm", "theta"), ("update_norm", "g"), ("gradient_norm", "y")):
            found = float(checked[name])
            if np.isnan(found):
                assert not 1e-147 * max(rate, 1) < length[value] < 1e150, name
            else:
                assert abs(mpf(found) - length[value]) <= 1e-13 * length[value], name
        # If nothing is out of range, the status does not state this for any estimate of the gradient.
        if not (small or large) and length["theta"] < 1e140:
            assert status not in (Status.UNDERFLOW, Status.OVERFLOW)
        assert (at["status"] != Status.NON_FINITE).all()


@pytest.mark.parametrize(
    ("displacement", "gradient", "expected"),
    [
        (1e-200, 1.0, Status.UNDERFLOW),
        (5e-324, 1.0, Status.UNDERFLOW),
        (1.0, 1e-300, Status.UNDERFLOW),
        (1.0, 5e-324, Status.UNDERFLOW),
        (1e200, 1.0, Status.OVERFLOW),
        (1.0, 1e200, Status.OVERFLOW),
        (1.0, np.inf, Status.NON_FINITE),
        (np.nan, 1.0, Status.NON_FINITE),
        (0.0, 1.0, Status.ZERO_UPDATE),
        (1.0, 0.0, Status.ZERO_GRADIENT),
    ],
)
def test_underflow_and_overflow_are_distinguished_from_zero_and_not_finite(displacement, gradient, expected):
    losses = [np.float64(1.0), np.float64(0.5)]
    states = [
        {"parameter/w": np.full(3, value), "gradient/w": np.full(3, -gradient), "loss": loss, "learning_rate": 1.0}
        for value, loss in zip((0.0, displacement), losses, strict=True)
    ]
    tree = dataset.label(table_of(states))
    for group in ("model", "tensor"):
        at = tree[group].to_dataset().sel(descent="gradient").squeeze()
        assert Status(int(at["status"])) == expected
        assert np.isnan([float(at[name]) for name in ("angle", "cosine", "condition_number")]).all()
        if expected in (Status.UNDERFLOW, Status.OVERFLOW):
            assert np.isnan(at["alignment"])


def test_a_tensor_that_underflows_leaves_the_model_exact():
    rng = np.random.default_rng(3)
    step, gradient = rng.standard_normal((2, 4))
    states = [
        {
            "parameter/large": factor * step,
            "gradient/large": gradient,
            "parameter/small": factor * 1e-200 * step,
            "gradient/small": gradient,
            "loss": np.float64(1.0),
            "learning_rate": np.float64(1.0),
        }
        for factor in (0.0, 1.0)
    ]
    tree = dataset.label(table_of(states))
    tensors = tree["tensor"]["status"].sel(descent="gradient").squeeze()
    assert tensors.sel(tensor="small") == Status.UNDERFLOW
    assert tensors.sel(tensor="large") <= Status.OBTUSE
    model = tree["model"].to_dataset().sel(descent="gradient").squeeze()
    y, g = -np.concatenate([gradient, gradient]), np.concatenate([step, 1e-200 * step])
    assert float(model["angle"]) == pytest.approx(
        float(np.arccos(y @ g / (np.linalg.norm(y) * np.linalg.norm(g)))), abs=1e-14
    )


# Labels and files --------------------------------------------------------------------------------------------


def test_xarray_alone_opens_the_results_and_finds_every_name(tmp_path):
    table = table_of(walk())
    extremes = np.ones((len(table.steps), len(TENSORS)))
    optional = {"optimizer": Optimizer(extremes, extremes, extremes), "recovery": Recovery(*[extremes] * 6)}
    optional |= dict.fromkeys(HESSIAN_NUMBERS, extremes[:, 0])
    table = replace(table, weight_decay=0.1 * extremes, **optional)
    tree = dataset.label(table, windows=[2], gammas=dataset.GAMMAS, provenance={"source": "a log"})
    dataset.write(tree, open_store(tmp_path / "results.zarr"), {})
    code = """
import sys, json, warnings, xarray
sys.modules["natgrad"] = None  # the engine of xarray cannot be loaded
warnings.filterwarnings("ignore", "Engine 'natgrad'")
GROUPS = ("model", "tensor", "without_decay/model", "without_decay/tensor")
tree = xarray.open_datatree(sys.argv[1])
assert not any(name.startswith("natgrad.") for name in sys.modules)
table = {g: {n: [list(v.dims), v.attrs] for n, v in tree[g].data_vars.items()} for g in GROUPS}
print(json.dumps([table, tree.attrs, {n: tree["tensor"][n].values.tolist() for n in tree["tensor"].coords}]))
"""
    command = [sys.executable, "-W", "error", "-c", code, tmp_path / "results.zarr"]
    variables, attributes, coordinates = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert attributes["source"] == "a log"
    assert attributes["versions"]["natgrad-pipeline"] == __version__
    assert attributes["results_version"] == RESULTS_VERSION
    assert coordinates["descent"] == list(DESCENTS)
    assert coordinates["window"] == [1, 2]
    assert coordinates["gamma"] == list(dataset.GAMMAS)
    assert coordinates["tensor"] == list(TENSORS)
    assert set(variables["model"]) == set(VARIABLES) - {"weight_decay", "gradient_check"}
    # The rest of an update without decay has the same variables.
    for group in ("model", "tensor"):
        assert variables[f"without_decay/{group}"] == variables[group]
    of_the_model = {"discrete_identity_residual", "objective_residual", "learning_rate_bound"}
    assert set(VARIABLES) - set(variables["tensor"]) == of_the_model | {
        "learning_rate_bound_optimal",
        "shifted_metric",
        *HESSIAN_NUMBERS,
    }
    for group, leading in (("model", ["step"]), ("tensor", ["step", "tensor"])):
        for name, (_, attrs) in variables[group].items():
            assert all(attrs[key] for key in ("long_name", "units", "equation", "description")), name
        assert variables[group]["angle"][0] == [*leading, "descent", "window"]
        assert variables[group]["family_eigenvalue_max"][0] == [*leading, "descent", "window", "gamma"]
        assert variables[group]["status"][1]["flag_meanings"].split()[Status.OBTUSE] == "obtuse"


@pytest.mark.parametrize("name", ["layer", "été \N{SNOWMAN}", "block." * 2000 + "weight"])
def test_functions_of_xarray_work_on_the_names_of_stored_results(tmp_path, name):
    table = table_of(walk())
    names = [name, "line", "plane"]
    renamed = [replace(tensor, name=to) for tensor, to in zip(table.layout.tensors, names, strict=True)]
    table = replace(table, layout=Layout(tuple(renamed)))
    dataset.write(dataset.label(table), open_store(tmp_path / "results.zarr"), {})
    angle = xr.open_datatree(tmp_path / "results.zarr", engine="zarr")["tensor"]["angle"]
    angle = angle.sel(descent="gradient", window=1)
    assert angle["tensor"].astype(str).values.tolist() == names
    largest = [names[index] for index in angle.values.argmax(axis=1)]
    assert angle.idxmax("tensor").values.tolist() == largest
    axes = figure.Figure().subplots()
    angle.plot.imshow(x="step", y="tensor", ax=axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert xr.concat([angle, angle], "copy")["tensor"].dtype.kind == "U"


def test_results_are_read_back_identically_and_replaced_completely(tmp_path):
    first, second = dataset.label(table_of(walk())), dataset.label(table_of(walk(seed=2)), gammas=[2.0])
    dataset.write(first, open_store(tmp_path / "results.zarr"), {})
    dataset.write(second, open_store(tmp_path / "results.zarr"), {})
    xr.testing.assert_identical(dataset.read(open_store(tmp_path / "results.zarr")).load(), second)
    assert [path.name for path in tmp_path.iterdir()] == ["results.zarr"]


@pytest.mark.parametrize("name", ["model/angle/c/0/0/0", "zarr.json", "checksums.json", "tensor/step/c/0"])
@pytest.mark.parametrize("damage", ["zeroed", "missing"])
def test_damaged_results_are_an_error_with_the_file_and_the_remedy(tmp_path, name, damage):
    path = tmp_path / "results.zarr"
    dataset.write(dataset.label(table_of(walk())), open_store(path), {})
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(bytes((path / name).stat().st_size))
    with pytest.raises(dataset.Damaged) as refused:
        dataset.read(open_store(path)).load()
    assert refused.value.where == str(path / name)
    assert "natgrad analyze OUT" in refused.value.remedy


def test_missing_results_are_an_error_with_the_remedy(tmp_path):
    with pytest.raises(InputError, match=r"there are no results here[\s\S]*natgrad analyze"):
        dataset.read(open_store(tmp_path / "results.zarr"))


@pytest.mark.parametrize("gammas", [[0.0], [-1.0], [np.nan], [np.inf], []])
def test_an_invalid_gamma_is_an_error(gammas):
    with pytest.raises(InputError, match="gammas must be positive and finite"):
        dataset.label(table_of(walk()), gammas=gammas)


@pytest.mark.parametrize("window", [0, -2, 6])
def test_a_window_that_does_not_fit_the_run_is_an_error(window):
    with pytest.raises(InputError, match="must be from 1 to 5 for a run with 5 updates"):
        dataset.label(table_of(walk()), windows=[window])


# Learning rates of groups of an optimizer ------------------------------------------------------------------------


def with_hvp(states):
    for state in states:
        state |= {
            key.replace("gradient", "hvp"): np.asarray(v) / 7 for key, v in state.items() if "gradient/" in key
        }
    return states


@given(seed=st.integers(0, 1000), powers=st.lists(st.integers(-6, 0), min_size=15, max_size=15))
@settings(max_examples=15)
def test_each_tensor_has_its_own_learning_rate_and_the_model_its_displacement(seed, powers):
    """With powers of two, all rates round to the same bits, so only a different formula changes the results."""
    table = table_of(with_hvp(walk(seed=seed)), numbers=[0, 1, 3, 4, 8, 9])
    own = 2.0 ** np.reshape(powers, (5, 3))
    table = replace(table, learning_rate=own.max(axis=1))
    tree = dataset.label(replace(table, tensor_learning_rate=own), windows=[1, 3])
    whole = dataset.label(table, windows=[1, 3])["model"].to_dataset()
    model = tree["model"].to_dataset()
    assert "largest rate of the tensors" in model["learning_rate"].attrs.pop("comment")
    assert model.identical(whole)
    for position, tensor in enumerate(TENSORS):
        of_tensor = replace(table, learning_rate=own[:, position])
        expected = dataset.label(of_tensor, windows=[1, 3])["tensor"].to_dataset().sel(tensor=tensor)
        found = tree["tensor"].to_dataset().sel(tensor=tensor)
        assert found["learning_rate"].attrs.pop("comment").startswith("The parameter groups of the optimizer")
        assert found.equals(expected)


def test_learning_rates_that_are_all_equal_give_the_same_bits():
    table = table_of(walk())
    # Not a power of two: a different order of the roundings would be visible.
    rate = 0.1 * 0.9 ** np.arange(5)
    plain = dataset.label(replace(table, learning_rate=rate), windows=[1, 2])
    own = np.repeat(rate[:, None], 3, axis=1)
    tree = dataset.label(replace(table, learning_rate=rate, tensor_learning_rate=own), windows=[1, 2])
    for group in ("model", "tensor"):
        found, expected = (one[group].to_dataset().drop_vars("learning_rate") for one in (tree, plain))
        assert found.identical(expected)
    assert tree["tensor"]["learning_rate"].dims == ("step", "tensor")


def test_updates_divided_by_their_own_learning_rates_could_descend_while_the_model_ascends():
    """The model has one rate because y.g > 0 must imply that the loss decreases along the displacement."""
    layout = {"fast": 1.0, "slow": 0.125}
    before = {"parameter/fast": [0.0, 0.0], "parameter/slow": [0.0, 0.0]}
    gradient = {"gradient/fast": [1.0, 0.0], "gradient/slow": [1.0, 0.0]}
    moved = {"parameter/fast": [0.25, 1.0], "parameter/slow": [-0.125, 0.0]}
    states = [{k: np.array(v) for k, v in (state | gradient).items()} for state in (before, moved)]
    for state in states:
        state |= {"learning_rate": 1.0, "loss": float(sum(state[f"parameter/{name}"][0] for name in layout))}
    assert states[1]["loss"] > states[0]["loss"]
    own = np.array([list(layout.values())])
    tree = dataset.label(replace(table_of(states), tensor_learning_rate=own))
    model, tensors = (
        tree[group].to_dataset().isel(step=0, window=0).sel(descent="gradient") for group in ("model", "tensor")
    )
    assert float(tensors["alignment"].sum()) == 0.75  # of the stacked updates
    assert float(model["alignment"]) == -0.125
    assert model["status"] == Status.OBTUSE
