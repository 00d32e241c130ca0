"""Test the evaluation of objectives at the states of a log: each state once, even if workers die."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import natgrad
import objective_factories
from commands import natgrad as command
from commands import natgrad_process
from natgrad.compute import executors
from natgrad.objectives.evaluation import Curvature
from natgrad.objectives.replay import LogOptions, evaluate_log
from natgrad.schema.errors import InputError
from natgrad.sources.replayed import Replays
from natgrad.storage import LocalStorage
from natgrad.store import open_trajectory
from objective_factories import STEPS, trained, write

FOLDER = str(Path(objective_factories.__file__).parent)
GRADIENT_ALONE = Curvature()


@pytest.fixture
def log(tmp_path):
    write(tmp_path / "log", trained())
    return tmp_path / "log"


def options(log):
    return LogOptions((LocalStorage(log),), None, {}, {}, "", False)


def replays_of(tmp_path):
    out = tmp_path / "out" / "replay"
    out.mkdir(parents=True, exist_ok=True)
    return Replays(LocalStorage(out))


def evaluated(log, tmp_path, factory="quartic", curvature=GRADIENT_ALONE, **keywords):
    return evaluate_log(
        options(log),
        replays_of(tmp_path),
        executors.serial,
        objective=f"objective_factories:{factory}",
        folder=FOLDER,
        curvature=curvature,
        **{"keep_gradients": True, **keywords},
    )


def gradients_of(replays, step):
    from safetensors.numpy import load

    return load(replays.state(step).get())


def test_each_state_is_evaluated_once(log, tmp_path):
    done = []
    found = evaluated(log, tmp_path, progress=lambda *numbers: done.append(numbers))
    assert done[-1] == (5, 5)
    assert found["new_evaluations"] == found["evaluations"] == 5
    assert (found["repeated_evaluations"], found["probe_evaluations"]) == (0, 1)
    assert found["determinism"] == {"equal_bits": True, "gradient": 0.0, "loss": 0.0}
    assert {"objective", "source", "threads", "versions"} <= found["fingerprint"].keys()
    for step, tensors in trained().items():
        loss, gradients = objective_factories.Quartic()(tensors)
        stored = gradients_of(replays_of(tmp_path), step)
        assert stored["loss"] == loss
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(stored[f"gradient/{name}"], gradient)
    assert evaluated(log, tmp_path)["new_evaluations"] == 0


def test_new_states_of_a_log_are_evaluated_alone(tmp_path):
    write(tmp_path / "log", trained((0, 1)))
    curvature = Curvature(hvp=True)
    assert evaluated(tmp_path / "log", tmp_path, curvature=curvature)["new_evaluations"] == 2
    write(tmp_path / "log", trained((2,)))
    found = evaluated(tmp_path / "log", tmp_path, curvature=curvature)
    assert (found["new_evaluations"], found["evaluations"], found["repeated_evaluations"]) == (1, 3, 0)
    assert replays_of(tmp_path).numbers() == ({0, 1, 2}, {0, 1})


def test_evaluations_of_different_objectives_are_never_mixed(log, tmp_path, monkeypatch):
    evaluated(log, tmp_path, "fingerprinted")
    replays_of(tmp_path).state(4).delete()
    monkeypatch.setenv("OBJECTIVE_DATA", "second")
    with pytest.raises(InputError, match="data differ") as caught:
        evaluated(log, tmp_path, "fingerprinted")
    assert "data was first, and is second" in caught.value.why
    assert not replays_of(tmp_path).state(4).exists()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OBJECTIVE_DATA", "first")
    with pytest.raises(InputError, match="threads differ"):
        evaluated(log, tmp_path, "fingerprinted")
    for factory, curvature, name in (
        ("quartic", Curvature(), "objective"),
        ("fingerprinted", Curvature(hvp=True), "hvp"),
    ):
        with pytest.raises(InputError, match=f"cannot change: {name} was"):
            evaluated(log, tmp_path, factory, curvature)
    assert evaluated(log, tmp_path, "fingerprinted", overwrite=True)["new_evaluations"] == 5


def test_an_objective_that_is_no_function_of_the_state_is_refused(log, tmp_path):
    with pytest.raises(InputError, match="two evaluations at one state differ"):
        evaluated(log, tmp_path, "random")
    assert replays_of(tmp_path).numbers() == (set(), set())


def test_differences_of_rounding_are_recorded_with_a_warning(log, tmp_path, caplog):
    found = evaluated(log, tmp_path, "rounded")
    assert not found["determinism"]["equal_bits"]
    assert 0.5e-7 < found["determinism"]["gradient"] < 2e-7
    assert "is not deterministic" in caplog.text


def test_an_objective_that_fails_keeps_the_other_states(log, tmp_path):
    with pytest.raises(InputError, match="ZeroDivisionError: at this state") as caught:
        evaluated(log, tmp_path, "failing")
    assert "step 1" in caught.value.where
    assert "objective_factories.py" in caught.value.where
    assert replays_of(tmp_path).numbers()[0] == {0}


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("refused", "RuntimeError: there are no data"),
        ("not_a_function", "which is not a function"),
        ("absent", "AttributeError"),
    ],
)
def test_objectives_that_cannot_be_made_are_refused(log, tmp_path, factory, message):
    with pytest.raises(InputError, match=message):
        evaluated(log, tmp_path, factory)


def test_a_log_with_gradients_is_refused(tmp_path):
    write(tmp_path / "log", trained(), **{"gradient/a": np.ones(3), "gradient/b": np.ones(2)})
    with pytest.raises(InputError, match="the log contains gradients"):
        evaluated(tmp_path / "log", tmp_path)


def test_a_log_of_ledgers_is_refused(tmp_path):
    with natgrad.Recorder(tmp_path / "log", mode="ledger") as recorder:
        for step in range(2):
            recorder.record(step, parameter={"a": np.ones(3)}, gradient={"a": np.ones(3)})
    with pytest.raises(InputError, match="inner products of updates, and no states") as refusal:
        evaluated(tmp_path / "log", tmp_path)
    assert "process the log with natgrad process" in refusal.value.remedy


def test_the_hessian_needs_products(log, tmp_path):
    with pytest.raises(InputError, match="has no Hessian-vector product"):
        evaluated(log, tmp_path, "without_hvp", Curvature(eigenvalues=True))


def test_products_points_and_eigenvalues_of_updates_are_exact(log, tmp_path):
    evaluated(log, tmp_path, curvature=Curvature(taylor_point=True, eigenvalues=True))
    from safetensors.numpy import load

    states = trained()
    for one, other in itertools.pairwise(STEPS):
        found = load(replays_of(tmp_path).update(one).get())
        start, end = (np.concatenate([states[step][name] for name in ("a", "b")]) for step in (one, other))
        step, slope = end - start, np.concatenate(list(objective_factories.Quartic()(states[one])[1].values()))
        losses = [objective_factories.Quartic()(states[step])[0] for step in (one, other)]
        product = np.concatenate([found["hvp/a"], found["hvp/b"]])
        # Eq. (11) holds at this point, up to the rounding of losses, of the order of 1e-16.
        assert abs(slope @ step + product @ step / 2 - (losses[1] - losses[0])) < 1e-14
        point = start + float(found["taylor_point"]) * step
        hessian = objective_factories.Quartic.hessian({"a": point[:3], "b": point[3:]})
        np.testing.assert_allclose(product, hessian @ step, rtol=1e-12)
        low, *_, high = np.linalg.eigvalsh(hessian)
        # The tolerance of the iteration, relative to the largest magnitude.
        assert abs(found["hessian_min_eigenvalue"] - low) <= 2.0**-26 * high
        assert abs(found["hessian_max_eigenvalue"] - high) <= 2.0**-26 * high


def test_the_product_is_that_at_the_state_without_a_point(log, tmp_path):
    evaluated(log, tmp_path, curvature=Curvature(hvp=True))
    from safetensors.numpy import load

    states, found = trained(), load(replays_of(tmp_path).update(2).get())
    step = {name: states[4][name] - states[2][name] for name in "ab"}
    for name, product in objective_factories.Quartic().hvp(states[2], step).items():
        np.testing.assert_allclose(found[f"hvp/{name}"], product, rtol=1e-14)
    assert "taylor_point" not in found


# Inner products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "repeated"), [(1, 0), (2, 1), (9, 3)])
def test_reduced_states_are_evaluated_once_except_at_the_edges_of_ranges(log, tmp_path, workers, repeated):
    found = evaluated(log, tmp_path, keep_gradients=False, workers=workers)
    assert (found["evaluations"], found["repeated_evaluations"]) == (5 + repeated, repeated)
    assert found["probe_evaluations"] == 1
    assert replays_of(tmp_path).numbers() == (set(), {0, 1, 2, 4})
    assert evaluated(log, tmp_path, keep_gradients=False)["new_evaluations"] == 0


def test_the_last_state_is_evaluated_again_for_the_next_update(tmp_path):
    write(tmp_path / "log", trained((0, 1, 2)))
    evaluated(tmp_path / "log", tmp_path, keep_gradients=False)
    write(tmp_path / "log", trained((4,)))
    found = evaluated(tmp_path / "log", tmp_path, keep_gradients=False)
    assert (found["new_evaluations"], found["repeated_evaluations"]) == (2, 1)


def test_updates_that_are_complete_are_not_evaluated_again(log, tmp_path):
    evaluated(log, tmp_path, keep_gradients=False)
    replays_of(tmp_path).update(1).delete()
    assert evaluated(log, tmp_path, keep_gradients=False)["new_evaluations"] == 2


def test_states_between_which_no_update_leads_are_not_connected(tmp_path):
    write(tmp_path / "log", trained((0, 1, 4, 5)))
    (tmp_path / "log" / "natgrad.toml").write_text("step_span = 1\n")
    evaluated(tmp_path / "log", tmp_path, keep_gradients=False)
    assert replays_of(tmp_path).numbers() == (set(), {0, 4})


def test_other_gradients_at_a_later_state_are_refused(log, tmp_path):
    with pytest.raises(InputError, match="different gradients than at the state before"):
        evaluated(log, tmp_path, "changing", keep_gradients=False)


def test_progress_counts_updates(log, tmp_path):
    shown = []
    evaluated(log, tmp_path, keep_gradients=False, progress=lambda *numbers: shown.append(numbers))
    assert shown[-1] == (4, 4)


# Commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def working(tmp_path, monkeypatch):
    """Run the command where it finds the factories, with results in a folder."""
    monkeypatch.chdir(FOLDER)
    monkeypatch.setenv("KILLED", str(tmp_path / "killed"))
    (tmp_path / "killed").mkdir()
    return tmp_path


def replay(folder, factory, *more):
    return ("replay", folder / "log", folder / "out", "--objective", f"objective_factories:{factory}", *more)


def test_a_killed_command_loses_the_states_of_its_workers_alone(log, working):
    done = natgrad_process(*replay(working, "killing_the_command", "--workers", 1, "--keep-gradients"))
    assert done.returncode == -9
    kept = {path: path.stat().st_mtime_ns for path in (working / "out" / "replay").glob("step_*")}
    assert len(kept) == 1
    done = command(*replay(working, "killing_the_command", "--workers", 2, "--keep-gradients", "--json"))
    found = json.loads(done.stdout)
    assert (found["new_evaluations"], found["replay"]["evaluations"]) == (4, 6)
    assert found["replay"]["repeated_evaluations"] == 1
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for step, tensors in trained().items():
        stored = gradients_of(Replays(LocalStorage(working / "out" / "replay")), step)
        np.testing.assert_array_equal(stored["gradient/a"], objective_factories.Quartic()(tensors)[1]["a"])


def test_the_task_of_a_worker_that_dies_runs_again(log, working):
    done = command(*replay(working, "killing_workers", "--workers", 2, "--json"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["replay"]
    # Two deaths, and the edge between the ranges of two workers.
    assert found["repeated_evaluations"] >= 3
    assert found["evaluations"] == 5 + found["repeated_evaluations"]
    assert natgrad.open_results(working / "out").attrs["replay"]["evaluations"] == found["evaluations"]
    assert len(list((working / "killed").iterdir())) == 2


def test_results_of_uneven_steps_do_not_need_a_learning_rate(log, working):
    done = command(*replay(working, "quartic", "--workers", 1, "--taylor-point", "--hessian-eigenvalues", "--json"))
    assert done.returncode == 0, done.stderr
    natgrad.replay(
        log,
        working / "kept",
        objective="objective_factories:quartic",
        workers=1,
        keep_gradients=True,
        taylor_point=True,
        hessian_eigenvalues=True,
    )
    results, kept = (natgrad.open_results(working / name) for name in ("out", "kept"))
    for group in ("model", "tensor"):
        xr.testing.assert_identical(*(one[group].to_dataset() for one in (results, kept)))
    assert results.attrs["gradient_source"] == "replayed"
    assert results.attrs["evaluation"] == "fixed"
    model = results["model"].to_dataset().sel(window=1, descent="gradient")
    assert model["step_span"].values.tolist() == [1, 1, 2, 4]
    assert np.isnan(model["learning_rate"]).all()
    states = trained()
    for index, (one, other) in enumerate(itertools.pairwise(STEPS)):
        slope = np.concatenate(list(objective_factories.Quartic()(states[one])[1].values()))
        step = np.concatenate([states[other][name] - states[one][name] for name in "ab"])
        cosine = -slope @ step / np.linalg.norm(slope) / np.linalg.norm(step)
        assert abs(model["angle"].values[index] - np.arccos(min(cosine, 1.0))) < 1e-7
    assert np.isfinite(model["condition_number"]).all()
    assert np.isnan(model["eigenvalue_max"]).all()
    assert open_trajectory(working / "kept" / "trajectory.zarr").in_place
    assert not list((working / "kept" / "trajectory.zarr" / "parameter").glob("c/*"))
    assert not (working / "out" / "trajectory.zarr").exists()
    for name in ("out", "kept"):
        assert command("verify", working / name).returncode == 0


def test_evaluations_of_changed_files_are_not_used(log, working):
    natgrad.replay(log, working / "out", objective="objective_factories:quartic", workers=1)
    write(log, {8: trained((7,))[7]})
    write(log, trained((16,)))
    with pytest.raises(InputError, match="changed after the objective was evaluated"):
        natgrad.replay(log, working / "out", objective="objective_factories:quartic", workers=1)
