"""Test the objective of JAX functions against gradients and products in closed form."""

import itertools

import numpy as np
import pytest

import natgrad
from lazy import Lazy
from natgrad.schema.errors import InputError

jnp = Lazy("jax.numpy")

X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=20).astype(np.float32)
TENSORS = {"w": np.array([0.5, -1.0, 2.0], np.float32), "b": np.float32(0.25).reshape(())}
TOLERANCE = 60 * 2.0**-24 * 40  # sums of 60 products of up to 40 in single precision


def errors(tree, batch):
    return batch["x"] @ tree["w"] + tree["b"] - batch["y"]


def split(*sizes):
    edges = np.cumsum([0, *sizes])
    return [{"x": X[a:b], "y": Y[a:b]} for a, b in itertools.pairwise(edges)]


def expected(tensors):
    error = X.astype(np.float64) @ tensors["w"] + tensors["b"] - Y
    return (error**2).mean(), {"w": 2 * error @ X / 20, "b": 2 * error.mean()}


@pytest.mark.parametrize("sizes", [(20,), (15, 5)])
@pytest.mark.parametrize("form", ["elements", "mean and count"])
def test_losses_gradients_and_products_are_those_of_all_elements(sizes, form):
    def loss(tree, batch):
        found = errors(tree, batch) ** 2
        return found if form == "elements" else (found.mean(), found.size)

    objective = natgrad.JaxObjective(loss, split(*sizes))
    value, gradients = objective(TENSORS)
    true_value, slopes = expected(TENSORS)
    assert abs(value - true_value) < TOLERANCE
    for name, slope in slopes.items():
        np.testing.assert_allclose(gradients[name], slope, rtol=0, atol=TOLERANCE)
    direction = {"w": np.array([1.0, 2.0, -1.0], np.float32), "b": np.array(3.0, np.float32)}
    # The gradient is linear.
    zero = {name: np.zeros_like(array) for name, array in TENSORS.items()}
    changes = {name: expected(direction)[1][name] - expected(zero)[1][name] for name in TENSORS}
    for name, product in objective.hvp(TENSORS, direction).items():
        np.testing.assert_allclose(product, changes[name], rtol=0, atol=TOLERANCE)


def test_names_become_nested_dictionaries_and_buffers_are_not_trained():
    tensors = {"layer/w": TENSORS["w"], "layer/b": TENSORS["b"], "stats/mean": np.ones(3, np.float32)}

    def loss(tree, batch):
        return errors(tree["layer"], {**batch, "x": batch["x"] * tree["stats"]["mean"]}) ** 2

    objective = natgrad.JaxObjective(loss, split(20), separator="/", buffers=["stats/*"])
    _, gradients = objective(tensors)
    assert list(gradients) == ["layer/w", "layer/b"]
    np.testing.assert_allclose(gradients["layer/w"], expected(TENSORS)[1]["w"], rtol=0, atol=TOLERANCE)


def test_double_precision_is_not_rounded():
    objective = natgrad.JaxObjective(lambda tree, batch: errors(tree, batch) ** 2, split(20))
    with pytest.raises(InputError, match="JAX computes in float32"):
        objective({name: array.astype(np.float64) for name, array in TENSORS.items()})


def test_the_fingerprint_depends_on_data_and_micro_batches():
    def fingerprint(batches):
        return natgrad.JaxObjective(lambda tree, batch: errors(tree, batch) ** 2, batches).fingerprint

    first = fingerprint(split(20))
    assert first == fingerprint(split(20))
    assert first["micro_batches"] != fingerprint(split(15, 5))["micro_batches"]
    assert first["data"] != fingerprint([{"x": X + 1, "y": Y}])["data"]
    with pytest.raises(InputError, match="no batches"):
        fingerprint([])
