"""One writer at a time: the holder is named, and a lock of a dead process is taken over only if that is safe."""

import errno
import getpass
import json
import os
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import filelock
import psutil
import pytest

from logs import random_walk, write_log
from natgrad.schema.errors import InputError
from natgrad.storage import LocalStorage
from natgrad.storage.local import disk_errors
from opened import TIMES

HOLD = """
import errno, os, sys
from pathlib import Path
import filelock._unix
from natgrad.storage import LocalStorage

def no_flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

if sys.argv[2] == "softlock":
    filelock._unix.fcntl.flock = no_flock
with LocalStorage(sys.argv[1]).lock("trajectory"):
    print("holding", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def store(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "trajectory.zarr"


@pytest.fixture(params=["lock", "softlock"])
def kind(request, monkeypatch):
    """System locks, and the locks of a file system without them."""
    if request.param == "softlock":
        flock = os.strerror(errno.ENOLCK)

        def no_flock(*_):
            raise OSError(errno.ENOLCK, flock)

        monkeypatch.setattr(filelock._unix.fcntl, "flock", no_flock)
    return request.param


def holder(store, kind):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holding\n"
    return process


def lock_file(store, kind="lock"):
    return store.with_name(f".{store.name}.{kind}")


def enter(store):
    with LocalStorage(store).lock("trajectory"):
        pass


def test_a_second_writer_learns_the_holder_and_start_time(store, kind):
    with holder(store, kind) as first:
        with pytest.raises(InputError, match="another process is writing this trajectory") as caught:
            enter(store)
        first.communicate("done\n")
    words = caught.value.what.split()
    assert words[words.index("process", 2) + 1] == str(first.pid)
    assert words[words.index("on") + 1].rstrip(",") == socket.gethostname()
    since = datetime.fromisoformat(words[-1])
    assert timedelta(seconds=-1) < datetime.now(UTC) - since < timedelta(minutes=1)
    if kind == "lock":
        assert f"of user {getpass.getuser()}" in caught.value.what
    assert caught.value.where == str(store)
    enter(store)
    assert not lock_file(store, kind).exists() or not lock_file(store, kind).read_text()


def test_the_lock_of_a_dead_process_on_this_host_is_taken_over(store, kind):
    with holder(store, kind) as first:
        first.send_signal(signal.SIGKILL)
    assert str(first.pid) in lock_file(store, kind).read_text()
    enter(store)


def left_by_another_host(store):
    name = {"process": 1234, "host": "node17", "user": "ada", "since": "2026-11-25T19:00:00+00:00"}
    lock_file(store).write_text(json.dumps(name))


def psutil_partition(mountpoint, fstype):
    return SimpleNamespace(mountpoint=str(mountpoint), fstype=fstype)


def mount_everything(monkeypatch, fstype):
    """Pretend that all files are on one file system."""
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [psutil_partition("/", fstype)])


def test_a_free_lock_of_another_host_is_not_taken_on_a_shared_file_system(store, monkeypatch):
    left_by_another_host(store)
    mount_everything(monkeypatch, "nfs4")
    for _ in range(2):
        with pytest.raises(InputError, match="process 1234 on node17 of user ada, since 2026-11-25") as caught:
            enter(store)
    assert "nfs4" in caught.value.why
    assert str(lock_file(store)) in caught.value.remedy
    lock_file(store).unlink()
    enter(store)


def test_a_free_lock_on_a_local_disk_is_taken_for_any_host_name(store, monkeypatch):
    left_by_another_host(store)
    mount_everything(monkeypatch, "ext4")
    enter(store)


def test_a_free_lock_of_this_host_is_taken_everywhere(store, monkeypatch):
    with holder(store, "lock") as first:
        first.kill()
    mount_everything(monkeypatch, "nfs4")
    enter(store)


@pytest.mark.parametrize("kind", ["softlock"], indirect=True)
def test_a_lock_file_of_another_host_is_not_taken_over(store, kind):
    lock_file(store, kind).write_text("1234\nnode17\n")
    with pytest.raises(InputError, match="process 1234 on node17, since"):
        enter(store)


def test_a_free_lock_is_taken_if_the_nearest_mount_is_local(store, monkeypatch):
    left_by_another_host(store)
    monkeypatch.setattr(
        psutil,
        "disk_partitions",
        lambda all: [psutil_partition("/", "nfs4"), psutil_partition(store.parent.resolve(), "xfs")],
    )
    enter(store)


def test_a_failed_writer_releases_the_lock(store):
    with pytest.raises(KeyboardInterrupt), LocalStorage(store).lock("trajectory"):
        raise KeyboardInterrupt
    with holder(store, "lock") as next_one:
        next_one.communicate("done\n")
    assert next_one.returncode == 0


@pytest.mark.parametrize(
    "code",
    [
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
        *(errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT),
    ],
)
def test_disk_errors_name_the_file_and_a_remedy(store, code):
    with pytest.raises(InputError, match=os.strerror(code)) as caught, disk_errors(store):
        raise OSError(code, os.strerror(code), str(store / "file"))
    assert caught.value.where == str(store / "file")
    assert caught.value.why
    assert "committed data are kept" in caught.value.remedy


def test_other_errors_are_not_translated(store):
    with pytest.raises(ConnectionResetError), disk_errors(store):
        raise ConnectionResetError(errno.ECONNRESET, "of a scheduler")
    with pytest.raises(OSError, match="of a scheduler"), disk_errors(store):
        raise OSError("of a scheduler")


# Two hosts: processes in namespaces for host names, mounts and process numbers.
HOST = """
import sys, time
from pathlib import Path
import natgrad

