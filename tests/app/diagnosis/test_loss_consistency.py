"""The change of the loss agrees with the gradients if both belong to one objective, and not otherwise."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import natgrad
from logs import write_log
from natgrad.app.diagnosis.loss_consistency import loss_residual


def descent(steps, rate=0.05, batches=None, seed=0):
    """Return states of gradient descent on c.theta^2 / 2 + b.theta, where b may differ in each step."""
    rng = np.random.default_rng(seed)
    curvature, theta = rng.uniform(0.5, 2, 20), rng.standard_normal(20)
    states = []
    for _ in range(steps):
        shift = np.zeros(20) if batches is None else batches * rng.standard_normal(20)
        gradient = curvature * theta + shift
        loss = float(curvature @ theta**2 / 2 + shift @ theta)
        states.append({"parameter/w": theta, "gradient/w": gradient, "loss": loss, "learning_rate": rate})
        theta = theta - rate * gradient
    return states


@given(st.integers(0, 1000), st.floats(1e-3, 0.3))
def test_a_fixed_quadratic_objective_is_consistent_up_to_rounding(seed, rate):
    states = descent(6, rate, seed=seed)
    products = [
        (
            (b["parameter/w"] - a["parameter/w"]) @ a["gradient/w"],
            (b["parameter/w"] - a["parameter/w"]) @ b["gradient/w"],
        )
        for a, b in itertools.pairwise(states)
    ]
    losses = [state["loss"] for state in states]
    # Losses and products are sums of 20 products of rounded factors: errors below 24 u of the largest terms.
    bounds = [
        24 * 2.0**-53 * 4 * (a["loss"] + np.linalg.norm(a["gradient/w"]) * np.linalg.norm(a["parameter/w"]))
        for a in states[:-1]
    ]
    changes = [abs(b - a) for a, b in itertools.pairwise(losses)]
    assert loss_residual(losses, products) <= max(np.divide(bounds, changes))


def test_a_value_that_is_not_finite_or_no_change_gives_nan():
    assert math.isnan(loss_residual([1.0, math.nan], [(0.0, 0.0)]))
    assert math.isnan(loss_residual([1.0, math.inf], [(1.0, 1.0)]))
    assert loss_residual([4.0, 1.0, math.nan], [(-4.0, -2.0), (1.0, 1.0)]) == 0
    assert math.isnan(loss_residual([1.0, 1.0], [(0.0, 0.0)]))
    assert loss_residual([1.0, 1.0], [(-1.0, -1.0)]) == 1.0


def inspected(folder, states):
    return natgrad.inspect(write_log(folder, states)).objective


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_inspect_distinguishes_a_fixed_objective_from_changing_batches(tmp_path, dtype):
    def stored(states):
        return [{key: np.asarray(value, dtype) for key, value in state.items()} for state in states]

    assert inspected(tmp_path / "fixed", stored(descent(8))).startswith("consistent: ")
    assert inspected(tmp_path / "batches", stored(descent(8, batches=3.0))).startswith("not consistent: ")


def test_a_sign_error_is_not_consistent(tmp_path):
    states = [state | {"gradient/w": -state["gradient/w"]} for state in descent(6)]
    assert inspected(tmp_path, states).startswith("not consistent: ")


def test_the_objective_is_unknown_without_a_loss_or_with_a_constant_one(tmp_path):
    states = descent(4)
    without = [{key: value for key, value in state.items() if key != "loss"} for state in states]
    assert inspected(tmp_path / "without", without) == "unknown: the log has no loss"
    still = [state | {"parameter/w": np.ones(20), "loss": 1.0} for state in states]
    assert inspected(tmp_path / "still", still).startswith("unknown: dL of the first 3 updates is 0")
