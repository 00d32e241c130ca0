"""Test Dask clusters by name and by address: requests of jobs, and a pass whose workers and scheduler fail.

Slurm is a stub: its `sbatch` starts the job script, which starts real workers.
"""

import contextlib
import gc
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import dask
import dask_jobqueue  # noqa: F401  (what it has in Dask's configuration must be there before ours)
import psutil
import pytest
from distributed import Client, LocalCluster
from distributed.security import Security
from test_ledger_pass import CHUNK, ELEMENTS, ROWS, SHAPES, bits, compute_small

import natgrad
from logs import walk_arrays, write_trajectory
from natgrad.compute import clusters, executors
from natgrad.compute.work import calls
from natgrad.schema.errors import InputError, Unavailable
from natgrad.schema.version import __version__
from natgrad.storage import open_storage
from natgrad.store import open_ledger
from servers import free_port, kill, process, wait_for

SBATCH = """#!/bin/sh
# A stub of Slurm for Dask's jobs: the job runs in a separate session, and its number is printed.
cp "$1" "$STUB/script"
cp "$1" "$STUB/script-$$"  # as Slurm does: Dask removes its own
setsid sh "$STUB/script-$$" > /dev/null 2>&1 &
echo $! >> "$STUB/jobs"
echo "Submitted batch job $!"
"""

