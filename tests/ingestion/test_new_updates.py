"""Runs that were restarted, and many runs in one trajectory: no update leads from one to another."""

import functools
import itertools
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logs import TENSORS, random_walk, write_log, write_step
from natgrad.app.describe import describe_run
from natgrad.app.folder import RunFolder
from natgrad.app.run import Analysis, analyze_run, ingest_run, report_run
from natgrad.app.verification import verify_run
from natgrad.compute.plan import PlanLimits
from natgrad.ingestion import Extent
from natgrad.results import dataset as results
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits, Layout, storage_dtype
from natgrad.schema.variables import Status
from natgrad.sources.checkpoints.step_folder import StepFolder
from natgrad.store import checksum, open_ledger, open_trajectory
from opened import create_trajectory, read_results

ELEMENTS = 17  # of `logs.TENSORS`


@pytest.fixture(name="ingest_run", params=[8, 3 * ELEMENTS], ids=["wide", "deep"])
def small_ingest_run(request):
    """`ingest_run` with small chunks, so that a short run has several."""
    return functools.partial(ingest_run, limits=IngestLimits(chunk_elements=request.param))


SERIAL = Analysis(workers=1)
_clock = itertools.count(10**9)


def log_steps(folder, states, numbers):
    """Log steps, each file a second later than the previous one, for any resolution of the file system's clock."""
    for number in numbers:
        path = write_step(folder, number, states[number])
        os.utime(path, ns=(10**9 * next(_clock),) * 2)
    return folder


def stored_states(out):
    """States of a trajectory: step, attempt and parameters."""
    trajectory = open_trajectory(RunFolder.of(out).trajectory)
    parts = []
    for column in range(trajectory.columns):
        first, last = trajectory.column(column)
        rows = np.zeros((trajectory.n_states, trajectory.chunk[1]), storage_dtype(trajectory.dtypes["parameter"]))
        trajectory.read("parameter", 0, trajectory.n_states, column, rows)
        parts.append(rows[:, : last - first])
    numbers = (trajectory.scalar(name).tolist() for name in ("step", "attempt"))
    return list(zip(*numbers, np.concatenate(parts, axis=1), strict=True))


def flat(state):
    return np.concatenate([np.ravel(state[f"parameter/{name}"]) for name in sorted(TENSORS)])


def variables(out, group="model"):
    """Variables of results by name, with the steps as the leading axis."""
    dataset = read_results(RunFolder.of(out).results)[group].to_dataset()
    return {name: dataset[name].values for name in (*dataset.data_vars, "step")}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def alone(folder, states, numbers, ingest=ingest_run, **options):
    """Return the results of steps that are processed as a separate run."""
    log_steps(folder / "log", states, numbers)
    ingest(folder / "log", folder / "out")
    analyze_run(folder / "out", Analysis(workers=1, **options))
    return folder / "out"


# A run that was restarted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [False, True], ids=["overwritten", "second folder"])
def test_a_restarted_run_continues_as_a_new_attempt(ingest_run, tmp_path, log, out, elsewhere):
    first, second = random_walk(10), random_walk(13, seed=1)
    ingest_run(log_steps(log, first, range(10)), out)
    folder = tmp_path / "restarted" if elsewhere else log
    (warning,) = ingest_run(log_steps(folder, second, range(6, 13)), out).warnings
    assert warning == (
        "the run was restarted before step 6: this step and later ones belong to attempt 1; "
        "4 steps of attempt 0 are kept (--attempt 0)"
    )
    rows = stored_states(out)
    assert [row[:2] for row in rows] == [*((n, 0) for n in range(10)), *((n, 1) for n in range(6, 13))]
    for (step, attempt, parameter), state in zip(rows, [*first, *second[6:]], strict=True):
        np.testing.assert_array_equal(parameter, flat(state), err_msg=f"{step} {attempt}")
    # The current run is the first attempt up to the restart, then the second; with --attempt 0 it is the first.
    analyze_run(out, SERIAL)
    before = variables(alone(tmp_path / "a", first, range(6), ingest=ingest_run))
    after = variables(alone(tmp_path / "b", second, range(6, 13), ingest=ingest_run))
    # The smallest windows are excluded, because they depend on the complete run.
    of_steps = [name for name in before if not name.startswith(("effective_window", "decreasing_window"))]
    found = variables(out)
    assert_same(
        {name: found[name] for name in of_steps},
        {name: np.concatenate([before[name], after[name]]) for name in of_steps},
    )
    dataset = read_results(RunFolder.of(out).results)["model"]
    assert dataset["attempt"].values.tolist() == [0] * 5 + [1] * 6
    analyze_run(out, Analysis(workers=1, attempt=0))
    assert_same(variables(out), variables(alone(tmp_path / "c", first, range(10), ingest=ingest_run)))
    with pytest.raises(InputError, match="there is no attempt 2; the last attempt is 1"):
        analyze_run(out, Analysis(workers=1, attempt=2))
    assert ingest_run(folder, out).new_steps == 0


