"""Compare learning rules with theory, on logs that went through the complete pipeline."""

import numpy as np
import pytest
from mpmath import mp, mpf
from typer.testing import CliRunner

from natgrad.experiments import __main__ as command_line
from natgrad.experiments import learning_rules
from natgrad.experiments.digits import Digits, load_digits
from natgrad.experiments.learning_rules import LAYERS, RULES, RuleContext, log_learning_rules, oja, propagate_back
from natgrad.schema.errors import InputError
from natgrad.schema.layout import unit_roundoff
from natgrad.schema.variables import Status
from processing import process, read_log
from reference import derivatives, exact, worst_case

U, U32 = unit_roundoff("float64"), unit_roundoff("float32")
DESCENDING = ("backpropagation", "momentum", "adam", "sign-descent", "weight-perturbation")
STEPS = 8


def toy_digits(images=40):
    random = np.random.default_rng(0)
    return Digits(random.random((images, 6), dtype=np.float32), random.integers(0, 10, images))


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    log_learning_rules(folder, steps=STEPS, hidden=4, images=30, seed=1, digits=toy_digits())
    return folder


@pytest.fixture(scope="module")
def trees(logs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: process(logs / name, folder / name) for name in RULES}


def model(tree):
    return tree["model"].to_dataset().sel(descent="gradient", window=1)


def tensors(tree):
    return tree["tensor"].to_dataset().sel(descent="gradient", window=1)


def negative_gradients(log):
    """Negative gradients y of the model, shape (step, element), in float64."""
    _, _, arrays = read_log(log)
    return -np.concatenate([arrays["gradient", layer] for layer in LAYERS], axis=1).astype(float)


def angle_between(x, y):
    """Angle by Kahan's formula, which does not suffer from cancellation, row by row."""
    x, y = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, y))
    return 2 * np.arctan2(np.linalg.norm(x - y, axis=-1), np.linalg.norm(x + y, axis=-1))


# The network ------------------------------------------------------------------------------------------------


def small_network(seed):
    random = np.random.default_rng(seed)
    widths = (5, 4, 3, 10)
    weights = {
        layer: random.standard_normal((above, below))
        for layer, below, above in zip(LAYERS, widths[:-1], widths[1:], strict=True)
    }
    return weights, random.standard_normal((6, 5)), random.integers(0, 10, 6)


def exact_loss(weights, inputs, labels):
    """Mean cross-entropy by its definition, for weights as lists of exact rows."""
    total = mpf(0)
    for image, label in zip(inputs, labels, strict=True):
        units = exact(image)
        for layer in LAYERS:
            scores = [mp.fsum(a * b for a, b in zip(row, units, strict=True)) for row in weights[layer]]
            units = [mp.tanh(score) for score in scores]
        total += mp.log(mp.fsum(mp.exp(score) for score in scores)) - scores[label]
    return total / len(labels)


def forward_bounds(weights, forward):
    """Bounds on the rounding of the inputs of every layer, and of the scores, to first order."""
    off = [np.zeros_like(forward.activities[0])]
    for weight, sources in zip(weights.values(), forward.activities, strict=True):
        sums = (off[-1] + worst_case(weight.shape[1]) * np.abs(sources)) @ np.abs(weight).T
        # tanh does not increase errors, and is accurate to two units in the last place.
        off.append(sums + 4 * U)
    return off[:-1], sums


def gradient_bounds(weights, forward):
    """Bounds on the rounding of every gradient, to first order: that of each operation, and what it propagates."""
    off, scores_off = forward_bounds(weights, forward)
    images, classes = forward.errors.shape
    shift = np.abs(forward.scores).max(axis=1, keepdims=True)
    relative = 2 * scores_off.max(axis=1, keepdims=True) + worst_case(classes + 8) + 4 * U * shift
    error, error_off = np.abs(forward.errors), np.full_like(forward.errors, 1.0 / images) * relative
    bounds = {}
    for layer in reversed(LAYERS):
        index = LAYERS.index(layer)
        sources, sources_off = np.abs(forward.activities[index]), off[index]
        bounds[layer] = error_off.T @ sources + error.T @ sources_off + worst_case(images) * error.T @ sources
        weight = np.abs(weights[layer])
        brought = error @ weight
        error_off = error_off @ weight + brought * (worst_case(weight.shape[0] + 4) + 2 * sources * sources_off)
        # The slope of tanh is at most 1.
        error = brought
    return {layer: 2 * bound for layer, bound in bounds.items()}


