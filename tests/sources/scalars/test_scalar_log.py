"""Logs of scalars in addition to those of tensors, written by common loggers."""

import contextlib
import csv
import gzip
import json
import os
import shutil
import sqlite3
import struct
from dataclasses import replace
from functools import partial

import numpy as np
import pandas
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import changes, damage, reads_only
from lazy import Lazy
from logs import random_walk, write_log, write_step
from natgrad.schema.errors import InputError
from natgrad.sources.formats import FORMATS
from natgrad.sources.names import parse_map
from natgrad.sources.opening import format_of
from natgrad.sources.scalars import event_file
from natgrad.sources.scalars.columns import LINE_KEY, each_record
from natgrad.sources.scalars.event_file import read_events
from natgrad.sources.scalars.record_files import open_text, read_csv, read_json_lines, read_parquet
from natgrad.sources.scalars.scalar_log import ScalarLog
from natgrad.sources.steps import NotYet
from natgrad.storage import open_storage
from natgrad.store import open_trajectory
from opened import ingest, open_source, open_sources

lightning_loggers = Lazy("lightning.pytorch.loggers")
tensorboard = Lazy("torch.utils.tensorboard")

STEPS = 6
SCALARS = ("loss", "learning_rate")
LONG_AGO = 10**18


def settled(path):
    """Return a log that has not been modified for a long time."""
    for file in [path, *path.rglob("*")]:
        os.utime(file, ns=(LONG_AGO, LONG_AGO))
    return path


def run_without_scalars(folder, steps=STEPS):
    states = random_walk(steps)
    return write_log(folder, [{k: v for k, v in state.items() if k not in SCALARS} for state in states])


def values_of(steps=STEPS):
    """Return losses and rates that only float64 represents, with one missing rate: loggers have sparse rows."""
    return [(step, np.pi / (step + 1), None if step == 3 else 0.1 * 0.9**step) for step in range(steps)]


def stored(path):
    states = open_trajectory(path)
    return [
        (int(step), *(None if np.isnan(value) else float(value) for value in values))
        for step, *values in zip(*(states.scalar(name) for name in ("step", *SCALARS)), strict=True)
    ]


# Writers: folder and (step, loss, rate) to SOURCE --------------------------------------------------------------


def write_lightning_csv(folder, values):
    logger = lightning_loggers.CSVLogger(folder, name="run", flush_logs_every_n_steps=2)
    for step, loss, rate in values:
        logger.log_metrics({"train_loss": loss}, step)
        logger.log_metrics({"val_loss": 7.0}, step)
        # A new key makes the logger write the file again, with another header.
        if rate is not None:
            logger.log_metrics({"lr-SGD": rate, "lr-SGD-momentum": 0.9}, step)
    logger.save()
    return folder / "run" / "version_0"


def frame_of(values, **names):
    table = pandas.DataFrame(values, columns=["step", *SCALARS])
    return table.rename(columns=names).assign(accuracy=0.5, note="text")


def write_pandas_csv(folder, values):
    frame_of(values, loss="Train Loss", learning_rate="lr").to_csv(folder / "scalars.csv", sep=";", index=False)
    return folder / "scalars.csv"


def write_json_lines(folder, values):
    rows = [{"iteration": s, "loss": a, "lr": b, "note": "text"} for s, a, b in values]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "log.jsonl"


def write_nested_json_lines(folder, values):
    rows = [{"global_step": s, "train": {"loss": a, "lr": b}, "val": {"loss": [1, 2]}} for s, a, b in values]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "log.jsonl"


def write_parquet(folder, values):
    """Write two files like a history exported by W&B."""
    table = frame_of(values, step="_step", loss="train/loss", learning_rate="train/learning_rate")
    for number, part in enumerate((table[:4], table[4:])):
        part.to_parquet(folder / f"{number:04}.parquet")
    return folder


def write_trackio(folder, values):
    """Write the schema and the bytes of trackio 0.43, whose package includes a web server."""
    with contextlib.closing(sqlite3.connect(folder / "project.db")) as database, database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(
            "CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT, timestamp TEXT NOT NULL, "
            "run_name TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL, log_id TEXT, "
            "space_id TEXT)"
        )
        database.executemany(
            "INSERT INTO metrics (timestamp, run_name, step, metrics) VALUES ('', 'first', ?, ?)",
            [(s, json.dumps({"loss": a} | ({} if b is None else {"lr": b})).encode()) for s, a, b in values],
        )
    return folder / "project.db"


def write_mlflow(folder, values):
    """Write the files of MLflow (``FileStore._log_run_metric``): a file per metric, with a time, value and step."""
    metrics = folder / "mlruns" / "0" / "first" / "metrics"
    (metrics / "train").mkdir(parents=True)
    (metrics.parent / "meta.yaml").write_text("run_id: first\n")
    for name, column in (("train/loss", 1), ("lr", 2)):
        rows = [f"1700000000000 {row[column]!r} {row[0]}\n" for row in values if row[column] is not None]
        (metrics / name).write_text("".join(rows))
    return folder / "mlruns"


