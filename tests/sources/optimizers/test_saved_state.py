"""Optimizer states, from the files of the original libraries to the condition number of the metric in use."""

import contextlib
import itertools
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf
from test_huggingface import small_gpt2, train

import natgrad
from lazy import Lazy
from natgrad.app import cli, run
from natgrad.app.run import Analysis
from natgrad.schema.errors import InputError
from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import OPTIMIZER_NUMBERS, OPTIMIZER_STATES
from natgrad.schema.variables import Status
from natgrad.sources.optimizers.saved_state import saved_optimizer
from natgrad.sources.steps import LoggedStep, LoggedTensor, NotYet
from natgrad.store import open_ledger, open_trajectory
from natgrad.theory.preconditioners import adam_eigenvalues, condition_number
from opened import ingest, read_results, verify_trajectory
from processing import Serial
from training import training_steps

safetensors_torch = Lazy("safetensors.torch")
torch = Lazy("torch")
dcp = Lazy("torch.distributed.checkpoint")
state_dict = Lazy("torch.distributed.checkpoint.state_dict")

STEPS = 5
RATES = (0.1, 0.02)


def small_net():
    """Return a network with tensors of equal shapes, in an order that differs from that of their names."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.second = torch.nn.Linear(3, 3)
            self.first = torch.nn.Linear(3, 3)
            self.norm = torch.nn.LayerNorm(3)

        def forward(self, x):
            return self.norm(self.second(torch.tanh(self.first(x))))

    return Net()


def two_groups(model, **options):
    """Return groups as in the Hugging Face Trainer and nanoGPT: decayed tensors first."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": 0.1, "lr": RATES[0]},
        {"params": others, "weight_decay": 0.0, "lr": RATES[1]},
    ]
    return torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, **options)


def trained(optimizer_of, save, steps=STEPS):
    """Train a network and save each step with its gradients; return the optimizer state by name, per step."""
    torch.manual_seed(0)
    model = small_net()
    optimizer = optimizer_of(model)
    x, target = torch.randn(8, 3), torch.randn(8, 3)
    truth = []
    for step, gradients, loss in training_steps(model, optimizer, x, target, steps):
        save(step, model, optimizer, gradients, loss)
        truth.append(
            {
                name: {key: value.clone().numpy() for key, value in optimizer.state[p].items()}
                for name, p in model.named_parameters()
            }
        )
    return truth


def saver(folder, **more):
    def save(step, model, optimizer, gradients, loss):
        folder.mkdir(parents=True, exist_ok=True)
        tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "gradient": gradients}
        torch.save({**tree, "loss": loss.item(), "learning_rate": 0.1, **more}, folder / f"step-{step}.pt")

    return save


def sharded(folder):
    def save(step, model, optimizer, gradients, loss):
        tree = {
            "model": state_dict.get_model_state_dict(model),
            "optimizer": state_dict.get_optimizer_state_dict(model, optimizer),
            "gradient": gradients,
            "loss": torch.tensor(loss.item()),
            "learning_rate": torch.tensor(0.1),
        }
        dcp.save(tree, checkpoint_id=folder / f"step-{step}", no_dist=True)

    return save


def stored(store):
    """Return the arrays of a trajectory by tensor, of shape (steps, elements); bfloat16 as its bits in uint16."""
    states = open_trajectory(store)
    whole = {}
    for name, dtype in states.dtypes.items():
        dtype = storage_dtype(dtype)
        rows = np.zeros((states.n_states, states.layout.elements), dtype)
        for column in range(states.columns):
            first, last = states.column(column)
            buffer = np.zeros((states.n_states, states.chunk[1]), dtype)
            states.read(name, 0, states.n_states, column, buffer)
            rows[:, first:last] = buffer[:, : last - first]
        whole[name] = {tensor.name: rows[:, tensor.offset : tensor.stop] for tensor in states.layout.tensors}
    return states, whole


