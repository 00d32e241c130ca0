"""Logs are found in folders by their content; folders of steps and loggers are not searched twice."""

import numpy as np

from logs import random_walk, write_log
from natgrad.sources.search import FoundLog, logs_below, nearest_format

STATES = random_walk(3)


def test_each_log_is_found_once(tmp_path):
    write_log(tmp_path / "a" / "ckpt", STATES)
    np.savez(tmp_path / "a" / "all.npz", **{key: np.stack([s[key] for s in STATES]) for key in STATES[0]})
    (tmp_path / "a" / "log.csv").write_text("step,loss\n0,1\n")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.toml").write_text('[[source]]\npath = "x"\n')
    found = list(logs_below(tmp_path))
    assert set(found) == {
        FoundLog(tmp_path / "a", ""),  # all.npz may be a step
        FoundLog(tmp_path / "a" / "all.npz", "npz"),
        FoundLog(tmp_path / "a" / "log.csv", "csv", scalars=True),
        FoundLog(tmp_path / "a" / "ckpt", "steps"),
        FoundLog(tmp_path / "c", "run file"),
    }
    assert len(found) == len(set(found))


def test_the_search_stops_when_requested(tmp_path):
    write_log(tmp_path / "a", STATES)
    assert list(logs_below(tmp_path, lambda: True)) == []


def test_few_of_many_similar_folders_are_searched(tmp_path):
    for run in range(30):
        write_log(tmp_path / f"run-{run}", STATES[:1])
    assert 2 <= len([found for found in logs_below(tmp_path) if found.format == "steps"]) < 30


def test_the_folder_of_a_logger_is_one_log(tmp_path):
    metrics = tmp_path / "mlruns" / "0" / "abc" / "metrics"
    metrics.mkdir(parents=True)
    (metrics.parent / "meta.yaml").write_text("run_id: abc\n")
    (metrics / "loss").write_text("1 0.5 0\n")
    assert list(logs_below(tmp_path)) == [FoundLog(tmp_path / "mlruns", "mlflow", scalars=True)]


def test_the_nearest_format_has_the_form_of_the_names(tmp_path):
    for step in (10, 20):
        (tmp_path / f"global_step{step}").mkdir()
    name, why = nearest_format(tmp_path)
    assert name == "deepspeed"
    assert "'global_step10' has a step number, but not the content" in why
    (tmp_path / "empty").mkdir()
    assert nearest_format(tmp_path / "empty") is None
