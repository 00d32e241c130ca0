"""Compare the energies of higher-order rules with closed forms, and process their extended states."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mpmath import mp, mpf
from typer.testing import CliRunner

from natgrad.experiments import __main__ as command_line
from natgrad.experiments import higher_order
from natgrad.experiments.higher_order import OBJECTIVES, RULES, Adam, HeavyBall, Nesterov, log_higher_order
from natgrad.schema.errors import InputError
from natgrad.schema.layout import unit_roundoff
from natgrad.schema.variables import Status
from processing import process, read_log

U = unit_roundoff("float64")
RUNS = [f"{rule}-{objective}" for rule in RULES for objective in OBJECTIVES]
# Powers of ten around the sizes that a trajectory passes.
scales = st.floats(-6, 2).map(lambda exponent: 10.0**exponent)
seeds = st.integers(0, 10**6)


def objective_of(name, seed, dimension=5):
    return higher_order.draw_objective(name, dimension, np.random.default_rng(seed))


def displaced(rule, state):
    """Change of the extended state by an update, and its product with the gradient of the energy, -y.p."""
    after = rule.step(state)
    change = {name: after[name] - state[name] for name in state}
    gradient = rule.energy_gradient(state)
    return after, change, sum(float(gradient[name] @ change[name]) for name in state)


def rounding_of(state, *others):
    """Bound on the rounding of sums of up to 15 products of values with up to 60 roundings each."""
    sizes = [sum(float(np.abs(value).max()) for value in each.values()) for each in (state, *others)]
    return 1000 * U * np.prod(sizes)


# Objectives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_the_objective_by_its_definition(name, seed):
    objective = objective_of(name, seed)
    theta = np.random.default_rng(seed).standard_normal(5) * 10.0 ** (seed - 1)
    h = objective.curvatures

    def value(state):
        x = [mp.fsum(mpf(r) * s for r, s in zip(row, state, strict=True)) for row in objective.rotation.tolist()]
        if name == "quadratic":
            return mp.fsum(mpf(c) * a**2 / 2 for c, a in zip(h.tolist(), x, strict=True))
        terms = (
            mpf(h[0]) * a**2 / 2 + (mpf(c) - mpf(h[0])) * mp.log(mp.cosh(a)) for c, a in zip(h, x, strict=True)
        )
        return mp.fsum(terms)

    with mp.workdps(60):
        state, step = [mpf(t) for t in theta.tolist()], mpf(10) ** -20
        # Sums of five terms of the same sign, each a sum of five: about twenty roundings, amplified by at most 2.
        assert abs(objective.value(theta) - value(state)) <= 40 * U * (theta @ theta)
        for index, slope in enumerate(objective.gradient(theta)):
            beside = [value([s + sign * step * (i == index) for i, s in enumerate(state)]) for sign in (1, -1)]
            assert abs(slope - (beside[0] - beside[1]) / (2 * step)) <= 40 * U * np.abs(theta).sum()


@given(st.sampled_from(OBJECTIVES), seeds, scales)
def test_the_curvature_lies_between_the_strong_convexity_and_the_lipschitz_constant(name, seed, scale):
    objective = objective_of(name, seed)
    one, other = scale * np.random.default_rng(seed).standard_normal((2, 5))
    slope = (objective.gradient(one) - objective.gradient(other)) @ (one - other)
    square = (one - other) @ (one - other)
    rounding = 100 * U * (one @ one + other @ other)
    assert objective.convexity * square - rounding <= slope <= objective.smoothness * square + rounding


def test_far_from_its_minimum_log_cosh_does_not_overflow():
    objective = objective_of("log-cosh", 0)
    assert np.isfinite(objective.value(np.full(5, 1e6)))
    assert objective.value(np.zeros(5)) == 0.0


# Energies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_the_energy_is_its_derivative(rule, name):
    followed = RULES[rule](objective_of(name, 1))
    random = np.random.default_rng(2)
    state = {tensor: random.standard_normal(5) for tensor in followed.start(np.ones(5))}
    if "square" in state:
        state["square"] = 1.0 + state["square"] ** 2
    for tensor, slopes in followed.energy_gradient(state).items():
        for index, slope in enumerate(slopes):
            for step in (1e-5, 1e-4):
                beside = []
                for sign in (1, -1):
                    moved = {key: value.copy() for key, value in state.items()}
                    moved[tensor][index] += sign * step
                    beside.append(followed.energy(moved))
                # A central difference is off by step^2 / 6 of the third derivative, which is below 10 here, and by
                # the rounding of two energies over the step.
                bound = 2 * step**2 + 100 * U * followed.energy(state) / step
                assert abs(slope - (beside[0] - beside[1]) / (2 * step)) <= bound


@given(st.sampled_from(OBJECTIVES), seeds, scales, scales, st.floats(0, 0.99), st.floats(0.01, 0.99))
def test_the_heavy_ball_descends_its_energy_from_every_state_by_the_known_amounts(
    name, seed, scale, speed, decay, part
):
    objective = objective_of(name, seed)
    rule = HeavyBall(objective, learning_rate=part * 2 * (1 - decay) / objective.smoothness, decay=decay)
    random = np.random.default_rng(seed)
    state = {"theta": scale * random.standard_normal(5), "velocity": speed * random.standard_normal(5)}
    after, change, slope = displaced(rule, state)
    eta, d, next_d = rule.learning_rate, rule.learning_rate * state["velocity"], change["theta"]
    s = 1 - eta * objective.smoothness / 2
    form = (next_d @ next_d - (decay + s) * (d @ next_d) + s * (d @ d)) / eta
    assert abs(-slope - form) <= rounding_of(rule.energy_gradient(state), state)
    assert 4 * s > (decay + s) ** 2  # so the form is positive definite
    least = (1 - decay - eta * objective.smoothness / 2) / (2 * eta) * (next_d @ next_d + d @ d)
    decrease = rule.energy(state) - rule.energy(after)
    assert decrease >= least - 100 * U * rule.energy(state)


@given(st.sampled_from(OBJECTIVES), seeds, scales, scales)
def test_the_energy_of_nesterov_shrinks_by_the_known_rate_from_every_state(name, seed, scale, speed):
    rule = Nesterov(objective_of(name, seed))
    random = np.random.default_rng(seed)
    state = {"theta": scale * random.standard_normal(5), "velocity": speed * random.standard_normal(5)}
    after, _, slope = displaced(rule, state)
    rounding = 100 * U * rule.energy(state)
    assert rule.energy(after) <= rule.rate * rule.energy(state) + rounding
    # E is convex, so its tangent lies below it: E' >= E + grad E . p.
    assert slope <= rule.energy(after) - rule.energy(state) + rounding


def test_nesterov_with_a_single_curvature_converges_in_one_step():
    # L = mu: there is no momentum, and the step 1/L along a gradient of slope L ends at the minimum.
    objective = higher_order.Objective(np.array([2.0]), np.eye(1), quadratic=True)
    rule = Nesterov(objective)
    assert rule.rate == 0.0
    assert rule.step(rule.start(np.array([3.0])))["theta"] == 0.0


def test_the_heavy_ball_on_a_parabola_follows_the_powers_of_its_matrix():
    objective = higher_order.Objective(np.array([1.0]), np.eye(1), quadratic=True)
    rule = HeavyBall(objective, learning_rate=0.1, decay=0.9)
    matrix = np.array([[1 - 0.1, 0.1 * 0.9], [-1.0, 0.9]])
    state = rule.start(np.array([1.0]))
    for step in range(1, 40):
        state = rule.step(state)
        expected = np.linalg.matrix_power(matrix, step) @ [1.0, 0.0]
        found = np.concatenate([state["theta"], state["velocity"]])
        assert found == pytest.approx(expected, abs=100 * step * U)


@given(seeds, scales, st.floats(0.5, 0.99), st.floats(0, 1))
def test_along_its_differential_equation_the_energy_of_adam_decreases(seed, scale, decay, part):
    # The flow is that of the differential equation, which steps with a small learning rate approximate.
    square_decay = 1 - part * min(4 * (1 - decay), 1)
    objective = objective_of("log-cosh", seed)
    random = np.random.default_rng(seed)
    state = {
        "theta": scale * random.standard_normal(5),
        "mean": scale * random.standard_normal(5),
        "square": (scale * random.standard_normal(5)) ** 2,
    }
    assume(state["square"].min() > 1e-6 * scale**2)
    rule = Adam(objective, 0.1, decay, square_decay)
    gradient, slope = objective.gradient(state["theta"]), rule.energy_gradient(state)
    root = np.sqrt(state["square"]) + rule.epsilon
    flow = {
        "theta": -rule.learning_rate * state["mean"] / root,
        "mean": (1 - decay) * (gradient - state["mean"]),
        "square": (1 - square_decay) * (gradient**2 - state["square"]),
    }
    change = sum(slope[name] @ flow[name] for name in flow)
    kinetic = rule.learning_rate * np.sum(state["mean"] ** 2 / root)
    known = -(1 - (1 - square_decay) / (4 * (1 - decay))) * kinetic
    assert change <= known + rounding_of(slope, flow)


def test_adam_has_a_cycle_of_two_and_so_no_lyapunov_function_on_all_states():
    objective = higher_order.Objective(np.array([2.0]), np.eye(1), quadratic=True)
    rule = Adam(objective, learning_rate=0.2, decay=0.9, epsilon=0.0)
    theta = 0.2 * 0.1 / (2 * 1.9)
    gradient = 2.0 * theta
    state = {
        "theta": np.array([theta]),
        "mean": np.array([-(1 - 0.9) / (1 + 0.9) * gradient]),
        "square": np.array([gradient**2]),
    }
    after = rule.step(state)
    assert after["theta"] == pytest.approx(-state["theta"], rel=100 * U)
    again = rule.step(after)
    for name, value in state.items():
        assert again[name] == pytest.approx(value, rel=200 * U)
    # Any function of the state returns to its value, so it does not decrease in one of the two steps.
    changes = [rule.energy(after) - rule.energy(state), rule.energy(again) - rule.energy(after)]
    assert max(changes) >= -100 * U * rule.energy(state)
    # From outside the cycle, with a large learning rate, it does rise.
    large = replace(rule, objective=objective_of("log-cosh", 2, 8), learning_rate=0.5, epsilon=1e-8)
    state, rises = large.start(3.0 * np.random.default_rng(2).standard_normal(8)), 0
    for _ in range(2000):
        following = large.step(state)
        rises += large.energy(following) > large.energy(state)
        state = following
    assert rises > 0


# Logs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    return folder, log_higher_order(folder)


@pytest.fixture(scope="module")
def models(logs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    trees = {path.name: process(path, folder / path.name) for path in sorted(logs[0].iterdir())}
    return {name: tree["model"].to_dataset() for name, tree in trees.items()}


def test_both_logs_describe_one_trajectory(logs):
    folder, followed = logs
    assert set(followed) == set(RUNS)
    assert {path.name for path in folder.iterdir()} == {
        f"{run}-{end}" for run in RUNS for end in ("loss", "extended")
    }
    for run, rule in followed.items():
        losses, rates, alone = read_log(folder / f"{run}-loss")
        energies, _, extended = read_log(folder / f"{run}-extended")
        assert (rates == rule.learning_rate).all()
        np.testing.assert_array_equal(alone["parameter", "theta"], extended["parameter", "theta"])
        names = [name for kind, name in extended if kind == "parameter"]
        state = rule.start(extended["parameter", "theta"][0])
        assert set(names) == set(state)
        for step in range(higher_order.STEPS + 1):
            for name in names:
                np.testing.assert_array_equal(extended["parameter", name][step], state[name])
                np.testing.assert_array_equal(extended["gradient", name][step], rule.energy_gradient(state)[name])
            assert energies[step] == rule.energy(state)
            assert losses[step] == rule.objective.value(state["theta"])
            np.testing.assert_array_equal(alone["gradient", "theta"][step], rule.objective.gradient(state["theta"]))
            state = rule.step(state)


@pytest.mark.parametrize("run", RUNS)
def test_a_rule_with_memory_is_effective_in_its_extended_state_but_not_for_the_loss_alone(models, run):
    alone = models[f"{run}-loss"].sel(descent="gradient", window=1)
    assert (alone["status"] == Status.OBTUSE).any()
    assert set(np.unique(alone["status"])) == {Status.EFFECTIVE, Status.OBTUSE}
    extended = models[f"{run}-extended"].sel(window=1)
    # A run without hvp does not have eq. (16).
    assert (extended["status"].sel(descent="taylor") == Status.UNVERIFIABLE).all()
    extended = extended.drop_sel(descent="taylor")
    # Compared with the gradient of the energy, and with its discrete gradient: the energy decreases.
    assert (extended["status"] == Status.EFFECTIVE).all()
    assert (extended["loss_decrease"] > 0).all()
    assert np.isfinite(extended["condition_number"]).all()


def test_the_documented_counts_are_those_of_the_results(models):
    def count(name, variable):
        values = models[name].sel(descent="gradient", window=1)[variable]
        return int((values > 0).sum())

    page = (Path(__file__).parents[2] / "docs" / "explanation" / "experiments.md").read_text()
    rows = re.findall(r"^\| ([a-z-]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == RUNS
    for name, *counts in rows:
        ends = ("loss", "extended")
        found = [count(f"{name}-{end}", variable) for end in ends for variable in ("effective", "loss_decrease")]
        assert list(map(int, counts)) == found


def test_the_discrete_gradient_shows_a_rise_of_the_loss_but_not_of_the_energy(models):
    for run in RUNS:
        alone = models[f"{run}-loss"].sel(window=1, descent="corrected")
        rises = alone["loss_decrease"] < 0
        assert rises.any()
        np.testing.assert_array_equal(alone["status"] == Status.OBTUSE, rises)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": ["hope"]}, "(?s)unknown rule 'hope'.*nesterov"),
        ({"objectives": ["sine"]}, "(?s)unknown objective 'sine'.*log-cosh"),
        ({"steps": 0}, "do not form a trajectory"),
        ({"dimension": 1}, "do not form a trajectory"),
    ],
)
def test_options_out_of_range_are_refused_and_nothing_is_logged(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        log_higher_order(tmp_path / "logs", **options)
    assert not (tmp_path / "logs").exists()


def test_rules_whose_energy_is_not_known_to_decrease_are_refused():
    objective = objective_of("quadratic", 0)
    for rate, decay in ((0.2, 0.9), (0.0, 0.9), (0.1, 1.0), (0.1, -0.1)):
        with pytest.raises(InputError, match="no decreasing energy is known for the heavy ball"):
            HeavyBall(objective, rate, decay)
    assert HeavyBall(objective, 0.199, 0.9).learning_rate == 0.199
    with pytest.raises(InputError, match=r"(?s)no decreasing energy is known for Adam.*four times as fast"):
        Adam(objective, decay=0.99, square_decay=0.9)


def test_the_command_line_logs_the_requested_rules(tmp_path):
    arguments = ["higher-order", str(tmp_path), "--rule", "nesterov", "--objective", "quadratic", "--steps", "3"]
    answer = CliRunner().invoke(command_line.app, arguments, catch_exceptions=False)
    assert answer.exit_code == 0
    assert answer.output.count("4 steps each") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"nesterov-quadratic-loss", "nesterov-quadratic-extended"}
