"""Alignment of logged quantities with states: shifts given by the user, and shifts detected from updates."""

import itertools
import json
import os
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lazy import Lazy
from logs import DTYPES, random_walk, write_log
from natgrad.app.inspection import inspect_source
from natgrad.schema.errors import InputError
from natgrad.schema.layout import storage_dtype
from natgrad.sources.alignment import shift_of_gradients
from natgrad.sources.names import parse_shift
from natgrad.store import open_trajectory
from opened import ingest, open_source

torch = Lazy("torch")

SHAPES = {"layers.0.weight": (5, 3), "layers.0.bias": (5,), "scale": ()}
STEPS = 6


def trained(optimizer, dtype="float32", steps=STEPS):
    """Return states of torch training on |A theta|^2 / 2, tensor by tensor, logged before the update."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    theta = {name: torch.randn(shape).to(kind).requires_grad_() for name, shape in SHAPES.items()}
    factor = {name: torch.rand(shape).to(kind) + 0.5 for name, shape in SHAPES.items()}
    updates = optimizer(theta.values())
    states = []
    for _ in range(steps):
        updates.zero_grad()
        loss = sum(((factor[name] * value) ** 2).sum() for name, value in theta.items()) / 2
        loss.backward()
        state = {"loss": np.float64(loss.item()), "learning_rate": np.float64(updates.param_groups[0]["lr"])}
        for name, value in theta.items():
            for array, tensor in (("parameter", value.detach()), ("gradient", value.grad)):
                state[f"{array}/{name}"] = tensor.to(torch.float64).numpy().astype(DTYPES[dtype])
        states.append(state)
        updates.step()
    return states


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def moved(states, by, quantities):
    """Return states in which some quantities are logged ``by`` steps later than the states that they belong to."""
    result = []
    for step, state in enumerate(states):
        if 0 <= step - by < len(states):
            other = states[step - by]
            result.append({key: (other if key.partition("/")[0] in quantities else state)[key] for key in state})
    return result, range(by, len(states)) if by > 0 else range(len(states) + by)


def write_moved(folder, states, by, quantities=("gradient", "loss")):
    logged, numbers = moved(states, by, quantities)
    return write_log(folder, logged, list(numbers))


def held(path):
    """Return the states of a trajectory by step: the bits of its arrays, and its scalars."""
    states = open_trajectory(path)
    rows = {}
    for row, step in enumerate(states.scalar("step").tolist()):
        bits = []
        for name, dtype in states.dtypes.items():
            out = np.zeros((1, states.chunk[1]), storage_dtype(dtype))
            states.read(name, row, row + 1, 0, out)
            bits.append(out.tobytes())
        rows[step] = (bits, *(float(states.scalar(name)[row]) for name in ("loss", "learning_rate")))
    return rows


@pytest.mark.parametrize("by", [1, -1, 2])
def test_shifting_a_log_back_gives_the_original_run(tmp_path, by, caplog):
    states = trained(sgd)
    ingest(write_log(tmp_path / "log", states), tmp_path / "aligned.zarr")
    source = write_moved(tmp_path / "moved", states, by)
    ingest(source, tmp_path / "shifted.zarr", shift={"gradient": -by, "loss": -by})
    expected, found = held(tmp_path / "aligned.zarr"), held(tmp_path / "shifted.zarr")
    # Of the logged states, those whose gradient is logged at another step.
    logged = range(by, STEPS) if by > 0 else range(STEPS + by)
    complete = [step for step in logged if step + by in logged]
    # The last update leads to a state whose gradient is not logged yet.
    assert list(found) == [*complete, *([complete[-1] + 1] if by > 0 else [])]
    assert all(found[step] == expected[step] for step in complete)
    assert all(found[step][0][0] == expected[step][0][0] for step in found)
    assert "steps of" in caplog.text
    assert "are omitted" in caplog.text


def test_a_shift_of_scalars_drops_no_state(tmp_path):
    states = trained(sgd)
    source = write_moved(tmp_path / "log", states, 1, ("loss",))
    ingest(source, tmp_path / "trajectory.zarr", shift={"loss": -1})
    found = held(tmp_path / "trajectory.zarr")
    assert list(found) == list(range(1, STEPS))
    assert [found[step][1] for step in range(1, STEPS - 1)] == [
        states[step]["loss"] for step in range(1, STEPS - 1)
    ]
    assert np.isnan(found[STEPS - 1][1])


def test_each_source_of_a_run_file_has_its_shift(tmp_path):
    states = trained(sgd)
    write_log(tmp_path / "log", [{k: v for k, v in state.items() if k != "loss"} for state in states])
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step + 1, "loss": float(s["loss"]), "lr": 7.0}) + "\n"
            for step, s in enumerate(states)
        )
    )
    os.utime(tmp_path / "metrics.jsonl", (1, 1))
    (tmp_path / "run.toml").write_text(
        '[[source]]\npath = "log"\n[[source]]\npath = "metrics.jsonl"\nshift = { loss = -1 }\n'
    )
    log = open_source(tmp_path / "run.toml")
    for step, state in zip(log.steps(), states, strict=True):
        with log.open(step) as reader:
            assert reader.content().scalars == {"loss": state["loss"], "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("shift = { gradient = 0.5 }", "gradient=0.5 is not a valid shift"),
        ("shift = { gradients = -1 }", "gradients=-1 is not a valid shift"),
        ('shift = { gradient = "-1" }', "gradient=-1 is not a valid shift"),
        ("shift = 3", "map or shift that is not a table"),
        ("shift = { gradient = true }", "gradient=True is not a valid shift"),
    ],
)
def test_an_invalid_shift_is_refused(tmp_path, text, what):
    write_log(tmp_path / "log", random_walk(2))
    (tmp_path / "run.toml").write_text(f'[[source]]\npath = "log"\n{text}\n')
    with pytest.raises(InputError, match=re.escape(what)) as caught:
        open_source(tmp_path / "run.toml")
    assert "run.toml" in caught.value.where
    with pytest.raises(InputError, match="ambiguous which source of the run file"):
        open_source(tmp_path / "run.toml", shift={"gradient": -1})


def test_command_line_shifts_are_numbers_of_steps():
    assert parse_shift(["gradient=-1", "loss=+2", "hvp=0"]) == {"gradient": -1, "loss": 2, "hvp": 0}
    for pairs in (
        ["gradient"],
        ["gradient="],
        ["gradient=x"],
        ["step=1"],
        ["loss=1", "loss=1"],
        ["loss=" + "9" * 99],
    ):
        with pytest.raises(InputError):
            parse_shift(pairs)


# Detection from updates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("by", [1, -1])
def test_gradients_of_another_step_are_reported_with_the_option_to_use(tmp_path, dtype, by):
    source = write_moved(tmp_path / "log", trained(sgd, dtype), by)
    summary = ingest(source, tmp_path / "trajectory.zarr")
    (message,) = [warning for warning in summary.warnings if "--shift" in warning]
    assert f"--shift gradient={-by}, and loss={-by}" in message
    assert message in inspect_source([source]).notes
    mended = ingest(source, tmp_path / "mended.zarr", shift={"gradient": -by, "loss": -by})
    assert not [warning for warning in mended.warnings if "--shift" in warning]


OPTIMIZERS = {
    "sgd": sgd,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "decay": lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_aligned_gradients_give_no_warning(tmp_path, optimizer):
    states = trained(OPTIMIZERS[optimizer])
    summary = ingest(write_log(tmp_path / "log", states), tmp_path / "trajectory.zarr")
    assert not [warning for warning in summary.warnings if "--shift" in warning]


def test_insufficient_precision_gives_no_warning(tmp_path):
    # The gradients of a step and of the next one differ by less than the rounding of an update.
    source = write_moved(tmp_path / "log", trained(sgd, "bfloat16"), 1)
    summary = ingest(source, tmp_path / "trajectory.zarr")
    assert not [warning for warning in summary.warnings if "--shift" in warning]


state = arrays(np.float64, (2, 3), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1e-9]))


@given(st.lists(state, min_size=4, max_size=4))
def test_alignment_by_chance_gives_no_warning(states):
    # Three elements are within b / d of a line by chance in one of (d / b)**2 cases; 1e12 is required. With this
    # rounding, d / b is at most 2**6, so that three updates are one of at most 7e10 cases.
    assert shift_of_gradients([{"w": values} for values in states], {"w": [2.0**-6] * 2}) == 0


def write_lightning(folder, states, **more):
    """Write checkpoints like a callback that saves the gradient and the loss of the update that was just made."""
    folder.mkdir()
    for step, (before, state) in enumerate(itertools.pairwise(states), 1):
        tree = {"state_dict": {}, "gradient": {}, "loss": float(before["loss"]), "global_step": step}
        for name in SHAPES:
            tree["state_dict"][name] = torch.from_numpy(np.array(state[f"parameter/{name}"]))
            tree["gradient"][name] = torch.from_numpy(np.array(before[f"gradient/{name}"]))
        torch.save(tree | more, folder / f"epoch=0-step={step}.ckpt")
    return folder


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


def test_lightning_gradients_that_may_belong_to_the_state_before_always_cause_a_warning(tmp_path):
    log = write_lightning(tmp_path / "log", trained(adam))
    (question,) = (w for w in ingest(log, tmp_path / "asked.zarr").warnings if "callback of Lightning" in w)
    assert question in inspect_source([log]).notes
    # The message names every quantity that was saved with the gradient, and each of its options removes it.
    shifts = re.findall(r"--shift (\w+=-1)", question)
    assert shifts == ["gradient=-1", "loss=-1"]
    for number, answer in enumerate((parse_shift(shifts), parse_shift(["gradient=0"]))):
        summary = ingest(log, tmp_path / f"answered-{number}.zarr", shift=answer)
        assert not any("Lightning" in warning for warning in summary.warnings)
    (tmp_path / "run.toml").write_text('[[source]]\npath = "log"\nshift = { gradient = 0 }\n')
    assert not any("Lightning" in note for note in inspect_source([tmp_path / "run.toml"]).notes)
    assert not any("Lightning" in w for w in ingest(tmp_path / "run.toml", tmp_path / "declared.zarr").warnings)
    states = trained(adam)[1:]
    states[-1] = {key: value for key, value in states[-1].items() if key.startswith("parameter/")}
    native = write_log(tmp_path / "native", states, list(range(1, STEPS)))
    aligned = ingest(native, tmp_path / "native.zarr")
    found, expected = held(tmp_path / "answered-0.zarr"), held(aligned.trajectory)
    for step in {*found, *expected}:
        assert found[step][0] == expected[step][0]
        np.testing.assert_array_equal(found[step][1], expected[step][1])


def test_lightning_gradients_that_are_proven_to_be_aligned_cause_no_question(tmp_path):
    states = trained(sgd)
    log = write_lightning(tmp_path / "log", states)
    (advice,) = (w for w in ingest(log, tmp_path / "late.zarr").warnings if "--shift" in w)
    assert "--shift gradient=-1, and loss=-1 if logged with it" in advice
    moved_on = [
        {**state, **{f"gradient/{name}": states[min(i + 1, STEPS - 1)][f"gradient/{name}"] for name in SHAPES}}
        for i, state in enumerate(states)
    ]
    summary = ingest(write_lightning(tmp_path / "aligned", moved_on), tmp_path / "aligned.zarr")
    assert not any("--shift" in warning for warning in summary.warnings)


def test_the_last_state_of_a_short_run_may_lack_its_gradient(tmp_path):
    states = random_walk(4)
    states[-1] = {key: value for key, value in states[-1].items() if not key.startswith("gradient/")}
    assert inspect_source([write_log(tmp_path / "log", states)]).command is not None
