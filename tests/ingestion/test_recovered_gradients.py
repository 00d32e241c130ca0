"""Gradients that are recovered from the states of the optimizer, from the log to labelled results."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest

import natgrad
from commands import natgrad as command
from lazy import Lazy
from natgrad.compute.plan import PlanLimits
from natgrad.results import dataset
from natgrad.results.inputs import update_table
from natgrad.results.recovery import GradientCheck
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits
from natgrad.schema.names import OPTIMIZER_STATES, RECOVERY
from natgrad.sources.steps import NotYet
from natgrad.store import open_ledger, open_trajectory
from opened import compute_ledger, ingest, verify_ledger, verify_trajectory
from optimizer_states import train

torch = Lazy("torch")

STATES = 7
RECOVER = {"gradient": "from-optimizer"}


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.fixture(scope="module")
def run():
    """States of a run, and its gradients."""
    return train(adamw, STATES - 1)


def write(folder, trees, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number, tree in enumerate(trees, start=first):
        torch.save(tree, folder / f"step-{number}.pt")
    return folder


def shaped(tree, gradients):
    """Return a state with its gradients."""
    found = {
        name: torch.tensor(values).reshape(tree["model"][name].shape).float() for name, values in gradients.items()
    }
    return tree | {"gradient": found}


@pytest.fixture(scope="module")
def log(run, tmp_path_factory):
    return write(tmp_path_factory.mktemp("run") / "log", run[0])


@pytest.fixture(scope="module")
def logged(run, tmp_path_factory):
    """The same run with logged gradients."""
    trees, gradients = run
    states = [shaped(tree, found) for tree, found in zip(trees, gradients, strict=False)]
    return write(tmp_path_factory.mktemp("run") / "logged", [*states, trees[-1]])


def results(folder, **options):
    compute_ledger(folder / "out", folder / "ledger")
    _, table = update_table(open_trajectory(folder / "out"), open_ledger(folder / "ledger"), **options)
    return dataset.label(table, windows=[2], variables=[])


def test_the_angles_are_those_of_the_logged_gradients(tmp_path, log, logged):
    summary = ingest(log, tmp_path / "recovered" / "out", **RECOVER)
    assert (summary.steps, summary.last_step_lacks) == (STATES, ["gradient"])
    assert any("mini-batch" in text and "clipping" in text for text in summary.warnings)
    assert list(verify_trajectory(tmp_path / "recovered" / "out")) == []
    recovered = results(tmp_path / "recovered")
    ingest(logged, tmp_path / "logged" / "out")
    expected = results(tmp_path / "logged")
    for group in ("model", "tensor"):
        one, other = (tree[group].sel(descent="gradient", window=1) for tree in (recovered, expected))
        np.testing.assert_array_equal(one["status"], other["status"])
        difference = np.abs(one["angle"] - other["angle"])
        assert (difference <= one["angle_uncertainty"] + other["angle_uncertainty"]).all()
        assert (one["gradient_error_bound"] < 1e-5).all()
        assert (one["gradient_check_residual"] < 1e-4).all()
    assert (recovered["tensor"]["gradient_check"] == GradientCheck.VERIFIED).all()
    qualified = {name: value for name, value in recovered.attrs.items() if name.startswith("gradient")}
    largest = float(recovered["tensor"]["gradient_error_bound"].max())
    residual = float(recovered["tensor"]["gradient_check_residual"].max())
    assert qualified == {
        "gradient_source": "recovered",
        "gradient_batch": "mini-batch",
        "gradient_clipped": "unknown",
        "gradient_rule": "AdamW",
        "gradient_check": "verified",
        "gradient_error_bound": largest,
        "gradient_check_residual": residual,
        "gradient_updates": 1.0,
    }
    assert recovered.attrs["evaluation"] == "batch"
    assert not any(name.startswith("gradient_check") for name in expected["tensor"].data_vars)


def test_the_error_of_the_gradient_is_part_of_the_uncertainty_of_the_angle(tmp_path, log):
    ingest(log, tmp_path / "out", **RECOVER)
    compute_ledger(tmp_path / "out", tmp_path / "ledger")
    _, table = update_table(open_trajectory(tmp_path / "out"), open_ledger(tmp_path / "ledger"))
    bounds = np.full_like(table.recovery.error_bound, 0.25)
    tree = dataset.label(replace(table, recovery=replace(table.recovery, error_bound=bounds)), variables=[])
    for group in ("model", "tensor"):
        found = tree[group]["angle_uncertainty"].sel(descent="gradient", window=1)
        assert (found >= np.arcsin(0.25)).all()
        assert (found < 0.26).all()
        np.testing.assert_allclose(tree[group]["gradient_error_bound"], 0.25, rtol=1e-14)


def test_full_batches_can_be_declared(tmp_path, log):
    ingest(log, tmp_path / "out", **RECOVER)
    assert results(tmp_path, evaluation="fixed").attrs["evaluation"] == "fixed"


@pytest.mark.parametrize("in_place", [False, True])
def test_a_grown_log_gives_what_one_ingest_gives(tmp_path, run, log, in_place):
    trees, _ = run
    for stop in (1, 3, 3, STATES):
        growing = write(tmp_path / "log", trees[:stop])
        if stop == 1:
            with pytest.raises(NotYet, match="only one state"):
                ingest(growing, tmp_path / "out", in_place=in_place, **RECOVER)
            continue
        summary = ingest(growing, tmp_path / "out", in_place=in_place, **({} if stop == STATES else RECOVER))
        compute_ledger(tmp_path / "out", tmp_path / "ledger")
    assert (summary.new_steps, summary.completed_steps, summary.last_step_lacks) == (STATES - 3, 1, ["gradient"])
    ingest(log, tmp_path / "once" / "out", **RECOVER)
    compute_ledger(tmp_path / "once" / "out", tmp_path / "once" / "ledger")
    for one, other in zip(
        open_ledger(tmp_path / "ledger").read(), open_ledger(tmp_path / "once" / "ledger").read(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    states, expected = open_trajectory(tmp_path / "out"), open_trajectory(tmp_path / "once" / "out")
    for name in RECOVERY:
        np.testing.assert_array_equal(states.scalar(name), expected.scalar(name))
    assert np.isnan(states.scalar(RECOVERY[0])[-1]).all()
    assert list(verify_ledger(tmp_path / "ledger", open_trajectory(tmp_path / "out"))) == []


def test_a_step_that_is_still_being_written_is_left_for_the_next_ingest(tmp_path, run):
    trees, _ = run
    growing = write(tmp_path / "log", trees[:4])
    path = growing / "step-3.pt"
    complete = path.read_bytes()
    path.write_bytes(complete[: len(complete) // 2])
    summary = ingest(growing, tmp_path / "out", **RECOVER)
    assert (summary.steps, summary.last_step_lacks) == (3, ["gradient"])
    path.write_bytes(complete)
    summary = ingest(growing, tmp_path / "out")
    assert (summary.new_steps, summary.completed_steps, summary.last_step_lacks) == (1, 1, ["gradient"])


def test_small_chunks_and_the_state_of_the_optimizer_change_nothing(tmp_path, log):
    ingest(log, tmp_path / "one" / "out", **RECOVER)
    limits = IngestLimits(chunk=(2, 50))
    ingest(log, tmp_path / "other" / "out", include=["optimizer"], limits=limits, **RECOVER)
    grams = []
    for name in ("one", "other"):
        compute_ledger(tmp_path / name / "out", tmp_path / name / "ledger", limits=PlanLimits())
        grams.append(open_ledger(tmp_path / name / "ledger").read()[0])
    # Products of n elements in another order differ by 4 sqrt(n) u of the norms.
    norms = np.sqrt(np.einsum("...ii->...i", grams[0]))
    bound = 4 * np.sqrt(100) * 2.0**-53 * norms[..., :, None] * norms[..., None, :]
    known = ~np.isnan(grams[0])
    assert (np.abs(grams[0] - grams[1])[known] <= bound[known]).all()
    assert {*OPTIMIZER_STATES[:2]} < {*open_trajectory(tmp_path / "other" / "out").dtypes}
    assert not {*OPTIMIZER_STATES} & {*open_trajectory(tmp_path / "one" / "out").dtypes}


def test_a_restarted_run_becomes_a_new_attempt(tmp_path, run):
    def schedule(optimizer, step):
        optimizer.param_groups[0]["lr"] = 1e-2 if step < 2 else 1e-3

    trees, _ = run
    growing = write(tmp_path / "log", trees)
    ingest(growing, tmp_path / "out", **RECOVER)
    again, _ = train(adamw, STATES - 1, schedule=schedule)
    torch.testing.assert_close(again[3]["model"], trees[3]["model"], rtol=0, atol=0)
    write(growing, again[4:], 4)
    summary = ingest(growing, tmp_path / "out")
    assert summary.attempts == 2
    tree = results(tmp_path)
    assert tree["model"]["step"].values.tolist() == [0, 1, 2, 4, 5]
    assert np.isfinite(tree["model"]["gradient_error_bound"]).all()


def test_a_skipped_update_is_stated_and_has_no_angle(tmp_path, run):
    trees, _ = run
    write(tmp_path / "log", [*trees[:3], *trees[2:]])
    summary = ingest(tmp_path / "log", tmp_path / "out", **RECOVER)
    assert any("skipped" in text for text in summary.warnings)
    tree = results(tmp_path)
    angle = tree["model"]["angle"].sel(descent="gradient", window=1)
    assert np.isnan(angle.values).tolist() == [False, False, True, False, False, False, False]
    assert np.isnan(tree["model"]["gradient_error_bound"][2])


def test_pairs_of_states_are_not_connected_to_the_next_pair(tmp_path):
    # The distance between the pairs is larger than that of states from which a gradient is recovered.
    trees, _ = train(adamw, 31)
    folder = tmp_path / "log"
    for first in (0, 30):
        write(folder, trees[first : first + 2], first)
    (folder / "natgrad.toml").write_text("step_span = 1\n")
    ingest(folder, tmp_path / "out", allow_gaps=True, **RECOVER)
    tree = results(tmp_path)
    assert tree["model"]["step"].values.tolist() == [0, 30]
    assert (tree["model"]["status"].sel(descent="gradient", window=1) == 0).all()


def test_means_over_several_updates_are_stated(tmp_path):
    trees, _ = train(adamw, 30)
    for number in (0, 10, 20, 30):
        write(tmp_path / "log", [trees[number]], number)
    summary = ingest(tmp_path / "log", tmp_path / "out", **RECOVER)
    assert any("each gradient is a mean" in text for text in summary.warnings)
    tree = results(tmp_path)
    assert tree.attrs["gradient_updates"] == 10
    assert tree.attrs["gradient_check"] == "none"
    assert (tree["tensor"]["gradient_check"] == GradientCheck.NONE).all()
    assert np.isfinite(tree["model"]["angle"].sel(descent="gradient", window=1)).all()


def test_decay_that_the_user_declares_is_that_of_the_optimizer(tmp_path, run):
    trees, _ = run
    old = [tree | {"optimizer": deepcopy(tree["optimizer"])} for tree in trees]
    for tree in old:
        for group in tree["optimizer"]["param_groups"]:
            del group["decoupled_weight_decay"]
    log = write(tmp_path / "log", old)
    (log / "natgrad.toml").write_text("[optimizer]\ndecoupled_weight_decay = true\n")
    summary = ingest(log, tmp_path / "out", **RECOVER)
    assert not any("does not state whether it is decoupled" in text for text in summary.warnings)
    tree = results(tmp_path)
    assert tree.attrs["gradient_rule"] == "AdamW"
    assert (tree["tensor"]["weight_decay"] == 0.1).all()
    (log / "natgrad.toml").write_text("[optimizer]\ndecoupled_weight_decay = 1\n")
    with pytest.raises(InputError, match="decoupled_weight_decay = true or false"):
        ingest(log, tmp_path / "other", **RECOVER)


def test_runs_of_a_sweep_are_recovered_one_by_one(tmp_path, run):
    trees, _ = run
    write(tmp_path / "runs" / "a", trees[:4])
    write(tmp_path / "runs" / "b", trees[2:5])
    ingest(tmp_path / "runs", tmp_path / "out", sweep=True, **RECOVER)
    tree = results(tmp_path)
    assert tree["model"]["angle"].sel(descent="gradient", window=1).notnull().sum("step").values.tolist() == [3, 2]


def test_losses_may_come_from_another_source(tmp_path, log):
    losses = [json.dumps({"step": step, "loss": 2.0 - step / 10}) for step in range(STATES)]
    (tmp_path / "train.jsonl").write_text("\n".join(losses) + "\n")
    ingest([log, tmp_path / "train.jsonl"], tmp_path / "out", **RECOVER)
    tree = results(tmp_path)
    np.testing.assert_array_equal(tree["model"]["loss"], [2.0 - step / 10 for step in range(STATES - 1)])
    assert (tree["tensor"]["gradient_check"] == GradientCheck.VERIFIED).all()
    assert tree.attrs["evaluation"] == "batch"


def test_a_scan_recovers_the_gradients_of_all_runs(tmp_path, run):
    trees, _ = run
    for name in ("a", "b"):
        write(tmp_path / "runs" / name, trees[:4])
    assert natgrad.scan(tmp_path / "runs", tmp_path / "outs", workers=1, **RECOVER).processed == 2
    for name in ("a", "b"):
        assert natgrad.open_results(tmp_path / "outs" / name).attrs["gradient_source"] == "recovered"


def test_a_log_with_gradients_is_refused(tmp_path, logged):
    with pytest.raises(InputError, match="the log already contains gradients") as error:
        ingest(logged, tmp_path / "out", **RECOVER)
    assert "omit --gradient" in error.value.remedy
    assert not (tmp_path / "out").exists()


def test_a_check_that_fails_later_leaves_the_commits_before_it(tmp_path, run):
    trees, _ = run
    write(tmp_path / "log", trees[:3])
    ingest(tmp_path / "log", tmp_path / "out", **RECOVER)
    wrong = dict(trees[4], model={name: 1.5 * values for name, values in trees[4]["model"].items()})
    write(tmp_path / "log", [trees[3], wrong], 3)
    with pytest.raises(InputError, match="does not explain the update") as error:
        ingest(tmp_path / "log", tmp_path / "out")
    assert "step 3" in error.value.where
    assert open_trajectory(tmp_path / "out").n_states == 3


def test_the_origin_of_gradients_is_fixed_when_the_trajectory_is_created(tmp_path, log):
    ingest(log, tmp_path / "none")
    with pytest.raises(InputError, match="created with --gradient logged"):
        ingest(log, tmp_path / "none", **RECOVER)
    ingest(log, tmp_path / "out", largest_span=30, **RECOVER)
    with pytest.raises(InputError, match="with --gradient from-optimizer --largest-span 30"):
        ingest(log, tmp_path / "out", **RECOVER)
    with pytest.raises(InputError, match="but --gradient logged is passed now"):
        ingest(log, tmp_path / "out", gradient="logged")
    assert ingest(log, tmp_path / "out").new_steps == 0
    with pytest.raises(InputError, match="--largest-span applies only"):
        ingest(log, tmp_path / "other", largest_span=30)


def test_the_commands_state_the_origin(tmp_path, log):
    done = command("process", log, tmp_path / "out", "--gradient", "from-optimizer", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["gradient_source"] == "recovered"
    assert found["gradient_recovery"]["check"] == "verified"
    assert "recovered" in command("info", tmp_path / "out").stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "recovered from the states of the optimizer" in page
    assert "AdamW" in page
    assert "verified" in page
