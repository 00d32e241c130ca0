"""Test that a log of ledgers becomes a run without states, with each update exactly once."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_last_state import KILLED

import natgrad
from natgrad.app.backend import NatgradBackend
from natgrad.app.folder import RunFolder
from natgrad.app.status import status
from natgrad.ingestion import ingest
from natgrad.recording.ledger_writer import LedgerWriter
from natgrad.results.ranking import rank_dataset
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits
from natgrad.schema.ledger_log import LedgerHeader, RecordedTensor, packed
from natgrad.schema.names import RECORDED_VECTORS
from natgrad.storage import open_storage
from natgrad.store import Trajectory
from natgrad.store.recorded import require_ledger

HEADER = LedgerHeader(
    (RecordedTensor("b", (), "float32", "float32", 0), RecordedTensor("a", (2, 3), "float32", "float32", 0)), 1
)


def record(step, *, seed=0, skipped=False):
    """Return the record of an update; its numbers depend on the step and the seed."""
    random = np.random.default_rng([step, seed])
    vectors = random.standard_normal((len(HEADER.tensors), len(RECORDED_VECTORS), 8))
    found = np.zeros((), HEADER.record)
    found["step"], found["span"], found["flags"] = step, 1, int(skipped)
    found["loss"], found["rates"], found["ratio"] = random.random(), [0.1], random.standard_normal(2)
    found["gram"] = packed(vectors @ vectors.swapaxes(1, 2))
    if skipped:
        found["gram"] = np.nan
    return found


def write(folder, steps, **options):
    """Write a new file of a log, and return its writer."""
    folder.mkdir(exist_ok=True, parents=True)
    writer = LedgerWriter(folder, HEADER)
    for step in steps:
        writer.append(record(step, **options))
    return writer


def stored(out):
    """Return the updates that are stored, by attempt and step: their products and losses."""
    run = Trajectory(open_storage(out / "steps.zarr"))
    ledger = require_ledger(run)
    gram, ratio = ledger.read()
    steps, spans = ledger.steps()
    loss, attempts = run.scalar("loss"), run.scalar("attempt")
    return {
        (int(attempts[index]), int(steps[index])): (gram[index], ratio[index], loss[index])
        for index in range(run.n_states - 1)
        if spans[index]
    }


def require_stored(out, expected):
    """Require the updates of records by attempt and step, with the tensors in the order of their names."""
    found = stored(out)
    assert [*found] == [*expected]
    for key, (gram, ratio, loss) in found.items():
        np.testing.assert_array_equal(packed(gram), expected[key]["gram"][::-1])
        np.testing.assert_array_equal(ratio, expected[key]["ratio"][::-1])
        assert loss == expected[key]["loss"]


def test_a_log_becomes_a_ledger_without_a_trajectory(tmp_path):
    write(tmp_path / "log", range(6)).close()
    found = natgrad.process(tmp_path / "log", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."} == {
        *("steps.zarr", "ledger.zarr", "results.zarr", "report.html")
    }
    assert (found.new_steps, found.updates, found.gradient_source) == (7, 6, "recorded")
    assert found.last_step_lacks == ["gradient", "loss", "learning_rate", "skipped"]
    require_stored(tmp_path / "out", {(0, step): record(step) for step in range(6)})
    tree = natgrad.open_results(tmp_path / "out")
    assert tree.attrs["gradient_source"] == "recorded"
    assert tree["model"]["step"].values.tolist() == [*range(6)]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the mean gradient of both states of an update is not known" in page
    trapezoid = tree["model"]["angle"].sel(descent="trapezoid")
    assert np.isnan(trapezoid).all()
    assert str(natgrad.verify(tmp_path / "out")) == "OK: all checksums match\n"
    assert "the last, has no" not in page


@settings(max_examples=12)
@given(
    parts=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    commit=st.integers(1, 4),
    chunk=st.integers(1, 5),
)
def test_a_log_that_grows_is_stored_once_whatever_is_committed_together(tmp_path_factory, parts, commit, chunk):
    folder = tmp_path_factory.mktemp("run")
    parts[0] += 1
    limits = IngestLimits(commit_bytes=commit * 8 * 2 * 17, chunk=(chunk, 1))
    writer, step, new = write(folder / "log", ()), 0, 0
    for count in parts:
        for _ in range(count):
            writer.append(record(step))
            step += 1
        found = ingest([open_storage(folder / "log")], open_storage(folder / "trajectory.zarr"), limits=limits)
        new += found.new_steps
        require_stored(folder, {(0, one): record(one) for one in range(step)})
    writer.close()
    assert new == step + 1


def test_a_restarted_run_begins_an_attempt_where_its_updates_differ(tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    write(log, range(6)).close()
    natgrad.ingest(log, out)
    # Updates that are repeated bit for bit continue the run.
    writer = write(log, [2])
    assert natgrad.ingest(log, out).new_steps == 0
    writer.append(record(3, seed=1))
    found = natgrad.ingest(log, out)
    assert (found.attempts, found.steps, found.last_step) == (2, 5, 4)
    assert any("restarted before step 3" in warning for warning in found.warnings)
    for step in range(4, 8):
        writer.append(record(step, seed=1))
    writer.close()
    assert natgrad.ingest(log, out).attempts == 2
    first = {(0, step): record(step) for step in range(6)}
    require_stored(out, first | {(1, step): record(step, seed=1) for step in range(3, 8)})
    natgrad.analyze(out)
    # The update from step 2 is the last one of the first attempt that was not made again.
    assert natgrad.open_results(out)["model"]["step"].values.tolist() == [*range(8)]
    natgrad.analyze(out, attempt=0)
    assert natgrad.open_results(out)["model"]["step"].values.tolist() == [*range(6)]


def record_run(folder, mode, rate, steps, **options):
    """Record gradient descent from the parameters of a checkpoint, and return those after each step."""
    theta, reached = options.pop("theta", np.array([3.0, -2.0])), {}
    with natgrad.Recorder(folder, mode=mode, evaluation="fixed", **options) as recorder:
        for step in steps:
            reached[step] = theta.copy()
            gradient = np.array([1.0, 4.0]) * theta
            loss = float(theta @ gradient) / 2
            recorder.record(step, parameter={"a": theta}, gradient={"a": gradient}, loss=loss, learning_rate=rate)
            theta = theta - rate * gradient
        recorder.record(steps[-1] + 1, parameter={"a": theta})
    return reached


@pytest.mark.parametrize("ingested_before", [False, True])
def test_a_restart_has_the_same_results_in_a_log_of_ledgers_and_of_states(tmp_path, ingested_before):
    found = {}
    for mode in ("full", "ledger"):
        log, out = tmp_path / mode, tmp_path / f"{mode}-out"
        reached = record_run(log, mode, 0.1, range(6))
        if ingested_before:
            natgrad.process(log, out)
        record_run(log, mode, 0.2, range(3, 8), theta=reached[3], resume=True)
        summary = natgrad.process(log, out)
        loss = natgrad.open_results(out)["model"]["loss"].to_series()
        found[mode] = (summary.attempts, summary.steps), loss
    # The steps of a log of states are replaced, but a log of ledgers still has those before the restart.
    assert (found["full"][0], found["ledger"][0]) == ((1 + ingested_before, 9), (2, 9))
    # In a log of states, the update from step 2 leads to a state of the attempt before.
    assert found["full"][1].index.tolist() == ([*range(2), *range(3, 8)] if ingested_before else [*range(8)])
    assert found["ledger"][1].index.tolist() == [*range(8)]
    assert found["ledger"][1][found["full"][1].index].equals(found["full"][1])


@pytest.mark.parametrize("kind", ["alone", "joined", "sweep"])
def test_attempts_that_ended_before_the_first_ingest_are_kept(tmp_path, kind):
    log, out = tmp_path / "logs" / "run", tmp_path / "out"
    parts = [(range(5), 0), (range(3, 6), 1), (range(2, 8), 2)]
    sources, options = ([log.parent], {"sweep": True}) if kind == "sweep" else ([log], {})
    if kind == "joined":
        (tmp_path / "rates.csv").write_text("step,learning_rate\n" + "".join(f"{step},0.1\n" for step in range(9)))
        sources.append(tmp_path / "rates.csv")
    for steps, seed in parts[:2]:
        write(log, steps, seed=seed).close()
    new = natgrad.ingest(sources, out, **options).new_steps if kind == "sweep" else 0
    write(log, *parts[2][:1], seed=2).close()
    new += natgrad.ingest(sources, out, **options).new_steps
    expected = {
        (attempt, step): record(step, seed=attempt) for attempt, (steps, _) in enumerate(parts) for step in steps
    }
    require_stored(out, expected)
    assert natgrad.ingest(sources, out, **options).new_steps == 0
    require_stored(out, expected)
    assert new == sum(len(steps) + 1 for steps, _ in parts)
    natgrad.analyze(out)
    results = natgrad.open_results(out)["model"]
    assert results["attempt"].values.ravel().tolist() == [0, 0, 2, 2, 2, 2, 2, 2]


def test_a_gap_divides_the_updates(tmp_path):
    write(tmp_path / "log", [0, 1, 5, 6, 7]).close()
    natgrad.process(tmp_path / "log", tmp_path / "out", windows=[1, 2])
    require_stored(tmp_path / "out", {(0, step): record(step) for step in (0, 1, 5, 6, 7)})
    angle = natgrad.open_results(tmp_path / "out")["model"]["angle"].sel(descent="gradient", window=2)
    assert np.isfinite(angle).values.tolist() == [True, False, True, True, False]


def test_a_skipped_update_has_a_status(tmp_path):
    writer = write(tmp_path / "log", [0])
    writer.append(record(1, skipped=True))
    writer.append(record(2))
    writer.close()
    found = natgrad.process(tmp_path / "log", tmp_path / "out", windows=[1, 2])
    assert found.status["skipped"] == 1
    assert any("the optimizer skipped 1 updates" in warning for warning in found.warnings)
    for group in ("model", "tensor"):
        status = natgrad.open_results(tmp_path / "out")[group]["status"]
        names = np.array(status.attrs["flag_meanings"].split())
        skipped = names[status.sel(descent="gradient").values] == "skipped"
        for index, expected in enumerate([[False, True, False], [True, True, False]]):
            of_updates = skipped[..., index].reshape(3, -1)
            assert (of_updates == np.array(expected)[:, None]).all()


def test_runs_of_a_sweep_are_stored_as_they_grow(tmp_path):
    logs, out = tmp_path / "logs", tmp_path / "out"
    writers = {name: write(logs / name, range(count)) for name, count in {"one": 3, "two": 2}.items()}
    natgrad.process(logs, out, sweep=True)
    for name, steps in {"one": range(3, 5), "two": range(2, 6)}.items():
        for step in steps:
            writers[name].append(record(step))
        writers[name].close()
    found = natgrad.process(logs, out, sweep=True)
    tree = natgrad.open_results(out)
    assert tree["model"]["run"].values.tolist() == ["one", "two"]
    loss = tree["model"]["loss"].sel(run="one").values[:5]
    np.testing.assert_array_equal(loss, [record(step)["loss"] for step in range(5)])
    assert (found.updates, found.gradient_source) == (11, "recorded")


@pytest.mark.parametrize("first", ["states", "ledgers"])
def test_states_and_ledgers_do_not_continue_each_other_but_replace(tmp_path, first):
    write(tmp_path / "ledgers", range(3)).close()
    recorder = natgrad.Recorder(tmp_path / "states")
    for step in range(4):
        values = {"a": np.full((2, 3), 1.0 / (step + 1)), "b": np.array(float(step))}
        recorder.record(step, parameter=values, gradient=values, loss=1.0, learning_rate=0.1)
    second = "ledgers" if first == "states" else "states"
    out = tmp_path / "out"
    natgrad.process(tmp_path / first, out)
    with pytest.raises(InputError, match="inner products of updates"):
        natgrad.process(tmp_path / second, out)
    found = natgrad.process(tmp_path / second, out, overwrite=True)
    assert found.gradient_source == ("recorded" if second == "ledgers" else "logged")
    assert (out / "trajectory.zarr").exists() == (second == "states")
    assert (out / "steps.zarr").exists() == (second == "ledgers")
    assert natgrad.verify(out).damages == ()


def test_functions_that_need_states_say_so(tmp_path):
    write(tmp_path / "log", range(3)).close()
    with pytest.raises(InputError, match="no states to read in place"):
        natgrad.process(tmp_path / "log", tmp_path / "out", in_place=True)
    natgrad.process(tmp_path / "log", tmp_path / "out")
    for function in (natgrad.materialize, natgrad.slim, natgrad.open_trajectory):
        with pytest.raises(InputError, match="the run has no states"):
            function(tmp_path / "out")
    trajectory = Trajectory(RunFolder.of(tmp_path / "out").trajectory)
    assert trajectory.describe()["states"] == "none"


def test_inspect_proposes_no_other_gradients_for_a_log_that_has_their_products(tmp_path):
    write(tmp_path / "log", range(3)).close()
    found = natgrad.inspect(tmp_path / "log")
    assert found.command == f"natgrad process {tmp_path}/log OUT"
    assert found.gradient_from is None
    assert found.holds["products"] == "2 tensors"
    assert "natgrad replay" not in found.missing.get("taylor_point", "")


def test_runs_of_ledgers_alone_are_compared_and_opened_like_others(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / "logs" / name, range(6), seed=len(name) + (name == "two")).close()
        natgrad.process(tmp_path / "logs" / name, tmp_path / "runs" / name)
    found = natgrad.compare([tmp_path / "runs" / name for name in ("one", "two")]).comparison
    assert found.curves["step"].values.tolist() == [*range(6)]
    for row, name in enumerate(("one", "two")):
        tree = NatgradBackend().open_datatree(tmp_path / "runs" / name)
        assert tree.natgrad.summary()["gradient_source"] == "recorded"
        of_model = tree["model"].sel(descent="gradient", window=1)
        np.testing.assert_array_equal(found.curves["angle"].values[row], of_model["angle"].values)
        assert tree.natgrad.worst(2).index.tolist() == [one.tensor for one in rank_dataset(tree["tensor"].ds)[:2]]
        assert tree["tensor"].natgrad.to_dataframe(variables=["angle"]).shape[0] == 12
    assert found.warnings == []


def test_the_status_of_a_run_of_ledgers_counts_the_updates_that_were_recorded_since(tmp_path):
    writer = write(tmp_path / "logs" / "run", range(4))
    natgrad.process(tmp_path / "logs" / "run", tmp_path / "runs" / "run")

    def row():
        (found,) = status(tmp_path / "runs")
        return found["state"], found["last_step"], found["lag"], found["error"]

    assert row() == ("done", 4, 0, None)
    for step in range(4, 7):
        writer.append(record(step))
    writer.close()
    assert row() == ("behind", 4, 3, None)


def test_a_damaged_ledger_is_not_replaced(tmp_path):
    write(tmp_path / "log", range(3)).close()
    out = tmp_path / "out"
    natgrad.process(tmp_path / "log", out)
    (chunk,) = [path for path in (out / "ledger.zarr" / "gram" / "c").rglob("*") if path.is_file()]
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(InputError, match="checksum mismatch") as refusal:
        natgrad.analyze(out, windows=[1, 2])
    assert "process the log again with --overwrite" in refusal.value.remedy
    assert chunk.read_bytes() == content
    (damage,) = natgrad.verify(out).damages
    assert damage.array == "gram"
    natgrad.process(tmp_path / "log", out, overwrite=True)
    require_stored(out, {(0, step): record(step) for step in range(3)})


@pytest.mark.parametrize("kind", ["longer", "restarted"])
def test_a_process_that_is_killed_at_any_change_to_files_loses_and_repeats_nothing(tmp_path, kind):
    log, base = tmp_path / "log", tmp_path / "base"
    base.mkdir()
    write(log, range(4)).close()
    natgrad.ingest(log, base)
    write(log, range(2, 6) if kind == "restarted" else range(4, 9), seed=kind == "restarted").close()
    program = [sys.executable, "-c", KILLED, log, base, tmp_path / "killed", "3"]
    done = subprocess.run([*map(str, program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
    last = {(0, step): record(step) for step in range(4)}
    attempt = int(kind == "restarted")
    last |= {(attempt, step): record(step, seed=attempt) for step in (range(2, 6) if attempt else range(4, 9))}
    for number in range(int(done.stdout)):
        require_stored(tmp_path / "killed" / str(number), last)
