"""Errors and warnings of the step hooks, after which the training continues."""

import copy
import logging
import subprocess
import sys
import time

import numpy as np
import pytest

import natgrad
from lazy import Lazy
from natgrad.schema.errors import InputError
from watched import loss_of, make_model, read, snapshot, train

torch = Lazy("torch")


def require_training_continues(tmp_path, caplog, message, hook):
    """Train with a recording that ends before step 3, and compare the result with a training without recording."""
    model, other = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = natgrad.watch(optimizer, tmp_path / "log", model=model)
    result = train(model, optimizer, 6, before_3=lambda: hook(model, optimizer, watch))
    watch.close()
    expected = train(other, torch.optim.SGD(other.parameters(), lr=0.1), 6)
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
    assert not watch.active
    assert watch.recorded == 3
    assert list(read(tmp_path / "log")) == [0, 1, 2]
    failures = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(failures) == 1, failures
    assert message in failures[0]
    assert "the training continues" in failures[0]


def test_sparse_gradients_end_the_recording_by_name(tmp_path, caplog):
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3, sparse=True), torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path / "all", model=model):
        model(torch.tensor([1])).sum().backward()
        optimizer.step()
    assert "the tensor is sparse" in caplog.text
    assert "where: gradient '0.weight'" in caplog.text
    assert not read(tmp_path / "all")
    with natgrad.watch(optimizer, tmp_path / "dense", model=model, parameters="1.*") as watch:
        optimizer.step()
    assert watch.recorded == 1


def test_a_reloaded_state_ends_the_recording(tmp_path, caplog):
    def reload(model, optimizer, watch):
        optimizer.load_state_dict(optimizer.state_dict())

    require_training_continues(tmp_path, caplog, "load_state_dict", reload)


def test_a_state_loaded_before_the_first_step_is_the_start_of_the_log(tmp_path, caplog):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model, first_step=7) as watch:
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, 2)
    assert list(read(tmp_path)) == [7, 8]
    assert watch.recorded == 2
    assert not caplog.records


def test_a_new_optimizer_for_the_same_parameters_ends_the_recording(tmp_path, caplog):
    def replace(model, optimizer, watch):
        torch.optim.SGD(model.parameters(), lr=0.0).step()

    require_training_continues(tmp_path, caplog, "another optimizer (SGD)", replace)


def test_a_copy_of_the_optimizer_is_reported(tmp_path, caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model) as watch:
        train(model, optimizer, 2)
        train(*copy.deepcopy((model, optimizer)), 9)
        train(model, optimizer, 2)
        assert not caplog.records
        train(*copy.deepcopy((model, optimizer)), 20)
    assert [record.getMessage() for record in caplog.records] == [
        "the watched optimizer has not taken a step since another one with parameters of the same shapes took 10; "
        "if the latter is a copy (copy.deepcopy), its steps are not recorded: call natgrad.watch for it"
    ]
    assert watch.recorded == 4


def test_a_log_that_cannot_be_written_ends_the_recording(tmp_path, caplog):
    def remove():
        while not (tmp_path / "log" / "step_1.safetensors").exists():  # step 2 is passed on by the next step
            time.sleep(0.01)
        (tmp_path / "log").rename(tmp_path / "moved")
        (tmp_path / "log").write_text("not a folder")

    model, other = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = natgrad.watch(optimizer, tmp_path / "log", model=model)
    result = train(model, optimizer, 6, before_3=remove)
    watch.close()
    expected = train(other, torch.optim.SGD(other.parameters(), lr=0.1), 6)
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
    (message,) = [record.getMessage() for record in caplog.records]
    assert "has ended" in message
    assert "Not a directory" in message


def test_missing_gradients_end_the_recording_with_the_remedy(tmp_path, caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model) as watch:
        loss_of(model, 0).backward()
        optimizer.zero_grad()
        optimizer.step()
    assert not watch.recorded
    assert "no parameter of the optimizer has a gradient when it steps" in caplog.text
    assert "do:    call zero_grad after the step" in caplog.text


def test_errors_are_raised_on_request(tmp_path):
    model = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = natgrad.watch(optimizer, tmp_path, model=model, on_error="raise")
    with pytest.raises(InputError, match="the loss must be one number"):
        watch.log(loss=torch.ones(2))
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="sparse"):
        optimizer.step()
    optimizer.step()
    watch.close()


@pytest.mark.parametrize("value", ["high", None, 1j, [1, 2], {}, object()])
def test_a_loss_that_is_not_a_number_is_reported_and_not_recorded(tmp_path, caplog, value):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model) as watch:
        watch.log(loss=value)
        train(model, optimizer, 2)
    assert ["loss" in state for state in read(tmp_path).values()] == [False, False]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "a loss was not recorded" in message


