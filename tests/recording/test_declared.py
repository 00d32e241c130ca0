"""Test that a log of states declares how it is read, and that the results follow the declaration."""

import numpy as np
import pytest

import natgrad
from natgrad.recording import Recorder
from natgrad.recording.declared import declare
from natgrad.schema.errors import InputError

STATE = {"parameter": {"w": np.ones(2)}, "gradient": {"w": np.ones(2)}}


def test_values_are_added_before_tables_and_kept(tmp_path):
    path = tmp_path / "natgrad.toml"
    path.write_text('[map]\nloss = "train_loss"\n')
    declare(tmp_path, "step_span", 1, argument="every=2")
    declare(tmp_path, "evaluation", "batch", argument="evaluation")
    declare(tmp_path, "step_span", 1, argument="every=2")
    assert path.read_text() == 'evaluation = "batch"\nstep_span = 1\n[map]\nloss = "train_loss"\n'


@pytest.mark.parametrize("text", ["", 'evaluation = "fixed"', "other = "])
def test_another_value_of_an_existing_log_is_refused(tmp_path, text):
    (tmp_path / "natgrad.toml").write_text(text)
    (tmp_path / "step_0.npz").touch()
    with pytest.raises(InputError, match=r"does not fit the log|cannot read the mapping file"):
        declare(tmp_path, "evaluation", "batch", argument="evaluation='batch'")
    assert (tmp_path / "natgrad.toml").read_text() == text


def test_the_absence_of_a_value_is_required(tmp_path):
    declare(tmp_path, "step_span", None, argument="every=1")
    assert not (tmp_path / "natgrad.toml").exists()
    (tmp_path / "natgrad.toml").write_text("step_span = 1")
    with pytest.raises(InputError, match="every=1 does not fit the log"):
        declare(tmp_path, "step_span", None, argument="every=1")


def test_results_follow_the_declaration_unless_the_option_is_set(tmp_path):
    recorder = Recorder(tmp_path / "log", evaluation="batch")
    for step in range(3):
        values = {"w": np.full(2, 1.0 / (step + 1))}
        recorder.record(step, parameter=values, gradient=values, loss=1.0 / (step + 1), learning_rate=0.1)
    natgrad.process(tmp_path / "log", tmp_path / "run")
    results = natgrad.open_results(tmp_path / "run")
    assert results.attrs["evaluation"] == "batch"
    # The losses of two mini-batches are not comparable.
    assert np.isnan(results["model"]["loss_decrease"]).all()
    natgrad.analyze(tmp_path / "run", evaluation="fixed")
    assert natgrad.open_results(tmp_path / "run").attrs["evaluation"] == "fixed"


def test_an_unknown_declaration_is_refused(tmp_path):
    Recorder(tmp_path / "log").record(0, **STATE)
    (tmp_path / "log" / "natgrad.toml").write_text('evaluation = "all"')
    with pytest.raises(InputError, match=r"(?s)invalid values.*evaluation what loss and gradient"):
        natgrad.process(tmp_path / "log", tmp_path / "run")