folder, name, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
natgrad.process(folder / "logs" / "run", folder / f"alone-{name}", workers=1)
for number in range(rounds):
    (folder / f"ready-{name}-{number}").touch()
    while not all((folder / f"ready-{host}-{number}").exists() for host in ("one", "two")):
        time.sleep(0.001)
    out = folder / f"out-{number}"
    try:
        if number % 2:
            print(*(run.state for run in natgrad.scan(folder / "logs", out, workers=1).runs))
        else:
            natgrad.process(folder / "logs" / "run", out / "run", workers=1)
            print("processed")
    except natgrad.Unavailable as error:
        print(error.what.partition(":")[0])
"""

UNSHARE = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]


def stores(out):
    """Files of the stores, except times."""
    return {
        path.relative_to(out): path.read_bytes()
        for store in ("trajectory.zarr", "ledger.zarr", "results.zarr")
        for path in sorted((out / store).rglob("*"))
        if path.is_file() and path.name != TIMES
    }


def test_two_hosts_that_use_one_out_at_the_same_time_give_the_data_of_one(tmp_path):
    write_log(tmp_path / "logs" / "run", random_walk(6))
    namespaces = [*UNSHARE, *([] if os.geteuid() == 0 else ["--map-root-user"])]
    rounds, ends = 2, []  # a race of two commands, and one of two scans
    hosts = [
        subprocess.Popen(
            [*namespaces, "sh", "-c", 'hostname "$1" && shift && exec "$@"', "sh", name]
            + [sys.executable, "-c", HOST, tmp_path, name, str(rounds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in ("one", "two")
    ]
    for host in hosts:
        ends.append(host.communicate()[0].splitlines())
        assert host.returncode == 0
    refused = ("another process is writing this trajectory", "another process is writing this ledger")
    for number, pair in enumerate(zip(*ends, strict=True)):
        assert "processed" in pair
        assert set(pair) <= {"processed", *(("skipped", "unchanged") if number % 2 else refused)}
        assert stores(tmp_path / f"out-{number}" / "run") == stores(tmp_path / "alone-one")
    assert len(ends[0]) == rounds