OPTIMIZERS = {
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.8, 0.95), eps=1e-6),
    "adamw of two groups": two_groups,
    "named": lambda model: torch.optim.Adam(
        list(model.named_parameters())[::-1], lr=0.1, betas=(0.8, 0.95), eps=1e-6
    ),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("writer", [saver, sharded])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_state_is_stored_under_the_name_of_its_tensor(tmp_path, writer, name):
    truth = trained(OPTIMIZERS[name], writer(tmp_path / "log"))
    ingest(tmp_path / "log", tmp_path / "store", include=["optimizer"])
    states, arrays = stored(tmp_path / "store")
    assert set(arrays) >= ({"momentum_buffer"} if name == "sgd" else {"exp_avg", "exp_avg_sq"})
    for array in set(arrays) & set(OPTIMIZER_STATES):
        for tensor, rows in arrays[array].items():
            for step, row in enumerate(rows):
                expected = truth[step].get(tensor, {}).get(array)
                if expected is None:  # there is none before the first update
                    assert step == 0
                    assert np.isnan(row).all()
                else:
                    np.testing.assert_array_equal(row, expected.ravel())
    assert list(verify_trajectory(tmp_path / "store")) == []
    numbers = {number: states.scalar(number) for number in OPTIMIZER_NUMBERS}
    if name == "sgd":
        assert (numbers["momentum"] == 0.9).all()
        return
    assert (numbers["beta1"] == 0.8).all()
    assert (numbers["beta2"] == 0.95).all()
    assert (numbers["epsilon"] == 1e-6).all()
    for index, tensor in enumerate(states.layout.tensors):
        decayed = name == "adamw of two groups" and len(tensor.shape) > 1
        rate = RATES[not decayed] if name == "adamw of two groups" else 0.1
        assert (numbers["tensor_learning_rate"][:, index] == rate).all()
        assert (numbers["weight_decay"][:, index] == (0.1 if decayed else 0.0)).all()
        np.testing.assert_array_equal(numbers["updates"][1:, index], range(1, STEPS))
        values = arrays["exp_avg_sq"][tensor.name].astype(np.float64)
        np.testing.assert_array_equal(numbers["exp_avg_sq_min"][:, index], values.min(axis=1))
        np.testing.assert_array_equal(numbers["exp_avg_sq_max"][:, index], values.max(axis=1))


DECAYS = {
    "adamw": (lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.25), 0.25),
    "adamw of two groups": (two_groups, (0.1, 0.0)),
    "adam adds it to the gradient": (
        lambda model: torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.25),
        None,
    ),
    "decoupled adam": (
        lambda model: torch.optim.NAdam(model.parameters(), lr=0.1, weight_decay=0.25, decoupled_weight_decay=True),
        0.25,
    ),
    "sgd": (lambda model: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.25), 0.25),
    "sgd with momentum": (
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.25, momentum=0.9),
        None,
    ),
    "sgd without decay": (lambda model: torch.optim.SGD(model.parameters(), lr=0.1), None),
}
"""Optimizers, and the coefficient of their decoupled weight decay: of all tensors, or of matrices and others."""


@pytest.mark.parametrize("include", [(), ("optimizer",)])
@pytest.mark.parametrize("writer", [saver, sharded])
@pytest.mark.parametrize("name", DECAYS)
def test_decoupled_weight_decay_is_stored_with_and_without_the_state(tmp_path, writer, name, include):
    optimizer_of, expected = DECAYS[name]
    trained(optimizer_of, writer(tmp_path / "log"), steps=3)
    summary = ingest(tmp_path / "log", tmp_path / "store", include=include)
    assert not any("weight decay" in text for text in summary.warnings)
    states = open_trajectory(tmp_path / "store")
    assert ("tensor_decoupled_weight_decay" in states.tables) == (expected is not None)
    if expected is not None:
        matrix, other = expected if isinstance(expected, tuple) else (expected, expected)
        decays = [matrix if len(tensor.shape) > 1 else other for tensor in states.layout.tensors]
        assert states.scalar("tensor_decoupled_weight_decay").tolist() == [decays] * 3