@pytest.mark.parametrize("seed", range(3))
def test_backpropagation_is_the_derivative_of_the_loss(seed):
    weights, inputs, labels = small_network(seed)
    forward = learning_rules.forward_pass(weights, inputs, labels)
    gradient = propagate_back(forward, list(weights.values())[1:])
    bounds = gradient_bounds(weights, forward)
    with mp.workdps(60):
        exactly = {layer: [exact(row) for row in weight] for layer, weight in weights.items()}
        # The error of a loss is twice that of the worst score, plus the roundings of softmax, logarithm and mean.
        scores_off, size = forward_bounds(weights, forward)[1].max(), np.abs(forward.scores).max()
        loss_bound = 2 * scores_off + worst_case(10 + 6 + 8) * (1 + 2 * size)
        assert abs(forward.loss - exact_loss(exactly, inputs, labels)) <= loss_bound
        assert all(gradient[name].shape == weight.shape for name, weight in weights.items())
        expected = derivatives(lambda moved: exact_loss(moved, inputs, labels), exactly)
        for (name, row, column), derivative in expected:
            assert abs(gradient[name][row, column] - derivative) <= bounds[name][row, column], (name, row, column)


def test_scores_that_overflow_an_exponential_have_a_loss_and_a_gradient():
    weights, inputs, labels = small_network(0)
    weights[LAYERS[-1]] *= 1e4
    forward = learning_rules.forward_pass(weights, inputs, labels)
    assert np.isfinite(forward.loss)
    assert all(np.isfinite(slope).all() for slope in propagate_back(forward, list(weights.values())[1:]).values())


def test_with_fixed_feedback_only_the_last_layer_has_the_true_gradient():
    weights, inputs, labels = small_network(0)
    forward = learning_rules.forward_pass(weights, inputs, labels)
    gradient = propagate_back(forward, list(weights.values())[1:])
    random = np.random.default_rng(1)
    feedback = [random.standard_normal((3, 4)), random.standard_normal((10, 3))]
    direct = [random.standard_normal((10, 4)), feedback[1]]
    for found in (propagate_back(forward, feedback), propagate_back(forward, direct, direct=True)):
        np.testing.assert_array_equal(found[LAYERS[2]], gradient[LAYERS[2]])
        for layer in LAYERS[:2]:
            assert np.linalg.norm(found[layer] - gradient[layer]) > 0.1 * np.linalg.norm(gradient[layer])
    # For the last hidden layer, the outputs are the layer above, so both kinds of feedback are the same.
    one, other = propagate_back(forward, feedback), propagate_back(forward, direct, direct=True)
    np.testing.assert_array_equal(one[LAYERS[1]], other[LAYERS[1]])
    assert (one[LAYERS[0]] != other[LAYERS[0]]).any()


# The logs ---------------------------------------------------------------------------------------------------


def test_all_rules_start_equally_and_log_the_gradient_of_one_objective(logs):
    digits = toy_digits()
    inside = np.random.default_rng(1).permutation(40)[:30]
    inputs = digits.images[inside] - digits.images[inside].mean(axis=0)
    shapes = dict(zip(LAYERS, ((4, 6), (4, 4), (10, 4)), strict=True))
    first = read_log(logs / "backpropagation")[2]
    for name in RULES:
        losses, rates, arrays = read_log(logs / name)
        assert len(losses) == STEPS + 1
        assert (rates == RULES[name].learning_rate).all()
        for step in range(STEPS + 1):
            weights = {k: arrays["parameter", k][step].reshape(shape) for k, shape in shapes.items()}
            forward = learning_rules.forward_pass(weights, inputs, digits.labels[inside])
            assert forward.loss == losses[step]
            for layer, slope in propagate_back(forward, list(weights.values())[1:]).items():
                np.testing.assert_array_equal(arrays["gradient", layer][step], slope.ravel())
        assert (name == "weight-perturbation") == any(key[0].startswith("replicate") for key in arrays)
        for key, array in arrays.items():
            assert array.dtype == np.float32
            if key in first:
                np.testing.assert_array_equal(array[0], first[key][0])
            assert key[0] == "gradient" or (array[1] != array[0]).any()


def test_a_rule_does_not_depend_on_which_others_are_trained(logs, tmp_path):
    log_learning_rules(
        tmp_path, rules=["weight-perturbation"], steps=STEPS, hidden=4, images=30, seed=1, digits=toy_digits()
    )
    for path in sorted((tmp_path / "weight-perturbation").iterdir()):
        assert path.read_bytes() == (logs / "weight-perturbation" / path.name).read_bytes()