def test_no_window_spans_a_restart(tmp_path, log, out):
    ingest_run(log_steps(log, random_walk(6), range(6)), out)
    ingest_run(log_steps(log, random_walk(9, seed=1), range(4, 9)), out)
    analyze_run(out, Analysis(workers=1, windows=(1, 2, 3)))
    model = read_results(RunFolder.of(out).results)["model"].to_dataset()
    assert model["step"].values.tolist() == [0, 1, 2, 4, 5, 6, 7]
    for m, cut in {1: [], 2: [2, 7], 3: [1, 2, 6, 7]}.items():
        at = model.sel(window=m, descent="gradient")
        unverifiable = at["status"] == Status.UNVERIFIABLE
        assert model["step"].values[unverifiable.values].tolist() == cut
        for name in ("angle", "update_norm", "loss_average", "loss_decrease"):
            assert (np.isnan(at[name]) == unverifiable).all(), name


def test_a_restarted_run_is_followed_before_it_reaches_its_former_end(ingest_run, log, out):
    first, second = random_walk(10), random_walk(12, seed=1)
    ingest_run(log_steps(log, first, range(10)), out)
    log_steps(log, second, [5])
    # A single file may also have been changed by a user.
    with pytest.raises(
        InputError, match=r"(?s)step 5 is already ingested, with .*run again once it has logged more steps"
    ):
        ingest_run(log, out)
    log_steps(log, second, [6, 7])
    assert ingest_run(log, out).new_steps == 3
    assert [row[:2] for row in stored_states(out)[10:]] == [(5, 1), (6, 1), (7, 1)]
    assert ingest_run(log, out).new_steps == 0  # steps 8 and 9 belong to the previous attempt
    assert ingest_run(log_steps(log, second, range(8, 12)), out).last_step == 11
    assert [row[:2] for row in stored_states(out)[10:]] == [(n, 1) for n in range(5, 12)]
    for (step, _, parameter), state in zip(stored_states(out), [*first, *second[5:]], strict=True):
        np.testing.assert_array_equal(parameter, flat(state), err_msg=str(step))


def test_steps_that_a_restart_logged_with_the_same_content_are_the_same_steps(log, out):
    states = random_walk(8)
    ingest_run(log_steps(log, states, range(6)), out)
    summary = ingest_run(log_steps(log, states, range(3, 8)), out)
    assert (summary.new_steps, summary.attempts, summary.warnings) == (2, 1, [])


@pytest.mark.parametrize(
    ("changed", "step"), [([4], 4), ([4, 6], 4), ([4, 5], 4)], ids=["one", "two", "older than what follows"]
)
def test_a_change_in_the_middle_is_refused_by_name_and_nothing_is_written(log, out, changed, step):
    ingest_run(log_steps(log, random_walk(9), range(9)), out)
    before = stored_states(out)
    log_steps(log, random_walk(9, seed=1), changed)
    if changed == [4, 5]:
        for number in (4, 5):
            os.utime(log / f"step_{number}.safetensors", ns=(number, number))
    with pytest.raises(InputError, match=f"step {step} is already ingested, with .*") as caught:
        ingest_run(log, out)
    assert f"step_{step}" in caught.value.where
    assert [row[:2] for row in stored_states(out)] == [row[:2] for row in before]


