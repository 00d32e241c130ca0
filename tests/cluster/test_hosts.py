"""A pass over several hosts: network namespaces on one machine, with a bridge between them and a shared disk.

The test itself is on the host ``client``; the scheduler and every worker are on separate hosts.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time

import pytest
from test_ledger_pass import ELEMENTS, SHAPES, SMALL, bits, compute_small

from logs import random_walk, walk_arrays, write_log, write_trajectory
from natgrad.compute import clusters
from natgrad.schema.layout import IngestLimits
from natgrad.store import open_trajectory
from opened import ingest
from servers import kill, process

ROWS, CHUNK = 120, (3, 40)

SETTINGS = {
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "10s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "10s",
}


def ip(*arguments):
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True)


class Hosts:
    """Hosts on one network, by name."""

    def __init__(self, names):
        self.tag = f"ng{os.getpid() % 10000}"
        self.names = names

    def __enter__(self):
        ip("link", "add", self.tag, "type", "bridge")
        ip("link", "set", self.tag, "up")
        for number, name in enumerate(self.names, start=1):
            space, near, far = self.space(name), f"{self.tag}{number}a", f"{self.tag}{number}b"
            ip("netns", "add", space)
            ip("link", "add", near, "type", "veth", "peer", "name", far)
            ip("link", "set", near, "master", self.tag, "up")
            ip("link", "set", far, "netns", space)
            ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", far)
            ip("-n", space, "link", "set", far, "up")
            ip("-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *exception):
        # Links first: a link is removed some time after its namespace, and its name is needed again.
        for number, name in enumerate(self.names, start=1):
            ip("link", "del", f"{self.tag}{number}a")
            ip("netns", "del", self.space(name))
        ip("link", "del", self.tag)

    def space(self, name):
        return f"{self.tag}-{name}"

    def address(self, name):
        return f"10.77.0.{self.names.index(name) + 1}"

    def link(self, name, state):
        """Disconnect the link of a host (``down``), or reconnect it (``up``)."""
        ip("link", "set", f"{self.tag}{self.names.index(name) + 1}a", state)

    def run(self, name, *arguments, **options):
        """Run a process on a host; see `servers.process`."""
        return process("ip", "netns", "exec", self.space(name), *arguments, **options)


@pytest.fixture
def hosts():
    with Hosts(["client", "head", "one", "two"]) as hosts:
        yield hosts


@contextlib.contextmanager
def dask_hosts(hosts, folder):
    """Start a scheduler and two workers, each on its host; yield the address and the workers by host."""
    environment = SETTINGS | clusters.ONE_THREAD
    address = f"tcp://{hosts.address('head')}:8786"
    head = (
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        hosts.address("head"),
        "--no-dashboard",
    )
    work = (sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard")
    with contextlib.ExitStack() as stack:
        stack.enter_context(hosts.run("head", *head, environment=environment, log=folder / "head.log"))
        workers = {
            name: stack.enter_context(
                hosts.run(
                    name,
                    *(*work, "--host", hosts.address(name), "--local-directory", folder / name),
                    environment=environment,
                    log=folder / f"{name}.log",
                )
            )
            for name in ("one", "two")
        }
        yield address, workers


PASS = """
import sys, time
from pathlib import Path
from distributed import Client
from natgrad.storage import LocalStorage
from natgrad.compute.executors import existing_cluster
from natgrad.compute.ledger_pass import compute_ledger
from natgrad.compute.plan import PlanLimits
with Client(sys.argv[1], timeout=120) as client:
    client.wait_for_workers(2, timeout=120)

def slowly(done, total):
    print(done, total, flush=True)
    time.sleep(0.2)

store = LocalStorage(sys.argv[2])
compute_ledger(
    store,
    store.parent / "ledger.zarr",
    executor=existing_cluster(sys.argv[1]),
    limits={LIMITS},
    progress=slowly,
)
"""


def pass_on(hosts, address, store):
    """Start a pass on the host ``client``; its standard output states how many chunks are finished."""
    code = PASS.replace("{LIMITS}", repr(SMALL))
    return subprocess.Popen(
        ["ip", "netns", "exec", hosts.space("client"), sys.executable, "-c", code, address, str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | SETTINGS,
    )


def started(running):
    """Wait until a pass has finished its first chunk."""
    assert running.stdout.readline(), running.communicate()[1]


@pytest.fixture
def store(tmp_path):
    return write_trajectory(tmp_path / "run" / "trajectory.zarr", walk_arrays(ROWS, ELEMENTS), SHAPES, CHUNK)


@pytest.fixture
def expected(tmp_path, store):
    """Bits of the serial pass."""
    compute_small(store, tmp_path / "serial" / "ledger.zarr")
    return bits(tmp_path / "serial" / "ledger.zarr")


def finish(running, store, expected):
    _, error = running.communicate(timeout=240)
    assert running.returncode == 0, error
    assert bits(store.parent / "ledger.zarr") == expected


def test_a_host_that_loses_power_costs_nothing_but_its_work(hosts, tmp_path, store, expected):
    with dask_hosts(hosts, tmp_path) as (address, workers):
        running = pass_on(hosts, address, store)
        started(running)
        kill(workers["one"])
        finish(running, store, expected)


def test_a_host_that_loses_power_costs_nothing_but_its_work_in_place(hosts, tmp_path):
    log = write_log(tmp_path / "log", random_walk(ROWS, SHAPES))
    for out, in_place in (("copied", False), ("placed", True)):
        store = tmp_path / out / "trajectory.zarr"
        ingest(log, store, in_place=in_place, limits=IngestLimits(chunk=CHUNK))
        assert open_trajectory(store).in_place == in_place
    compute_small(tmp_path / "copied/trajectory.zarr", tmp_path / "copied/ledger.zarr")
    with dask_hosts(hosts, tmp_path) as (address, workers):
        running = pass_on(hosts, address, store)
        started(running)
        kill(workers["one"])
        finish(running, store, bits(tmp_path / "copied/ledger.zarr"))


@pytest.mark.parametrize("back", [True, False])
def test_a_link_that_is_cut_and_may_come_back_changes_no_bit(hosts, tmp_path, store, expected, back):
    with dask_hosts(hosts, tmp_path) as (address, _):
        running = pass_on(hosts, address, store)
        started(running)
        hosts.link("one", "down")
        restored = threading.Timer(20.0, hosts.link, ("one", "up")) if back else None
        if restored:
            restored.start()
        finish(running, store, expected)
        if restored:
            restored.join()


def test_a_disconnected_client_states_how_to_continue_and_continues(hosts, tmp_path, store, expected):
    with dask_hosts(hosts, tmp_path) as (address, _):
        running = pass_on(hosts, address, store)
        started(running)
        hosts.link("head", "down")
        _, error = running.communicate(timeout=240)
        assert running.returncode != 0
        assert "the Dask scheduler was lost" in error
        assert f"natgrad analyze {store.parent}" in error
        hosts.link("head", "up")
        time.sleep(1)
    with dask_hosts(hosts, tmp_path) as (address, _):
        finish(pass_on(hosts, address, store), store, expected)