# Predictions of the theory
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DESCENDING)
def test_rules_that_descend_by_construction_are_always_effective(trees, name):
    assert (model(trees[name])["status"] == Status.EFFECTIVE).all()


def test_the_angle_of_backpropagation_is_zero_to_rounding(trees):
    for results in (model(trees["backpropagation"]), tensors(trees["backpropagation"])):
        assert (results["angle"] <= results["angle_uncertainty"]).all()
        turned = np.sin(results["angle_uncertainty"])
        assert (results["condition_number"] <= (1 + turned) / (1 - turned)).all()


def expected_updates(name, y):
    """Updates by the definition of a rule, from all previous negative gradients, and their rounding in float32."""
    steps = np.arange(len(y))
    ages = steps[:, None] - steps
    past = np.where(ages >= 0, learning_rules.DECAY ** np.maximum(ages, 0), 0.0)
    if name == "momentum":
        return past @ y, 4 * len(y) * U32 * (past @ np.abs(y))
    if name == "sign-descent":
        return np.sign(y), np.zeros_like(y)
    squares = np.where(ages >= 0, learning_rules.SQUARE_DECAY ** np.maximum(ages, 0), 0.0)
    mean = past / past.sum(axis=1, keepdims=True)
    root = np.sqrt((squares / squares.sum(axis=1, keepdims=True)) @ y**2) + learning_rules.EPSILON
    # 1 - 0.999 and its powers are rounded to float32 relative to 1. This is a common factor of all elements, so
    # angles do not depend on it.
    return mean @ y / root, 8 * len(y) * U32 * (mean @ np.abs(y)) / root


@pytest.mark.parametrize("name", ["momentum", "adam", "sign-descent"])
def test_the_angle_is_that_of_the_rule_by_its_definition(trees, logs, name):
    y = negative_gradients(logs / name)[:-1]
    update, rounding = expected_updates(name, y)
    found = model(trees[name])
    turned = np.arcsin(np.linalg.norm(rounding, axis=1) / np.linalg.norm(update, axis=1))
    expected = angle_between(y, update)
    assert (np.abs(found["angle"] - expected) <= found["angle_uncertainty"] + turned).all()
    # The bound is meaningful: it distinguishes the rule from backpropagation.
    assert (expected[1:] > 10 * (found["angle_uncertainty"] + turned)[1:]).all()


def test_momentum_begins_as_backpropagation_and_then_turns(trees):
    angle, uncertainty = (model(trees["momentum"])[name].values for name in ("angle", "angle_uncertainty"))
    assert angle[0] <= uncertainty[0]
    assert (angle[1:] > 10 * uncertainty[1:]).all()


def test_sign_descent_has_the_cosine_of_the_two_norms_of_the_gradient(trees, logs):
    y = negative_gradients(logs / "sign-descent")[:-1]
    lengths = np.sqrt((y != 0).sum(axis=1)) * np.linalg.norm(y, axis=1)
    found = model(trees["sign-descent"])
    assert (np.abs(found["angle"] - np.arccos(np.abs(y).sum(axis=1) / lengths)) <= found["angle_uncertainty"]).all()


@pytest.mark.parametrize("name", ["feedback-alignment", "direct-feedback-alignment"])
def test_the_last_layer_needs_no_feedback(trees, name):
    found = tensors(trees[name])
    last = found.sel(tensor=LAYERS[-1])
    assert (last["angle"] <= last["angle_uncertainty"]).all()
    others = found.sel(tensor=list(LAYERS[:-1]))
    assert (others["angle"] > 10 * others["angle_uncertainty"]).all()


def test_the_control_is_obtuse_everywhere_and_has_no_metric(trees, logs):
    y = negative_gradients(logs / "partial-ascent")[:-1]
    for found in (model(trees["partial-ascent"]), tensors(trees["partial-ascent"])):
        assert (found["status"] == Status.OBTUSE).all()
        assert not found["effective"].any()
        assert (found["angle"] > np.pi / 2).all()
        assert np.isnan(found["condition_number"]).all()
    # Every tensor has an even number of elements, so every second element of the model is one of its tensor.
    rising = np.linalg.norm(y[:, ::2], axis=1) / np.linalg.norm(y, axis=1)
    found = model(trees["partial-ascent"])
    assert (np.abs(found["angle"] - np.arccos(-rising)) <= found["angle_uncertainty"]).all()
    assert (np.diff(found["loss"]) > 0).all()