def test_another_run_is_rejected_but_a_run_restarted_from_the_first_step_is_an_attempt(tmp_path, log, out):
    ingest_run(log_steps(log, random_walk(4), range(4)), out)
    other = log_steps(tmp_path / "other", random_walk(5, seed=1), range(5))
    with pytest.raises(InputError, match="step 0 is already ingested, with "):
        ingest_run(other, out)
    log_steps(log, random_walk(4, seed=2), range(3))
    (log / "step_3.safetensors").unlink()
    assert ingest_run(log, out).attempts == 2
    assert [row[:2] for row in stored_states(out)] == [*((n, 0) for n in range(4)), *((n, 1) for n in range(3))]
    analyze_run(out, SERIAL)
    assert variables(out)["step"].tolist() == [0, 1]


def test_a_run_with_one_state_since_its_restart_has_no_update_yet(log, out):
    ingest_run(log_steps(log, random_walk(3), range(3)), out)
    shutil.rmtree(log)
    ingest_run(log_steps(log, random_walk(1, seed=1), [0]), out)
    with pytest.raises(InputError, match=r"(?s)no two logged states follow each other.*restarted"):
        analyze_run(out, SERIAL)


def test_a_restart_recomputes_only_the_ledger_chunks_of_its_updates(log, out):
    chunks = IngestLimits(chunk_elements=2 * ELEMENTS)
    limits = PlanLimits(least_tile_bytes=1, chunks_of_small_run=2, least_updates=1)
    ingest_run(log_steps(log, random_walk(9), range(9)), out, limits=chunks)
    assert analyze_run(out, SERIAL, limits=limits).computed_chunks == 2
    ingest_run(log_steps(log, random_walk(9, seed=1), range(7, 9)), out, limits=chunks)
    summary = analyze_run(out, SERIAL, limits=limits)
    assert (summary.chunks, summary.computed_chunks) == (3, 1)
    gram, ratio = open_ledger(RunFolder.of(out).ledger).read()
    assert np.isnan(gram[8]).all()
    assert np.isnan(ratio[8]).all()
    assert not np.isnan(np.delete(gram, 8, axis=0)).any()


@settings(max_examples=15)
@given(
    restarts=st.lists(st.tuples(st.integers(0, 9), st.integers(2, 6)), max_size=3),
    looks=st.integers(0, 2**16 - 1),
    chunk=st.sampled_from([(1, 8), (3, 17), (64, 17)]),
)
def test_any_history_of_restarts_leaves_every_step_once_and_every_attempt_readable(
    tmp_path_factory, restarts, looks, chunk
):
    folder = tmp_path_factory.mktemp("history")
    log, out = folder / "log", folder / "out"
    looked = itertools.chain((bool(looks >> bit & 1) for bit in range(16)), itertools.repeat(False))
    states, last = random_walk(30), -1
    history = [(0, 6), *restarts]
    model: dict[int, tuple[int, int]] = {}
    limits = IngestLimits(chunk=chunk)
    for attempt, (begin, count) in enumerate(history):
        begin = min(begin, last + 1)
        states = [*states[:begin], *random_walk(30, seed=attempt)[begin:]]
        if attempt and begin <= last:
            # A run that restarts from a checkpoint may remove its later logs.
            for number in range(begin, last + 1):
                (log / f"step_{number}.safetensors").unlink()
        for number in range(begin, begin + count):
            log_steps(log, states, [number])
            # A scan of a run with one new state, or none: nothing is lost or ingested twice.
            if next(looked) and number > begin:
                ingest_run(log, out, limits=limits)
        ingest_run(log, out, limits=limits)
        last = begin + count - 1
        model = {n: kept for n, kept in model.items() if n < begin}
        model |= {n: (attempt, n) for n in range(begin, last + 1)}
    trajectory = open_trajectory(RunFolder.of(out).trajectory)
    rows = np.flatnonzero(trajectory.current())
    everything = stored_states(out)
    assert [everything[row][0] for row in rows] == sorted(model)
    for row in rows:
        np.testing.assert_array_equal(everything[row][2], flat(states[everything[row][0]]))
    spans = trajectory.spans()
    for row, (step, attempt, _) in enumerate(everything[1:]):
        assert spans[row] == ((step - everything[row][0]) if attempt == everything[row][1] else 0)


