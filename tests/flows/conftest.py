import contextlib
import shutil
import sqlite3

import pytest

from servers import QUIET, PrefectServer

# The client of a server keeps a connection open, and its pings use `random` in another thread. Hypothesis fails if
# this happens while it draws an example, so servers end before the tests of other packages.


def end_clients():
    """End the threads that send events and logs; otherwise they would send those of later tests to this server."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=30)


@pytest.fixture(scope="module")
def prefect_server():
    """Start Prefect's embedded server with its own database, and use it in this process."""
    from prefect.testing.utilities import prefect_test_harness

    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        end_clients()
        with prefect_test_harness(server_startup_timeout=120):
            yield


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Start a Prefect server with SQLite in a process. ``server.empty`` is a database without flow runs."""
    with PrefectServer(tmp_path_factory.mktemp("prefect")) as server:
        server.empty = server.home / "empty.db"
        # The files of a database in use are not consistent.
        with (
            contextlib.closing(sqlite3.connect(server.home / "prefect.db")) as used,
            contextlib.closing(sqlite3.connect(server.empty)) as copy,
        ):
            used.backup(copy)
        yield server
        end_clients()


@pytest.fixture
def home(server, tmp_path):
    """Return the folder of a server with an existing database, because creating one takes a few seconds."""
    home = tmp_path / "prefect"
    home.mkdir()
    shutil.copy(server.empty, home / "prefect.db")
    return home
