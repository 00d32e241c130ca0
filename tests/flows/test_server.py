"""Test scans with Prefect servers that are missing, stopped or damaged, with real processes."""

import os
import signal
import subprocess

import psutil
import pytest

from commands import NATGRAD
from distributions import install
from logs import random_walk, write_log
from natgrad.app import scan
from servers import QUIET, PrefectServer, free_port, wait_for

# A server is ready after about ten seconds, or after minutes on a busy machine.
pytestmark = pytest.mark.timeout(1200)

HANGING = """
import time
from dataclasses import replace
from natgrad.sources.formats import FORMATS

HANGING = replace(
    FORMATS["steps"],
    name="hanging",
    find=lambda path: (path / "hang").exists(),
    open=lambda path, mapping: time.sleep(1000),
)
"""


@pytest.fixture
def root(tmp_path):
    write_log(tmp_path / "logs" / "run", random_walk(3))
    return tmp_path / "logs"


def environment(tmp_path, **variables):
    """Return the environment of a command without a Prefect server."""
    clean = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    return clean | QUIET | {"PREFECT_HOME": str(tmp_path / "prefect")} | variables


def natgrad_scan(root, out, variables):
    return subprocess.run(
        [NATGRAD, "scan", root, out, "--workers", "1", "--quiet"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_scan_without_a_server_starts_one_that_must_be_able_to_read_its_database(root, home, tmp_path):
    variables = environment(tmp_path)
    done = natgrad_scan(root, tmp_path / "out", variables)
    assert (done.returncode, done.stderr) == (0, "")
    database = home / "prefect.db"
    os.truncate(database, database.stat().st_size // 2)
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    done = natgrad_scan(root, tmp_path / "out", variables)
    assert done.returncode == 2
    for part in ("the Prefect server cannot start", "prefect.db", "malformed", "move the database away"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("home")
def test_a_scan_that_is_killed_leaves_no_server_and_no_other_process(tmp_path):
    installed = install(
        tmp_path / "installed",
        "natgrad-hanging",
        {"natgrad_hanging": HANGING},
        {"natgrad.formats": {"hanging": "natgrad_hanging:HANGING"}},
    )
    (tmp_path / "logs" / "run").mkdir(parents=True)
    (tmp_path / "logs" / "run" / "hang").touch()
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [NATGRAD, "scan", tmp_path / "logs", tmp_path / "out", "--quiet"]
    with subprocess.Popen(command, env=environment(tmp_path, PYTHONPATH=path)) as running:
        wait_for(lambda: (tmp_path / "out" / "run" / ".processing.lock").exists())
        children = psutil.Process(running.pid).children(recursive=True)
        assert len([one for one in children if "natgrad_flows.server" in " ".join(one.cmdline())]) == 1
        running.kill()
    psutil.wait_procs(children, timeout=60)
    assert not [one for one in children if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    with scan.only_processor(tmp_path / "out" / "run"):
        pass


def test_a_server_that_is_missing_or_does_not_respond_is_an_error(server, root, tmp_path):
    nobody = f"http://127.0.0.1:{free_port()}/api"
    done = natgrad_scan(root, tmp_path / "out", environment(tmp_path, PREFECT_API_URL=nobody))
    assert done.returncode == 2
    for part in ("the Prefect server does not respond", nobody, "prefect server start"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    (answering,) = [one for one in psutil.process_iter() if _listens_on(one, server.port)]
    answering.send_signal(signal.SIGSTOP)
    try:
        done = natgrad_scan(root, tmp_path / "out", environment(tmp_path, **server.environment))
    finally:
        answering.send_signal(signal.SIGCONT)
    assert done.returncode == 2
    for part in ("the Prefect server does not respond", server.environment["PREFECT_API_URL"], "it hangs"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_scan_ends_with_a_message_if_the_database_of_its_server_is_truncated(home, tmp_path):
    runs = 4
    for number in range(runs):
        write_log(tmp_path / "logs" / f"run-{number}", random_walk(3, seed=number))
    out, database = tmp_path / "out", home / "prefect.db"
    command = [NATGRAD, "scan", tmp_path / "logs", out, "--workers", "1", "--quiet"]
    with PrefectServer(home) as server, (tmp_path / "errors").open("w+") as errors:
        # Fewer attempts shorten the test.
        variables = environment(tmp_path, **server.environment, PREFECT_CLIENT_MAX_RETRIES="1")
        with subprocess.Popen(command, env=variables, stderr=errors) as running:
            wait_for(lambda: (out / "run-0" / "report.html").exists())
            os.truncate(database, database.stat().st_size // 2)
            for suffix in ("-wal", "-shm"):
                if database.with_name(database.name + suffix).exists():
                    os.truncate(database.with_name(database.name + suffix), 0)
        errors.seek(0)
        message = errors.read()
    assert running.returncode == 2
    assert "natgrad: the Prefect server" in message
    assert "Traceback" not in message
    # The runs themselves do not depend on the server.
    assert len(list(out.glob("*/report.html"))) == runs


def _listens_on(process, port):
    try:
        return any(one.laddr.port == port for one in process.net_connections("inet") if one.status == "LISTEN")
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return False
