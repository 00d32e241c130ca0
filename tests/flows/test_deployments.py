"""Test flows of many runs on a real Prefect server, a separate process with SQLite."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest

import commands
from commands import NATGRAD
from lazy import Lazy
from logs import random_walk, write_log, write_step
from natgrad.app import scan
from natgrad.app.status import status_of_run
from servers import process, wait_for

actions = Lazy("prefect.client.schemas.actions")
orchestration = Lazy("prefect.client.orchestration")
prefect_commands = Lazy("prefect.testing.cli")
settings = Lazy("prefect.settings")

# A server is ready after about ten seconds, or after minutes on a busy machine.
pytestmark = pytest.mark.timeout(1200)

STEPS = 12


def settings_of(server):
    """Return a context in which this process uses a server."""
    return settings.temporary_settings({settings.PREFECT_API_URL: server.environment["PREFECT_API_URL"]})


def flow_runs(server):
    with settings_of(server), orchestration.get_client(sync_client=True) as client:
        return client.read_flow_runs()


def states(root, out):
    """Return the state and the last step of every run."""
    rows = {run.name: status_of_run(run.out, run.source) for run in scan.find_runs(root, out)}
    return {name: (row["state"], row["last_step"]) for name, row in rows.items()}


def natgrad(server, *arguments):
    """Run the command in this process, which uses a server."""
    with settings_of(server):
        return commands.natgrad(*arguments)


@pytest.fixture
def root(tmp_path):
    """Write the logs of two valid runs and an invalid one."""
    write_log(tmp_path / "logs" / "first", random_walk(STEPS)[:2])
    write_log(tmp_path / "logs" / "group" / "second", random_walk(2, seed=1))
    bad = write_step(tmp_path / "logs" / "bad", 0, random_walk(1)[0])
    bad.write_bytes(bad.read_bytes()[:-5])
    # It was last written an hour ago, so it is no longer being written.
    os.utime(bad, (time.time() - 3600,) * 2)
    return tmp_path / "logs"


def test_a_schedule_processes_new_steps_and_an_invalid_run_fails_alone(server, root, tmp_path):
    out = tmp_path / "out"
    serve = (NATGRAD, "serve", root, out, "--every", "8", "--workers", "1", "--name", "scheduled")
    with process(*serve, environment=server.environment, log=tmp_path / "serve.log"):
        done = {"first": ("done", 1), "group/second": ("done", 1), "bad": ("failed", None)}
        wait_for(lambda: states(root, out) == done)
        for number, state in enumerate(random_walk(STEPS)[2:], start=2):
            write_step(root / "first", number, state)
        wait_for(lambda: states(root, out) == done | {"first": ("done", STEPS - 1)})
    assert scan.Outcome.of(out / "group" / "second").summary["new_steps"] == 2
    failed = [run for run in flow_runs(server) if run.name == f"process-run {out / 'bad'}"]
    assert len(failed) == 1
    for part in ("step_0.safetensors, step 0", "truncated", "write the step again"):
        assert part in failed[0].state.message
    listed = json.loads(natgrad(server, "status", out, "--json").stdout)["runs"]
    assert [row["run"] for row in listed if row["error"]] == ["bad"]


def test_two_concurrent_scans_process_every_run_once(server, tmp_path):
    runs = 3
    for number in range(runs):
        write_log(tmp_path / "logs" / f"twice-{number}", random_walk(3, seed=number))
    command = (NATGRAD, "scan", tmp_path / "logs", tmp_path / "out", "--workers", "1", "--json")
    started = [
        subprocess.Popen(
            [*map(str, command)],
            env={**os.environ, **server.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    output = [one.communicate() for one in started]
    assert [one.returncode for one in started] == [0, 0], output
    answers = [json.loads(answer) for answer, _ in output]
    assert sum(answer["processed"] for answer in answers) == runs
    assert sum(answer["unchanged"] + answer["skipped"] for answer in answers) == runs
    ended = [(run.state.name, run.state.message) for run in flow_runs(server) if "/twice-" in run.name]
    assert [name for name, _ in ended].count("Completed") == runs
    for name, message in ended:
        assert name == "Completed" or (name, "another process" in message) == ("Skipped", True)
    assert states(tmp_path / "logs", tmp_path / "out") == {f"twice-{number}": ("done", 2) for number in range(runs)}


KILLED = """
import os, signal, sys
from pathlib import Path
from natgrad_flows import runs
from natgrad.app import stages, worker

call = worker.Worker.call

def killed(self, function, *arguments, **options):
    # The stages run in another process. The flow dies between the first and the second.
    if function is not stages.ingest_stage:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, function, *arguments, **options)

