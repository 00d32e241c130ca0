"""Compare what the step hooks record with parameters of the loop, and with gradients computed by hand."""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import xarray as xr

import natgrad
from lazy import Lazy
from natgrad.kernel.updates import refresh_products
from natgrad.schema.errors import InputError
from natgrad.store import open_trajectory
from watched import ROUNDING, all_states, by_hand, loss_of, make_model, read, snapshot, train, updates_of

torch = Lazy("torch")


def require_states(log, states):
    """Compare recorded parameters with those of the loop, and gradients with those by hand.

    Parameters
    ----------
    log : Path
    states : mapping
        By step, the parameters of the loop before the update and the gradients by hand.
    """
    found = read(log)
    assert list(found) == list(states)
    for number, (parameters, gradients) in states.items():
        for name, parameter in parameters.items():
            assert torch.equal(found[number]["parameter"][name], parameter), (number, name)
            np.testing.assert_allclose(found[number]["gradient"][name].numpy(), gradients[name], 0, ROUNDING)
    return found


class both:
    """Watch in both modes, and compare the ledgers with the products of the recorded states, bit for bit."""

    def __init__(self, optimizer, folder, model=None, **options):
        self.model, self.folder, self.ledgers = model, folder, folder.with_name(f"{folder.name}-ledgers")
        self.optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
        self.full = natgrad.watch(optimizer, folder, model=model, **options)
        self.ledger = natgrad.watch(optimizer, self.ledgers, model=model, mode="ledger", **options)
        self.angles = {}

    def __enter__(self):
        return self

    def log(self, **arguments):
        self.full.log(**arguments)
        self.ledger.log(**arguments)

    def __getattr__(self, name):
        values = {getattr(watch, name) for watch in (self.full, self.ledger)}
        assert len(values) == 1, (name, values)
        return values.pop()

    def __exit__(self, *exception):
        last = {name: values.angle for name, values in self.ledger.last.tensors.items()} if self.ledger.last else {}
        names = getattr(self.model, "_orig_mod", self.model)
        now = {name.removeprefix("module."): value for name, value in snapshot(names).items()}
        self.full.close()
        self.ledger.close()
        states, found = read(self.folder), list(updates_of(self.ledgers))
        assert [update["step"] for update in found] == list(states)
        for update in found:
            state = states[update["step"]]
            if update["step"] < max(states) and update["step"] + 1 not in states:
                continue  # an incomplete step follows, so that the state after the update is not recorded
            after = states.get(update["step"] + 1, {"parameter": now})["parameter"]
            names = list(update["gram"])
            assert sorted(names) == sorted(state["parameter"])
            before, gradients = state["parameter"], state["gradient"]
            arrays = [[one[name].numpy().ravel().copy() for name in names] for one in (before, after, gradients)]
            expected, ratio = refresh_products(*arrays)
            np.testing.assert_array_equal(list(update["gram"].values()), expected)
            np.testing.assert_array_equal(list(update["ratio"].values()), ratio)
            np.testing.assert_equal(update["loss"], state.get("loss", np.nan))
            rates = {float(value) for key, value in state["texts"].items() if key.endswith("/lr")}
            assert set(update["rates"].values()) == (rates or {state["learning_rate"]})
            assert update["skipped"] == (not all(gradient.isfinite().all() for gradient in gradients.values()))
        assert not last or last.keys() == found[-1]["gram"].keys()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "sgd-foreach": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=False),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plain_steps(tmp_path, name):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    states = {}
    with both(optimizer, tmp_path / "log", model=model) as watch:
        for step in range(4):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            states[step] = snapshot(model), by_hand(snapshot(model), step)[1]
            watch.log(loss=loss)
            optimizer.step()
    found = require_states(tmp_path / "log", states)
    for step, state in found.items():
        assert state["loss"] == pytest.approx(by_hand(states[step][0], step)[0], rel=ROUNDING)
        assert state["learning_rate"] == 0.1
    assert (watch.active, watch.recorded, watch.skipped) == (False, 4, 0)


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipped_gradients_are_recorded_as_the_optimizer_uses_them(tmp_path, kind):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = {}
    with both(optimizer, tmp_path, model=model):
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            _, gradients = by_hand(snapshot(model), step)
            norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
            assert norm > 0.1
            if kind == "norm":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                gradients = {name: gradient * 0.1 / (norm + 1e-6) for name, gradient in gradients.items()}
            else:
                torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
                gradients = {name: gradient.clip(-0.1, 0.1) for name, gradient in gradients.items()}
            states[step] = snapshot(model), gradients
            optimizer.step()
    require_states(tmp_path, states)