def test_losses_belong_to_the_next_step_or_to_the_step_just_taken(tmp_path, caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model) as watch:
        watch.log(loss=-1.0, after=True)
        assert "no step has been taken yet" in caplog.text
        watch.log(loss=0.0)
        train(model, optimizer, 1)
        train(model, optimizer, 1)
        watch.log(loss=np.float32(1), after=True)
        train(model, optimizer, 1)
        watch.log(loss=torch.tensor([2.0], requires_grad=True), after=True)
        watch.log(loss=3)
        watch.log(loss=torch.tensor(3.5))
        train(model, optimizer, 1)
    assert [state["loss"] for state in read(tmp_path).values()] == [0.0, 1.0, 2.0, 3.5]
    assert "the loss of a step was logged twice" in caplog.text


def test_values_that_change_between_steps_are_reported(tmp_path, caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model) as watch:
        train(model, optimizer, 3)
        assert not caplog.records
        model.load_state_dict(make_model().state_dict())
        train(model, optimizer, 2)
    assert "parameters were changed between two steps" in caplog.text
    assert watch.recorded == 5


def test_a_disk_that_is_slower_than_the_training_is_reported(tmp_path, caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (tmp_path / "log").mkdir()
    watch = natgrad.watch(optimizer, tmp_path / "log", model=model, buffer_bytes=0)
    train(model, optimizer, 3)
    watch.close()
    assert watch.seconds_waited > 0
    assert list(read(tmp_path / "log")) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": 3}, "the optimizer must be a torch.optim.Optimizer, got 3"),
        ({"optimizer": []}, "there is no optimizer"),
        ({"model": 3}, "the model must be a torch.nn.Module, got 3"),
        ({"model": "other"}, "a parameter of shape .* is not in the model"),
        ({"optimizer": "twice"}, "two optimizers update parameter 'weight'"),
        ({"parameters": "encoder.*"}, "(?s)no trained parameter has a name that matches encoder.*weight"),
        ({"parameters": [3]}, "parameters must be patterns"),
        ({"first_step": -1}, "first_step, buffer_bytes or every must be at least 0"),
        ({"every": 0}, "first_step, buffer_bytes or every must be at least 1"),
        ({"buffer_bytes": "big"}, "first_step, buffer_bytes or every must be a whole number"),
        ({"on_error": "stop"}, "on_error must be 'warn' or 'raise'"),
        ({"folder": ""}, "the folder must be a path"),
    ],
)
def test_arguments_are_checked_before_training(tmp_path, arguments, message):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = {"other": make_model(), "twice": [optimizer, copy.copy(optimizer)]}
    found = {"optimizer": optimizer, "folder": tmp_path / "log", "model": model} | {
        name: values.get(value, value) if isinstance(value, str) else value for name, value in arguments.items()
    }
    with pytest.raises(InputError, match=message):
        natgrad.watch(**found)
    assert not (tmp_path / "log").exists()


ZERO = """
import logging, warnings
warnings.simplefilter("ignore")
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
import torch
import natgrad

model = torch.nn.Linear(3, 2)
optimizer = object.__new__(DeepSpeedZeroOptimizer)
optimizer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # DeepSpeed passes it parts of parameters

class Wrapper(torch.optim.Optimizer):
    def __init__(self):
        self.optimizer = optimizer

for one in (optimizer, Wrapper()):
    try:
        natgrad.watch(one, "log", model=model)
    except natgrad.InputError as error:
        print(error.what, error.remedy, sep="|")
"""


def test_optimizers_of_deepspeed_and_megatron_are_refused_with_the_remedy(tmp_path):
    done = subprocess.run([sys.executable, "-c", ZERO], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    assert [what for what, _ in lines] == ["the optimizer is one of deepspeed (DeepSpeedZeroOptimizer)"] * 2
    assert all("safe_get_full_fp32_param and safe_get_full_grad" in remedy for _, remedy in lines)
    # Megatron is not among the libraries of the tests.
    megatron = type("DistributedOptimizer", (), {"__module__": "megatron.core.optimizer"})()
    with pytest.raises(InputError, match=r"(?s)one of megatron \(DistributedOptimizer\).*process the checkpoints"):
        natgrad.watch(megatron, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_a_folder_with_steps_is_continued_only_on_request(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with natgrad.watch(optimizer, tmp_path, model=model):
        train(model, optimizer, 4)
    with pytest.raises(InputError, match="already contains steps"):
        natgrad.watch(optimizer, tmp_path, model=model)
    with natgrad.watch(optimizer, tmp_path, model=model, first_step=2):
        before = snapshot(model)
        train(model, optimizer, 3)
    found = read(tmp_path)
    assert list(found) == [0, 1, 2, 3, 4]
    assert torch.equal(found[2]["parameter"]["weight"], before["weight"])