@pytest.mark.parametrize("name", ["adamw", "adamw of two groups", "sgd"])
def test_updates_without_decay_are_those_of_the_optimizer_without_decay(tmp_path, name):
    # The first update of an optimizer with and without decay differs by the decay alone.
    found = {}
    for decayed in (True, False):

        def optimizer_of(model, decayed=decayed):
            optimizer = DECAYS[name][0](model)
            for group in optimizer.param_groups:
                group["weight_decay"] *= decayed
            return optimizer

        folder = tmp_path / str(decayed)
        torch.set_default_dtype(torch.float64)
        try:
            trained(optimizer_of, saver(folder / "log"), steps=2)
        finally:
            torch.set_default_dtype(torch.float32)
        natgrad.process(folder / "log", folder / "run", workers=1)
        found[decayed] = read_results(folder / "run" / "results.zarr")
    assert "without_decay" not in found[False].children
    rest, expected = found[True]["without_decay/tensor"].to_dataset(), found[False]["tensor"].to_dataset()
    for variable in ("update_norm", "alignment", "angle"):
        at = {"descent": "gradient"} if "descent" in rest[variable].dims else {}
        own, of_gradient = rest[variable].sel(at), expected[variable].sel(at)
        # The states are rounded to float64: 2**-53 of parameters of at most 2 and updates of at least 1e-3. Near 0
        # the angle of a sum of vectors is less accurate, as its uncertainty states.
        limit = 1e-12 + (rest["angle_uncertainty"].sel(at) if variable == "angle" else 1e-11 * abs(of_gradient))
        assert (abs(own - of_gradient) <= limit).all(), variable
    # With decay the updates differ.
    assert abs(found[True]["model/update_norm"] - found[False]["model/update_norm"]).max() > 1e-4


def test_weight_decay_that_may_not_be_decoupled_is_named(tmp_path):
    # Before 2.7, torch did not save whether decay is decoupled.
    class Old(torch.optim.AdamW):
        def state_dict(self):
            state = super().state_dict()
            for group in state["param_groups"]:
                group.pop("decoupled_weight_decay")
            return state

    trained(lambda model: Old(model.parameters(), lr=0.1, weight_decay=0.25), saver(tmp_path / "log"), steps=3)
    summary = ingest(tmp_path / "log", tmp_path / "store")
    assert any("does not state whether it is decoupled" in text for text in summary.warnings)
    # The proposed remedy works.
    natgrad.process(tmp_path / "log", tmp_path / "run", weight_decay=0.25, workers=1)
    tree = read_results(tmp_path / "run" / "results.zarr")
    assert (tree["tensor/weight_decay"] == 0.25).all()
    assert (tree["without_decay/model/status"].sel(descent="gradient") <= Status.OBTUSE).all()


def test_the_trainer_optimizer_is_matched_by_the_order_of_the_model(tmp_path):
    folder, states = train(tmp_path / "out", states_of=saved_moments)
    model = small_gpt2()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match="neither the order of the file nor the shapes are sufficient"):
        ingest(folder, tmp_path / "store", include=["optimizer"])
    (folder / "natgrad.toml").write_text(f"order = {json.dumps(names)}\n")
    ingest(folder, tmp_path / "store", include=["optimizer"])
    stored_states, arrays = stored(tmp_path / "store")
    assert set(arrays["exp_avg_sq"]) == set(names)
    for row, step in enumerate(stored_states.scalar("step")):
        for name in names:
            for array in ("exp_avg", "exp_avg_sq"):
                np.testing.assert_array_equal(arrays[array][name][row], states[step][array][name].ravel())


def saved_moments(model, optimizer):
    """Return the moments of each tensor in the optimizer of the Trainer."""
    return {
        array: {name: optimizer.state[p][array].numpy().copy() for name, p in model.named_parameters()}
        for array in ("exp_avg", "exp_avg_sq")
    }


