"""Test logs that are read together with evaluations of an objective."""

import numpy as np
import pytest
import safetensors.numpy

from logs import random_walk, write_log
from natgrad.schema.errors import InputError
from natgrad.sources.replayed import Replayed, Replays
from natgrad.sources.steps import NotYet
from natgrad.storage import LocalStorage
from opened import open_sources

TENSORS = ("layer.weight", "layer.bias")


@pytest.fixture
def replays(tmp_path):
    (tmp_path / "replay").mkdir()
    return Replays(LocalStorage(tmp_path / "replay"))


def log_of(tmp_path, gradients=False, **others):
    states = [
        {key: array for key, array in state.items() if gradients or not key.startswith("gradient")} | others
        for state in random_walk(3)
    ]
    return open_sources([write_log(tmp_path / "log", states)])


def write(replays, step, update=False, texts=None, **arrays):
    entry = replays.update(step) if update else replays.state(step)
    entry.put(safetensors.numpy.save({name: np.asarray(array) for name, array in arrays.items()}, texts))


def gradient(step):
    shapes = {"layer.weight": (4, 3), "layer.bias": (4,)}
    return {f"gradient/{name}": np.full(shape, float(step), np.float32) for name, shape in shapes.items()}


def test_evaluated_steps_have_the_loss_and_the_gradient_of_the_objective(tmp_path, replays, caplog):
    source = Replayed(log_of(tmp_path, hvp=np.ones(3)), replays)
    with pytest.raises(NotYet, match="has not been evaluated at any state"):
        source.steps()
    for step in (0, 2):
        write(replays, step, loss=10.0 + step, **gradient(step))
    write(replays, 0, update=True, taylor_point=0.25, **{"hvp/layer.bias": np.ones(4, np.float32)})
    steps = source.steps()
    assert [step.number for step in steps] == [0, 2]
    assert "1 states are not evaluated yet, the first is that of step 1" in caplog.text
    with source.open(steps[0]) as reader:
        content = reader.content()
        # The loss of the log belongs to another objective, and the learning rate to the run.
        assert content.scalars == {"loss": 10.0, "learning_rate": 0.1, "taylor_point": 0.25}
        assert set(content.arrays["gradient"]) == set(TENSORS)
        assert set(content.arrays["hvp"]) == {"layer.bias"}
        assert content.untrained
    with source.open(steps[1]) as reader:
        found = np.empty(3, np.float32)
        reader.read("gradient", "layer.weight", 1, found)
        assert found.tolist() == [2.0] * 3
        (place,) = reader.ranges("gradient", "layer.weight")
        assert str(place.file) == str(replays.state(2))
        assert reader.ranges("parameter", "layer.weight")[0].file.name == "step_2.safetensors"


def test_logs_with_gradients_are_refused(tmp_path, replays):
    source = Replayed(log_of(tmp_path, gradients=True), replays)
    write(replays, 0, loss=1.0, **gradient(0))
    (step,) = source.steps()
    with source.open(step) as reader, pytest.raises(InputError, match="the log contains gradients"):
        reader.content()


def test_evaluations_of_changed_files_are_refused(tmp_path, replays):
    source = Replayed(log_of(tmp_path), replays)
    write(replays, 0, loss=1.0, texts={"source_size": "1", "source_time": "2"}, **gradient(0))
    (step,) = source.steps()
    with pytest.raises(InputError, match="changed after the objective was evaluated"), source.open(step):
        pass


def test_documents_are_written_once(replays):
    assert replays.document("replay") == {}
    assert replays.write_document("replay", {"objective": "a"})
    assert not replays.write_document("replay", {"objective": "b"})
    assert replays.document("replay") == {"objective": "a"}
