"""Real servers for tests, in separate processes: Prefect, and an S3 server."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import s3fs

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    # Services that the tests do not need, and that slow down a busy machine.
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
    # The time for which a flow whose process died occupies its deployment: the minimum that Prefect accepts.
    "PREFECT_SERVER_CONCURRENCY_INITIAL_DEPLOYMENT_LEASE_DURATION": "30",
}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for(condition, seconds=500.0):
    """Return the first true value of a condition; fail after a timeout."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not in {seconds} seconds: {condition}"
        time.sleep(0.2)


@contextlib.contextmanager
def process(*arguments, environment=None, log=None):
    """Run a process in its own session until the end of the context."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(Path(log).open("ab")) if log else subprocess.DEVNULL
        running = subprocess.Popen(
            [*map(str, arguments)],
            env=os.environ | (environment or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield running
        finally:
            kill(running)


def kill(running):
    """Kill a process and all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()


class PrefectServer:
    """Prefect server on a port, with a persistent database.

    Parameters
    ----------
    home : Path
        Folder of its database, unless ``database`` is set.
    database : str, optional
        Address of a database.
    settings : mapping, optional
        Further settings. With the web interface, ``PREFECT_SERVER_UI_ENABLED`` is true.
    """

    def __init__(self, home, database=None, settings=None):
        self.port, self.home = free_port(), Path(home)
        self.environment = {
            **QUIET,
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            **(settings or {}),
        }
        if database:
            self.environment["PREFECT_API_DATABASE_CONNECTION_URL"] = database
        self._stack = contextlib.ExitStack()

    def start(self):
        self.home.mkdir(parents=True, exist_ok=True)
        command = (sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1")
        if self.environment.get("PREFECT_SERVER_UI_ENABLED") != "true":
            command = (*command, "--no-ui")
        self._stack.enter_context(
            process(*command, "--port", self.port, environment=self.environment, log=self.home / "server.log")
        )
        wait_for(self._answers)

    def _answers(self):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.environment['PREFECT_API_URL']}/health"):
            return True
        return False

    def kill(self):
        """Kill the server, as in a power failure."""
        self._stack.close()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self.kill()


_FORGOTTEN = []


def forget_object_stores():
    """Forget the open object stores, so that they are opened again with the current environment."""
    _FORGOTTEN.append(s3fs.S3FileSystem._cache)
    s3fs.S3FileSystem._cache = {}


class S3Server:
    """moto server: buckets and objects in memory, with the S3 interface.

    Parameters
    ----------
    log : Path
        File for the output.
    """

    def __init__(self, log):
        self.port, self.log = free_port(), Path(log)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "a-key",
            "AWS_SECRET_ACCESS_KEY": "a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        command = (Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", self.port)
        self._stack.enter_context(process(*command, log=self.log))
        wait_for(self._answers)
        forget_object_stores()
        return self

    def _answers(self):
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{self.environment['AWS_ENDPOINT_URL']}/moto-api/"),
        ):
            return True
        return False

    def __exit__(self, *exception):
        self._stack.close()