def test_the_used_metric_is_reported_with_the_smallest_possible_one(tmp_path):
    truth = trained(two_groups, saver(tmp_path / "log"))
    out = tmp_path / "out"
    run.ingest_run(tmp_path / "log", out, include=["optimizer"])
    run.analyze_run(out, Analysis(workers=1))
    tree = read_results(out / "results.zarr")
    kappa = tree["tensor"]["preconditioner_condition_number"]
    for step in range(STEPS - 1):
        # The metric of the update from a step is the optimizer state after it.
        metric = {
            tensor: np.sqrt(state["exp_avg_sq"].astype(np.float64) / (1 - 0.95 ** int(state["step"]))) + 1e-6
            for tensor, state in truth[step + 1].items()
        }
        for tensor, diagonal in metric.items():
            expected = diagonal.max() / diagonal.min()
            # A quotient of two sums, each of a root of a quotient: eight roundings.
            assert float(kappa.sel(step=step, tensor=tensor)) == pytest.approx(expected, rel=8 * 2.0**-52)
        scaled = [d / RATES[d.ndim < 2] for d in metric.values()]
        expected = max(d.max() for d in scaled) / min(d.min() for d in scaled)
        found = tree["model"]["preconditioner_condition_number"].sel(step=step)
        assert float(found) == pytest.approx(expected, rel=8 * 2.0**-52)


@pytest.mark.parametrize(("logged", "include"), [(True, ["optimizer"]), (False, ["optimizer"]), (True, [])])
def test_groups_with_several_rates_give_each_tensor_its_rate_and_the_model_the_largest(tmp_path, logged, include):
    def save(step, model, optimizer, gradients, loss):
        (tmp_path / "log").mkdir(exist_ok=True)
        tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "gradient": gradients}
        rate = {"learning_rate": 0.5} if logged else {}
        torch.save({**tree, "loss": loss.item(), **rate}, tmp_path / "log" / f"step-{step}.pt")

    trained(two_groups, save)
    summary = run.ingest_run(tmp_path / "log", tmp_path / "out", include=include)
    run.analyze_run(tmp_path / "out", Serial())
    tree = read_results(tmp_path / "out" / "results.zarr")
    # The rate that is saved next to the optimizer is not the one that it used.
    assert (tree["model"]["learning_rate"] == max(RATES)).all()
    differences = [warning for warning in summary.warnings if "differs at" in warning]
    assert len(differences) == logged
    assert not any("learning_rate is missing" in warning for warning in summary.warnings)
    assert not (tree["model"]["status"] == Status.NO_LEARNING_RATE).any()
    states = open_trajectory(tmp_path / "out" / "trajectory.zarr")
    _, arrays = stored(tmp_path / "out" / "trajectory.zarr")
    for tensor in states.layout.tensors:
        rate = RATES[len(tensor.shape) < 2]
        of_tensor = tree["tensor"].to_dataset().sel(tensor=tensor.name)
        assert (of_tensor["learning_rate"] == rate).all()
        moved = np.linalg.norm(np.diff(arrays["parameter"][tensor.name].astype(np.float64), axis=0), axis=1)
        # The quotient of a norm of at most 9 elements: a dozen roundings.
        assert of_tensor["update_norm"].sel(window=1).values == pytest.approx(moved / rate, rel=12 * 2.0**-52)


def test_the_rate_that_defines_the_time_unit_is_not_taken_from_groups(tmp_path):
    trained(two_groups, saver(tmp_path / "log", learning_rate=None, loss_time_derivative=0.5))
    run.ingest_run(tmp_path / "log", tmp_path / "out", include=["optimizer"])
    run.analyze_run(tmp_path / "out", Serial())
    model = read_results(tmp_path / "out" / "results.zarr")["model"]
    assert (model["status"] == Status.NO_LEARNING_RATE).all()


def test_the_ledger_does_not_depend_on_optimizer_arrays(tmp_path):
    trained(two_groups, saver(tmp_path / "log"))
    grams = []
    for name, include in (("with", ["optimizer"]), ("without", [])):
        run.ingest_run(tmp_path / "log", tmp_path / name, include=include)
        run.analyze_run(tmp_path / name, Analysis(workers=1))
        grams.append(open_ledger(tmp_path / name / "ledger.zarr").read()[0])
    np.testing.assert_array_equal(*grams)
    assert "preconditioner_condition_number" not in read_results(tmp_path / "without" / "results.zarr")["model"]