def situation(y, seed=0):
    """Context of a rule on the loss -y.theta + |theta|^2 / 2 at 0, where the gradient is -y."""
    weights = {"theta": np.zeros_like(y)}

    def loss(weights):
        return float(weights["theta"] @ weights["theta"] / 2 - y @ weights["theta"])

    random = np.random.default_rng(seed)
    return RuleContext(0, weights, {"theta": -y}, None, None, loss, [], [], random)


def test_weight_perturbation_descends_in_every_mean_by_the_mean_square_of_its_slopes():
    y = np.random.default_rng(3).standard_normal(10)
    for seed in range(20):
        update = learning_rules.weight_perturbation(situation(y, seed))["theta"]
        random = np.random.default_rng(seed)
        slopes = np.array([random.standard_normal(10) @ y for _ in range(learning_rules.PERTURBATIONS)])
        # A slope is a difference of two losses divided by the amplitude, so its error is their rounding divided by
        # it.
        error = 20 * U * (1 + np.abs(slopes).max()) / learning_rules.AMPLITUDE * np.abs(slopes).max()
        assert abs(update @ y - np.mean(slopes**2)) <= error
        assert update @ y > 0


def test_the_mean_of_weight_perturbation_is_the_negative_gradient():
    y = np.random.default_rng(3).standard_normal(10)
    context, turns = situation(y), 100
    updates = np.array([learning_rules.weight_perturbation(context)["theta"] for _ in range(turns)])
    # The update of one perturbation, (y.v) v, has the covariance |y|^2 I + y y'. The mean square error of a mean of
    # N is its trace over N; four times that is exceeded with a probability of at most one in four (Markov).
    count = turns * learning_rules.PERTURBATIONS
    assert np.sum((updates.mean(axis=0) - y) ** 2) <= 4 * (len(y) + 1) * (y @ y) / count
    # One update alone is far from it: cos^2 psi is about n / (n + D + 1).
    cosines = updates @ y / np.linalg.norm(updates, axis=1) / np.linalg.norm(y)
    few = learning_rules.PERTURBATIONS
    # A hundred of them, each with a standard deviation of about 0.1: five standard errors.
    assert np.mean(cosines**2) == pytest.approx(few / (few + len(y) + 1), abs=0.05)


def test_the_draws_of_weight_perturbation_are_logged_with_the_states_they_lead_to(logs, trees):
    digits, name = toy_digits(), "weight-perturbation"
    inside = np.random.default_rng(1).permutation(40)[:30]
    inputs = digits.images[inside] - digits.images[inside].mean(axis=0)
    _, _, arrays = read_log(logs / name)
    found = trees[name]["replicates/model"].to_dataset()
    states = {k: arrays["replicate_parameter", k].reshape(STEPS + 1, learning_rules.DRAWS, -1) for k in LAYERS}
    for layer in LAYERS:
        # The next state is the mean of theirs, up to the rounding of float32 states and of the sum.
        off = 4 * learning_rules.DRAWS * U32 * np.abs(states[layer]).max()
        assert np.abs(states[layer].mean(axis=1)[:-1] - arrays["parameter", layer][1:]).max() <= off
    shapes = dict(zip(LAYERS, ((4, 6), (4, 4), (10, 4)), strict=True))
    for step, draw in np.ndindex(STEPS, learning_rules.DRAWS):
        weights = {k: states[k][step, draw].reshape(shapes[k]) for k in LAYERS}
        forward = learning_rules.forward_pass(weights, inputs, digits.labels[inside])
        assert (
            float(found["replicate_loss_decrease"][step, draw]) == model(trees[name])["loss"][step] - forward.loss
        )
        for layer, slope in propagate_back(forward, list(weights.values())[1:]).items():
            bent = arrays["replicate_hvp", layer].reshape(STEPS + 1, learning_rules.DRAWS, -1)[step, draw]
            np.testing.assert_array_equal(bent, slope.ravel() - arrays["gradient", layer][step])
    # The mean of the draws is the update, so its angles agree up to the rounding of the states.
    turned = np.abs(found["angle"] - model(trees[name])["angle"])
    assert (turned <= learning_rules.DRAWS * model(trees[name])["angle_uncertainty"]).all()
    # Each draw descends by the mean square of its slopes, as the mean does, but at a larger angle on average.
    assert (found["replicate_alignment"] > 0).all()
    assert (found["replicate_angle"].mean("replicate") > found["angle"]).all()


