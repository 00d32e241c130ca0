"""Test that the configuration of a run is found where training programs store it, and that nothing is executed."""

import argparse
import contextlib
import json
import os
import sqlite3

import pytest

import natgrad
from lazy import Lazy
from logs import random_walk, write_log
from natgrad.recording import Recorder
from natgrad.sources.configured import configuration_of
from natgrad.sources.opening import open_log, open_sources
from natgrad.storage import LocalStorage
from opened import ingest

torch = Lazy("torch")


def configuration(*logs, sweep=False):
    """Return the configuration of the last step of a log, and the notes."""
    source = open_sources([LocalStorage(log) for log in logs], sweep=sweep)
    notes = []
    return configuration_of(source, source.steps()[-1], notes), notes


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("config.json", '{"lr": 0.1, "model": {"depth": 2}}', {"lr": 0.1, "model.depth": 2}),
        ("args.json", '{"lr": 0.1}', {"lr": 0.1}),
        ("config.toml", "[optimizer]\nlr = 0.1", {"optimizer.lr": 0.1}),
        ("config.yaml", "wandb_version: 1\nlr:\n  desc: null\n  value: 1e-3\n", {"wandb_version": 1, "lr": 1e-3}),
        (
            ".hydra/config.yaml",
            "optimizer:\n  lr: 1e-3\n  name: sgd\n",
            {"optimizer.lr": 1e-3, "optimizer.name": "sgd"},
        ),
        (
            "hparams.yaml",
            "net: !!python/object/apply:os.system [a]\nlr: 0.1\n",
            {"net.0": "a", "lr": 0.1},
        ),
        ("trainer_state.json", '{"max_steps": 9, "global_step": 3, "log_history": []}', {"max_steps": 9}),
    ],
)
def test_files_of_the_run_are_read_beside_the_log_and_above_its_checkpoints(tmp_path, name, text, expected):
    for run, steps in (("beside", "."), ("above", "checkpoints")):
        log = write_log(tmp_path / run / steps, random_walk(2))
        file = tmp_path / run / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        assert configuration(log) == (expected, [])


def test_the_nearest_file_decides(tmp_path):
    log = write_log(tmp_path / "checkpoints", random_walk(2))
    (tmp_path / "config.json").write_text('{"lr": 1, "seed": 5}')
    (log / "config.json").write_text('{"lr": 2}')
    assert configuration(log)[0] == {"lr": 2, "seed": 5}
    # A folder of another name may belong to several runs.
    other = write_log(tmp_path / "run", random_walk(2))
    assert configuration(other)[0] == {}


def malicious(folder, kind):
    file = folder / ("config.json" if kind in ("pipe", "deep") else "config.yaml")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "deep":
        file.write_text("[" * 100_000)
    elif kind == "long":
        file.write_text("a: 1\n" * 10**6)
    elif kind == "unclosed":
        file.write_text("a: [1, {")
    elif kind == "nested":
        file.write_text("[" * 100_000)
    else:
        file.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("kind", ["pipe", "deep", "long", "unclosed", "nested", "binary"])
def test_a_file_that_cannot_be_read_costs_only_its_values(tmp_path, kind):
    log = write_log(tmp_path / "log", random_walk(2))
    (log / "args.json").write_text('{"lr": 0.1}')
    malicious(log, kind)
    found, (note,) = configuration(log)
    assert found == {"lr": 0.1}
    assert note.startswith(f"the configuration in {log / 'config'}")
    assert note in ingest([log], tmp_path / "trajectory.zarr").warnings


@pytest.mark.parametrize("merge", ["&a{k}: &a{k} [*a{p},*a{p}]", "&a{k}: &a{k}\n  <<: [*a{p},*a{p}]"])
def test_aliases_and_merge_keys_do_not_grow(tmp_path, merge):
    log = write_log(tmp_path / "log", random_walk(2))
    lines = ["lr: 0.1", "a0: &a0 {x: 1}", *(merge.format(k=k, p=k - 1) for k in range(1, 40))]
    (log / "config.yaml").write_text("\n".join(line.removeprefix("&") for line in lines))
    found, notes = configuration(log)
    assert (found["lr"], notes) == (0.1, [])
    assert len(found) <= 1000