def test_a_run_continues_with_its_original_options(tmp_path):
    log, store = tmp_path / "log", tmp_path / "store"
    trained(OPTIMIZERS["adam"], saver(log), steps=3)
    ingest(log, store, include=["optimizer"])
    trained(OPTIMIZERS["adam"], saver(log), steps=STEPS)  # repeat, with two more steps
    assert ingest(log, store).new_steps == 2
    whole = tmp_path / "whole"
    ingest(log, whole, include=["optimizer"])
    for array, tensors in stored(whole)[1].items():
        for tensor, rows in tensors.items():
            np.testing.assert_array_equal(stored(store)[1][array][tensor], rows)
    plain = tmp_path / "plain"
    ingest(log, plain)
    with pytest.raises(InputError, match="created without the optimizer state"):
        ingest(log, plain, include=["optimizer"])


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_following_a_run_before_its_first_update_waits_for_the_second_step(tmp_path, name):
    trained(OPTIMIZERS[name], saver(tmp_path / "all"))
    log, store = tmp_path / "log", tmp_path / "store"
    log.mkdir()
    new = []
    for step in range(STEPS):
        (tmp_path / "all" / f"step-{step}.pt").rename(log / f"step-{step}.pt")
        if step:
            new.append(ingest(log, store, include=["optimizer"]).new_steps)
        else:
            with pytest.raises(NotYet, match="contain no optimizer state"):
                ingest(log, store, include=["optimizer"])
            assert not store.exists()
    assert new == [2, 1, 1, 1]
    ingest(log, tmp_path / "whole", include=["optimizer"])
    for array, tensors in stored(tmp_path / "whole")[1].items():
        for tensor, rows in tensors.items():
            np.testing.assert_array_equal(stored(store)[1][array][tensor], rows)


def test_a_log_without_optimizer_is_refused(tmp_path):
    def save(step, model, optimizer, gradients, loss):
        (tmp_path / "log").mkdir(exist_ok=True)
        tree = {"model": model.state_dict(), "gradient": gradients, "loss": loss.item(), "lr": 0.1}
        torch.save(tree, tmp_path / "log" / f"step-{step}.pt")

    trained(OPTIMIZERS["adam"], save, steps=2)
    with pytest.raises(NotYet, match="contain no optimizer state"):
        ingest(tmp_path / "log", tmp_path / "store", include=["optimizer"])
    assert not (tmp_path / "store").exists()


# Assignment of entries to tensors ------------------------------------------------------------------------------


class Opened:
    """A container of an optimizer over tensors of given shapes, numbered in one group."""

    ordered = False

    def __init__(self, shapes):
        self.step = LoggedStep(0, "file")
        self.tensors = {f"optimizer/state/{i}/exp_avg": LoggedTensor(s, "float32") for i, s in enumerate(shapes)}
        self.numbers = {f"optimizer/param_groups/0/params/{i}": float(i) for i in range(len(shapes))}
        self.numbers |= {"optimizer/param_groups/0/lr": 0.1}
        self.texts, self.unread, self.objects = {}, {}, {}

    def number(self, key):
        return self.numbers[key]


SHAPES = st.lists(st.sampled_from([(1,), (2,), (3,), (2, 2), (3, 2), (5,)]), min_size=1, max_size=6)


@given(shapes=SHAPES, data=st.data())
def test_without_an_order_only_unique_shapes_are_matched(shapes, data):
    names = data.draw(st.permutations(range(len(shapes))))
    parameters = {f"t{index}": LoggedTensor(shapes[index], "float32") for index in names}
    found = saved_optimizer(Opened(shapes), parameters)
    if len(set(shapes)) == len(shapes):
        assert found.keys["exp_avg"] == {f"t{i}": f"optimizer/state/{i}/exp_avg" for i in range(len(shapes))}
        assert set(found.state.numbers["tensor_learning_rate"]) == set(parameters)
    else:
        assert "neither the order of the file nor the shapes are sufficient" in found.state.problem
        assert not found.keys
        assert not found.state.arrays


@given(shapes=SHAPES, data=st.data())
def test_a_user_defined_order_is_checked_by_shape(shapes, data):
    parameters = {f"t{index}": LoggedTensor(shape, "float32") for index, shape in enumerate(shapes)}
    order = data.draw(st.permutations(list(parameters)))
    found = saved_optimizer(Opened(shapes), parameters, order=order)
    if all(parameters[name].shape == shape for name, shape in zip(order, shapes, strict=True)):
        assert found.keys["exp_avg"] == {name: f"optimizer/state/{i}/exp_avg" for i, name in enumerate(order)}
    else:
        assert "does not match the " in found.state.problem


