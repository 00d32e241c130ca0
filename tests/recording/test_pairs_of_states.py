"""Test that the recorder computes the ledgers of the updates between the states that are passed to it."""

import numpy as np
import pytest

import natgrad
from natgrad.kernel.ledger_sums import roundoff_bound
from natgrad.kernel.updates import portable_products
from natgrad.recording import Recorder
from natgrad.schema.errors import InputError
from natgrad.sources.ledger_log import LedgerLog
from watched import updates_of


def states(steps, dtype="float32"):
    """Yield states of a run; the arrays are changed in place, as a NumPy program does."""
    random = np.random.default_rng(0)
    parameter = {"w": random.standard_normal((3, 4)).astype(dtype), "b": random.standard_normal(()).astype(dtype)}
    gradient = {name: np.empty_like(array) for name, array in parameter.items()}
    for step in steps:
        for name in parameter:
            gradient[name][...] = random.standard_normal(parameter[name].shape)
        yield step, parameter, gradient
        for name in parameter:
            parameter[name][...] -= (0.1 * gradient[name]).astype(dtype)


def test_the_products_are_those_of_the_states_before_and_after_each_update(tmp_path):
    kept = []
    with Recorder(tmp_path, mode="ledger", evaluation="fixed") as recorder:
        assert repr(recorder) == f'Recorder({str(tmp_path)!r}, mode="ledger")'
        for step, parameter, gradient in states(range(5)):
            kept.append([{name: array.copy() for name, array in one.items()} for one in (parameter, gradient)])
            path = recorder.record(
                step, parameter=parameter, gradient=gradient, loss=step + 1.0, learning_rate={"w": 0.1, "b": 0.2}
            )
            assert path == tmp_path
    found = list(updates_of(tmp_path))
    assert [update["step"] for update in found] == [*range(4)]
    assert LedgerLog(tmp_path).header.evaluation == "fixed"
    for update, (before, gradient), (after, _) in zip(found, kept[:-1], kept[1:], strict=True):
        assert update["loss"] == update["step"] + 1.0
        assert update["rates"] == {"w": 0.1, "b": 0.2}
        for name in before:
            arrays = [[one[name].reshape(-1)] for one in (before, after, gradient)]
            gram, _ = portable_products(*arrays)
            norms = np.sqrt(np.diagonal(gram[0]))
            norms[3] = 2 * norms[2]
            bound = 4 * roundoff_bound(12) * norms[:, None] * norms
            assert (abs(update["gram"][name] - gram[0]) <= bound).all()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_results_are_those_of_recorded_states(tmp_path, dtype):
    recorders = [Recorder(tmp_path / mode, mode=mode) for mode in ("full", "ledger")]
    for step, parameter, gradient in states(range(6), dtype):
        for recorder in recorders:
            recorder.record(step, parameter=parameter, gradient=gradient, loss=1.0 / (step + 1), learning_rate=0.1)
    for recorder in recorders:
        recorder.record(6, parameter=parameter)
        recorder.close()
    for mode in ("full", "ledger"):
        natgrad.process(tmp_path / mode, tmp_path / f"{mode}_run")
    one, other = (natgrad.open_results(tmp_path / f"{mode}_run")["model"] for mode in ("full", "ledger"))
    assert one["step"].values.tolist() == other["step"].values.tolist() == [*range(6)]
    for name in ("angle", "condition_number", "loss_decrease"):
        expected, found = (
            tree[name].sel(descent="gradient") if "descent" in tree[name].dims else tree[name]
            for tree in (one, other)
        )
        np.testing.assert_allclose(found, expected, 64 * roundoff_bound(13), err_msg=name)


def test_a_step_that_was_recorded_before_begins_a_file(tmp_path):
    with Recorder(tmp_path, mode="ledger") as recorder:
        for step, parameter, gradient in states([0, 1, 2, 3, 1, 2]):
            recorder.record(step, parameter=parameter, gradient=gradient)
    assert [update["step"] for update in updates_of(tmp_path)] == [0, 1]
    with Recorder(tmp_path, mode="ledger", resume=True) as recorder:
        for step, parameter, gradient in states([2, 3]):
            recorder.record(step, parameter=parameter, gradient=gradient)
    assert [update["step"] for update in updates_of(tmp_path)] == [0, 1, 2]
    assert len([*tmp_path.iterdir()]) == 3


def test_a_missing_step_is_refused(tmp_path):
    recorder = Recorder(tmp_path, mode="ledger")
    (first, second) = list(states([0, 2]))
    recorder.record(0, parameter=first[1], gradient=first[2])
    with pytest.raises(InputError, match="step 1 is missing: step 2 follows step 0"):
        recorder.record(2, parameter=second[1], gradient=second[2])


def test_another_shape_or_dtype_is_refused_by_name(tmp_path):
    recorder = Recorder(tmp_path, mode="ledger")
    recorder.record(0, parameter={"w": np.ones(2)}, gradient={"w": np.ones(2)})
    for changed in (np.ones(3), np.ones(2, np.float32)):
        with pytest.raises(InputError, match="the shape or dtype of 'w' has changed"):
            recorder.record(1, parameter={"w": changed}, gradient={"w": changed})


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"hvp": {"w": np.ones(2)}}, "hvp"),
        ({"hessian_min_eigenvalue": 0.1}, "hessian_min_eigenvalue"),
        ({"replicates": {"parameter": {"w": np.ones((3, 2))}}}, "replicate_parameter"),
    ],
)
def test_values_that_the_log_cannot_contain_are_refused(tmp_path, values, what):
    recorder = Recorder(tmp_path, mode="ledger")
    with pytest.raises(InputError, match=f"a log of ledgers cannot contain {what}"):
        recorder.record(0, parameter={"w": np.ones(2)}, gradient={"w": np.ones(2)}, **values)


@pytest.mark.parametrize(("options", "what"), [({"mode": "ledgers"}, "mode"), ({"evaluation": 1}, "evaluation")])
def test_unknown_options_are_refused(tmp_path, options, what):
    with pytest.raises(InputError, match=f"{what} must be one of"):
        Recorder(tmp_path, **options)


def test_states_and_ledgers_are_not_mixed_in_a_folder(tmp_path):
    state = {"parameter": {"w": np.ones(2)}, "gradient": {"w": np.ones(2)}}
    Recorder(tmp_path / "states").record(0, **state)
    with pytest.raises(InputError, match="already contains states"):
        Recorder(tmp_path / "states", mode="ledger")
    with Recorder(tmp_path / "ledgers", mode="ledger") as recorder:
        recorder.record(0, **state)
        recorder.record(1, **state)
    with pytest.raises(InputError, match="already contains ledgers"):
        Recorder(tmp_path / "ledgers", resume=True)
    with pytest.raises(InputError, match=r"(?s)already contains ledgers.*resume=True"):
        Recorder(tmp_path / "ledgers", mode="ledger")
