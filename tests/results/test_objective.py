"""Test whether losses and gradients of a run are recognized as those of one objective."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset import quadratic_walk, table_of, walk

from natgrad.results import dataset
from natgrad.results.objective import Objective, loss_precision, objective_residual
from natgrad.results.summary import overview
from natgrad.schema.names import EVALUATIONS
from natgrad.schema.variables import Status


def regression(seed=0, steps=24, batch=None, rate=0.05, sign=1.0):
    """Return states of gradient descent on the mean squared error of all data, or of a new batch in each step."""
    rng = np.random.default_rng(seed)
    inputs, noise = rng.standard_normal((64, 4)), rng.standard_normal(64)
    targets = inputs @ rng.standard_normal(4) + noise
    theta, states = rng.standard_normal(4), []
    for _ in range(steps):
        chosen = slice(None) if batch is None else rng.choice(64, batch, replace=False)
        # A smooth objective that is not quadratic.
        error = np.tanh(inputs[chosen] @ theta - targets[chosen])
        slope = error * (1 - error**2)
        gradient = 2 * inputs[chosen].T @ slope / len(error)
        loss = float((error**2).mean())
        states.append({"parameter/w": theta, "gradient/w": sign * gradient, "loss": loss, "learning_rate": rate})
        theta = theta - rate * gradient
    return states


def objective_of(table):
    tree = dataset.label(table, variables=[])
    return Objective.of(tree["model"].to_dataset(), tree.attrs["evaluation"])


def test_the_residual_is_that_of_exact_sums():
    states = walk()
    found = objective_residual(table_of(states))
    names = [key for key in states[0] if key.startswith("parameter/")]
    for row, (before, after) in enumerate(itertools.pairwise(states)):

        def terms(weight, before=before, after=after):
            return math.fsum(
                weight(float(g), float(h)) * (float(b) - float(a))
                for name in names
                for a, b, g, h in zip(
                    *(np.ravel(state[key]) for key in (name, name.replace("parameter", "gradient"))
                      for state in (before, after)),
                    strict=True,
                )
            )  # fmt: skip

        change = float(after["loss"]) - float(before["loss"])
        first, second = terms(lambda g, h: g), terms(lambda g, h: (h - g) / 2)
        expected = abs(change - first - second) / (abs(change) + abs(first) + abs(second))
        # The loss is |theta|^2 / 2, so the trapezoid rule is exact. Only the loss is rounded.
        assert abs(found[row] - expected) <= 1e-12
        assert found[row] <= 1e-12


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_one_smooth_objective_is_consistent_and_changing_batches_are_not(seed):
    fixed = objective_of(table_of(regression(seed)))
    assert fixed.consistency == "consistent"
    assert fixed.comparable
    assert fixed.warnings() == []
    assert fixed.caution == ""
    changing = objective_of(table_of(regression(seed, batch=4)))
    assert changing.consistency == "inconsistent"
    assert not changing.comparable
    (warning,) = changing.warnings()
    assert "--evaluation batch" in warning
    assert "changing batches" in changing.caution


def test_a_residual_between_the_limits_is_undecided():
    for residual, consistency in ((0.05, "consistent"), (0.1, "undecided"), (0.2, "inconsistent")):
        found = Objective("unknown", residual, 9, wrong_sign=False)
        assert found.consistency == consistency
        assert bool(found.caution) == (consistency != "consistent")
    assert Objective("unknown", None, 0, wrong_sign=False).consistency == "undecided"


def test_gradients_of_the_wrong_sign_are_reported():
    found = objective_of(table_of(regression(sign=-1.0)))
    assert found.wrong_sign
    (warning,) = found.warnings()
    assert "wrong sign" in warning
    for states in (regression(), regression(sign=-1.0)[:3], regression(batch=4, sign=-1.0)):
        assert not objective_of(table_of(states)).wrong_sign


def test_losses_with_few_decimals_that_hardly_change_prove_nothing():
    states = regression(rate=1e-4)
    assert objective_of(table_of(states)).consistency == "consistent"
    rounded = [state | {"loss": round(state["loss"], 4)} for state in states]
    found = objective_of(table_of(rounded))
    assert (found.consistency, found.residual, found.updates) == ("undecided", None, 0)
    assert found.warnings() == []


@pytest.mark.parametrize(
    ("losses", "precision"),
    [
        ([1.25, 0.5, 3.75], (2.0**-8, 0.005)),
        ([12.0, 3.0], (2.0**-8, 0.5)),
        ([0.1, 0.73], (2.0**-53, 0.005)),
        (list(np.float32([0.1, 0.7])), (2.0**-24, 0.0)),
        ([0.1 + 1e-15, 0.7 / 3], (2.0**-53, 0.0)),
    ],
)
def test_the_precision_of_losses_is_that_of_their_digits(losses, precision):
    assert loss_precision(np.array(losses, float)) == precision


@pytest.mark.parametrize(("multiple", "known"), [(32.5, True), (31.5, False)])
def test_a_change_of_the_loss_is_significant_above_32_times_its_errors(multiple, known):
    table = table_of(regression()[:2])
    change = table.next_loss - table.loss
    gradient, displacement, difference = (
        table.vectors.index(name) for name in ("gradient", "displacement", "gradient_change")
    )
    terms = np.abs(table.gram[0, :, displacement, [gradient, difference]].sum(axis=-1)) * [1.0, 0.5]
    scale = float(np.abs(change[0]) + terms.sum())
    # The other errors are those of float64, and smaller by many orders of magnitude.
    table = replace(table, loss_precision=(0.0, scale / multiple / 2))
    assert np.isfinite(objective_residual(table)[0]) == known


@pytest.mark.parametrize("lost", ["loss", "next_loss", "gradient_change", "time"])
def test_a_residual_that_is_not_known_is_nan(lost):
    table = table_of(regression())
    if lost == "gradient_change":
        table = replace(table, vectors=tuple(name.replace(lost, "other") for name in table.vectors))
    elif lost == "time":
        table = replace(table, loss_time_derivative=np.ones(len(table.steps)))
    else:
        table = replace(table, **{lost: np.full(len(table.steps), np.nan)})
    assert np.isnan(objective_residual(table)).all()


def test_losses_of_declared_batches_are_not_compared():
    states, _ = quadratic_walk(8)
    table = table_of(states)
    trees = {evaluation: dataset.label(replace(table, evaluation=evaluation), windows=[2], variables=[])
             for evaluation in EVALUATIONS}  # fmt: skip
    batch, fixed = trees["batch"]["model"].to_dataset(), trees["fixed"]["model"].to_dataset()
    for descent in ("corrected", "trapezoid"):
        assert (batch["status"].sel(descent=descent) == Status.UNVERIFIABLE).all()
        assert np.isnan(batch["angle"].sel(descent=descent)).all()
        assert (fixed["status"].sel(descent=descent, window=1) <= Status.OBTUSE).all()
    for name in ("loss_decrease", "decreasing_window", "discrete_identity_residual"):
        assert np.isnan(batch[name]).all()
    # The consistency is still computed, and results that compare no losses do not change.
    for name in ("objective_residual", "loss", "loss_average", "effective_window", "angle", "status"):
        at = {"descent": "gradient"} if "descent" in batch[name].dims else {}
        np.testing.assert_array_equal(batch[name].sel(at), fixed[name].sel(at))
    for evaluation, tree in trees.items():
        assert overview(tree)["objective"]["evaluation"] == tree.attrs["evaluation"] == evaluation
        assert tree.attrs["gradient_source"] == "logged"


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_a_warning_depends_on_what_was_declared(evaluation):
    found = objective_of(replace(table_of(regression(batch=4)), evaluation=evaluation))
    assert found.consistency == "inconsistent"
    assert found.comparable == (evaluation == "fixed")
    texts = {"batch": None, "fixed": "--evaluation fixed", "unknown": "--evaluation batch"}
    assert [texts[evaluation] in text for text in found.warnings()] == ([] if evaluation == "batch" else [True])
    assert evaluation == "unknown" or "declared" in str(found)