def test_an_unknown_order_is_requested_and_then_used(tmp_path):
    log = tmp_path / "log"

    def save(step, model, optimizer, gradients, loss):
        # Files of this kind do not preserve the order of their tensors.
        folder = log / f"step-{step}"
        folder.mkdir(parents=True)
        safetensors_torch.save_file(model.state_dict(), folder / "model.safetensors")
        safetensors_torch.save_file(gradients, folder / "gradient.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    truth = trained(OPTIMIZERS["adam"], save)
    with pytest.raises(InputError, match="neither the order of the file nor the shapes are sufficient") as refusal:
        ingest(log, tmp_path / "store", include=["optimizer"])
    assert "order = [" in refusal.value.remedy
    assert "step 1" in refusal.value.where  # before the first update, there is no state to assign
    order = [name for name, _ in small_net().named_parameters()]
    (log / "natgrad.toml").write_text(f"order = {json.dumps(order)}\n")
    ingest(log, tmp_path / "store", include=["optimizer"])
    for tensor, rows in stored(tmp_path / "store")[1]["exp_avg"].items():
        for step in range(1, STEPS):
            np.testing.assert_array_equal(rows[step], truth[step][tensor]["exp_avg"].ravel())
    (log / "natgrad.toml").write_text(f"order = {json.dumps(order[::-1])}\n")
    with pytest.raises(InputError, match="does not match the 6 parameters in 1 groups"):
        ingest(log, tmp_path / "other", include=["optimizer"])


# Arithmetic --------------------------------------------------------------------------------------------------

POSITIVE = st.floats(1e-30, 1e30)


@given(POSITIVE, POSITIVE, st.floats(0.5, 0.9999), st.floats(1e-12, 1e-2), st.integers(1, 10**6))
def test_eigenvalues_of_adams_metric_against_exact_arithmetic(one, other, beta2, epsilon, updates):
    smallest, largest = sorted((one, other))
    low, high = adam_eigenvalues(smallest, largest, beta2, epsilon, updates)
    with mp.workdps(50):
        bias = 1 - mpf(beta2) ** updates
        for found, v in ((low, smallest), (high, largest)):
            expected = mp.sqrt(mpf(v) / bias) + mpf(epsilon)
            # Power, difference, quotient, root and sum are rounded once each; near beta2 = 1, the difference has
            # 1 / (1 - beta2) = 1e4 times the rounding error of the power at one update.
            assert float(abs(mpf(float(found)) - expected) / expected) <= (1e4 + 4) * 2.0**-52
    assert low <= high


def test_unknown_options_give_no_number():
    known = {"smallest": 1.0, "largest": 4.0, "beta2": 0.9, "epsilon": 1e-8, "updates": 3.0}
    for name in known:
        assert np.isnan(adam_eigenvalues(**{**known, name: np.nan})).any()
    assert np.isnan(adam_eigenvalues(**{**known, "updates": 0.0})).all()
    assert np.isnan(adam_eigenvalues(**{**known, "smallest": -1.0})[0])
    tensors, model = condition_number([[1.0, 2.0]], [[2.0, 8.0]], [[0.1, np.nan]])
    assert tensors.tolist() == [[2.0, 4.0]]
    assert np.isnan(model).all()


def test_inspect_reports_the_optimizer_state(tmp_path, capsys, monkeypatch):
    trained(OPTIMIZERS["adam"], saver(tmp_path / "log"), steps=2)
    monkeypatch.setattr(sys, "argv", ["natgrad", "inspect", str(tmp_path / "log"), "--json"])
    with contextlib.suppress(SystemExit):
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert found["optimizer"] == "exp_avg, exp_avg_sq of 6 tensors at step 1; store it with --include optimizer"


def write_quantized(folder, moments):
    """Write checkpoints with the state of 8-bit Adam as bitsandbytes saves it: blocks of bytes and their scales."""
    folder.mkdir()
    for step in range(1, 4):
        weight = torch.full((8, 8), 0.5**step)
        group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
        optimizer = {"state": {0: {"step": step, **moments()}}, "param_groups": [group]}
        tree = {"model": {"w": weight}, "grad": {"w": weight}, "optimizer": optimizer}
        torch.save(tree, folder / f"ckpt_{step}.pt")
    return folder


def test_quantized_moments_are_nan_with_the_reason(tmp_path, monkeypatch):
    moment = type("Moment", (torch.Tensor,), {"__module__": __name__})
    monkeypatch.setattr(sys.modules[__name__], "Moment", moment, raising=False)  # pickle finds a class by its name

    def blocks():
        state = {name: torch.ones(8, 8, dtype=torch.uint8) for name in ("state1", "state2")}
        state |= {name: torch.linspace(-1, 1, 256) for name in ("qmap1", "qmap2")}
        return state | {name: torch.ones(1) for name in ("absmax1", "absmax2")}

    def subclass():
        return {name: torch.ones(8, 8).as_subclass(moment) for name in ("exp_avg", "exp_avg_sq")}

    for name, moments, encoding in (
        ("blocks", blocks, "in 8-bit blocks of bitsandbytes"),
        ("subclass", subclass, f"objects of {__name__}.Moment"),
    ):
        log = write_quantized(tmp_path / name, moments)
        warnings = ingest(log, tmp_path / f"{name}.zarr", include=["optimizer"]).warnings
        assert any(f"the moments of 1 tensors are {encoding}" in warning for warning in warnings)
        store = open_trajectory(tmp_path / f"{name}.zarr")
        assert not {"exp_avg", "exp_avg_sq"} & set(store.arrays)
        assert store.scalar("learning_rate").tolist() == [0.1] * 3


@pytest.mark.parametrize("root", ["optimizers/0", "optimizer/0", "state/optimizers/DecoupledAdamW"])
def test_the_only_optimizer_of_a_list_and_that_of_composer_are_read(tmp_path, root):
    for name in ("log", "plain"):
        (tmp_path / name).mkdir()

    def save(step, model, optimizer, gradients, loss):
        saved = optimizer.state_dict()
        levels = root.split("/")
        tree = [saved] if levels[-1] == "0" else {"optimizers": {levels[-1]: saved}}
        for name, key, value in (("log", levels[0], tree), ("plain", "optimizer", saved)):
            content = {"model": model.state_dict(), "grad": gradients, key: value}
            torch.save(content, tmp_path / name / f"ckpt_{step}.pt")

    trained(OPTIMIZERS["adam"], save)
    for name in ("log", "plain"):
        ingest(tmp_path / name, tmp_path / f"{name}.zarr", include=["optimizer"])
    (states, found), (plain, expected) = (stored(tmp_path / f"{name}.zarr") for name in ("log", "plain"))
    assert (
        states.scalar("learning_rate").tolist() == plain.scalar("learning_rate").tolist() == [0.1] * plain.n_states
    )
    assert found.keys() == expected.keys() >= {"exp_avg", "exp_avg_sq"}
    for array, tensors in expected.items():
        for tensor, rows in tensors.items():
            assert found[array][tensor].tobytes() == rows.tobytes()


# Several optimizers ------------------------------------------------------------------------------------------


def matrices_and_others(model):
    """Return an optimizer of the matrices and one of the other tensors, as with Muon, with different rates."""
    matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], lr=RATES[0], momentum=0.9)
    return matrices, torch.optim.Adam([p for p in model.parameters() if p.ndim < 2], lr=RATES[1])


