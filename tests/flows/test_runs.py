"""Test the flows on Prefect's embedded server, one for all tests of this file."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import natgrad
from lazy import Lazy
from logs import random_walk, write_log, write_step
from natgrad.app import declarations, options, run, scan
from natgrad.app.status import status
from natgrad.schema.errors import InputError
from natgrad.sources import changes
from natgrad.storage import open_out, open_storage
from natgrad.store import open_trajectory
from objective_factories import trained, write
from servers import wait_for

prefect = Lazy("prefect")
exceptions = Lazy("prefect.exceptions")
filters = Lazy("prefect.client.schemas.filters")
flow_engine = Lazy("prefect.flow_engine")
orchestration = Lazy("prefect.client.orchestration")
runs = Lazy("natgrad_flows.runs")
shown = Lazy("natgrad_flows.artifacts")
scans = Lazy("natgrad_flows.scan")

WRITER = """
import sys, time
from natgrad.storage import open_storage
with (open_storage(sys.argv[1]) / "trajectory.zarr").lock("trajectory"):
    print("writing", flush=True)
    time.sleep(600)
"""

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(900)]


def task_runs():
    with orchestration.get_client(sync_client=True) as client:
        return {task_run.name: task_run for task_run in client.read_task_runs()}


@pytest.fixture
def log(tmp_path):
    return write_log(tmp_path / "log", random_walk(8))


def artifacts(key):
    with orchestration.get_client(sync_client=True) as client:
        named = filters.ArtifactFilter(key=filters.ArtifactFilterKey(any_=[key]))
        found = client.read_artifacts(artifact_filter=named)
    return [artifact.data for artifact in found]


def flow_runs():
    with orchestration.get_client(sync_client=True) as client:
        return {flow_run.name: flow_run for flow_run in client.read_flow_runs()}


def test_the_flow_gives_the_same_results_as_the_command_line(log, tmp_path):
    summary = runs.process_run(log, tmp_path / "by-flow", windows=[1, 2], workers=1)
    natgrad.process(log, tmp_path / "by-hand", windows=(1, 2), workers=1)
    one, other = (xr.open_datatree(tmp_path / name / "results.zarr") for name in ("by-flow", "by-hand"))
    xr.testing.assert_identical(one, other)
    assert summary["updates"] == 7
    assert (tmp_path / "by-flow" / "report.html").exists()


def test_the_flow_of_a_replay_gives_the_results_of_the_function(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    write(tmp_path / "log", trained((0, 1, 2)))
    options = {"objective": "objective_factories:quartic", "workers": 1}
    summary = runs.replay_run(tmp_path / "log", tmp_path / "by-flow", **options)
    natgrad.replay(tmp_path / "log", tmp_path / "by-hand", **options)
    one, other = (natgrad.open_results(tmp_path / name) for name in ("by-flow", "by-hand"))
    xr.testing.assert_identical(one["model"].to_dataset(), other["model"].to_dataset())
    assert (summary["gradient_source"], summary["new_evaluations"]) == ("replayed", 3)
    (page,) = artifacts(shown.key_of("replayed", tmp_path / "by-flow"))
    assert "| gradient source | `replayed` |" in page


def test_run_names_tags_and_artifacts_have_the_full_path_of_the_run(log, tmp_path):
    outs = [tmp_path / folder / "Run 7" for folder in ("exp", "exp2")]
    for out in outs:
        runs.process_run(log, out, workers=1)
    for out in outs:
        assert {f"ingest {out}", f"analyze {out}", f"report {out}"} <= set(task_runs())
        assert flow_runs()[f"process-run {out}"].tags == [f"run:{out}"]
        # One request for each tag, for its limit of concurrent tasks.
        assert not task_runs()[f"ingest {out}"].tags
        (page,) = artifacts(shown.key_of("analyzed", out))
        assert "| status | `effective 7` |" in page
        assert "100.0% of 7 updates are effective" in page
        assert "data:image/svg+xml;base64," in page
        assert f"Report: `{out / 'report.html'}`" in page
        assert "file://" not in page
        assert artifacts(shown.key_of("report", out)) == []


def test_a_report_has_a_link_if_a_web_server_shows_it(log, tmp_path):
    out = tmp_path / "exp" / "Run 8"
    runs.process_run(log, out, workers=1, report_url=f"{tmp_path}=http://lab:8000/runs/")
    (link,) = artifacts(shown.key_of("report", out))
    address = "http://lab:8000/runs/exp/Run%208/report.html"
    assert link == f"[Report of {out}]({address})"
    (page,) = artifacts(shown.key_of("analyzed", out))
    assert f"[Open the report]({address})" in page


def test_a_large_angle_sends_an_event(log, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("natgrad_flows.artifacts.emit_event", lambda *values, **named: sent.append((values, named)))
    runs.process_run(log, tmp_path / "small", workers=1, alert_angle=3.1)
    assert sent == []
    summary = runs.process_run(log, tmp_path / "large", workers=1, alert_angle=0.01)
    ((name,), named) = sent[0]
    assert name == "natgrad.angle-exceeded"
    assert named["resource"]["prefect.resource.name"] == str(tmp_path / "large")
    assert named["payload"]["angle"] == summary["angle_course"][-1] > 0.01


def test_bad_input_fails_immediately_with_its_message(tmp_path):
    with pytest.raises(InputError, match="no step files"):
        runs.process_run(_empty(tmp_path / "nothing"), tmp_path / "bad", workers=1)
    failed = flow_runs()[f"process-run {tmp_path / 'bad'}"]
    assert failed.state.is_failed()
    assert "no step files" in failed.state.message
    assert task_runs()[f"ingest {tmp_path / 'bad'}"].run_count == 1
    (text,) = artifacts(shown.key_of("failed", tmp_path / "bad"))
    assert "/bad**: there are no step files" in text.replace("\\", "")
    assert "- do: pass the folder" in text


def _empty(folder):
    folder.mkdir()
    return folder


def test_a_second_flow_processes_new_steps(log, tmp_path):
    runs.process_run(log, tmp_path / "grows", workers=1)
    for number, state in enumerate(random_walk(11)[8:], start=8):
        write_step(log, number, state)
    summary = runs.process_run(log, tmp_path / "grows", workers=1)
    assert (summary["new_steps"], summary["updates"]) == (3, 10)


def test_an_error_that_may_heal_is_retried(log, tmp_path):
    # Another process holds the lock of the trajectory until the first attempt has failed.
    out = tmp_path / "heals"
    with subprocess.Popen([sys.executable, "-c", WRITER, out], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"

        def release():
            name = f"ingest {out}"
            wait_for(lambda: name in task_runs() and task_runs()[name].state.is_scheduled())
            writer.kill()

        releasing = threading.Thread(target=release)
        releasing.start()
        assert runs.ingest_run(log, out)["new_steps"] == 8
        releasing.join()
    assert task_runs()[f"ingest {out}"].run_count > 1


@pytest.mark.usefixtures("hostile")
def test_a_flow_that_hangs_fails_in_time(tmp_path):
    # tests/app/test_scan.py has logs that crash the process or exhaust its memory.
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "hang").touch()
    with pytest.raises(InputError, match="timeout: no progress for 5 s") as failure:
        runs.process_run(tmp_path / "log", tmp_path / "out", workers=1, stall_timeout=5)
    assert "the flow can be run again" in failure.value.remedy
    assert task_runs()[f"ingest {tmp_path / 'out'}"].run_count == 1
    assert scan.Outcome.of(tmp_path / "out").error["heals"]


def test_longer_work_shows_the_progress_of_each_stage(tmp_path):
    @prefect.flow
    def work(interval):
        progress = shown.StageProgressArtifacts(tmp_path / f"run-{interval}", interval)
        for stage in ("ingest", "results"):
            for done in range(1, 4):
                progress(stage, done, 3)

    work(0)
    for stage in ("ingest", "results"):
        assert artifacts(shown.key_of(stage, tmp_path / "run-0")) == [100]
    work(60)
    assert artifacts(shown.key_of("ingest", tmp_path / "run-60")) == []


def test_a_run_that_another_process_works_on_is_skipped_with_a_message(log, tmp_path):
    with scan.only_processor(tmp_path / "held"):
        answer = runs.process_run(log, tmp_path / "held", workers=1)
    assert answer == {"skipped": "another process is working on this run"}
    skipped = flow_runs()[f"process-run {tmp_path / 'held'}"].state
    assert (skipped.name, skipped.type.value) == ("Skipped", "COMPLETED")
    assert str(tmp_path / "held") in skipped.message


def test_a_flow_accepts_several_sources_like_the_command_line(log, tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("step,nll\n" + "".join(f"{step + 1},{step / 8}\n" for step in range(8)))
    os.utime(metrics, (1, 1))
    options = {"mapping": {"loss": "nll"}, "shift": {"loss": -1}}
    runs.process_run([metrics, log], tmp_path / "joined", workers=1, **options)
    run.ingest_run([metrics, log], tmp_path / "by-hand", **options)
    one, other = (open_trajectory(tmp_path / name / "trajectory.zarr") for name in ("joined", "by-hand"))
    assert one.fingerprint() == other.fingerprint()
    assert one.scalar("loss").tolist() == [step / 8 for step in range(8)]
    (row,) = [row for row in status(tmp_path) if row["run"] == "joined"]
    assert (row["last_step"], row["lag"]) == (7, 0)


def test_a_folder_with_a_run_file_is_one_run_of_a_scan(tmp_path):
    folder = tmp_path / "logs" / "mixed"
    write_log(folder, [{k: v for k, v in state.items() if k != "loss"} for state in random_walk(4)])
    (folder / "metrics.csv").write_text("step,loss\n0,0.5\n1,0.25\n")
    (folder / "run.toml").write_text('[[source]]\npath = "."\n[[source]]\npath = "metrics.csv"\n')
    # The file of a logger without states is not a run.
    (tmp_path / "logs" / "scalars").mkdir()
    (tmp_path / "logs" / "scalars" / "metrics.csv").write_text("step,loss\n0,1.0\n")

    def scanned():
        answer = scans.scan_runs(tmp_path / "logs", tmp_path / "out", workers=1)
        assert not answer["failed"]
        states = open_trajectory(tmp_path / "out" / "mixed" / "trajectory.zarr")
        return answer["processed"], answer["unchanged"], states.scalar("loss").tolist()

    # The last state of a run may lack its loss.
    np.testing.assert_equal(scanned(), (1, 0, [0.5, 0.25, np.nan]))
    np.testing.assert_equal(scanned(), (0, 1, [0.5, 0.25, np.nan]))
    # A step that is missing in the log of scalars is stored when the log has not been written to for a long time.
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - 2 * changes.SETTLED_SECONDS,) * 2)
    np.testing.assert_equal(scanned(), (1, 0, [0.5, 0.25, np.nan, np.nan]))
    assert scanned()[:2] == (0, 1)


@pytest.mark.parametrize(
    "parameters",
    [
        {"windows": [0]},
        {"workers": 0},
        {"gammas": [-1.0]},
        {"learning_rate": 0},
        {"mapping": {"gradients": "g"}},
        {"mapping": {"gradient": ""}},
        {"shift": {"gradient": 0.5}},
        {"shift": {"step": 1}},
        {"store": "zip"},
        {"attempt": -1},
        {"memory_limit": "plenty"},
    ],
)
def test_parameters_are_validated_before_a_run_starts(log, tmp_path, parameters):
    with pytest.raises(exceptions.ParameterTypeError) as refusal:
        runs.process_run(log, tmp_path / "never", **parameters)
    with pytest.raises(InputError) as same:
        declarations.validated(options.RunOptions, parameters)
    assert same.value.what in str(refusal.value)
    assert not (tmp_path / "never").exists()


def test_options_that_depend_on_each_other_or_on_the_steps_are_checked_before_anything_is_stored(log, tmp_path):
    for parameters, message in (
        ({"scheduler": "tcp://host:1", "cluster": "slurm"}, "exclude each other"),
        ({"windows": [8]}, "--window 8 is longer than the run, which has 7 updates"),
        ({"attempt": 1}, "there is no attempt 1"),
    ):
        with pytest.raises(InputError, match=message):
            runs.process_run(log, tmp_path / "never", **parameters)
        assert not (tmp_path / "never" / "trajectory.zarr").exists()


def test_many_concurrent_runs_fail_alone_and_compute_only_new_steps(tmp_path):
    logs, out = tmp_path / "logs", tmp_path / "out"
    for number in range(3):
        write_log(logs / f"many-{number}", random_walk(4, seed=number))
    _empty(logs / "no-run")
    bad = logs / "many-1" / "step_2.safetensors"
    bytes_before = bad.read_bytes()
    bad.write_bytes(bytes_before[:-3])

    def scanned():
        answer = scans.scan_runs(logs, out, workers=1, at_once=2)
        return [answer[what] for what in ("processed", "unchanged", "failed")], answer["failures"]

    numbers, failures = scanned()
    assert numbers == [2, 0, 1]
    assert set(failures) == {"many-1"}
    assert scanned() == ([0, 2, 1], failures)
    bad.write_bytes(bytes_before)
    write_step(logs / "many-0", 4, random_walk(5)[4])
    assert scanned() == ([2, 1, 0], {})
    assert scan.Outcome.of(out / "many-0").summary["new_steps"] == 1
    path = out / "many-0"
    assert {f"run:{path}", "natgrad"} <= set(flow_runs()[f"process-run {path}"].tags)
    tables = artifacts("scan")
    assert any("truncated" in table or "incomplete" in table for table in tables)


def test_a_scan_does_not_repeat_a_run_started_with_default_parameters(log, tmp_path):
    # A deployment starts it in this way: options that are not set have their defaults.
    out = tmp_path / "out" / "log"
    flow_engine.run_flow(runs.process_run, parameters={"source": str(log), "out": str(out), "workers": 1})
    answer = scans.scan_runs(log.parent, out.parent, workers=1)
    assert (answer["processed"], answer["unchanged"]) == (0, 1)


def test_telemetry_is_off_unless_the_environment_enables_it():
    names = "PREFECT_SERVER_ANALYTICS_ENABLED", "DO_NOT_TRACK"
    code = f"import natgrad_flows, os; print(*map(os.environ.get, {names}))"
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PREFECT_SERVER_ANALYTICS_ENABLED", "DO_NOT_TRACK")
    }
    for chosen, expected in (({}, "false 1"), ({"DO_NOT_TRACK": "0"}, "false 0")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=clean | chosen, check=True
        )
        assert done.stdout.strip() == expected


@pytest.mark.usefixtures("s3_server")
def test_a_flow_accepts_urls(log):
    out = "s3://bucket/out"
    for file in sorted(log.iterdir()):
        open_storage(f"s3://bucket/log/{file.name}").put(file.read_bytes())
    assert runs.process_run("s3://bucket/log", out, workers=1, store="icechunk")["new_steps"] == 8
    assert [row["message"].partition(" ")[0] for row in open_out(out).versions()][:3] == [
        "results",
        "ledger",
        "trajectory",
    ]
    outcome = scan.Outcome.of(out)
    assert outcome.is_current(scan.listing("s3://bucket/log"), outcome.options, out)
    assert "store" not in outcome.options
    (page,) = artifacts(shown.key_of("analyzed", out))
    assert "Report: `s3://bucket/out/report.html`" in page
    with (open_storage(out) / "processing").lock("run"):
        assert "another process is writing this run" in runs.process_run("s3://bucket/log", out)["skipped"]
    assert runs.process_run("s3://bucket/log", out, workers=1)["new_steps"] == 0
