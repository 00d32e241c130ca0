"""Use a Prefect server: require that one responds, or start one that ends with this process.

Prefect would start a server itself. That server outlives a process that is killed, and Prefect waits forever for
one that cannot open its database.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

import httpx
from prefect.client.orchestration import get_client
from prefect.context import refresh_global_settings_context
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_CLIENT_MAX_RETRIES,
    get_current_settings,
    temporary_settings,
)

from natgrad.app.worker import end_with_parent
from natgrad.schema.errors import InputError, Unavailable
from natgrad.schema.logs import logger

__all__ = ["require_server", "serve", "server_errors", "shorten_request_errors", "use_server"]

_log = logger("natgrad.flows")

_ANSWER_SECONDS = 30.0
"""Seconds in which a server must respond before anything is started."""

_START_SERVER = (
    "start a server (prefect server start) and set its address: export PREFECT_API_URL=http://HOST:4200/api"
)


def require_server() -> None:
    """Require that the configured server responds, and that it can read its database.

    Raises
    ------
    InputError
        If no server is configured.
    Unavailable
        If it does not respond in time, or answers with an error.
    """
    address = get_current_settings().api.url
    if address is None:
        raise InputError(
            "schedules require a Prefect server", where="PREFECT_API_URL is not set", remedy=_START_SERVER
        )
    # Prefect would try five times for a minute each.
    brief = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: _ANSWER_SECONDS}
    with temporary_settings(brief), server_errors(), get_client(sync_client=True) as client:
        client.read_flow_runs(limit=1)


class _OneLine(logging.Filter):
    """Log an error of a request in one line: its traceback only shows the code of Prefect."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True, and remove the traceback of such an error."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, httpx.HTTPError | PrefectHTTPStatusError):
            record.msg, record.args = f"{record.getMessage()} {error or type(error).__name__}", ()
            record.exc_info = record.exc_text = None
        return True


_ONE_LINE = _OneLine()


def shorten_request_errors() -> None:
    """Log errors of requests to the server in one line from now on; Prefect logs them with long tracebacks."""
    for name in ("engine", "flow_runs", "task_runs"):
        logging.getLogger(f"prefect.{name}").addFilter(_ONE_LINE)


@contextmanager
def server_errors() -> Iterator[None]:
    """Translate errors of requests to the Prefect server into messages for users."""
    shorten_request_errors()
    try:
        yield
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        address = get_current_settings().api.url
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code >= 500:
            raise Unavailable(
                f"the Prefect server answers with status {error.response.status_code}",
                where=address or "",
                why="it may be overloaded, or its database may be damaged",
                remedy="read the output of the server; if its database is damaged, stop it, move the database away "
                "(it holds only the history of the flows), and start it again",
            ) from error
        if isinstance(error, httpx.HTTPStatusError):
            raise
        raise Unavailable(
            f"the Prefect server does not respond: {error or type(error).__name__}",
            where=address or "",
            why="it is not running, it hangs, or the address is wrong",
            remedy=_START_SERVER,
        ) from error


def use_server() -> None:
    """Use the server of ``PREFECT_API_URL``, or else start one that ends with this process.

    Raises
    ------
    Unavailable
        If the server does not respond, or cannot be started.
    """
    if get_current_settings().api.url is None:
        _log.info("starting a Prefect server for this command; set PREFECT_API_URL to use one that is running")
        # Threads of Prefect read the settings of the process, not those of a context.
        os.environ["PREFECT_API_URL"] = _start_server()
        refresh_global_settings_context()
    require_server()


def _start_server() -> str:
    """Start a server; return its address."""
    # The other end of the pipe stays open as long as this process lives.
    alive, _ = os.pipe()
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (the server writes to it)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        descriptors = (listening.fileno(), alive)
        running = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()", *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={
                # Events take up half of the history of a run, and no program reads those of this server.
                "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                **get_current_settings().to_environment_variables(exclude_unset=True),
            },
            process_group=0,
        )
    os.close(alive)
    # Prefect sends its last messages when the interpreter ends, before functions of `atexit` are called.
    atexit.register(_stop, running)
    _wait_for_start(running, address, log)
    return address


def _stop(running: subprocess.Popen[bytes]) -> None:
    running.terminate()
    with suppress(subprocess.TimeoutExpired):
        running.wait(5)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def _wait_for_start(running: subprocess.Popen[bytes], address: str, log: IO[str]) -> None:
    settings = get_current_settings()
    seconds = settings.server.ephemeral.startup_timeout_seconds
    deadline = time.monotonic() + seconds
    while running.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    if running.poll() is None:
        what, why = f"the Prefect server has not started in {seconds} s", "this machine is busy"
        remedy = "increase PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
    else:
        log.seek(0)
        lines = [line.strip() for line in log if "Error" in line and not line.startswith((" ", "INFO"))]
        what, why = "the Prefect server cannot start", lines[-1] if lines else f"status {running.returncode}"
        remedy = "move the database away if it is damaged; it holds only the history of the flows"
    url = settings.server.database.connection_url
    database = "" if url is None else url.get_secret_value()
    # The address of another database may contain a password.
    where = database if database.startswith("sqlite") else "PREFECT_API_DATABASE_CONNECTION_URL"
    raise Unavailable(what, where=where, why=why, remedy=remedy)


def serve() -> None:
    """Run the server on a socket of the parent process, until that process ends."""
    descriptor, alive = map(int, sys.argv[1:])
    end_with_parent(alive)
    os.environ |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    import uvicorn

    listening = socket.socket(fileno=descriptor)
    listening.set_inheritable(False)
    application = "prefect.server.api.server:create_app"
    config = uvicorn.Config(application, factory=True, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[listening])