# Results of another run ----------------------------------------------------------------------------------------


SAME_TIME = (10**18, 10**18)


def log_at_one_time(folder, states):
    """Log steps with equal times, as a reproducible image or ``tar --mtime`` leaves them."""
    for number, state in enumerate(states):
        os.utime(write_step(folder, number, state), ns=SAME_TIME)
    return folder


def copied(source, target):
    """Copy each file over that of another run, with its times and into its inode, as ``cp -p`` does."""
    for path in source.iterdir():
        shutil.copy2(path, target / path.name)


def synchronized(source, target):
    """Replace each file by a copy with the same time, as ``rsync -t`` does."""
    for path in source.iterdir():
        shutil.copy2(path, target / f".{path.name}")
        (target / f".{path.name}").rename(target / path.name)


def linked(source, target):
    """Replace each file by a hard link."""
    for path in source.iterdir():
        (target / path.name).unlink()
        os.link(path, target / path.name)


def rewritten(source, target):
    """Change the bytes of each file in place, and set its former time."""
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
        os.utime(target / path.name, ns=SAME_TIME)


def exchanged(source, target):
    """Exchange the folders."""
    shutil.rmtree(target)
    source.rename(target)


def test_another_run_with_equal_names_sizes_and_times_is_refused_with_both_locations(tmp_path, out):
    one, other = (log_at_one_time(tmp_path / name, random_walk(5, seed=seed)) for seed, name in enumerate("ab"))
    assert [(p.name, p.stat().st_size, p.stat().st_mtime) for p in sorted(one.iterdir())] == [
        (p.name, p.stat().st_size, p.stat().st_mtime) for p in sorted(other.iterdir())
    ]
    ingest_run(one, out)
    before = stored_states(out)
    with pytest.raises(InputError, match=r"step 0 is already ingested, with loss .*, and now has ") as refusal:
        ingest_run(other, out)
    assert refusal.value.where == f"{other / 'step_0.safetensors'}, step 0"
    assert f"it was ingested from {one / 'step_0.safetensors'}" in refusal.value.why
    assert len(stored_states(out)) == len(before) == 5


@pytest.mark.parametrize("change", [copied, synchronized, linked, rewritten, exchanged])
def test_a_run_copied_over_another_one_is_found_by_its_contents(tmp_path, log, out, change):
    first, second = random_walk(5), random_walk(5, seed=1)
    ingest_run(log_at_one_time(log, first), out)
    change(log_at_one_time(tmp_path / "other", second), log)
    assert {path.stat().st_mtime_ns for path in log.iterdir()} == {10**18}
    summary = ingest_run(log, out)
    assert (summary.new_steps, summary.attempts) == (5, 2)
    for (_, _, parameter), state in zip(stored_states(out), [*first, *second], strict=True):
        np.testing.assert_array_equal(parameter, flat(state))
    analyze_run(out, SERIAL)
    assert_same(variables(out), variables(alone(tmp_path / "alone", second, range(5))))


@pytest.mark.parametrize("step", range(5))
def test_one_step_rewritten_with_its_size_and_time_is_refused(log, out, step):
    ingest_run(log_at_one_time(log, random_walk(5)), out)
    os.utime(write_step(log, step, random_walk(5, seed=1)[step]), ns=SAME_TIME)
    if step == 4:  # the last step is from a run that was restarted before it
        assert ingest_run(log, out).attempts == 2
        return
    with pytest.raises(InputError, match=f"step {step} is already ingested, with "):
        ingest_run(log, out)


@pytest.fixture
def opened(monkeypatch):
    """Steps that were opened, in order."""
    steps, whole = [], StepFolder.open
    monkeypatch.setattr(StepFolder, "open", lambda self, step: steps.append(step.number) or whole(self, step))
    return steps


def moved(log, target):
    return log.rename(target)


def copied_elsewhere(log, target):
    return shutil.copytree(log, target)


def copied_without_times(log, target):
    return shutil.copytree(log, target, copy_function=shutil.copyfile)


def linked_elsewhere(log, target):
    return shutil.copytree(log, target, copy_function=os.link)


def named_by_a_link(log, target):
    target.symlink_to(log)
    return target