def test_accumulated_gradients_are_one_step(tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    states = {}
    with both(optimizer, tmp_path, model=model):
        for step in range(3):
            for part in range(3):
                (loss_of(model, 3 * step + part) / 3).backward()
            states[step] = snapshot(model), by_hand(snapshot(model), *range(3 * step, 3 * step + 3))[1]
            optimizer.step()
            optimizer.zero_grad()
    require_states(tmp_path, states)


# Automatic mixed precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw-foreach", "adamw-fused", "sgd-fused"])
def test_scaled_gradients_are_recorded_without_the_scale(tmp_path, name, unscale):
    model = make_model()
    optimizer, scaler = OPTIMIZERS[name](model.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    states, calls = {}, 0
    with both(optimizer, tmp_path, model=model) as watch:
        for step in range(5):
            overflows = step == 2
            optimizer.zero_grad()
            loss = loss_of(model, step)
            scaler.scale(loss * torch.inf if overflows else loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            before = snapshot(model)
            scaler.step(optimizer)
            # A fused optimizer is called and skips the step itself. Others are not called.
            if "fused" in name or not overflows:
                states[calls] = before, by_hand(before, step)[1]
                calls += 1
            if overflows:
                assert all(torch.equal(before[key], value) for key, value in snapshot(model).items())
            scaler.update()
    if "fused" in name:
        found = read(tmp_path)[2]
        assert not any(gradient.isfinite().any() for gradient in found["gradient"].values())
        (tmp_path / "step_2.safetensors").unlink()
        del states[2]
    assert watch.skipped == ("fused" in name)
    require_states(tmp_path, states)


# Closures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw-fused", "lbfgs"])
def test_the_gradient_of_a_closure_is_that_of_its_first_evaluation(tmp_path, name, keyword):
    model = make_model()
    make = OPTIMIZERS | {"lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)}
    optimizer = make[name](model.parameters())
    states, evaluations, returned = {}, 0, []
    with both(optimizer, tmp_path, model=model) as watch:
        for step in range(3):

            def closure(step=step):
                nonlocal evaluations
                evaluations += 1
                optimizer.zero_grad(set_to_none=keyword)  # otherwise evaluations share the memory of gradients
                loss = loss_of(model, step)
                loss.backward()
                if step == 2:
                    watch.log(loss=loss + 1)
                return loss

            for parameter in model.parameters():  # a stale gradient
                parameter.grad = torch.full_like(parameter, torch.nan)
            states[step] = snapshot(model), by_hand(snapshot(model), step)[1]
            returned.append(optimizer.step(closure=closure) if keyword else optimizer.step(closure))
    assert evaluations == (9 if name == "lbfgs" else 3)
    found = require_states(tmp_path, states)
    for step, state in found.items():
        expected = by_hand(states[step][0], step)[0]
        assert returned[step].item() == pytest.approx(expected, rel=ROUNDING)
        assert state["loss"] == pytest.approx(expected + (step == 2), rel=ROUNDING)


def test_a_step_that_fails_is_not_recorded(tmp_path, caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = {}
    with both(optimizer, tmp_path, model=model):
        for step in range(3):

            def closure(step=step):
                if step == 1:
                    raise MemoryError
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            states[step] = snapshot(model), by_hand(snapshot(model), step)[1]
            if step == 1:
                with pytest.raises(MemoryError):
                    optimizer.step(closure)
            else:
                optimizer.step(closure)
    del states[1]
    require_states(tmp_path, states)
    assert "step 1 and other incomplete steps are not recorded" in caplog.text


# Trainers ---------------------------------------------------------------------------------------------------------


def test_the_wrapper_of_accelerate_is_unwrapped(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    states = {}
    with both(optimizer, tmp_path, model=model):
        for step in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, step))
                if accelerator.sync_gradients:
                    states[step // 2] = snapshot(model), by_hand(snapshot(model), step - 1, step)[1]
                optimizer.step()
                optimizer.zero_grad()
    require_states(tmp_path, states)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_step_is_recorded(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    states = {}
    step_of_optimizer = torch.compile(optimizer.step, backend="aot_eager")
    with both(optimizer, tmp_path, model=torch.compile(model, backend="eager")):
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            states[step] = snapshot(model), by_hand(snapshot(model), step)[1]
            step_of_optimizer()
    require_states(tmp_path, states)


def test_a_rule_that_changes_gradients_is_recorded_with_those_before(tmp_path):
    class Clears(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.zero_()

    model = make_model()
    optimizer = Clears(model.parameters(), lr=0.1)
    states = {}
    with both(optimizer, tmp_path, model=model):
        for step in range(3):
            loss_of(model, step).backward()
            states[step] = snapshot(model), by_hand(snapshot(model), step)[1]
            optimizer.step()
            assert not model.weight.grad.any()
    require_states(tmp_path, states)


def test_several_optimizers_with_groups_make_one_update(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[0].bias], "lr": torch.tensor(0.5)}]
    first = torch.optim.AdamW(groups)
    second = torch.optim.SGD(model[2].parameters(), lr=0.25)
    scheduler = torch.optim.lr_scheduler.StepLR(second, 1, 0.5)
    with both([first, second], tmp_path / "log", model=model) as watch:
        states, gradients = [], []
        for _ in range(4):
            loss = model(torch.ones(3)).square().sum()
            loss.backward()
            watch.log(loss=loss)
            states.append(snapshot(model))
            gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
            first.step()
            first.zero_grad()
            second.step()
            second.zero_grad()
            scheduler.step()
    found = read(tmp_path / "log")
    assert list(found) == [0, 1, 2, 3]
    for state, parameters, expected in zip(found.values(), states, gradients, strict=True):
        for name, parameter in parameters.items():
            assert torch.equal(state["parameter"][name], parameter)
            assert torch.equal(state["gradient"][name], expected[name])
    natgrad.process(tmp_path / "log", tmp_path / "run")
    trajectory = open_trajectory(tmp_path / "run" / "trajectory.zarr")
    rates, names = trajectory.scalar("tensor_learning_rate"), trajectory.layout.names
    assert names == ("0.bias", "0.weight", "2.bias", "2.weight")
    expected = [[0.5, 0.1, 0.25 * 0.5**step, 0.25 * 0.5**step] for step in range(4)]
    np.testing.assert_array_equal(rates, [*expected, [np.nan] * 4])


def test_an_optimizer_that_steps_less_often_is_reported(tmp_path, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    often, seldom = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    with both([often, seldom], tmp_path, model=model):
        for step in range(4):
            model(torch.ones(3)).sum().backward()
            often.step()
            if step % 2:
                seldom.step()
    assert list(read(tmp_path)) == [1, 3]
    assert "watch each optimizer with its own folder" in caplog.text


# Parameters -------------------------------------------------------------------------------------------------------


def test_frozen_tied_unused_and_late_parameters(tmp_path, caplog):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(5, 3),
            "head": torch.nn.Linear(3, 5, bias=False),
            "unused": torch.nn.Linear(2, 2, bias=False),
            "frozen": torch.nn.Linear(5, 5, bias=False),
        }
    )
    model["head"].weight = model["embed"].weight
    model["frozen"].requires_grad_(False)
    late = torch.nn.Linear(5, 5, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with both(optimizer, tmp_path, model=model) as watch:
        for step in range(4):
            if step == 1:
                model["late"] = late
                optimizer.add_param_group({"params": late.parameters()})
            if step == 2:
                model["frozen"].requires_grad_(True)
            optimizer.zero_grad()
            outputs = model["frozen"](model["head"](model["embed"](torch.tensor([1, 3]))))
            (late(outputs) if step else outputs).square().sum().backward()
            optimizer.step()
    assert watch.recorded == 4
    for state in read(tmp_path).values():
        assert sorted(state["parameter"]) == sorted(state["gradient"]) == ["embed.weight", "unused.weight"]
        assert state["gradient"]["embed.weight"].any()
        assert not state["gradient"]["unused.weight"].any()
    assert "a parameter of shape (5, 5) was added to the optimizer: it is not recorded" in caplog.text
    natgrad.process(tmp_path, tmp_path / "run", learning_rate=0.1)


def test_a_parameter_that_requires_a_gradient_later_is_reported(tmp_path, caplog):
    model = make_model()
    model.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with both(optimizer, tmp_path, model=model):
        for step in range(3):
            model.bias.requires_grad_(step > 0)
            loss_of(model, step).backward()
            optimizer.step()
    assert "parameter 'bias' started to require a gradient after the first step: it is not recorded" in caplog.text
    assert [list(state["gradient"]) for state in read(tmp_path).values()] == [["weight"]] * 3


def test_parameters_are_selected_by_patterns_and_named_without_a_model(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = {
        "model": (plain, model, "1.*", ["1.bias", "1.weight"]),
        "several": (plain, model, ["0.weight", "1.b*"], ["0.weight", "1.bias"]),
        "names": (named, None, "*.bias", ["0.bias", "1.bias"]),
        "numbers": (plain, None, None, [f"parameter_{number}" for number in range(4)]),
        "compiled": (plain, torch.compile(model, backend="eager"), "1.*", ["1.bias", "1.weight"]),
    }
    for folder, (optimizer, source, patterns, names) in expected.items():
        with natgrad.watch(optimizer, tmp_path / folder, model=source, parameters=patterns):
            optimizer.zero_grad()
            model(torch.ones(2)).sum().backward()
            optimizer.step()
        assert sorted(read(tmp_path / folder)[0]["gradient"]) == names


def test_bfloat16_and_channels_last_are_recorded_with_the_same_bits(tmp_path):
    model = torch.nn.Conv2d(3, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model):
        model(torch.ones(1, 3, 4, 4, dtype=torch.bfloat16)).sum().backward()
        before = snapshot(model)
        optimizer.step()
    state = read(tmp_path)[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(state["parameter"][name], before[name])
        assert torch.equal(state["gradient"][name], parameter.grad)


# Live values ------------------------------------------------------------------------------------------------------


def test_the_values_of_the_last_update_are_those_of_the_results(tmp_path, caplog):
    model = make_model()
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups)
    values = []
    with natgrad.watch(optimizer, tmp_path / "log", model=model) as watch:
        assert watch.last is None
        for step in range(4):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(watch.last)
        with torch.no_grad():
            model.weight.add_(1.0)
        assert watch.last is None
    assert watch.last is None
    assert not caplog.records
    natgrad.process(tmp_path / "log", tmp_path / "run")
    results = natgrad.open_results(tmp_path / "run")
    assert results["model"]["step"].values.tolist() == [0, 1, 2]
    for step, found in enumerate(values[:3]):
        assert found.step == step
        chosen = {"step": step, "descent": "gradient", "window": 1}
        tables = {None: results["model"].sel(chosen)}
        tables |= {name: results["tensor"].sel(chosen | {"tensor": name}) for name in found.tensors}
        for name, table in tables.items():
            here = found.model if name is None else found.tensors[name]
            assert here.angle == pytest.approx(float(table["angle"]), abs=1e-13)
            assert here.condition_number == pytest.approx(float(table["condition_number"]), rel=1e-10, nan_ok=True)
            assert here.effective == bool(table["effective"] == 1)


# The last update ------------------------------------------------------------------------------------------------


def test_the_last_update_of_a_log_has_a_result(tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path / "log", model=model) as watch:
        train(model, optimizer, 3)
        last = watch.last
    (state,) = [state for state in all_states(tmp_path / "log").values() if not state["gradient"]]
    assert all(torch.equal(state["parameter"][name], value) for name, value in snapshot(model).items())
    natgrad.process(tmp_path / "log", tmp_path / "run")
    table = natgrad.open_results(tmp_path / "run")["model"].sel(descent="gradient", window=1).load()
    assert table["step"].values.tolist() == [0, 1, 2]
    assert last.model.angle == pytest.approx(float(table["angle"][2]), abs=1e-13)
    # A run that continues replaces the state without a gradient.
    with natgrad.watch(optimizer, tmp_path / "log", model=model, first_step=3):
        train(model, optimizer, 2)
    natgrad.process(tmp_path / "log", tmp_path / "run")
    again = natgrad.open_results(tmp_path / "run")["model"].sel(descent="gradient", window=1)
    assert again["step"].values.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(again["angle"][:3], table["angle"])


def test_parameters_that_were_changed_after_the_last_step_are_not_its_result(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model):
        train(model, optimizer, 2)
        model.load_state_dict(make_model().state_dict())
    assert list(all_states(tmp_path)) == [0, 1]


# Single updates ---------------------------------------------------------------------------------------------------


def test_every_nth_update_is_a_pair_of_states_with_the_results_of_a_complete_log(tmp_path, caplog):
    model, folders = make_model(), {"pairs": 5, "all": 1}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    watches = [natgrad.watch(optimizer, tmp_path / name, model=model, every=n) for name, n in folders.items()]
    for step in range(17):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        for watch in watches:
            watch.log(loss=loss)
        optimizer.step()
        assert (watches[0].last is None) == (step % 5 > 1)
        if step == 12:  # with a state that waits for its pair, and while the log grows
            while not (tmp_path / "pairs" / "step_10.safetensors").exists():
                time.sleep(0.01)
            natgrad.process(tmp_path / "pairs", tmp_path / "grown")
    for watch in watches:
        watch.close()
    assert list(read(tmp_path / "pairs")) == [0, 1, 5, 6, 10, 11, 15, 16]
    assert natgrad.inspect(tmp_path / "pairs").steps == 8
    models = {}
    for log, run in (("all", "all_run"), ("pairs", "pairs_run"), ("pairs", "grown")):
        natgrad.process(tmp_path / log, tmp_path / run, windows=[1, 2])
        assert natgrad.verify(tmp_path / run).ok
        models[run] = natgrad.open_results(tmp_path / run)["model"].to_dataset()
    assert models["pairs_run"]["step"].values.tolist() == [0, 5, 10, 15]
    assert models["pairs_run"]["step_span"].values.tolist() == [1, 1, 1, 1]
    expected = models["all_run"].sel(step=[0, 5, 10, 15])
    for run in ("pairs_run", "grown"):
        for name in expected.data_vars:
            if "window" in expected[name].dims:
                xr.testing.assert_equal(models[run][name].sel(window=1), expected[name].sel(window=1))
        assert np.isnan(models[run]["angle"].sel(window=2)).all()
    assert not [record for record in caplog.records if "belong to no update" in record.getMessage()]
    (tmp_path / "pairs" / "step_6.safetensors").unlink()
    natgrad.process(tmp_path / "pairs", tmp_path / "lost")
    assert natgrad.open_results(tmp_path / "lost")["model"]["step"].values.tolist() == [0, 10, 15]
    assert "1 states belong to no update" in caplog.text
    assert "the first is step 5" in caplog.text


def test_a_log_keeps_its_interval(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for name, every in (("pairs", 3), ("all", 1)):
        with natgrad.watch(optimizer, tmp_path / name, model=model, every=every):
            train(model, optimizer, 4)
        with pytest.raises(InputError, match="does not fit the log"):
            natgrad.watch(optimizer, tmp_path / name, model=model, every=4 - every, first_step=4)
        with natgrad.watch(optimizer, tmp_path / name, model=model, every=every, first_step=4):
            train(model, optimizer, 3)
    assert list(read(tmp_path / "pairs")) == [0, 1, 3, 4, 6]
    natgrad.process(tmp_path / "pairs", tmp_path / "run")
    (tmp_path / "pairs" / "natgrad.toml").unlink()
    with natgrad.watch(optimizer, tmp_path / "more", model=model):
        train(model, optimizer, 9)
    for step in (7, 8):
        (tmp_path / "more" / f"step_{step}.safetensors").rename(tmp_path / "pairs" / f"step_{step}.safetensors")
    with pytest.raises(InputError, match="the states of an update are 0 steps apart in this log, but 1 in"):
        natgrad.process(tmp_path / "pairs", tmp_path / "run", allow_gaps=True)


# Processes --------------------------------------------------------------------------------------------------------

LOOP = """
import os, sys
import torch
import natgrad

model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
watch = natgrad.watch(optimizer, "log", model=model)
for step in range(5):
    optimizer.zero_grad()
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    if step == 2 and os.fork() == 0:
        optimizer.step()
        watch.close()
        sys.exit()
heavy = ("numba", "scipy", "xarray", "zarr", "dask", "prefect")
print(*(name for name in heavy if name in sys.modules))
"""


def test_the_end_of_the_program_writes_the_last_states_and_forked_processes_none(tmp_path):
    done = subprocess.run([sys.executable, "-c", LOOP], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert done.stderr == ""
    assert list(read(tmp_path / "log")) == [0, 1, 2, 3, 4]


DISTRIBUTED = """
import os, sys
import torch
import natgrad

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2).double())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with natgrad.watch(optimizer, "log", model=model) as watch:
    for step in range(3):
        optimizer.zero_grad()
        loss = (model(torch.full((1, 3), 1.0 + rank, dtype=torch.float64)) ** 2).sum()
        loss.backward()
        if rank == 0:
            torch.save(model.module.weight.grad.clone(), f"gradient_{step}.pt")
        watch.log(loss=loss)
        optimizer.step()
assert watch.recorded == (3 if rank == 0 else 0)
torch.distributed.barrier()  # gloo may abort a process whose peer has ended
torch.distributed.destroy_process_group()
"""


def test_rank_0_of_data_parallel_training_records_the_mean_gradient(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED],
            cwd=tmp_path,
            env={**common, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in ranks] == [0, 0]
    found = read(tmp_path / "log")
    assert list(found) == [0, 1, 2]
    for step, state in found.items():
        weight, bias = (state["parameter"][name].numpy() for name in ("weight", "bias"))
        expected = 0.0
        for rank in range(2):
            inputs = np.full(3, 1.0 + rank)
            expected = expected + np.outer(2 * (weight @ inputs + bias), inputs) / 2
        np.testing.assert_allclose(state["gradient"]["weight"].numpy(), expected, 1e-14)
        assert torch.equal(state["gradient"]["weight"], torch.load(tmp_path / f"gradient_{step}.pt"))