worker.Worker.call = killed
runs.process_run(Path(sys.argv[1]), Path(sys.argv[2]), workers=1)
"""


def test_a_killed_flow_is_marked_and_its_run_continues(server, tmp_path):
    log, out = write_log(tmp_path / "logs" / "killed", random_walk(5)), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, log, out / "killed"]
    dead = subprocess.run(
        [*map(str, command)], env={**os.environ, **server.environment}, capture_output=True, check=False
    )
    assert dead.returncode == -9, dead.stderr.decode()
    (left,) = [run for run in flow_runs(server) if run.name == f"process-run {out / 'killed'}"]
    assert left.state.is_running()
    answer = json.loads(natgrad(server, "scan", log.parent, out, "--workers", "1", "--json").stdout)
    assert answer["processed"] == 1
    ended = {run.id: run.state for run in flow_runs(server) if run.name == f"process-run {out / 'killed'}"}
    assert ended.pop(left.id).is_crashed()
    assert [state.name for state in ended.values()] == ["Completed"]
    # The steps that the killed scan had ingested were not read again.
    assert scan.Outcome.of(out / "killed").summary["new_steps"] == 0


def events(server):
    """Return the length of each event of a flow run in the database, by the flow run."""
    query = "select resource_id, length(resource) + length(related) + length(payload) from events"
    found = {}
    with contextlib.closing(sqlite3.connect(server.home / "prefect.db")) as database:
        for resource, length in database.execute(query):
            found.setdefault(resource.removeprefix("prefect.flow-run."), []).append(length)
    return found


def test_a_run_of_a_scan_adds_little_to_the_history_and_old_flow_runs_are_deleted(server, tmp_path):
    def scanned(*options):
        done = natgrad(server, "scan", tmp_path / "logs", tmp_path / "out", "--workers", "1", "--json", *options)
        return json.loads(done.stdout)["processed"]

    def named():
        return [run.name for run in flow_runs(server) if "/small-" in run.name]

    runs = 6
    write_log(tmp_path / "logs" / "small-0", random_walk(3))
    assert scanned() == 1
    for number in range(1, runs + 1):
        write_log(tmp_path / "logs" / f"small-{number}", random_walk(3, seed=number))
    assert scanned() == runs
    assert len(named()) == runs + 1
    address = server.environment["PREFECT_API_URL"]
    with (
        settings.temporary_settings({settings.PREFECT_API_URL: address}),
        orchestration.get_client(sync_client=True) as client,
    ):
        made = {run.id for run in flow_runs(server) if "/small-" in run.name}
        assert not [one for one in client.read_artifacts() if one.flow_run_id in made]
        assert not [one for one in client.read_task_runs() if one.flow_run_id in made]
    # The server stores events, here the start and the end of a run, a few seconds later.
    wait_for(lambda: all(len(events(server).get(str(one), ())) == 2 for one in made))
    assert all(length < 1500 for one in made for length in events(server)[str(one)])
    assert scanned("--keep-days", "1") == 0
    assert len(named()) == runs + 1
    assert scanned("--keep-days", "0") == 0
    assert named() == []


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["serve", "ROOT", "OUT"], "no schedule is set"),
        (["serve", "ROOT", "OUT", "--cron", "* * * * *", "--every", "9"], "two schedules are set"),
        (
            ["serve", "ROOT", "OUT", "--cron", "now and then"],
            "--cron 'now and then' is not a schedule in cron syntax",
        ),
        (["serve", "ROOT", "OUT", "--every", "0"], "--every must be at least 1, got 0"),
        (["serve", "ROOT", "OUT", "--every", "9", "--window", "0"], "--window must be at least 1"),
        (["scan", "ROOT", "OUT", "--gamma", "-1"], "--gamma must be greater than 0"),
        (["deploy", "ROOT", "OUT", "--every", "9", "--pool", "none"], "no work pool 'none'"),
    ],
)
def test_an_invalid_schedule_is_rejected_before_anything_is_deployed(server, arguments, what):
    done = natgrad(server, *arguments)
    assert done.returncode == 2, done.stderr
    assert what in done.stderr
    assert "Traceback" not in done.stderr


def test_a_deployment_has_descriptions_and_an_old_deployment_is_reported(server, root, tmp_path):
    with settings_of(server), orchestration.get_client(sync_client=True) as client:
        old = client.create_flow_from_name("watch-runs")
        client.create_deployment(old, name="natgrad", entrypoint="flows.watch.watch_runs", tags=["natgrad"])
        client.create_work_pool(actions.WorkPoolCreate(name="here", type="process"))
        done = natgrad(server, "deploy", root, tmp_path / "out", "--pool", "here", "--every", "9", "--json")
        assert json.loads(done.stdout)["deployments"][0] == "scan-runs/natgrad", done.stderr
        assert "deployment watch-runs/natgrad was created by an older version" in done.stderr
        assert "prefect deployment delete watch-runs/natgrad" in done.stderr
        made = client.read_deployment_by_name("scan-runs/natgrad")
        form = made.parameter_openapi_schema["properties"]
        assert made.entrypoint == "natgrad_flows.scan.scan_runs"
        assert form["windows"]["description"].startswith("Windows of m updates")
        assert all(parameter["description"] for parameter in form.values())
        # The remedy of the message works.
        prefect_commands.invoke_and_assert(["--no-prompt", "deployment", "delete", "watch-runs/natgrad"])
        done = natgrad(server, "deploy", root, tmp_path / "out", "--pool", "here", "--every", "9", "--json")
        assert "older version" not in done.stderr