@pytest.mark.parametrize("move", [moved, copied_elsewhere, copied_without_times, linked_elsewhere, named_by_a_link])
def test_the_same_contents_elsewhere_continue_without_a_second_ingest(tmp_path, log, out, opened, move):
    states = random_walk(8)
    ingest_run(log_at_one_time(log, states[:5]), out)
    elsewhere = move(log, tmp_path / "elsewhere")
    opened.clear()
    summary = ingest_run(elsewhere, out)
    assert (summary.new_steps, summary.attempts, summary.warnings) == (0, 1, [])
    assert set(opened) == set(range(5))
    opened.clear()
    assert ingest_run(elsewhere, out).new_steps == 0
    assert opened == []  # the new identity was recorded
    sources = open_trajectory(RunFolder.of(out).trajectory).sources()
    assert {source["folder"] for source in sources} == {str(elsewhere)}
    assert describe_run(out)["source"] == str(elsewhere)
    assert verify_run(out) == []
    write_log(elsewhere, states[5:], numbers=[5, 6, 7])
    assert ingest_run(elsewhere, out).new_steps == 3
    for (_, _, parameter), state in zip(stored_states(out), states, strict=True):
        np.testing.assert_array_equal(parameter, flat(state))


def test_if_anything_changed_the_last_step_is_also_read(log, out, opened):
    ingest_run(log_at_one_time(log, random_walk(6)), out)
    opened.clear()
    ingest_run(log, out)
    assert opened == []
    (log / "step_2.safetensors").chmod(0o600)  # only the status change time
    ingest_run(log, out)
    assert set(opened) == {2, 5}


def test_a_file_of_a_superseded_attempt_that_was_touched_is_not_a_new_step(log, out):
    first, second = random_walk(8), random_walk(8, seed=1)
    ingest_run(log_steps(log, first, range(8)), out)
    ingest_run(log_steps(log, second, [4, 5]), out)
    (log / "step_7.safetensors").chmod(0o600)
    assert ingest_run(log, out).new_steps == 0


def test_a_continuation_in_another_folder_without_a_common_step_is_a_warning(tmp_path, log, out):
    states = random_walk(6)
    ingest_run(log_steps(log, states, range(3)), out)
    (warning,) = ingest_run(log_steps(tmp_path / "b", states, range(3, 6)), out).warnings
    assert warning.startswith(f"step 3 and later steps, in {tmp_path / 'b'}, continue those of {log}")


# Many runs -----------------------------------------------------------------------------------------------------


def write_sweep(folder, lengths, begin=0):
    """Log runs of the given lengths, or only their steps from ``begin`` on."""
    for index, length in enumerate(lengths):
        log_steps(folder / f"run_{index}", random_walk(length, seed=index), range(begin, length))
    return folder


def test_a_sweep_has_the_results_of_its_runs_on_a_separate_axis(tmp_path, out):
    lengths = [5, 9, 2, 7]
    ingest_run(write_sweep(tmp_path / "sweep", lengths), out, sweep=True)
    analyze_run(out, Analysis(workers=1, windows=(1, 3)))
    tree = read_results(RunFolder.of(out).results)
    assert tree["model"].sizes == {"run": 4, "step": 8, "descent": 4, "window": 2, "gamma": 5}
    assert tree["tensor"].sizes["tensor"] == len(TENSORS)
    trees = results.runs(tree)
    assert list(trees) == [f"run_{index}" for index in range(4)]
    for index, length in enumerate(lengths):
        windows = (1, 3) if length > 3 else (1,)
        single = alone(tmp_path / f"alone_{index}", random_walk(length, seed=index), range(length), windows=windows)
        for group in ("model", "tensor"):
            expected = variables(single, group)
            found = trees[f"run_{index}"][group].to_dataset().sel(window=list(windows))
            assert_same({name: found[name].values for name in (*found.data_vars, "step")}, expected)
        absent = tree["model"]["status"].sel(run=f"run_{index}").isel(step=slice(length - 1, None))
        assert (absent == Status.NOT_LOGGED).all()
    report_run([out])


