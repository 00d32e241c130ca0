"""A Prefect server over time: restarts, a work pool, watchers that are killed; with SQLite and PostgreSQL."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from test_deployments import flow_runs, natgrad, states

from commands import NATGRAD
from logs import random_walk, write_log, write_step
from servers import PrefectServer, free_port, kill, process, wait_for


@pytest.fixture(scope="module")
def postgresql():
    """Start PostgreSQL on a free port, and yield the address of a database."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    port, user = free_port(), {"user": "postgres"} if os.geteuid() == 0 else {}
    # Not in the folder of all tests: pytest closes that to other users whenever it is started.
    with tempfile.TemporaryDirectory(prefix="natgrad-postgresql-") as made:
        folder = Path(made)
        if user:  # PostgreSQL does not run as root
            shutil.chown(folder, "postgres")

        def run(name, *arguments):
            command = [programs / name, *map(str, arguments)]
            subprocess.run(command, check=True, capture_output=True, cwd=folder, **user)

        run("initdb", "--pgdata", folder / "data", "--username", "prefect", "--auth", "trust")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        run("pg_ctl", "--pgdata", folder / "data", "--log", folder / "log", "--wait", "--options", options, "start")
        try:
            run("createdb", "--host", "127.0.0.1", "--port", port, "--username", "prefect", "prefect")
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
        finally:
            run("pg_ctl", "--pgdata", folder / "data", "--mode", "immediate", "stop")


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request, tmp_path):
    database = request.getfixturevalue("postgresql") if request.param == "postgresql" else None
    with PrefectServer(tmp_path / "prefect", database) as server:
        yield server


@pytest.fixture
def root(tmp_path):
    write_log(tmp_path / "logs" / "run", random_walk(3))
    return tmp_path / "logs"


def append(root, number):
    write_step(root / "run", number, random_walk(number + 1)[number])


# Each test uses its own deployment names, because a flow that ended with its test keeps its slot for minutes.


def test_a_served_schedule_outlives_its_server(server, root, tmp_path):
    out = tmp_path / "out"
    serve = (NATGRAD, "serve", root, out, "--every", "20", "--workers", "1", "--name", "outlives")
    with process(*serve, environment=server.environment, log=tmp_path / "serve.log"):
        wait_for(lambda: states(root, out) == {"run": ("done", 2)})
        before = {run.id for run in flow_runs(server)}
        server.kill()
        append(root, 3)
        server.start()
        wait_for(lambda: states(root, out) == {"run": ("done", 3)})
        assert before <= {run.id for run in flow_runs(server)}


def test_a_watcher_that_was_killed_is_followed_by_another(server, root, tmp_path):
    out = tmp_path / "out"
    serve = (NATGRAD, "serve", root, out, "--every", "20", "--workers", "1", "--name", "followed")
    with process(*serve, environment=server.environment, log=tmp_path / "serve.log") as running:
        wait_for(lambda: "run" in states(root, out))
        kill(running)
    append(root, 3)
    with process(*serve, environment=server.environment, log=tmp_path / "serve.log"):
        wait_for(lambda: states(root, out) == {"run": ("done", 3)})


def test_workers_of_a_pool_run_the_deployed_code(server, root, tmp_path):
    out, prefect = tmp_path / "out", (sys.executable, "-m", "prefect")
    made = [*prefect, "work-pool", "create", "--type", "process", "here"]
    subprocess.run(made, env=os.environ | server.environment, check=True, capture_output=True)
    deployed = natgrad(server, "deploy", root, out, "--pool", "here", "--every", "20", "--workers", "1", "--json")
    assert "scan-runs/natgrad" in json.loads(deployed.stdout)["deployments"]
    worker = (*prefect, "worker", "start", "--pool", "here", "--limit", "2")
    with process(*worker, environment=server.environment, log=tmp_path / "worker.log"):
        wait_for(lambda: states(root, out) == {"run": ("done", 2)})
        append(root, 3)
        wait_for(lambda: states(root, out) == {"run": ("done", 3)})