def write_mlflow_database(folder, values):
    """Write the table ``metrics`` of MLflow's SQLAlchemy store (``SqlMetric``)."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        database.execute(
            "CREATE TABLE metrics (key VARCHAR(250) NOT NULL, value FLOAT NOT NULL, timestamp BIGINT NOT NULL, "
            "run_uuid VARCHAR(32) NOT NULL, step BIGINT DEFAULT '0' NOT NULL, is_nan BOOLEAN DEFAULT '0' NOT NULL, "
            "CONSTRAINT metric_pk PRIMARY KEY (key, timestamp, step, run_uuid, value, is_nan))"
        )
        rows = [(name, row[column], row[0]) for row in values for name, column in (("train/loss", 1), ("lr", 2))]
        database.executemany(
            "INSERT INTO metrics VALUES (?, ?, 0, 'first', ?, 0)", [row for row in rows if row[1] is not None]
        )
    return folder / "mlflow.db"


def write_long_csv(folder, values):
    rows = [(row[0], name, row[column]) for row in values for name, column in (("loss", 1), ("lr", 2))]
    table = pandas.DataFrame([row for row in rows if row[2] is not None], columns=["step", "metric", "value"])
    table.to_csv(folder / "long.csv", index=False)
    return folder / "long.csv"


WRITERS = {
    "lightning": (write_lightning_csv, "csv"),
    "pandas, csv": (write_pandas_csv, "csv"),
    "lines of json": (write_json_lines, "jsonl"),
    "nested lines of json": (write_nested_json_lines, "jsonl"),
    "parquet": (write_parquet, "parquet"),
    "trackio": (write_trackio, "trackio"),
    "mlflow": (write_mlflow, "mlflow"),
    "mlflow database": (write_mlflow_database, "mlflow-sqlite"),
    "long csv": (write_long_csv, "csv"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_logger_preserves_the_logged_numbers(tmp_path, writer):
    write, name = WRITERS[writer]
    (tmp_path / "scalars").mkdir()
    source = write(tmp_path / "scalars", values_of())
    settled(tmp_path / "scalars")
    assert format_of(open_storage(source)) == name
    assert FORMATS[name].scalars
    log = run_without_scalars(tmp_path / "log")
    summary = ingest([log, source], tmp_path / "trajectory.zarr")
    assert summary.steps == STEPS
    assert stored(tmp_path / "trajectory.zarr") == values_of()
    (message,) = [warning for warning in summary.warnings if "missing" in warning]
    assert message.startswith("learning_rate is missing or NaN in 1 of 6 steps")


@pytest.mark.parametrize("new_style", [False, True])
def test_tensorboard_gives_every_point_in_single_precision(tmp_path, new_style):
    values = [(step, float(np.float32(a)), float(np.float32(0.1))) for step, a, _ in values_of()]
    with tensorboard.SummaryWriter(tmp_path / "events") as writer:
        for step, loss, rate in values:
            writer.add_scalar("Loss/train", loss, step, new_style=new_style)
            writer.add_scalar("lr-SGD", rate, step, new_style=new_style)
            writer.add_histogram("weights", np.arange(9.0), step)
    settled(tmp_path / "events")
    assert format_of(open_storage(tmp_path / "events")) == "tensorboard"
    summary = ingest([run_without_scalars(tmp_path / "log"), tmp_path / "events"], tmp_path / "trajectory.zarr")
    assert stored(tmp_path / "trajectory.zarr") == values
    assert any("single precision" in warning for warning in summary.warnings)
    assert any("loss is read from Loss/train" in warning for warning in summary.warnings)


# Restarts --------------------------------------------------------------------------------------------------


def scalars_of(source, **options):
    log = open_sources([run_without_scalars(source.parent / "tensors"), source], **options)
    found, notes = {}, {}
    for step in log.steps():
        with log.open(step) as reader:
            content = reader.content()
            found[step.number] = dict(content.scalars)
            notes |= dict.fromkeys(content.notes)
    return found, list(notes)


def test_the_later_record_of_a_repeated_step_is_used(tmp_path):
    rows = [(0, 5.0), (1, 4.0), (2, 3.0), (3, 2.0), (1, 40.0), (2, 30.0)]
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "loss"))
        writer.writerows(rows[:4])
        writer.writerow(("step", "loss"))  # by the restarted process
        writer.writerows(rows[4:])
    settled(tmp_path / "metrics.csv")
    found, notes = scalars_of(tmp_path / "metrics.csv")
    assert {step: scalars.get("loss") for step, scalars in found.items()} == {
        0: 5.0, 1: 40.0, 2: 30.0, 3: None, 4: None, 5: None
    }  # fmt: skip
    (note,) = notes
    assert "decreases once, first from 3 to 1" in note
    assert "3 values that were logged before" in note


def test_event_files_of_a_restarted_run_are_read_in_start_order(tmp_path):
    # Sorting by name would put the second file first.
    for suffix, steps, loss in ((".second", range(5), 1.0), (".first", range(2, 4), 2.0)):
        with tensorboard.SummaryWriter(tmp_path / "events", filename_suffix=suffix) as writer:
            for step in steps:
                writer.add_scalar("loss", loss, step)
    for path in (tmp_path / "events").iterdir():
        path.rename(path.with_name("tfevents" + path.suffix))
    settled(tmp_path / "events")
    found, notes = scalars_of(tmp_path / "events")
    assert [found[step].get("loss") for step in range(STEPS)] == [1.0, 1.0, 2.0, 2.0, None, None]
    assert any("decreases once, first from 4 to 2" in note for note in notes)


# Meaning of keys -----------------------------------------------------------------------------------------------


def lines(tmp_path, *rows):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return settled(path)


def test_equal_rates_of_groups_are_used(tmp_path):
    path = lines(
        tmp_path,
        {"step": 0, "lr-Adam/pg1": 0.1, "lr-Adam/pg2": 0.1},
        {"step": 1, "lr-Adam/pg1": 0.1, "lr-Adam/pg2": 0.2},
    )
    found, notes = scalars_of(path)
    assert found[0] == {"learning_rate": 0.1}
    assert found[1] == {}
    assert any("at 1 steps: no value is used there" in note for note in notes)


def test_the_trainer_step_takes_precedence_over_that_of_the_log(tmp_path):
    path = lines(tmp_path, {"_step": 7, "trainer/global_step": 2, "loss": 1.5}, {"_step": 8, "loss": 9.0})
    found, notes = scalars_of(path)
    assert {step: scalars for step, scalars in found.items() if scalars} == {2: {"loss": 1.5}}
    assert any("1 records of loss have no step" in note for note in notes)


def test_a_run_file_maps_the_keys_of_a_log(tmp_path):
    run_without_scalars(tmp_path / "log")
    lines(tmp_path, {"n": 0, "a": {"x": 1.0}, "b": {"x": 1.0}, "loss": 3.0}).rename(tmp_path / "scalars.txt")
    (tmp_path / "run.toml").write_text(
        '[[source]]\npath = "log"\n[[source]]\npath = "scalars.txt"\nformat = "jsonl"\n'
        'map = { loss = "*/x", step = "n", hessian_min_eigenvalue = "loss" }\n'
    )
    log = open_source(tmp_path / "run.toml")
    with log.open(log.steps()[0]) as reader:
        assert reader.content().scalars == {"loss": 1.0, "hessian_min_eigenvalue": 3.0}


def test_an_error_in_a_row_does_not_keep_the_database_open(tmp_path):
    # SQLite shares its memory map of a database within a process, which ends if the file is truncated meanwhile.
    path = write_trackio(tmp_path, [(0, 1.0, 0.1), (1, 0.5, 0.1)])
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE metrics SET metrics = '{' WHERE step = 0")
    settled(tmp_path)
    with pytest.raises(InputError, match="row 1") as refusal:
        scalars_of(path)
    assert refusal.value.__traceback__ is not None
    assert not [file.path for file in psutil.Process().open_files() if str(tmp_path) in file.path]


def test_one_of_several_runs_in_a_log_must_be_selected(tmp_path):
    path = write_trackio(tmp_path, [(0, 1.0, 0.1)])
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "INSERT INTO metrics (timestamp, run_name, step, metrics) VALUES ('', 'b', 0, '{\"loss\": 2}')"
        )
    settled(tmp_path)
    with pytest.raises(InputError, match="contains the runs first, b"):
        scalars_of(path)
    (tmp_path / "run.toml").write_text(
        f'[[source]]\npath = "tensors"\n[[source]]\npath = "{path.name}"\nmap = {{ run = "b" }}\n'
    )
    log = open_source(tmp_path / "run.toml")
    with log.open(log.steps()[0]) as reader:
        assert reader.content().scalars == {"loss": 2.0}


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"step": 0, "accuracy": 1.0}], "no known scalar in this log"),
        ([{"loss": 1.0}], "this log has no step numbers"),
        ([{"step": 0.5, "loss": 1.0}], "contains 0.5, which is not a step number"),
        ([{"step": -1, "loss": 1.0}], "contains -1, which is not a step number"),
        ([{"step": 0, "loss": "low"}], "'low' is not a number"),
        ([{"step": 0, "loss": True}], "'True' is not a number"),
        ([{"step": 0, "loss": "1_0"}], "'1_0' is not a number"),
        ([{"step": 0, "loss": 10**400}], "is not a number"),
        ([{"step": "train", "loss": 1.0}], "'train' is not a number"),
    ],
)
def test_invalid_scalars_are_refused(tmp_path, rows, what):
    with pytest.raises(InputError, match=what) as caught:
        scalars_of(lines(tmp_path, *rows))
    assert caught.value.remedy
    assert "log.jsonl" in caught.value.where


def test_logged_nan_values_are_preserved(tmp_path):
    path = lines(tmp_path, {"step": 0, "loss": float("nan")}, {"step": 1, "loss": "Infinity"})
    found, _ = scalars_of(path)
    assert np.isnan(found[0]["loss"])
    assert found[1]["loss"] == np.inf


def test_scalars_alone_are_refused(tmp_path):
    path = lines(tmp_path, {"step": 0, "loss": 1.0})
    for sources in ([path], [tmp_path], [path, path]):
        with pytest.raises(InputError, match="does not contain any tensors") as caught:
            open_sources(sources)
        assert "additional SOURCE" in caught.value.remedy


def test_tensors_are_waited_for_in_a_folder_whose_scalars_grow(tmp_path):
    lines(tmp_path, {"step": 0, "loss": 1.0}).touch()
    with pytest.raises(NotYet, match="no step files in this folder yet"):
        open_source(tmp_path)


def test_scalars_without_a_matching_step_are_reported(tmp_path, caplog):
    scalars_of(lines(tmp_path, {"step": 100, "loss": 1.0}))
    assert "has no scalars for any step of the run: its steps are 100" in caplog.text


# During training -----------------------------------------------------------------------------------------------


def append(path, *rows):
    with path.open("a") as file:
        file.writelines(f"{step},{loss!r}\n" for step, loss in rows)


@pytest.fixture
def growing(tmp_path):
    run_without_scalars(tmp_path / "log", 4)
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    append(tmp_path / "metrics.csv", (0, 5.0), (1, 4.0), (2, 3.0))
    return tmp_path


def ingest_again(folder, *sources):
    return ingest([folder / "log", *sources], folder / "trajectory.zarr")


def test_steps_that_a_growing_log_does_not_have_yet_are_completed_or_left_for_the_next_pass(growing, caplog):
    metrics = growing / "metrics.csv"
    metrics.write_text("step,loss\n0,5.0\n1,4.0\n")
    first = ingest_again(growing, metrics)
    assert (first.steps, first.last_step_lacks) == (3, ["loss"])
    assert "1 steps are left for the next pass" in caplog.text
    append(metrics, (2, 3.0), (3, 2.0))
    summary = ingest_again(growing, metrics)
    assert (summary.new_steps, summary.completed_steps, summary.steps, summary.attempts) == (1, 1, 4, 1)
    assert [loss for _, loss, _ in stored(growing / "trajectory.zarr")] == [5.0, 4.0, 3.0, 2.0]


def test_a_log_that_has_not_started_is_waited_for(growing):
    (growing / "metrics.csv").write_text("step,loss\n")
    with pytest.raises(NotYet):
        ingest_again(growing, growing / "metrics.csv")


def test_scalars_logged_after_their_step_start_no_attempt(growing):
    metrics = settled(growing / "metrics.csv")
    metrics.write_text("step,loss\n0,5.0\n1,4.0\n")
    settled(metrics)
    ingest_again(growing, metrics)
    before = stored(growing / "trajectory.zarr")
    append(metrics, (2, 3.0), (3, 2.0))
    summary = ingest_again(growing, metrics)
    assert (summary.new_steps, summary.completed_steps, summary.attempts) == (0, 0, 1)
    (warning,) = (w for w in summary.warnings if "were added to the log or removed from it" in w)
    assert "--overwrite" in warning
    assert stored(growing / "trajectory.zarr") == before
    # The same holds for a log that is omitted the next time.
    assert ingest_again(growing).attempts == 1
    assert stored(growing / "trajectory.zarr") == before


def test_a_scalar_that_changed_in_the_middle_is_refused(growing):
    metrics = settled(growing / "metrics.csv")
    ingest_again(growing, metrics)
    metrics.write_text(metrics.read_text().replace("1,4.0", "1,4.5"))
    with pytest.raises(InputError, match=r"step 1 is already ingested, with loss 4.0, and now has 4.5"):
        ingest_again(growing, settled(metrics))


def test_a_restart_of_both_logs_is_one_attempt(growing):
    metrics = settled(growing / "metrics.csv")
    ingest_again(growing, metrics)
    for step, state in enumerate(random_walk(4, seed=1)):
        if step >= 2:
            write_step(growing / "log", step, {k: v for k, v in state.items() if k not in SCALARS})
    with metrics.open("a") as file:
        file.write("step,loss\n")  # without the header of the restarted process, step 2 has two values
    append(metrics, (2, 9.0), (3, 8.0))
    summary = ingest_again(growing, metrics)
    assert (summary.new_steps, summary.attempts) == (2, 2)
    losses = [loss for _, loss, _ in stored(growing / "trajectory.zarr")]
    assert losses == [5.0, 4.0, 3.0, None, 9.0, 8.0]


@pytest.mark.parametrize("name", ["log.csv.gz", "log.tsv.gz", "log.jsonl.gz", "log.json", "log.json.gz"])
def test_compressed_files_and_json_lines_in_json_files_are_read(tmp_path, name):
    rows = values_of()
    if "json" in name:
        lines = [json.dumps({"step": step, "loss": loss, "lr": rate}) for step, loss, rate in rows]
    else:
        separator = "\t" if "tsv" in name else ","
        lines = [separator.join(("step", "loss", "lr"))]
        lines += [separator.join(("" if value is None else repr(value)) for value in row) for row in rows]
    content = ("\n".join(lines) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    settled(tmp_path / name)
    assert format_of(open_storage(tmp_path / name)) == ("jsonl" if "json" in name else "csv")
    found, _ = scalars_of(tmp_path / name)
    assert found == {
        step: {"loss": loss} | ({} if rate is None else {"learning_rate": rate}) for step, loss, rate in rows
    }


@pytest.mark.parametrize("text", ["{}", '{"a": 1}\n', '{\n"a": 1}\n{', '[1]\n{"a": 1}\n', '{"a"\n{"a": 1}\n'])
def test_other_json_files_are_not_logs(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert format_of(open_storage(tmp_path / "config.json")) == "steps"


def test_a_compressed_file_that_expands_without_end_is_refused(tmp_path):
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(bytes(1 << 20)) * 400)
    with open_text(open_storage(tmp_path / "log.csv.gz")) as file:
        blocks = iter(lambda: file.read(1 << 20), b"")
        with pytest.raises(ValueError, match="times the size"):
            list(map(len, blocks))


@pytest.mark.parametrize("length", [5, 20, -1])
@pytest.mark.parametrize(("name", "text"), [
    ("log.csv.gz", b"step,loss\n0,1\n1,2\n"), ("log.json.gz", b'{"step": 0, "loss": 1}\n' * 2)
])  # fmt: skip
def test_a_truncated_compressed_file_is_refused(tmp_path, name, text, length):
    (tmp_path / name).write_bytes(gzip.compress(text)[:length])
    with pytest.raises(InputError, match="cannot read"):
        open_sources([run_without_scalars(tmp_path / "log"), tmp_path / name]).steps()


# Truncated, corrupt and malicious files ------------------------------------------------------------------------


def read_all(decode, path):
    notes = []
    records = [dict(record) for record in each_record(decode(open_storage(path), lambda key: True, notes))]
    for record in records:
        record.pop(LINE_KEY, None)
    return records, notes


@pytest.mark.parametrize(("decode", "text"), [
    (read_csv, "step,loss\r\n0,0.125\r\n1,0.0625\r\n"),
    (read_json_lines, '{"step": 0, "loss": 0.125}\n{"step": 1, "loss": 0.0625}\n'),
])  # fmt: skip
def test_a_truncated_text_file_yields_only_numbers_that_were_written(tmp_path, decode, text):
    (tmp_path / "log").write_text(text, newline="")
    whole, notes = read_all(decode, tmp_path / "log")
    assert not notes
    for length in range(len(text)):
        (tmp_path / "log").write_text(text[:length], newline="")
        found, notes = read_all(decode, tmp_path / "log")
        assert found == whole[: len(found)]
        assert notes or not length or text[length - 1] in "\r\n"


@pytest.fixture
def events(tmp_path):
    with tensorboard.SummaryWriter(tmp_path / "events") as writer:
        for step in range(3):
            writer.add_scalar("loss", 1.0 / (step + 1), step)
    (path,) = (tmp_path / "events").iterdir()
    return path


def test_truncated_event_files_yield_the_complete_records(events):
    body = events.read_bytes()
    whole, notes = read_all(read_events, events)
    assert [record["step"] for record in whole] == [0, 1, 2]
    assert not notes
    for length in range(len(body)):
        events.write_bytes(body[:length])
        found, notes = read_all(read_events, events)
        assert found == whole[: len(found)]
        assert len(notes) <= 1
    assert "is truncated" in notes[0]


def test_a_changed_byte_in_an_event_file_is_detected(events):
    body = events.read_bytes()
    for position in range(len(body)):
        damaged = bytearray(body)
        damaged[position] ^= 4
        events.write_bytes(damaged)
        with pytest.raises(ValueError, match="checksum"):
            read_all(read_events, events)
    with pytest.raises(InputError, match="checksum"):
        scalars_of(settled(events.parent))


numbers = st.floats(width=32) | st.floats(-1e30, 1e30)


@given(rows=st.lists(st.tuples(st.integers(0, 2**53), st.text(max_size=9), numbers, st.sampled_from("sfdbc"))))
@reads_only
def test_events_written_by_tensorboard_are_read(tmp_path, rows):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.summary.writer.record_writer import RecordWriter

    expected = []
    with (tmp_path / "tfevents").open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=1.5, file_version="brain.Event:2").SerializeToString())
        for step, tag, number, form in rows:
            if form == "s":
                value = Summary.Value(tag=tag, simple_value=np.float32(number))
            else:
                fields = {
                    "f": {"dtype": 1, "float_val": [np.float32(number)]},
                    "b": {"dtype": 1, "tensor_content": np.float32(number).tobytes()},
                    "d": {"dtype": 2, "double_val": [number]},
                    "c": {"dtype": 2, "tensor_content": struct.pack("<d", number)},
                }[form]
                value = Summary.Value(tag=tag, tensor=TensorProto(tensor_shape=TensorShapeProto(), **fields))
            writer.write(Event(wall_time=2.0, step=step, summary=Summary(value=[value])).SerializeToString())
            exact = number if form in "dc" else float(np.float32(number))
            expected.append({tag: exact, "step": step})
    found, notes = read_all(read_events, tmp_path / "tfevents")
    np.testing.assert_equal(found, expected)
    assert not notes


keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r\n"), min_size=1, max_size=5)


@given(
    names=st.lists(keys.map(lambda key: key.strip() or "x"), min_size=1, max_size=4, unique=True),
    rows=st.lists(st.lists(st.floats(allow_nan=False), min_size=4, max_size=4)),
    delimiter=st.sampled_from(",;\t"),
)
@reads_only
def test_csv_values_are_read_unchanged(tmp_path, names, rows, delimiter):
    names = [
        "step",
        *(f"n{name.translate(dict.fromkeys(map(ord, ',;' + chr(9))))}{i}" for i, name in enumerate(names)),
    ]
    with (tmp_path / "log.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(names)
        writer.writerows([step, *row[: len(names) - 1]] for step, row in enumerate(rows))
    found, notes = read_all(read_csv, tmp_path / "log.csv")
    expected = [dict(zip(names, [step, *row], strict=False)) for step, row in enumerate(rows)]
    assert [{key: float(value) for key, value in record.items()} for record in found] == expected
    assert not notes


trees = st.dictionaries(keys.filter(lambda key: "/" not in key), st.floats(allow_nan=False) | st.none(), max_size=3)


@given(rows=st.lists(st.dictionaries(keys.filter(lambda key: "/" not in key), trees, max_size=3)))
@reads_only
def test_json_lines_values_are_read_unchanged(tmp_path, rows):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found, notes = read_all(read_json_lines, tmp_path / "log.jsonl")
    expected = [{f"{a}/{b}": value for a, tree in row.items() for b, value in tree.items()} for row in rows]
    found, expected = (
        [{key: value for key, value in record.items() if value is not None} for record in records]
        for records in (found, expected)
    )
    assert found == expected
    assert not notes


HOSTILE = [
    ("jsonl", b"[1]\n"),
    ("jsonl", b'{"step": 0, "loss": \n'),
    ("jsonl", b'{"a":' * 100_000 + b"\n"),
    ("jsonl", b"{\xff\n"),
    ("jsonl", b'{"a": ' + b"9" * 9999 + b"}\n"),
    ("csv", b"step,loss\n0,1,2\n"),
    ("csv", b"step,loss\n0\n"),
    ("csv", b"step,loss,loss\n0,1,2\n"),
    ("csv", b'step,loss\n0,"1\n'),
    ("csv", b"step,loss\n0,\x00\n"),
    ("csv", b"\xff\xfe\n"),
    ("parquet", b"PAR1"),
    ("parquet", b"PAR1" + b"\xff" * 200 + b"PAR1"),
    ("parquet", b"PAR1" + bytes(50) + (1 << 31).to_bytes(4, "little") + b"PAR1"),
    ("tensorboard", bytes(12)),
    ("tensorboard", b"x" * 40),
    ("trackio", b"SQLite format 3\0" + b"\xff" * 500),
]


@pytest.mark.parametrize(("format", "body"), HOSTILE)
def test_files_that_are_not_logs_are_refused(tmp_path, format, body):
    name = f"log.{format}"
    (tmp_path / name).write_bytes(body)
    run_without_scalars(tmp_path / "log", 2)
    (tmp_path / "run.toml").write_text(
        f'[[source]]\npath = "log"\n[[source]]\npath = "{name}"\nformat = "{format}"\n'
    )
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "run.toml").steps()
    assert name in caught.value.where
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("writer", "decode", "limits", "refusal"),
    [
        ("parquet", partial(read_parquet, group_limit=40), {}, "exceeds 40 bytes"),
        ("lines of json", partial(read_json_lines, line_limit=40), {}, "a line of more than 40 characters"),
        ("lightning", read_csv, {"records_limit": 40}, "more than 40 records"),
    ],
)
def test_records_of_unbounded_size_are_refused(tmp_path, writer, decode, limits, refusal):
    (tmp_path / "scalars").mkdir()
    write, name = WRITERS[writer]
    source = write(tmp_path / "scalars", values_of(50))
    settled(tmp_path / "scalars")
    source = open_storage(next(source.rglob("metrics.csv"), source))
    kind = FORMATS[name].scalars
    assert len(ScalarLog(source, kind).steps()) == 50
    with pytest.raises(InputError, match=refusal):
        ScalarLog(source, replace(kind, decode=decode), **limits).steps()


def test_checksums_of_large_records_are_verified(events):
    read_events = partial(event_file.read_events, data_limit=10)
    assert read_all(read_events, events) == ([], [])
    body = events.read_bytes()
    events.write_bytes(body[:-9] + bytes([body[-9] ^ 1]) + body[-8:])
    with pytest.raises(ValueError, match="checksum"):
        read_all(read_events, events)


COMPUTED = {
    "view": "CREATE VIEW metrics AS WITH RECURSIVE n(step) AS (SELECT 0 UNION ALL SELECT step + 1 FROM n LIMIT 9) "
    "SELECT 'run' AS run_name, step, '{\"loss\": 1}' AS metrics FROM n",
    "virtual": "CREATE VIRTUAL TABLE metrics USING rtree(run_name, step, metrics)",
    "generated": "CREATE TABLE metrics (run_name, step, metrics AS ('{\"loss\": ' || step || '}'))",
}


@pytest.mark.parametrize("how", COMPUTED)
def test_a_database_with_computed_metrics_is_refused(tmp_path, how):
    with contextlib.closing(sqlite3.connect(tmp_path / "project.db")) as database, database:
        database.execute(COMPUTED[how])
    with pytest.raises(InputError, match=r"this is a file|no table metrics"):
        scalars_of(tmp_path / "project.db")


@given(changes=changes(6), name=st.sampled_from(["parquet", "trackio"]))
@settings(reads_only, max_examples=60)
def test_corrupt_files_are_either_read_or_refused(tmp_path, changes, name):
    folder = tmp_path / name
    if not folder.exists():
        folder.mkdir()
        (write_parquet if name == "parquet" else write_trackio)(folder, values_of())
        (folder / "0001.parquet").unlink(missing_ok=True)
        run_without_scalars(tmp_path / "log")
        (tmp_path / f"{name}.body").write_bytes(next(folder.iterdir()).read_bytes())
    (path,) = (entry for entry in folder.iterdir() if entry.suffix in (".parquet", ".db"))
    path.write_bytes(damage((tmp_path / f"{name}.body").read_bytes(), changes))
    with contextlib.suppress(InputError):
        open_sources([tmp_path / "log", path]).steps()


# Several records for one step, restarts and epochs -----------------------------------------------------------


def losses_of(found):
    return [found[step].get("loss") for step in range(STEPS)]


def train_and_validation(tmp_path):
    rows = [{"mode": "train", "step": n, "loss": 10.0 - n, "lr": 0.5} for n in range(STEPS)]
    return lines(tmp_path, *rows, *({"mode": "val", "step": n, "loss": 90.0, "lr": 0.5} for n in (0, 2, 4)))


def test_records_that_differ_in_a_label_give_no_value_until_one_is_selected(tmp_path):
    path = train_and_validation(tmp_path)
    found, notes = scalars_of(path)
    # Records of one quantity that agree are unambiguous.
    assert list(found.values()) == [{"learning_rate": 0.5}] * STEPS
    (note,) = (note for note in notes if note.startswith("loss is not used"))
    assert "10.0 of loss[mode=train] and 90.0 of loss[mode=val] at step 0" in note
    advice = note.split("--map '")[1].split("'")[0]
    found, notes = scalars_of(path, mapping=parse_map([advice]))
    assert losses_of(found) == [10.0 - n for n in range(STEPS)]
    assert not any("loss" in note for note in notes)
    found, _ = scalars_of(path, mapping={"loss": "loss[mode=val]"})
    assert losses_of(found) == [90.0, None, 90.0, None, 90.0, None]


def test_the_steps_of_ambiguous_records_are_not_waited_for(tmp_path):
    path = train_and_validation(tmp_path)
    path.touch()
    found, _ = scalars_of(path)
    assert len(found) == STEPS


def test_validation_records_at_other_steps_are_not_those_of_training(tmp_path):
    path = lines(
        tmp_path,
        {"split": "val", "step": 0, "loss": 90.0},
        *({"split": "train", "step": n, "loss": 10.0 - n} for n in range(1, STEPS)),
    )
    found, notes = scalars_of(path)
    assert losses_of(found) == [None] * STEPS
    assert any("at different steps" in note for note in notes)


@pytest.mark.parametrize("blocks", [False, True])
def test_the_losses_of_ranks_are_not_mixed(tmp_path, blocks):
    rows = [{"rank": r, "step": n, "loss": 10.0 - n + 50 * r} for n in range(STEPS) for r in (0, 1)]
    path = lines(tmp_path, *sorted(rows, key=lambda row: row["rank"] if blocks else 0))
    assert losses_of(scalars_of(path)[0]) == [None] * STEPS
    found, _ = scalars_of(path, mapping={"loss": "loss[rank=1]"})
    assert losses_of(found) == [60.0 - n for n in range(STEPS)]
    with pytest.raises(InputError, match="no record of loss has rank=2") as caught:
        scalars_of(path, mapping={"loss": "loss[rank=2]"})
    assert "0, 1" in caught.value.why


def test_several_labels_are_selected_together(tmp_path):
    rows = [
        {"split": split, "rank": rank, "step": n, "loss": 100.0 * rank + 10 * len(split) + n}
        for n in range(STEPS)
        for split in ("train", "val")
        for rank in (0, 1)
    ]
    found, _ = scalars_of(lines(tmp_path, *rows), mapping={"loss": "loss[split=val][rank=1]"})
    assert losses_of(found) == [130.0 + n for n in range(STEPS)]


def test_unlabelled_records_of_a_step_are_used_if_they_are_equal(tmp_path):
    rows = [(0, 3.0), (1, 2.0), (1, 2.0), (2, 1.0), (2, 7.0), (3, float("nan")), (3, float("nan"))]
    found, notes = scalars_of(lines(tmp_path, *({"step": step, "loss": loss} for step, loss in rows)))
    assert losses_of(found)[:3] == [3.0, 2.0, None]
    assert np.isnan(found[3]["loss"])
    (note,) = notes
    assert "different values at 1 steps, 1.0 and 7.0 at step 2" in note


@pytest.mark.parametrize("epochs", [True, False])
def test_a_step_that_counts_within_epochs_is_refused(tmp_path, epochs):
    path = lines(
        tmp_path, *({"epoch": n // 4, "step": n % 4, "loss": 100.0 + n} for n in range(12 if epochs else 8))
    )
    if not epochs:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path = lines(tmp_path, *({"step": row["step"], "loss": row["loss"]} for row in [*rows, *rows[:2]]))
    with pytest.raises(InputError, match=r"falls from 3 to 0\b.*counts within each epoch") as caught:
        scalars_of(path)
    assert "--map step=KEY" in caught.value.remedy


def test_a_restart_within_an_epoch_is_a_restart(tmp_path):
    steps = [0, 1, 2, 3, 1, 2]
    found, _ = scalars_of(
        lines(tmp_path, *({"epoch": n // 3, "step": n, "loss": float(i)} for i, n in enumerate(steps)))
    )
    assert losses_of(found) == [0.0, 4.0, 5.0, None, None, None]


def test_a_sparse_key_of_an_abandoned_attempt_is_omitted(tmp_path):
    rows = [{"step": n, "loss": float(n), **({"lr": 0.5} if n in (0, 3) else {})} for n in (0, 1, 2, 3, 1, 2)]
    found, _ = scalars_of(lines(tmp_path, *rows))
    assert [found[n].get("learning_rate") for n in range(STEPS)] == [0.5, *[None] * 5]


def test_keys_that_are_logged_apart_have_their_own_steps(tmp_path):
    # The rate is logged once per epoch, at the number of the epoch.
    rows = [{"step": 0, "lr": 0.5}, *({"step": n, "loss": float(n)} for n in range(4)), {"step": 1, "lr": 0.25}]
    found, _ = scalars_of(lines(tmp_path, *rows, {"step": 4, "loss": 4.0}))
    assert losses_of(found) == [0.0, 1.0, 2.0, 3.0, 4.0, None]


def test_a_session_that_purges_steps_removes_them(tmp_path):
    for purge, steps in ((None, range(5)), (2, range(3, 4))):
        with tensorboard.SummaryWriter(
            tmp_path / "events", purge_step=purge, filename_suffix=f".{purge}"
        ) as writer:
            for step in steps:
                writer.add_scalar("loss", 1.0 if purge is None else 2.0, step)
    settled(tmp_path / "events")
    found, notes = scalars_of(tmp_path / "events")
    # No value was logged at step 2 again, and the removed values are not used.
    assert losses_of(found) == [1.0, 1.0, None, 2.0, None, None]
    assert any("3 values that were logged before" in note for note in notes)


@given(attempts=st.lists(st.tuples(st.integers(0, STEPS - 1), st.integers(1, STEPS)), min_size=1, max_size=4))
@reads_only
def test_any_history_of_restarts_gives_the_values_of_the_last_attempts(tmp_path, attempts):
    rows, expected = [], {}
    for attempt, (start, count) in enumerate(attempts):
        expected = {step: value for step, value in expected.items() if step < start}
        rows.append("step,loss")
        for step in range(start, min(start + count, STEPS)):
            expected[step] = attempt + step / 8
            rows.append(f"{step},{expected[step]}")
    log = tmp_path / "history.csv"
    log.write_text("\n".join(rows) + "\n")
    scalars = ScalarLog(open_storage(log), FORMATS["csv"].scalars)
    starts, end = [], STEPS
    for start, count in attempts:
        if start <= end:
            starts.append(start)
        end = min(start + count, STEPS) - 1
    if len(starts) > 2 and len(set(starts)) == 1:
        return  # the steps of epochs may look the same
    steps = scalars.steps()
    found = {step.number: scalars.open(step).content().scalars.get("loss") for step in steps}
    # A start after the last step is not known to be a restart.
    assert {step: found[step] for step in expected} == expected
    assert set(found) == set(expected)


@pytest.mark.parametrize(
    ("name", "text", "used"),
    [
        ("a.csv", "step,loss\n0,3\n1,2", True),
        ("a.csv", "step,loss\n0,3\n1", False),
        ("a.csv", 'step,loss\n0,3\n1,"2', False),
        ("a.jsonl", '{"step": 0, "loss": 3}\n{"step": 1, "loss": 2}', True),
        ("a.jsonl", '{"step": 0, "loss": 3}\n{"step": 1, "loss": 2', False),
    ],
)
def test_the_last_line_of_a_finished_file_is_read_if_it_is_a_record(tmp_path, name, text, used):
    path = tmp_path / name
    path.write_text(text)
    found, notes = scalars_of(settled(path))
    assert losses_of(found)[:2] == [3.0, 2.0 if used else None]
    assert any("has no newline" in note for note in notes)


@pytest.mark.parametrize("text", ["step;loss\n0;1\n1;5,5\n", "step,loss\n0,1\n1,tensor(5.)\n"])
def test_a_value_that_is_not_a_number_is_refused_with_its_line(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match="is not a number") as caught:
        scalars_of(settled(tmp_path / "a.csv"))
    assert caught.value.where.endswith("a.csv, loss, line 3")


# Folders of several runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["mlruns", "mlruns/0", "mlruns/0/first", "mlruns/0/first/metrics"])
def test_every_folder_of_an_mlflow_store_is_read(tmp_path, level):
    write_mlflow(tmp_path, values_of())
    settled(tmp_path / "mlruns")
    found, _ = scalars_of(tmp_path / level)
    assert {step: scalars["loss"] for step, scalars in found.items()} == {step: a for step, a, _ in values_of()}


def test_one_of_several_mlflow_runs_is_selected(tmp_path):
    first = write_mlflow(tmp_path, values_of()) / "0" / "first"
    shutil.copytree(first, first.with_name("second"))
    (first.with_name("second") / "metrics" / "train" / "loss").write_text("0 7.0 0\n0 inf 1\n0 nan 2\n")
    settled(tmp_path / "mlruns")
    with pytest.raises(InputError, match="contains the runs first, second"):
        scalars_of(tmp_path / "mlruns")
    found, _ = scalars_of(tmp_path / "mlruns", mapping={"run": "second"})
    assert [found[step].get("loss") for step in (0, 1)] == [7.0, np.inf]
    assert np.isnan(found[2]["loss"])


def test_nan_and_infinity_in_an_mlflow_database_are_read(tmp_path):
    path = write_mlflow_database(tmp_path, values_of())
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        # MLflow replaces them because not every database can store them.
        database.execute("UPDATE metrics SET value = 0, is_nan = 1 WHERE key = 'train/loss' AND step = 1")
        database.execute("UPDATE metrics SET value = -1.7976931348623157e308 WHERE key = 'train/loss' AND step = 2")
    found, _ = scalars_of(settled(path))
    assert np.isnan(found[1]["loss"])
    assert found[2]["loss"] == -np.inf


def test_a_line_of_mlflow_without_a_value_is_refused(tmp_path):
    write_mlflow(tmp_path, values_of())
    file = tmp_path / "mlruns" / "0" / "first" / "metrics" / "lr"
    file.write_text(file.read_text() + "7\n")
    with pytest.raises(InputError, match="line 6 does not consist of a time, a value and a step") as caught:
        scalars_of(settled(tmp_path / "mlruns"))
    assert str(file) in caught.value.where


def test_one_of_several_folders_of_event_files_is_selected(tmp_path):
    for name, loss in (("train", 1.0), ("validation", 2.0)):
        with tensorboard.SummaryWriter(tmp_path / "events" / name) as writer:
            for step in range(STEPS):
                writer.add_scalar("loss", loss, step)
    settled(tmp_path / "events")
    with pytest.raises(InputError, match="contains the runs train, validation"):
        scalars_of(tmp_path / "events")
    found, _ = scalars_of(tmp_path / "events", mapping={"run": "train"})
    assert [scalars["loss"] for scalars in found.values()] == [1.0] * STEPS
    shutil.rmtree(tmp_path / "events" / "train")
    found, _ = scalars_of(tmp_path / "events")
    assert [scalars["loss"] for scalars in found.values()] == [2.0] * STEPS


def test_labels_of_a_long_table_are_used_and_ambiguous_names_are_refused(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("step,split,metric,value\n0,train,loss,1.0\n0,val,loss,2.0\n")
    found, _ = scalars_of(settled(path), mapping={"loss": "loss[split=val]"})
    assert found[0]["loss"] == 2.0
    path.write_text("step,metric,value\n0,loss,1.0\n0,step,5\n")
    with pytest.raises(InputError, match="line 3 has a metric named 'step', like a column"):
        scalars_of(settled(path))