def write_with_optimizers(folder, tree_of, steps=STEPS):
    """Train with two optimizers, save each step, and return the names of the tensors of both."""
    torch.manual_seed(0)
    folder.mkdir()
    model = small_net()
    optimizers = matrices_and_others(model)
    x, target = torch.randn(8, 3), torch.randn(8, 3)
    for step in range(steps):
        model.zero_grad()
        ((model(x) - target) ** 2).mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        tree = {"state_dict": model.state_dict(), "grad": gradients, "global_step": step}
        torch.save(tree | tree_of(optimizers), folder / f"step={step}.ckpt")
        for optimizer in optimizers:
            optimizer.step()
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    return names + [name for name, p in model.named_parameters() if p.ndim < 2]


LISTS = {
    "list": lambda optimizers: {"optimizers": [o.state_dict() for o in optimizers]},
    "Lightning": lambda optimizers: {"optimizer_states": [o.state_dict() for o in optimizers]},
    "names": lambda optimizers: {"optimizers": {"a": optimizers[0].state_dict(), "b": optimizers[1].state_dict()}},
}


@pytest.mark.parametrize("kind", LISTS)
def test_each_tensor_has_the_rate_and_the_state_of_the_optimizer_that_holds_it(tmp_path, kind):
    names = write_with_optimizers(tmp_path / "log", LISTS[kind])
    options = {"include": ["optimizer"], "shift": {"gradient": 0}}
    with pytest.raises(InputError, match="the 6 parameters of 2 optimizers cannot be assigned"):
        ingest(tmp_path / "log", tmp_path / "store", **options)  # at step 0, they have no state
    (tmp_path / "log" / "natgrad.toml").write_text(f"order = {json.dumps(names)}\n")
    ingest(tmp_path / "log", tmp_path / "ordered", **options)
    (tmp_path / "log" / "natgrad.toml").unlink()
    (tmp_path / "log" / "step=0.ckpt").unlink()
    ingest(tmp_path / "log", tmp_path / "store", **options)
    for store, first in (("store", 1), ("ordered", 0)):
        states, arrays = stored(tmp_path / store)
        assert set(arrays["momentum_buffer"]) == set(arrays["exp_avg"]) == set(names)
        rates = states.scalar("tensor_learning_rate")
        for index, tensor in enumerate(states.layout.tensors):
            matrix = len(tensor.shape) > 1
            assert (rates[:, index] == RATES[not matrix]).all()
            assert np.isnan(arrays["exp_avg"][tensor.name][1 - first :]).all() == matrix
            assert np.isnan(arrays["momentum_buffer"][tensor.name][1 - first :]).all() != matrix


