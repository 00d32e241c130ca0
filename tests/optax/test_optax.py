"""Record real training runs with Optax, and compare the log with the gradients of JAX."""

import numpy as np
import pytest

import natgrad
from lazy import Lazy
from natgrad.kernel.ledger_sums import roundoff_bound
from natgrad.kernel.updates import portable_products
from natgrad.schema.errors import InputError
from watched import all_states, updates_of

jax = Lazy("jax")
jnp = Lazy("jax.numpy")
optax = Lazy("optax")
natgrad_optax = Lazy("natgrad.optax")


def loss_of(params):
    return jnp.sum((params["layer"]["w"] @ jnp.arange(3.0) - params["layer"]["b"]) ** 2)


def start():
    return {"layer": {"w": jnp.array([[0.3, -0.2, 0.5], [0.1, 0.4, -0.6]]), "b": jnp.array([0.7, -0.1])}}


def train(optimizer, steps, params=None, state=None):
    """Train with a compiled step; return the parameters, the state, and the kept values of each update."""
    params = start() if params is None else params
    state = optimizer.init(params) if state is None else state

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params, value=value)
        return optax.apply_updates(params, updates), state, value, gradients

    kept = []
    for _ in range(steps):
        before = params
        params, state, value, gradients = step(params, state)
        kept.append((before["layer"], params["layer"], gradients["layer"], float(value)))
    jax.effects_barrier()
    return params, state, kept


def test_the_ledgers_of_a_compiled_training_are_those_of_its_arrays(tmp_path):
    adamw = optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(0.1, 0.05, 5))
    optimizer = natgrad_optax.watch(adamw, tmp_path / "log", mode="ledger", evaluation="fixed")
    _, state, kept = train(optimizer, 5)
    assert int(state.count) == 5
    found = list(updates_of(tmp_path / "log"))
    assert [update["step"] for update in found] == [*range(5)]
    for number, (update, (before, after, gradients, value)) in enumerate(zip(found, kept, strict=True)):
        assert update["loss"] == value
        assert update["rates"]["layer.w"] == pytest.approx(0.1 - 0.01 * number, rel=1e-6)
        for name in before:
            arrays = [[np.asarray(one[name]).reshape(-1)] for one in (before, after, gradients)]
            gram, _ = portable_products(*arrays)
            norms = np.sqrt(np.diagonal(gram[0]))
            norms[3] = 2 * norms[2]
            bound = 4 * roundoff_bound(6) * norms[:, None] * norms
            assert (abs(update["gram"][f"layer.{name}"] - gram[0]) <= bound).all()
    summary = natgrad.process(tmp_path / "log", tmp_path / "out")
    assert (summary.updates, summary.gradient_source) == (5, "recorded")


def test_states_are_recorded_and_continued(tmp_path):
    optimizer = natgrad_optax.watch(optax.sgd(0.1), tmp_path, learning_rate=0.1)
    params, state, kept = train(optimizer, 3)
    optimizer = natgrad_optax.watch(optax.sgd(0.1), tmp_path, learning_rate=0.1, resume=True)
    kept += train(optimizer, 2, params, state)[2]
    states = all_states(tmp_path)
    assert [*states] == [*range(5)]
    for found, (before, _, gradients, value) in zip(states.values(), kept, strict=True):
        assert found["loss"] == value
        for name in before:
            np.testing.assert_array_equal(found["parameter"][f"layer.{name}"], before[name])
            np.testing.assert_array_equal(found["gradient"][f"layer.{name}"], gradients[name])


def test_an_error_ends_the_recording_and_not_the_training(tmp_path, caplog):
    optimizer = natgrad_optax.watch(optax.sgd(0.1), tmp_path, mode="ledger")
    params, _, _ = train(optimizer, 2)
    changed = {"layer": {**params["layer"], "other": jnp.ones(2)}}
    train(optimizer, 2, changed, optimizer.init(changed)._replace(count=jnp.int32(2)))
    (record,) = [record for record in caplog.records if "the training continues" in record.message]
    assert "has a new gradient" in record.message or "changed" in record.message
    assert [update["step"] for update in updates_of(tmp_path)] == [0, 1]


def test_updates_without_parameters_and_unknown_options_are_refused(tmp_path):
    optimizer = natgrad_optax.watch(optax.sgd(0.1), tmp_path)
    params = start()
    with pytest.raises(InputError, match="the parameters are required"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(InputError, match="on_error must be"):
        natgrad_optax.watch(optax.sgd(0.1), tmp_path / "other", on_error="ignore")
