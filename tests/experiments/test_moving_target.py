"""Compare a model extended by time, for a loss that changes with time, with complete vectors and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpmath import diff, mp, mpf
from typer.testing import CliRunner

from logs import random_walk, write_log
from natgrad.app import run
from natgrad.experiments import __main__ as command_line
from natgrad.experiments.moving_target import RULES, MovingTarget, log_moving_target
from natgrad.results import dataset as results
from natgrad.results.inputs import update_table
from natgrad.schema.errors import InputError
from natgrad.schema.layout import unit_roundoff
from natgrad.schema.variables import Status
from natgrad.store import open_ledger, open_trajectory
from natgrad.theory import geometry
from processing import Serial, process, read_log
from reference import assert_same_pair, pair_of

U = unit_roundoff("float64")
BOWL = np.array([[2.0, 0.5], [0.5, 1.0]])


# The loss ---------------------------------------------------------------------------------------------------


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 10), st.floats(0, 3))
def test_gradient_and_time_derivative_are_those_of_the_loss(first, second, time, frequency):
    moving = MovingTarget(BOWL, frequency)

    def loss(x, y, t):
        turn = mpf(frequency) * t
        a, b = x - mp.cos(turn), y - mp.sin(turn)
        return (2 * a**2 + a * b + b**2) / 2

    with mp.workdps(60):
        at = (mpf(first), mpf(second), mpf(time))
        slopes = [diff(loss, at, order) for order in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
        # theta - c is off by the rounding of the phase, frequency x time, and of two functions of it; |H| < 3.
        off = 20 * U * (8 + frequency * time)
        theta = np.array([first, second])
        assert abs(moving.loss(theta, time) - loss(*at)) <= 3 * off * 5
        assert np.abs(moving.gradient(theta, time) - np.array(slopes[:2], dtype=float)).max() <= 3 * off
        assert abs(moving.time_derivative(theta, time) - slopes[2]) <= 3 * off * (1 + frequency) * 10


@given(st.integers(0, 99), st.floats(0, 10), st.sampled_from(RULES))
def test_the_loss_falls_along_the_flow_as_derived(seed, time, rule):
    moving = MovingTarget(BOWL, 1.5)
    theta = np.random.default_rng(seed).standard_normal(2)
    gradient, slope = moving.gradient(theta, time), moving.time_derivative(theta, time)
    pair = pair_of(-gradient, moving.flow(theta, time, rule))
    extended = geometry.with_time(pair, np.array(slope))
    square = gradient @ gradient
    expected = square if rule == "tracking" else square - slope
    rounding = 30 * U * (square + np.linalg.norm(gradient) * 1.5)
    assert abs(extended.alignment - expected) <= rounding
    assert abs(pair.alignment - (square + slope if rule == "tracking" else square)) <= rounding


# The model extended by time ---------------------------------------------------------------------------------


@given(st.integers(0, 999), st.floats(-3, 3))
def test_the_pair_with_time_is_that_of_vectors_with_one_element_more(seed, slope):
    y, g = np.random.default_rng(seed).standard_normal((2, 6))
    found = geometry.with_time(pair_of(y, g), np.array(slope))
    vectors = np.append(y, -slope), np.append(g, 1.0)
    assert_same_pair(found.update_square, found.alignment, geometry.angle(found), *vectors)
    assert found.size == 7


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    logs = {rule: folder / rule for rule in RULES}
    moving = {rule: log_moving_target(log, rule=rule) for rule, log in logs.items()}
    return {rule: (log, moving[rule], process(log, folder / f"{rule}-out")) for rule, log in logs.items()}


def at(tree, group, descent="gradient"):
    return tree[group].to_dataset().sel(descent=descent, window=1)


@pytest.mark.parametrize("rule", RULES)
def test_every_update_of_the_model_is_the_pair_of_complete_vectors_and_time(runs, rule):
    log, moving, tree = runs[rule]
    losses, rates, arrays = read_log(log)
    theta, gradient = arrays["parameter", "theta"], arrays["gradient", "theta"]
    model, tensor = at(tree, "model"), at(tree, "tensor").sel(tensor="theta")
    for step in range(len(losses) - 1):
        time = step * rates[0]
        assert losses[step] == moving.loss(theta[step], time)
        y, g = -gradient[step], (theta[step + 1] - theta[step]) / rates[0]
        slope = moving.time_derivative(theta[step], time)
        pair = pair_of(np.append(y, -slope), np.append(g, 1.0))
        row = model.isel(step=step)
        assert row["angle"] == pytest.approx(float(geometry.angle(pair)), abs=1e-13)
        assert row["gradient_norm"] == pytest.approx(np.hypot(np.linalg.norm(y), slope), rel=1e-14)
        assert row["update_norm"] == pytest.approx(np.hypot(np.linalg.norm(g), 1.0), rel=1e-14)
        kappa = float(geometry.condition_number(pair))
        assert float(row["condition_number"]) == pytest.approx(kappa, rel=1e-10, nan_ok=True)
        assert tensor.isel(step=step)["angle"] == pytest.approx(float(geometry.angle(pair_of(y, g))), abs=1e-13)


def test_steepest_descent_on_the_current_loss_may_not_decrease_the_moving_loss(runs):
    _, _, tree = runs["gradient"]
    tensor, model = at(tree, "tensor").sel(tensor="theta"), at(tree, "model")
    assert (tensor["status"] == Status.EFFECTIVE).all()
    assert (tensor["angle"] <= tensor["angle_uncertainty"] + 1e-13).all()
    assert set(np.unique(model["status"])) == {Status.EFFECTIVE, Status.OBTUSE}
    # Once it has caught up, it lags behind the target on a circle, and the loss rises in about half of the steps.
    assert 0.2 < float(model["effective"][100:].mean()) < 0.8


def test_the_tracking_rule_is_effective_even_if_it_climbs_the_current_loss(runs):
    _, _, tree = runs["tracking"]
    tensor, model = at(tree, "tensor").sel(tensor="theta"), at(tree, "model")
    assert (model["status"] == Status.EFFECTIVE).all()
    assert (tensor["status"] == Status.OBTUSE).any()


@pytest.mark.parametrize("rule", RULES)
def test_the_discrete_gradient_in_time_and_parameters_explains_the_change_of_the_loss(runs, rule):
    _, _, tree = runs[rule]
    model = at(tree, "model", "corrected")
    rises = model["loss_decrease"].values < 0
    np.testing.assert_array_equal(model["status"] == Status.OBTUSE, rises)
    # y.g is computed as -dL / eta, with a few roundings.
    assert np.abs(model["discrete_identity_residual"]).max() <= 10 * U


def inputs_of(log, out):
    run.ingest_run(log, out)
    run.analyze_run(out, Serial())
    folder = run.RunFolder.of(out)
    return update_table(open_trajectory(folder.trajectory), open_ledger(folder.ledger))[1]


def test_a_step_without_the_derivative_is_not_verifiable_and_a_run_without_any_is_not_extended(tmp_path):
    states = random_walk(6)
    for state in states[:3] + states[4:]:
        state["loss_time_derivative"] = np.float64(0.5)
    tree = process(write_log(tmp_path / "some", states), tmp_path / "some-out")
    for descent in ("gradient", "corrected"):
        status = at(tree, "model", descent)["status"].values
        assert status[3] == Status.UNVERIFIABLE
        assert (status[[0, 1, 2, 4]] != Status.UNVERIFIABLE).all()
    assert (at(tree, "tensor")["status"] != Status.UNVERIFIABLE).all()
    # A tensor's share of the loss change is computed from the model's pair.
    assert (at(tree, "tensor", "corrected")["status"][3] == Status.UNVERIFIABLE).all()
    windows = process(write_log(tmp_path / "more", states), tmp_path / "more-out", windows=(2,))
    status = windows["model"]["status"].sel(window=2, descent="gradient").values
    assert (status == Status.UNVERIFIABLE).tolist() == [False, False, True, True, True]
    plain = process(write_log(tmp_path / "plain", random_walk(6)), tmp_path / "plain-out")
    model, tensors = at(plain, "model"), at(plain, "tensor")
    squares = (tensors["update_norm"] ** 2).sum("tensor")
    assert (model["update_norm"] ** 2).values == pytest.approx(squares.values, rel=10 * U)


def test_results_of_the_hessian_of_the_parameters_alone_are_omitted(tmp_path):
    states = random_walk(6)
    for state in states:
        state |= {key.replace("gradient/", "hvp/"): value for key, value in state.items() if "gradient/" in key}
        state["hessian_min_eigenvalue"] = np.float64(-0.1)
    plain = process(write_log(tmp_path / "plain", states), tmp_path / "plain-out")
    for state in states:
        state["loss_time_derivative"] = np.float64(0.5)
    tree = process(write_log(tmp_path / "moving", states), tmp_path / "moving-out")
    assert (at(plain, "model", "taylor")["status"] != Status.UNVERIFIABLE).all()
    assert (at(tree, "model", "taylor")["status"] == Status.UNVERIFIABLE).all()
    assert (at(tree, "tensor", "taylor")["status"] != Status.UNVERIFIABLE).all()
    assert np.isfinite(at(plain, "model", "corrected")["learning_rate_bound"]).any()
    assert np.isnan(at(tree, "model", "corrected")["learning_rate_bound"]).all()


def test_only_the_runs_of_a_sweep_that_log_the_derivative_are_extended(tmp_path):
    states = random_walk(9)
    for state in states:
        state["loss_time_derivative"] = np.float64(0.5)
    inputs = inputs_of(write_log(tmp_path / "log", states), tmp_path / "out")
    slope = np.array([0.5] * 4 + [np.nan] * 4)
    both = replace(inputs, loss_time_derivative=slope, runs=("one", "other"), run=np.repeat([0, 1], 4))
    swept = results.label(both)["model"]["update_norm"].sel(window=1)
    extended, alone = (
        results.label(replace(inputs, loss_time_derivative=each))["model"]["update_norm"].sel(window=1).values
        for each in (inputs.loss_time_derivative, None)
    )
    assert (extended > alone).all()
    found = [swept.sel(run=name).values for name in ("one", "other")]
    np.testing.assert_array_equal([value[np.isfinite(value)] for value in found], [extended[:4], alone[4:]])


# Logs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "hope"}, "(?s)unknown rule 'hope'.*gradient, tracking"),
        ({"steps": 0}, "do not form a trajectory"),
        ({"learning_rate": 0.0}, "do not form a trajectory"),
        ({"frequency": np.nan}, "do not form a trajectory"),
    ],
)
def test_options_out_of_range_are_refused_and_nothing_is_logged(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        log_moving_target(tmp_path / "log", **options)
    assert not (tmp_path / "log").exists()


def test_the_command_line_logs_the_requested_rule(tmp_path):
    arguments = ["moving-target", str(tmp_path / "log"), "--rule", "tracking", "--steps", "4"]
    answer = CliRunner().invoke(command_line.app, arguments, catch_exceptions=False)
    assert answer.exit_code == 0
    assert answer.output == f"{tmp_path / 'log'}: 5 steps\n"
    assert len(list((tmp_path / "log").iterdir())) == 5