def test_runs_that_continue_after_others_lose_no_update(tmp_path, out):
    sweep = tmp_path / "sweep"
    ingest_run(write_sweep(sweep, [3, 4]), out, sweep=True)
    assert ingest_run(sweep, out, sweep=True).new_steps == 0
    write_sweep(sweep, [6, 5], begin=3)
    log_steps(sweep / "run_2", random_walk(3, seed=2), range(3))
    (sweep / "notes.txt").write_text("of the sweep")
    assert ingest_run(sweep, out, sweep=True).new_steps == 7
    analyze_run(out, SERIAL)
    at_once = tmp_path / "at_once"
    ingest_run(write_sweep(tmp_path / "again", [6, 5, 3]), at_once, sweep=True)
    analyze_run(at_once, SERIAL)
    for group in ("model", "tensor"):
        assert_same(variables(out, group), variables(at_once, group))
    with pytest.raises(InputError, match="the trajectory contains a sweep, but the log does not"):
        ingest_run(sweep / "run_0", out)


def test_a_run_of_a_sweep_that_was_restarted_is_another_attempt_of_it_alone(tmp_path, out):
    sweep = tmp_path / "sweep"
    ingest_run(write_sweep(sweep, [4, 4]), out, sweep=True)
    log_steps(sweep / "run_0", random_walk(5, seed=7), range(2, 5))
    (warning,) = ingest_run(sweep, out, sweep=True).warnings
    assert warning.startswith("run run_0 was restarted before step 2")
    analyze_run(out, SERIAL)
    model = read_results(RunFolder.of(out).results)["model"]
    status = model["status"].sel(window=1, descent="gradient") != Status.NOT_LOGGED
    assert status.sel(run="run_0").values.tolist() == [True, False, True, True]
    assert status.sel(run="run_1").values.tolist() == [True, True, True, False]
    assert model["attempt"].sel(run="run_0").values.tolist() == [0, 0, 1, 1]


def test_a_folder_without_runs_is_refused(tmp_path, out):
    (tmp_path / "sweep").mkdir()
    for path, message in [
        (tmp_path / "sweep", "this folder contains no runs"),
        (tmp_path / "no", "a sweep must be one folder"),
    ]:
        with pytest.raises(InputError, match=message):
            ingest_run(path, out, sweep=True)


# The extent of a trajectory, computed before it is written -----------------------------------------------------


@st.composite
def restarted_runs(draw):
    """Steps and attempts of a run that is restarted from an older state a few times, in the order of logging."""
    rows, step = [], 0
    for attempt in range(draw(st.integers(1, 4))):
        step = draw(st.integers(0, step)) if attempt else 0
        for _ in range(draw(st.integers(1, 4))):
            rows.append((step, attempt))
            step += 1
    return rows


@settings(max_examples=40)
@given(restarted_runs())
def test_extent_counts_the_updates_of_the_trajectory(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("extent") / "trajectory.zarr"
    dtypes = {"parameter": "float32", "gradient": "float32"}
    trajectory = create_trajectory(path, Layout.from_shapes({"a": ((2,), "float32")}), dtypes, (16, 2))
    states = np.zeros((len(rows), 2), np.uint32)
    for name in dtypes:
        trajectory.write(name, 0, 0, states)
    steps, attempts = map(list, zip(*rows, strict=True))
    numbers = np.ones(len(rows))
    sums = {name: [[checksum(state)] for state in states] for name in dtypes}
    trajectory.commit(steps, {"loss": numbers, "learning_rate": numbers}, [{}] * len(rows), sums, attempts)
    extent = Extent.of(open_trajectory(path))
    assert extent == Extent(tuple(("", *row) for row in rows))
    assert extent.attempts == max(attempts) + 1
    for attempt in (None, *range(extent.attempts)):
        current = trajectory.current(attempt)
        updates = (trajectory.spans() > 0) & current[:-1] & current[1:]
        assert extent.updates(attempt) == updates.sum()


def test_extent_counts_the_longest_run_of_a_sweep():
    extent = Extent((("a", 0, 0), ("a", 1, 0), ("b", 0, 0), ("b", 10, 0), ("b", 20, 0)))
    assert (extent.attempts, extent.updates()) == (1, 2)
    assert Extent(()).updates() == 0