SCANCEL = """#!/bin/sh
for job in "$@"; do kill -- -"$job"; done
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Provide a stub of Slurm, with its configuration for Dask."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "jobs").touch()
    for name, text in {"sbatch": SBATCH, "scancel": SCANCEL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("STUB", str(folder))
    job = {
        "cores": 1,
        "processes": 1,
        "memory": "1GB",
        "queue": "long",
        "walltime": "02:00:00",
        "interface": "lo",
        "scheduler-options": {"interface": "lo", "dashboard_address": "127.0.0.1:0"},
        "job-script-prologue": ["export OF_THE_SITE=1"],
    }
    settings = {f"jobqueue.slurm.{key}": value for key, value in job.items()}
    with dask.config.set({**settings, "distributed.deploy.lost-worker-timeout": "1s"}):
        yield folder
    for number in (folder / "jobs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(number), signal.SIGKILL)


@pytest.fixture
def arrays():
    return walk_arrays(ROWS, ELEMENTS)


@pytest.fixture
def expected(tmp_path, arrays):
    """Return the bits of the serial pass."""
    trajectory = write_trajectory(tmp_path / "serial.zarr", arrays, SHAPES, CHUNK)
    compute_small(trajectory, tmp_path / "serial" / "ledger.zarr")
    return bits(tmp_path / "serial" / "ledger.zarr")


def run_pass(tmp_path, arrays, executor, **options):
    trajectory = write_trajectory(tmp_path / "trajectory.zarr", arrays, SHAPES, CHUNK)
    compute_small(trajectory, tmp_path / "ledger.zarr", executor=executor, **options)
    return bits(tmp_path / "ledger.zarr")


# Slurm -------------------------------------------------------------------------------------------------------


def test_a_pass_on_slurm_requests_configured_jobs_replaces_a_dead_job_and_has_the_same_bits(
    slurm, tmp_path, arrays, expected
):
    processes, jobs = 2, []

    def kill_the_first_job(done, total):
        jobs.append((slurm / "jobs").read_text().split())
        if done == 1:
            os.killpg(int(jobs[0][0]), signal.SIGKILL)
            wait_for(lambda: len((slurm / "jobs").read_text().split()) > 1)

    with dask.config.set({"jobqueue.slurm.processes": processes, "jobqueue.slurm.cores": processes}):
        got = run_pass(tmp_path, arrays, executors.named_cluster("slurm", processes), progress=kill_the_first_job)
    assert got == expected
    script = (slurm / "script").read_text()
    for line in (
        "#SBATCH -p long",
        "#SBATCH -t 02:00:00",
        "#SBATCH --mem=954M",
        f"#SBATCH --cpus-per-task={processes}",
        "export OF_THE_SITE=1",
        *(f"export {name}={value}" for name, value in clusters.ONE_THREAD.items()),
    ):
        assert line in script.splitlines()
    assert "--nthreads 1" in script
    # The cluster ends with the pass.
    for number in map(int, (slurm / "jobs").read_text().split()):
        wait_for(lambda number=number: not psutil.pid_exists(number) or _is_zombie(number))


def _is_zombie(number):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.usefixtures("slurm")
def test_no_job_is_requested_if_there_is_nothing_to_compute(slurm):
    assert list(executors.named_cluster("slurm", 2)(None, [], dict)) == []
    assert (slurm / "jobs").read_text() == ""


# Objects that Dask could not finish creating emit warnings when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["slurm", "pbs", "lsf", "sge", "oar", "htcondor"])
def test_an_unconfigured_batch_system_is_reported_with_its_section(name):
    with (
        dask.config.set({f"jobqueue.{name}.cores": None, f"jobqueue.{name}.memory": None}),
        pytest.raises(InputError, match="cannot be started") as refusal,
        clusters.named_scheduler(name, 1),
    ):
        raise AssertionError
    assert f"jobqueue.{name}" in str(refusal.value)
    del refusal
    gc.collect()


@pytest.mark.parametrize("form", ["mapping", "list"])
def test_a_pass_on_kubernetes_requests_pods_of_one_thread_and_has_the_same_bits(
    tmp_path, arrays, expected, monkeypatch, form
):
    """Replace the Dask operator by a stub, whose pods are processes of this machine."""
    asked, scaled = [], []

    class KubeCluster(LocalCluster):
        def __init__(self, *, env):
            asked.append(env)
            super().__init__(n_workers=0, threads_per_worker=1, dashboard_address="127.0.0.1:0")

        def scale(self, n):
            scaled.append(n)
            super().scale(n)

    operator = types.SimpleNamespace(KubeCluster=KubeCluster)
    monkeypatch.setitem(sys.modules, "dask_kubernetes", types.SimpleNamespace(operator=operator))
    monkeypatch.setitem(sys.modules, "dask_kubernetes.operator", operator)
    site = {"OF_THE_SITE": "1"} if form == "mapping" else [{"name": "OF_THE_SITE", "value": "1"}]
    with dask.config.set({"kubernetes.env": site}):
        assert run_pass(tmp_path, arrays, executors.named_cluster("kubernetes", 2)) == expected
    assert scaled[0] == 2
    (env,) = asked
    got = env if form == "mapping" else {variable["name"]: variable["value"] for variable in env}
    assert got == {**clusters.ONE_THREAD, "OF_THE_SITE": "1"}


def test_an_unknown_or_missing_cluster_package_is_an_error(monkeypatch):
    with pytest.raises(InputError, match="unknown cluster 'mainframe'"), clusters.named_scheduler("mainframe", 1):
        raise AssertionError
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(InputError, match=r"natgrad-pipeline\[batch\]"), clusters.named_scheduler("slurm", 1):
        raise AssertionError


@pytest.mark.usefixtures("slurm")
def test_a_configured_batch_system_is_accepted_without_a_job(slurm):
    clusters.require_cluster("slurm")
    assert (slurm / "jobs").read_text() == ""


def test_a_missing_command_or_configuration_is_found_before_a_cluster_is_started(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        dask.config.set({"jobqueue.slurm.cores": 1, "jobqueue.slurm.memory": "1GB"}),
        pytest.raises(InputError, match="requires the command sbatch"),
    ):
        clusters.require_cluster("slurm")
    with (
        dask.config.set({"jobqueue.pbs.cores": None}),
        pytest.raises(InputError, match="cannot be started") as refusal,
    ):
        clusters.require_cluster("pbs")
    assert "jobqueue.pbs" in str(refusal.value)


def test_local_workers_have_one_thread_of_each_kind(monkeypatch):
    for name in clusters.ONE_THREAD:
        monkeypatch.delenv(name, raising=False)
    with clusters.local_scheduler(1) as address, Client(address, set_as_default=False) as client:
        names = list(clusters.ONE_THREAD)
        (seen,) = client.run(lambda: {name: os.environ.get(name) for name in names}).values()
    assert seen == clusters.ONE_THREAD


def test_the_log_of_a_pass_has_run_steps_and_tile_as_fields(tmp_path, arrays, caplog):
    with caplog.at_level("DEBUG", "natgrad"):
        run_pass(tmp_path / "run 7", arrays, executors.serial)
    records = [record.__dict__ for record in caplog.records]
    tiles = [(tuple(record["updates"]), tuple(record["columns"])) for record in records if "updates" in record]
    steps = [(record["first_step"], record["last_step"]) for record in records if "last_step" in record]
    assert {record["run"] for record in records if "updates" in record or "last_step" in record} == {"run 7"}
    assert sorted(steps) == steps
    assert steps[0][0] == 0
    assert steps[-1][1] == ROWS - 2
    assert len(set(tiles)) == len(tiles) >= len(steps) > 1
    assert {updates for updates, _ in tiles} == {(first, last + 1) for first, last in steps}


# An existing cluster -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def scheduler(port, folder, *options):
    command = (sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--no-dashboard")
    with process(*command, "--port", port, *options, log=folder / "scheduler.log") as running:
        yield running


@contextlib.contextmanager
def worker(address, folder, *options, environment=None, program=()):
    command = (
        *program,
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        address,
        "--nthreads",
        "1",
        "--no-dashboard",
    )
    environment = clusters.ONE_THREAD | (environment or {})
    with process(*command, *options, environment=environment, log=folder / "worker.log") as running:
        yield running


def test_a_client_that_does_not_connect_again_ends_the_pass(tmp_path, arrays):
    def kill_and_wait(done, total):
        kill(running)
        time.sleep(3)  # the client gives up after a second

    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    executor = executors.existing_cluster(address, connect_seconds=1.0)
    with scheduler(port, tmp_path) as running, worker(address, tmp_path):
        connected(address, 1)
        with pytest.raises(Unavailable, match="the Dask scheduler was lost"):
            run_pass(tmp_path, arrays, executor, progress=kill_and_wait)


def test_a_lost_scheduler_ends_the_pass_with_a_remedy_that_works(tmp_path, arrays, expected):
    port = free_port()
    executor = executors.existing_cluster(f"tcp://127.0.0.1:{port}")
    with scheduler(port, tmp_path) as running, worker(f"tcp://127.0.0.1:{port}", tmp_path):
        with pytest.raises(Unavailable, match="the Dask scheduler was lost") as lost:
            run_pass(tmp_path, arrays, executor, progress=lambda done, total: done == 1 and kill(running))
        assert f"natgrad analyze {tmp_path}" in lost.value.remedy
        assert "chunks are done and kept" in lost.value.remedy
        kept = open_ledger(tmp_path / "ledger.zarr")
        assert (
            1
            <= len(list((kept.storage.local_path / "commits").glob("[0-9]*.json")))
            < -(-(ROWS - 1) // kept.updates_per_chunk)
        )
    with scheduler(port, tmp_path), worker(f"tcp://127.0.0.1:{port}", tmp_path):
        compute_small(tmp_path / "trajectory.zarr", tmp_path / "ledger.zarr", executor=executor)
    assert bits(tmp_path / "ledger.zarr") == expected


def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


die.__module__ = "__main__"  # workers receive it by value, so they do not import this module


def test_a_task_whose_workers_die_repeatedly_is_reported_with_a_remedy(tmp_path):
    with clusters.local_scheduler(2) as address, pytest.raises(Unavailable, match="died 4 times") as dead:
        list(
            calls(
                executors.existing_cluster(address),
                die,
                [0, 1],
                kind="die",
                out=open_storage(tmp_path),
                task_bytes=0,
                worker_bytes=0,
            )
        )
    assert f"natgrad analyze {tmp_path}" in dead.value.remedy


# Workers that cannot take tasks -------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path):
    port = free_port()
    with scheduler(port, tmp_path):
        yield f"tcp://127.0.0.1:{port}"


def package(folder, **replaced):
    """Write the package with other text into a folder for PYTHONPATH; without text, one that cannot be imported."""
    if replaced:
        shutil.copytree(Path(natgrad.__file__).parent, folder / "natgrad")
        version = folder / "natgrad" / "schema" / "version.py"
        text = version.read_text()
        for name, value in replaced.items():
            text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        version.write_text(text)
    else:
        (folder / "natgrad").mkdir(parents=True)
        (folder / "natgrad" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'natgrad'\")")
    return {"PYTHONPATH": str(folder)}


def connected(address, count):
    with Client(address, timeout=60, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=120)


def refusal_of(tmp_path, arrays, address):
    """Return the error of a pass for which no worker can take tasks."""
    connected(address, 1)
    with pytest.raises(Unavailable, match="no worker could take the tasks of this pass for 3 s") as caught:
        run_pass(tmp_path, arrays, executors.existing_cluster(address, worker_seconds=3.0))
    assert f"natgrad analyze {tmp_path}" in caught.value.remedy
    assert "0 of" in caught.value.remedy
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".check")]
    return caught.value.why


def test_workers_without_the_package_end_the_pass_with_the_host_and_the_remedy(tmp_path, arrays, address):
    with worker(address, tmp_path, environment=package(tmp_path / "lacks")):
        why = refusal_of(tmp_path, arrays, address)
    assert f"on host {socket.gethostname()}: natgrad {__version__} cannot be imported: No module named" in why
    assert f"install natgrad-pipeline {__version__}, as on the client, for {sys.executable}" in why


def test_workers_of_another_version_end_the_pass(tmp_path, arrays, address):
    with worker(address, tmp_path, environment=package(tmp_path / "other", RESULTS_VERSION=999)):
        why = refusal_of(tmp_path, arrays, address)
    assert f"its versions are natgrad {__version__}, results 999" in why or "results 999" in why


def test_a_cluster_without_workers_ends_the_pass_without_a_traceback(tmp_path, arrays, address, caplog, capfd):
    with pytest.raises(Unavailable, match="no worker could take the tasks") as caught:
        run_pass(tmp_path, arrays, executors.existing_cluster(address, worker_seconds=0.5))
    assert caught.value.why == "no worker is connected to the scheduler"
    assert "the Dask scheduler has no workers; waiting for one for 0.5 s" in caplog.text
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


def test_workers_that_do_not_see_out_end_the_pass(tmp_path, arrays, address, monkeypatch):
    # The same path refers to a different folder in every process.
    out = Path("/proc/self/cwd/out")
    (tmp_path / "client" / "out").mkdir(parents=True)
    (tmp_path / "host").mkdir()
    monkeypatch.chdir(tmp_path / "client")
    trajectory = write_trajectory(out / "trajectory.zarr", arrays, SHAPES, CHUNK)
    executor = executors.existing_cluster(address, worker_seconds=3.0)
    with worker(address, tmp_path, program=("env", "-C", tmp_path / "host")):
        connected(address, 1)
        # There is no folder, and then one of another storage.
        for _ in range(2):
            with pytest.raises(Unavailable, match="no worker could take the tasks") as caught:
                compute_small(trajectory, out / "ledger.zarr", executor=executor)
            assert f"{out} does not exist there, or is not the OUT of the client" in caught.value.why
            assert f"make the storage of OUT available at {out} on that host" in caught.value.why
            (tmp_path / "host" / "out").mkdir(exist_ok=True)


def test_tasks_go_to_the_workers_that_pass_the_check_whenever_they_join(
    tmp_path, arrays, expected, address, caplog
):
    other, lacking = package(tmp_path / "other", RESULTS_VERSION=999), package(tmp_path / "lacks")
    with contextlib.ExitStack() as stack:
        stack.enter_context(worker(address, tmp_path, environment=lacking))
        first = stack.enter_context(worker(address, tmp_path))
        connected(address, 2)

        def replace_first(done, total):
            if done == 1:
                stack.enter_context(worker(address, tmp_path, environment=other))
                connected(address, 3)
                kill(first)
                joins = threading.Timer(4.0, lambda: stack.enter_context(worker(address, tmp_path)))
                joins.start()
                stack.callback(joins.join)

        executor = executors.existing_cluster(address, worker_seconds=300.0)
        assert run_pass(tmp_path, arrays, executor, progress=replace_first) == expected
    assert "cannot be imported: No module named 'natgrad'" in caplog.text
    assert "results 999" in caplog.text
    assert "the Dask scheduler has no worker that passes the check; waiting for one for 300 s" in caplog.text


def test_a_pass_over_tls_uses_the_certificates_of_the_configuration_of_dask(tmp_path, arrays, expected):
    port = free_port()
    temporary = Security.temporary()
    files = {
        "ca-file": temporary.tls_ca_file,
        "cert": temporary.tls_scheduler_cert,
        "key": temporary.tls_scheduler_key,
    }
    options = []
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        options += [f"--tls-{name}", tmp_path / name]
    tls = {"ca-file": str(tmp_path / "ca-file")} | {
        f"{role}.{key}": str(tmp_path / key)
        for role in ("client", "worker", "scheduler")
        for key in ("cert", "key")
    }
    address = f"tls://127.0.0.1:{port}"
    with scheduler(port, tmp_path, "--protocol", "tls", *options), worker(address, tmp_path, *options):
        with pytest.raises(Unavailable, match="does not respond"):
            list(executors.existing_cluster(address)(None, [None], dict))
        with dask.config.set({f"distributed.comm.tls.{key}": value for key, value in tls.items()}):
            assert run_pass(tmp_path, arrays, executors.existing_cluster(address)) == expected
            options = clusters.job_options("slurm")
    assert options["protocol"] == "tls://"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"distributed: [", "expected the node content"),
        (b"text", "it is not a mapping"),
        (b"\xff\xfe", "invalid start byte"),
        (b"a: 2001-99-99", "month must be in"),
        (b"distributed: 3", r"distributed must be a section \(a mapping\), got 3"),
        (b"array: {rechunk: [1]}", r"array.rechunk must be a section \(a mapping\), got \[1\]"),
    ],
)
def test_a_malformed_configuration_is_named(tmp_path, monkeypatch, text, why):
    file = tmp_path / "any.yaml"
    file.write_bytes(text)
    monkeypatch.setattr(dask.config, "paths", [str(tmp_path)])
    with (
        pytest.raises(InputError, match="a configuration file of Dask is malformed") as refusal,
        clusters.configuration_errors(),
    ):
        raise TypeError("what Dask would raise")
    assert refusal.value.where == str(file)
    assert re.search(why, refusal.value.why)


def test_other_errors_are_not_attributed_to_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "any.yaml").write_text(
        "distributed: {comm: {retry: {count: 3}}}\narray: {chunk-size: 1MiB}\nmy: 3\n"
    )
    monkeypatch.setattr(dask.config, "paths", [str(tmp_path)])
    with pytest.raises(TypeError, match="another"), clusters.configuration_errors():
        raise TypeError("another")


def test_an_amount_of_memory_is_parsed_in_the_notation_of_dask():
    amounts = {"512MiB": 512 << 20, "2GB": 2 * 10**9, "1.5 GiB": 3 << 29, "4096": 4096}
    assert {amount: clusters.memory_bytes(amount) for amount in amounts} == amounts


@pytest.mark.parametrize("amount", ["", "MiB", "much", "5 apples", "0", "-1GB", "nan", "inf", "1e400", "0.1"])
def test_an_invalid_amount_of_memory_is_an_error(amount):
    with pytest.raises(InputError, match="is not an amount of memory") as caught:
        clusters.memory_bytes(amount)
    assert repr(amount) in caught.value.what
    assert caught.value.where == "option memory_limit"


@pytest.mark.parametrize("guarded", [False, True])
def test_a_program_that_its_workers_would_run_again_is_told_what_to_do(tmp_path, guarded):
    program = tmp_path / "program.py"
    program.write_text(
        "from natgrad.compute.clusters import local_scheduler\n"
        + ("if __name__ == '__main__':\n    " if guarded else "")
        + "with local_scheduler(1) as address: print(address)\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=500)
    assert (done.returncode == 0) == guarded, done.stderr
    assert ("tcp://" in done.stdout) == guarded
    assert ("call natgrad below the line: if __name__ == '__main__':" in done.stderr) != guarded
