"""Test where recording ledgers differs from recording states; test_torch.py compares the two."""

import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import natgrad
from lazy import Lazy
from natgrad.kernel.ledger_sums import roundoff_bound
from natgrad.schema.errors import InputError
from natgrad.sources.ledger_log import LedgerLog
from reference import exact_gram, exact_vectors
from watched import loss_of, make_model, snapshot, train, updates_of

torch = Lazy("torch")
KEPT = np.ix_([0, 1, 2, 4], [0, 1, 2, 4])


def require_exact(update, name, before, after, gradient):
    vectors = [tensor.detach().double().numpy() for tensor in (before, after, gradient, gradient)]
    ratio = update["ratio"][name]
    expected = exact_gram(exact_vectors(*vectors, ratio))[KEPT]
    norms = np.sqrt(np.diagonal(expected))
    norms[3] += norms[2] + abs(ratio) * norms[1]
    bound = 2.0 * roundoff_bound(before.numel()) * np.outer(norms, norms)
    assert (abs(update["gram"][name] - expected) <= bound).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_of_any_dtype_and_order_in_memory_are_exact_to_rounding(tmp_path, dtype):
    torch.manual_seed(0)
    model = torch.nn.ParameterDict(
        {
            "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "transposed": torch.randn(7, 3).T,
            "part": torch.randn(6, 8)[::2, 1:5],
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(2.0),
            "unused": torch.ones(3),
        }
    ).to(getattr(torch, dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = []
    with natgrad.watch(optimizer, tmp_path, model=model, mode="ledger") as watch:
        for _ in range(3):
            optimizer.zero_grad()
            sum(
                (one**2).sum() * 0.3 + one.flatten()[:2].sum() for key, one in model.items() if key != "unused"
            ).backward()
            states.append((snapshot(model), {name: one.grad for name, one in model.named_parameters()}))
            optimizer.step()
        assert watch.last.tensors["unused"].update_to_weight == 0.0
    states.append((snapshot(model), None))
    found = list(updates_of(tmp_path))
    assert [update["step"] for update in found] == [0, 1, 2]
    for update, (before, gradients), (after, _) in zip(found, states[:-1], states[1:], strict=True):
        for name, gradient in gradients.items():
            if name == "unused":
                gradient = torch.zeros_like(before[name])
            if before[name].numel():
                require_exact(update, name, before[name], after[name], gradient)
        assert not update["gram"]["empty"].any()
    dtypes = {tensor.name: (tensor.dtype, tensor.gradient_dtype) for tensor in LedgerLog(tmp_path).header.tensors}
    assert set(dtypes.values()) == {(dtype, dtype)}


def test_the_values_of_the_last_update_are_those_of_recorded_states(tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    watches = [natgrad.watch(optimizer, tmp_path / mode, model=model, mode=mode) for mode in ("full", "ledger")]
    for step in range(4):
        train(model, optimizer, 1)
        full, ledger = (watch.last for watch in watches)
        assert full.step == ledger.step == step
        for one, other in [(full.model, ledger.model)] + [
            (full.tensors[n], ledger.tensors[n]) for n in full.tensors
        ]:
            # This is the guaranteed error of angles; the length is the quotient of two norms.
            assert abs(one.angle - other.angle) <= 1e-13
            assert other.update_to_weight == pytest.approx(one.update_to_weight, rel=4 * roundoff_bound(6))
            assert one.effective == other.effective
    for watch in watches:
        watch.close()
        assert watch.last is None


def test_every_nth_update_has_the_ledger_of_a_complete_log(tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    watches = [
        natgrad.watch(optimizer, tmp_path / str(every), model=model, mode="ledger", every=every) for every in (1, 4)
    ]
    train(model, optimizer, 10)
    for watch in watches:
        watch.close()
    complete, seldom = ({update["step"]: update for update in updates_of(tmp_path / name)} for name in "14")
    assert list(complete) == [*range(10)]
    assert list(seldom) == [0, 4, 8]
    for step, update in seldom.items():
        np.testing.assert_equal(update, complete[step])


def test_a_change_between_steps_is_not_a_part_of_an_update(tmp_path, caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model, mode="ledger"):
        train(model, optimizer, 2)
        model.load_state_dict(make_model().state_dict())
        before = snapshot(model)
        train(model, optimizer, 1)
    assert "the change is not a part of any recorded update" in caplog.text
    update = list(updates_of(tmp_path))[2]
    for name, parameter in model.named_parameters():
        require_exact(update, name, before[name], parameter, parameter.grad)


def test_an_optimizer_that_changes_gradients_in_between_evaluations_is_exact(tmp_path):
    class Twice(torch.optim.Optimizer):
        """Evaluates the closure, takes half a step, evaluates again and takes the other half."""

        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure):
            for _ in range(2):
                closure()
                with torch.no_grad():
                    for group in self.param_groups:
                        for parameter in group["params"]:
                            parameter.grad.mul_(0.5)
                            parameter.sub_(parameter.grad, alpha=group["lr"])

    model = make_model()
    optimizer = Twice(model.parameters())
    states = []

    def closure():
        optimizer.zero_grad()
        loss_of(model, len(states) // 2).backward()
        states.append((snapshot(model), {name: one.grad.clone() for name, one in model.named_parameters()}))

    with natgrad.watch(optimizer, tmp_path, model=model, mode="ledger"):
        for _ in range(3):
            optimizer.step(closure)
    states.append((snapshot(model), None))
    for update, (before, gradients), (after, _) in zip(
        updates_of(tmp_path), states[:-1:2], states[2::2], strict=True
    ):
        for name, gradient in gradients.items():
            require_exact(update, name, before[name], after[name], gradient)


def test_a_resumed_run_continues_the_log_or_begins_an_attempt(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model, mode="ledger", evaluation="fixed"):
        train(model, optimizer, 4)
    with pytest.raises(InputError, match=r"(?s)already contains ledgers.*first_step=N"):
        natgrad.watch(optimizer, tmp_path, model=model, mode="ledger")
    with pytest.raises(InputError, match="already contains ledgers"):
        natgrad.watch(optimizer, tmp_path, model=model, first_step=4)
    for first in (4, 2):
        with natgrad.watch(optimizer, tmp_path, model=model, mode="ledger", first_step=first):
            train(model, optimizer, 2)
    assert [update["step"] for update in updates_of(tmp_path)] == [0, 1, 2, 3]
    assert LedgerLog(tmp_path).header.evaluation == "fixed"


def test_new_parameter_groups_begin_a_file(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model, mode="ledger"):
        train(model, optimizer, 2)
        bias = optimizer.param_groups[0]["params"].pop()
        optimizer.add_param_group({"params": [bias], "lr": 0.5})
        train(model, optimizer, 2)
    assert len(list(tmp_path.iterdir())) == 2
    rates = [update["rates"] for update in updates_of(tmp_path)]
    assert rates == [{"weight": 0.1, "bias": 0.1}] * 2 + [{"weight": 0.1, "bias": 0.5}] * 2


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "mode must be 'full' or 'ledger', got 'fast'"),
        ({"evaluation": "all"}, "evaluation must be 'batch' or 'fixed' or 'unknown'"),
    ],
)
def test_arguments_are_checked(tmp_path, arguments, message):
    model = make_model()
    with pytest.raises(InputError, match=message):
        natgrad.watch(
            torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "log", **{"mode": "ledger"} | arguments
        )
    assert not (tmp_path / "log").exists()


def convert(model, optimizer):
    model.float()


def reload(model, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (convert, "parameter 'weight' was torch.float64 on cpu with 6 elements, and is torch.float32"),
        (reload, "the state of the optimizer was replaced"),
    ],
)
def test_an_error_ends_the_recording_with_all_updates_before_it_and_not_the_training(
    tmp_path, caplog, change, message
):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = natgrad.watch(optimizer, tmp_path, model=model, mode="ledger")
    train(model, optimizer, 3)
    change(model, optimizer)
    before = snapshot(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3, dtype=model.weight.dtype)).sum().backward()
        optimizer.step()
    assert not any(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not watch.active
    watch.close()
    assert [update["step"] for update in updates_of(tmp_path)] == [0, 1, 2]
    (warning,) = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert message in warning
    assert "the training continues" in warning


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_tensors_without_a_ledger_are_refused_by_name(tmp_path, caplog, kind):
    model = torch.nn.Embedding(5, 3, sparse=True)
    if kind == "complex":
        model = torch.nn.Linear(1, 3, dtype=torch.complex64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model, mode="ledger") as watch:
        model(torch.tensor([1]).to(torch.complex64 if kind == "complex" else int)).abs().sum().backward()
        optimizer.step()
    assert not watch.recorded
    assert {"sparse": "where: gradient 'weight'", "complex": "parameter 'weight' has dtype torch.complex64"}[
        kind
    ] in caplog.text
    assert not list(tmp_path.iterdir())


# Processes --------------------------------------------------------------------------------------------------------

TRAINER = """
import sys
import torch
import natgrad

model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
watch = natgrad.watch(optimizer, "log", model=model, mode="ledger", first_step=int(sys.argv[1]))
for step in range(1_000_000):
    optimizer.zero_grad()
    model(torch.ones(3)).square().sum().backward()
    optimizer.step()
    print(step, flush=True)
"""


def test_a_trainer_that_is_killed_loses_at_most_the_last_update(tmp_path):
    taken = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(taken)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        for _ in range(200):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        rest, _ = process.communicate()
        done = 200 + len(rest.splitlines())
        found = [update["step"] for update in updates_of(tmp_path / "log")]
        assert found == [*range(len(found))]
        assert taken + done - 1 <= len(found) <= taken + done + 1
        taken = len(found)


WITHOUT_NUMBA = """
import logging, sys
sys.modules["numba"] = None
sys.modules["ml_dtypes"] = None
logging.basicConfig(level="INFO")
import torch
import natgrad

model = torch.nn.Linear(3, 2).bfloat16()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with natgrad.watch(optimizer, "log", model=model, mode="ledger") as watch:
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(3).bfloat16()).sum().backward()
        optimizer.step()
        print(watch.last.model.angle)
heavy = ("numba", "llvmlite", "scipy", "xarray", "zarr", "dask", "prefect", "crc32c", "pandas")
assert not [name for name in heavy if sys.modules.get(name)]
"""


def test_without_numba_and_the_other_dependencies_ledgers_are_computed_by_numpy(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    # The update is along the gradient, up to the rounding of bfloat16 to 8 bits.
    assert all(float(line) <= 2**-5 for line in done.stdout.splitlines())
    assert done.stderr.count("ledgers are computed by NumPy, because numba is not installed") == 1
    assert [update["step"] for update in updates_of(tmp_path / "log")] == [0, 1, 2]