class SeveralOpened(Opened):
    """A container with the state of several optimizers, each for tensors of some shapes."""

    ordered = True

    def __init__(self, groups):
        super().__init__([])
        self.tensors, self.numbers = {}, {}
        for number, shapes in enumerate(groups):
            root = f"optimizers/{number}"
            self.tensors |= {f"{root}/state/{i}/exp_avg": LoggedTensor(s, "float32") for i, s in enumerate(shapes)}
            self.numbers |= {f"{root}/param_groups/0/params/{i}": float(i) for i in range(len(shapes))}
            self.numbers |= {f"{root}/param_groups/0/lr": 0.1 * (number + 1)}


def interleavings(owners, shapes, groups):
    """Return all assignments of tensors to optimizers that keep the order of the model and match the shapes."""
    return [
        owner
        for owner in itertools.product(range(len(groups)), repeat=len(owners))
        if all([shapes[i] for i, o in enumerate(owner) if o == n] == list(group) for n, group in enumerate(groups))
    ]


@given(
    owners=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    data=st.data(),
)
def test_optimizers_are_assigned_if_and_only_if_there_is_one_way(owners, data):
    shapes = data.draw(st.lists(st.sampled_from([(1,), (2,), (3,)]), min_size=len(owners), max_size=len(owners)))
    groups = [[s for s, o in zip(shapes, owners, strict=True) if o == n] for n in range(3)]
    groups = [group for group in groups if group]
    parameters = {f"t{index}": LoggedTensor(shape, "float32") for index, shape in enumerate(shapes)}
    found = saved_optimizer(SeveralOpened(groups), parameters)
    possible = interleavings(owners, shapes, groups)
    if len(set(shapes)) == len(shapes) or len(possible) == 1:
        (owner,) = possible
        rates = found.state.numbers["tensor_learning_rate"]
        assert rates == {f"t{index}": 0.1 * (number + 1) for index, number in enumerate(owner)}
    elif len(groups) > 1:
        assert "cannot be assigned" in found.state.problem