def test_the_subspace_rule_of_oja_converges_to_its_fixed_points():
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.standard_normal((5, 5)))[0]
    sources = random.standard_normal((200, 5)) * [4, 3, 1, 0.5, 0.2] @ basis.T
    principal = np.linalg.svd(sources, full_matrices=False)[2][:2]
    turned = np.array([[0.6, 0.8], [-0.8, 0.6]]) @ principal
    size = np.linalg.norm(sources) ** 2 / len(sources)
    assert np.linalg.norm(oja(turned, sources, sources @ turned.T)) <= worst_case(200 * 25) * size
    weight = random.standard_normal((2, 5)) / 3
    for _ in range(2000):
        weight = weight + 0.01 * oja(weight, sources, sources @ weight.T)
    # At a fixed point, the steps are rounding errors, which accumulate over the slowest relaxation, about eight
    # times the rate.
    assert weight.T @ weight == pytest.approx(principal.T @ principal, abs=worst_case(200 * 25) * size / 0.01)


def test_the_hebbian_rule_does_not_use_errors(logs):
    weights, inputs, labels = small_network(0)
    forward = learning_rules.forward_pass(weights, inputs, labels)
    gradient = propagate_back(forward, list(weights.values())[1:])
    random = np.random.default_rng(0)
    updates = []
    for factor in (1.0, np.nan):
        nothing = {layer: factor * slope for layer, slope in gradient.items()}
        blind = learning_rules.ForwardPass(factor, forward.activities, forward.scores, factor * forward.errors)
        context = RuleContext(0, weights, nothing, blind, labels, None, [], [], random)
        updates.append(learning_rules.hebbian(context))
    for layer in LAYERS:
        np.testing.assert_array_equal(*(update[layer] for update in updates))
        assert np.isfinite(updates[0][layer]).all()
    teacher = np.eye(10)[labels] - np.eye(10)[labels].mean(axis=0)
    last = teacher.T @ (forward.activities[2] - teacher @ weights[LAYERS[2]]) / len(labels)
    rounding = worst_case(40) * (np.abs(teacher).T @ (1 + np.abs(teacher @ weights[LAYERS[2]])))
    assert (np.abs(updates[0][LAYERS[2]] - last) <= rounding).all()


# Real digits ------------------------------------------------------------------------------------------------


def test_on_real_digits_every_rule_learns_and_the_control_unlearns(tmp_path):
    trainings = log_learning_rules(tmp_path, steps=30, images=300, digits=load_digits())
    assert set(trainings) == set(RULES) == {path.name for path in tmp_path.iterdir()}
    start = trainings["backpropagation"].losses[0]
    assert 2.0 < start < 3.0  # about log(10) nats: the network guesses
    for name, training in trainings.items():
        losses, (before, after) = training.losses, training.accuracies
        assert (losses[0], before) == (start, trainings["backpropagation"].accuracies[0])
        if name == "partial-ascent":
            assert losses[-1] > start
            assert after < before
        else:
            assert losses[-1] < start
            assert after > before
    fast = ("backpropagation", "momentum", "adam", "sign-descent", "feedback-alignment")
    assert all(trainings[name].accuracies[1] > 0.5 for name in fast)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": ["adam", "hope"]}, r"(?s)unknown rules 'hope'.*partial-ascent"),
        ({"steps": 0}, "^steps must be greater than 0 .*, got 0"),
        ({"hidden": 0}, "hidden units must be greater than 0 .*, got 0"),
        ({"images": 40}, "images in the objective must be .*, got 40"),
    ],
)
def test_options_out_of_range_are_refused_and_nothing_is_logged(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        log_learning_rules(tmp_path / "logs", digits=toy_digits(), **({"images": 20} | options))
    assert not (tmp_path / "logs").exists()


def test_the_command_line_logs_the_requested_rules(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "load_digits", lambda folder: toy_digits())
    arguments = ["learning-rules", str(tmp_path), "--rule", "adam", "--rule", "hebbian", "--steps", "2"]
    arguments += ["--images", "20", "--hidden", "3", "--container", "npz"]
    answer = CliRunner().invoke(command_line.app, arguments, catch_exceptions=False)
    assert answer.exit_code == 0
    for line, name in zip(answer.output.splitlines(), ("adam", "hebbian"), strict=True):
        assert line.startswith(f"{tmp_path / name}: 3 steps, loss ")
        assert len(list((tmp_path / name).glob("step_*.npz"))) == 3