def test_checkpoints_of_torch_contain_the_arguments_of_the_run(tmp_path):
    (state,) = random_walk(1)
    tensors = {
        array: {
            name.partition("/")[2]: torch.tensor(value) for name, value in state.items() if name.startswith(array)
        }
        for array in ("parameter", "gradient")
    }
    arguments = argparse.Namespace(lr=0.1, betas=(0.9, 0.95), out=None, name="a")
    for step in (1, 2):
        saved = {**tensors, "args": arguments, "hyper_parameters": {"width": 64}, "loss": 1.0}
        torch.save(saved, tmp_path / f"step_{step}.pt")
    expected = {"lr": 0.1, "betas.0": 0.9, "betas.1": 0.95, "name": "a", "width": 64}
    assert configuration(tmp_path) == (expected, [])


def test_parameters_of_mlflow_belong_to_the_selected_run(tmp_path):
    values = {"first": "0.1", "second": "1e-3"}
    for run, rate in values.items():
        for kind, name, text in (("metrics", "loss", "17 1.0 0\n17 0.5 1\n"), ("params", "optimizer/lr", rate)):
            file = tmp_path / "mlruns" / "0" / run / kind / name
            file.parent.mkdir(parents=True)
            file.write_text(text)
        (tmp_path / "mlruns" / "0" / run / "meta.yaml").write_text(f"run_id: {run}\n")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("CREATE TABLE metrics (key, value, timestamp, run_uuid, step, is_nan)")
        database.execute("CREATE TABLE params (key, value, run_uuid)")
        for run, rate in values.items():
            database.execute("INSERT INTO metrics VALUES ('loss', 1.0, 0, ?, 0, 0)", [run])
            database.execute("INSERT INTO params VALUES ('optimizer/lr', ?, ?)", [rate, run])
    for log in ("mlruns", "mlflow.db"):
        source = open_log(LocalStorage(tmp_path / log), mapping={"run": "second"})
        assert configuration_of(source, source.steps()[-1], []) == {"optimizer/lr": 1e-3}


def test_joined_logs_share_a_configuration_and_runs_of_a_sweep_do_not(tmp_path):
    scalars = tmp_path / "scalars" / "metrics.csv"
    scalars.parent.mkdir()
    scalars.write_text("step,loss\n0,1\n1,0.5\n")
    (scalars.parent / "config.json").write_text('{"lr": 0.1}')
    for run, depth in (("a", 1), ("b", 2)):
        log = write_log(tmp_path / "sweep" / run, random_walk(2))
        (log / "config.json").write_text(json.dumps({"depth": depth}))
    assert configuration(tmp_path / "sweep" / "a", scalars) == ({"depth": 1, "lr": 0.1}, [])
    assert configuration(tmp_path / "sweep", sweep=True)[0] == {"depth": 2}


def test_the_configuration_of_a_recorder_reaches_results_and_comparisons(tmp_path):
    for run, rate in (("a", 0.1), ("b", 0.2)):
        options = {"optimizer": {"lr": rate}, "seed": 1}
        recorder = Recorder(tmp_path / "sweep" / run, configuration=options)
        for step in range(3):
            weights = {"w": [1.0 - rate * step, 2.0]}
            recorder.record(step, parameter=weights, gradient={"w": [1.0, 0.5]}, loss=1.0, learning_rate=rate)
    natgrad.process(tmp_path / "sweep", tmp_path / "all", sweep=True)
    attributes = natgrad.open_results(tmp_path / "all").attrs["configuration"]
    assert attributes == {run: {"optimizer.lr": rate, "seed": 1} for run, rate in (("a", 0.1), ("b", 0.2))}
    expected = {"optimizer.lr": {"all/a": 0.1, "all/b": 0.2}}
    assert natgrad.compare({"all": tmp_path / "all"}).comparison.configuration == expected
    natgrad.process(tmp_path / "sweep" / "b", tmp_path / "b")
    assert natgrad.open_results(tmp_path / "b").attrs["configuration"] == {"optimizer.lr": 0.2, "seed": 1}


def test_a_restart_replaces_the_configuration_and_its_absence_does_not(tmp_path):
    states = random_walk(6)
    for count, text in ((2, '{"lr": 1}'), (4, '{"lr": 2}'), (6, None)):
        log = write_log(tmp_path / "log", states[:count])
        (log / "config.json").unlink(missing_ok=True)
        if text is not None:
            (log / "config.json").write_text(text)
        natgrad.process(log, tmp_path / "out")
        expected = {"lr": 1 if count == 2 else 2}
        assert natgrad.open_results(tmp_path / "out").attrs["configuration"] == expected
