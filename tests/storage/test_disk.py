"""Disks that are full, read-only or limited: commits are kept, the error is reported, and a rerun completes."""

import contextlib
import ctypes
import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from logs import random_walk, write_log
from natgrad.app.folder import RunFolder
from natgrad.app.run import Analysis, analyze_run, ingest_run
from natgrad.app.verification import verify_run
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits
from natgrad.storage import LocalStorage
from natgrad.store import open_trajectory
from opened import TIMES, ingest

TENSORS = {"weight": (300, 100), "bias": (40,)}
STEPS = 12
ONE_WORKER = Analysis(workers=1)
SMALL = IngestLimits(chunk_elements=70_000, commit_bytes=1)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("disk") / "log", random_walk(STEPS, TENSORS))


def content(out):
    """Files of the stores of a run, except times, and the version that created them."""
    return {
        path.relative_to(out): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "results.zarr" not in path.parts and path.suffix != ".lock" and path.name != TIMES
    }


# A small disk: a tmpfs in a mount namespace, which ends with the process. It is filled until the command under
# test has no space for its next step, and enlarged for the rerun.
ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from subprocess import run

disk, log, size = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)

from natgrad.app.run import Analysis, analyze_run, ingest_run
from natgrad.app.verification import verify_run
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits
from natgrad.store import open_trajectory

out = disk / "out"

def process():
    ingest_run(log, out, limits=IngestLimits(chunk_elements=70_000, commit_bytes=1))
    analyze_run(out, Analysis(workers=1))

try:
    process()
    print("no error")
except InputError as error:
    print(error.what, error.where.startswith(str(disk)), "run again" in error.remedy, sep="|")
rows = open_trajectory(out / "trajectory.zarr").n_states if (out / "trajectory.zarr").exists() else 0
print(rows, verify_run(out) if rows else [], sep="|")
run(["mount", "-o", "remount,{}".format(sys.argv[4]), disk], check=True)
try:
    process()
    print("no error")
except InputError as error:
    print(error.what)
run(["mount", "-o", "remount,rw,size=64m", disk], check=True)
process()
run(["cp", "-r", out, sys.argv[5]], check=True)
"""


def on_a_small_disk(tmp_path, log, size, remount="size=64m"):
    """Run and rerun a command on a small disk; return its messages and the final stores."""
    (tmp_path / "disk").mkdir()
    copy = tmp_path / "copy"
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    done = subprocess.run(
        [*namespace, sys.executable, "-c", ON_A_SMALL_DISK, tmp_path / "disk", log, size, remount, copy],
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), content(copy)


@pytest.fixture(scope="module")
def undisturbed(log, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    ingest_run(log, out, limits=SMALL)
    analyze_run(out, ONE_WORKER)
    return content(out)


# A state has 240 kB, and a run with all its data 3.1 MB. The sizes fit the first steps, or all except the last.
@pytest.mark.parametrize("size", ["600k", "1500k", "2900k"])
def test_a_full_disk_is_reported_commits_are_kept_and_a_rerun_completes(tmp_path, log, undisturbed, size):
    (message, kept, again), stores = on_a_small_disk(tmp_path, log, size)
    assert message == "no space left: No space left on device|True|True"
    rows, _, damages = kept.partition("|")
    assert 0 <= int(rows) < STEPS
    assert damages == "[]"
    assert again == "no error"
    assert stores == undisturbed


def test_a_read_only_disk_is_reported_and_commits_are_kept(tmp_path, log, undisturbed):
    (message, kept, again), stores = on_a_small_disk(tmp_path, log, "64m", "ro")
    assert (message, kept) == ("no error", f"{STEPS}|[]")
    assert again.startswith("the file system is read-only")
    assert stores == undisturbed


RESULTS_ON_A_FULL_DISK = """
import os, sys
from pathlib import Path
from subprocess import run

disk, log = Path(sys.argv[1]), sys.argv[2]
run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)

import natgrad

out = disk / "out"
natgrad.ingest(log, out)
natgrad.analyze(out, windows=[1], workers=1)
ballast, complete = disk / "ballast", sum(path.stat().st_blocks * 512 for path in (out / "results.zarr").rglob("*"))
# A tenth of the results is more than the file of the lock.
for share in range(10, 100, 25):
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast.write_bytes(bytes(free - complete * share // 100))
    try:
        natgrad.analyze(out, windows=[1, 2], workers=1)
        print("no error")
    except natgrad.Unavailable as error:
        print(error.what, error.where.startswith(f"{out}/results.zarr/"), error.why, sep="|")
    print([path.name for path in out.glob(".*.new")], natgrad.open_results(out)["model"]["window"].values)
    ballast.unlink()
print(natgrad.analyze(out, windows=[1, 2], workers=1).updates, natgrad.open_results(out)["model"]["window"].values)
"""


def test_a_failed_write_of_results_names_the_file_and_keeps_the_old_results(tmp_path, log):
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    done = subprocess.run(
        [*namespace, sys.executable, "-c", RESULTS_ON_A_FULL_DISK, tmp_path, log], capture_output=True, text=True
    )
    assert done.stderr == ""
    *failed, complete = done.stdout.splitlines()
    assert failed == ["no space left: No space left on device|True|the disk is full", "[] [1]"] * 4
    assert complete == f"{STEPS - 1} [1 2]"


LIMITED = """
import resource, sys
from pathlib import Path
from natgrad.app.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main()
"""


def test_the_command_reports_a_file_size_limit(tmp_path, log):
    command = [sys.executable, "-c", LIMITED, "50000", "ingest", log, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "natgrad: a file would become too large: File too large" in done.stderr
    assert "ulimit -f" in done.stderr
    assert "Traceback" not in done.stderr
    assert ingest(log, tmp_path / "out" / "trajectory.zarr").new_steps == STEPS


class Failing:
    """Make writing system calls fail from a certain call on, as a quota does."""

    def __init__(self, monkeypatch, calls, code):
        self._count, self._calls, self._code = itertools.count(), calls, code
        for owner, name in ((os, "pwrite"), (os, "fsync"), (os, "mkdir"), (Path, "replace"), (os, "truncate")):
            monkeypatch.setattr(owner, name, self._failing(getattr(owner, name)))

    def _failing(self, function):
        def failing(*arguments, **options):
            if next(self._count) >= self._calls:
                raise OSError(self._code, os.strerror(self._code), "file")
            return function(*arguments, **options)

        return failing


@pytest.mark.parametrize("calls", range(0, 120, 13))
def test_a_quota_exceeded_at_any_call_keeps_commits(tmp_path, log, monkeypatch, calls):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Failing(patch, calls, errno.EDQUOT)
        with pytest.raises(InputError, match="the disk quota is exceeded"):
            ingest_run(log, out, limits=SMALL)
    store = RunFolder.of(out).trajectory
    before = open_trajectory(store).scalar("step").tolist() if store.exists() else []
    assert before == list(range(len(before)))
    assert not before or verify_run(out) == []
    ingest_run(log, out, limits=SMALL)
    ingest_run(log, tmp_path / "once", limits=SMALL)
    assert content(out) == content(tmp_path / "once")


# Several files together --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_each_file_and_folder_is_flushed_once(tmp_path, monkeypatch, count):
    paths = [tmp_path / str(number) for number in range(count)]
    for path in paths[:-1]:
        path.write_text("")
    for path in paths[-1:]:
        path.mkdir()
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(Path(f"/proc/self/fd/{number}").readlink()))
    LocalStorage(tmp_path).flush(map(LocalStorage, paths))
    assert sorted(flushed) == sorted(paths)


@pytest.mark.parametrize("failing", range(4))
def test_an_error_of_one_flush_is_raised_after_all_flushes(tmp_path, monkeypatch, failing):
    files, done, failed = [tmp_path / str(number) for number in range(4)], [], threading.Event()
    for file in files:
        file.write_text("")

    def fsync(descriptor):
        file = Path(f"/proc/self/fd/{descriptor}").readlink()
        if file == files[failing]:
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        failed.wait()
        time.sleep(0.05)  # long enough for a caller that does not wait
        done.append(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        LocalStorage(tmp_path).flush(map(LocalStorage, files))
    assert sorted(done) == [file for file in files if file != files[failing]]


FORKED = """
import os, signal, sys
from pathlib import Path
from natgrad.storage import LocalStorage

folder = LocalStorage(Path(sys.argv[1]).parent)
paths = [LocalStorage(sys.argv[1]), folder]
folder.flush(paths)
if (process := os.fork()) == 0:
    signal.alarm(20)  # where it would wait forever
    folder.flush(paths)
    os._exit(0)
folder.flush(paths)
assert os.waitpid(process, 0)[1] == 0
"""


def test_a_forked_process_flushes_with_its_own_threads(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, tmp_path / "file"]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


class System:
    """C library that can only start to flush a file."""

    def __init__(self):
        self.sizes = []

    def sync_file_range(self, descriptor, *_):
        self.sizes.append(os.fstat(descriptor).st_size)


def test_the_disk_starts_with_a_segment_of_a_file_before_the_next_is_written(tmp_path, monkeypatch):
    system, half = System(), 1 << 19
    monkeypatch.setattr(ctypes, "CDLL", lambda name: system)
    contents = {"a": os.urandom(2 * half + 7), "b": b"", "c": memoryview(os.urandom(half))}
    LocalStorage(tmp_path).put_entries(contents)
    assert system.sizes == [half, 2 * half, 2 * half + 7, half]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents


def test_each_of_several_files_is_the_old_or_the_new_one_after_any_failure(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in "abc"]
    new = {path: path.name.encode() * 20 for path in paths}
    outcomes = set()
    for calls in range(12):
        for path in paths:
            path.write_bytes(b"old")
        with monkeypatch.context() as patch, contextlib.suppress(OSError):
            Failing(patch, calls, errno.ENOSPC)
            LocalStorage(tmp_path).put_entries({path.name: content for path, content in new.items()})
        replaced = [path.read_bytes() == new[path] for path in paths]
        assert all(path.read_bytes() == b"old" for path, done in zip(paths, replaced, strict=True) if not done)
        outcomes.add(sum(replaced))
        assert sorted(tmp_path.iterdir()) == paths
    # All of them are flushed before the first is renamed.
    assert outcomes == {0, 1, 2, 3}


SHORT = """
import resource, sys
from pathlib import Path
from natgrad.storage import LocalStorage
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    LocalStorage(sys.argv[1]).put_entries({"a": bytes(999), "b": bytes(1001)})
except OSError as error:
    print(error.strerror)
"""


def test_a_partly_written_file_does_not_replace_the_old_one(tmp_path):
    # A write fills the available space; only the next write fails.
    done = subprocess.run([sys.executable, "-c", SHORT, tmp_path], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("File too large\n", "")
    assert not list(tmp_path.iterdir())


# Results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("possible", [True, False], ids=["exchanged", "renamed"])
def test_a_folder_is_replaced_atomically(tmp_path, monkeypatch, possible):
    if not possible:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: System())
    path = tmp_path / "results"
    for number in range(3):
        with LocalStorage(path).replace_tree(str(number)) as folder:
            folder.mkdir()
            (folder / str(number)).write_text("")
        assert [entry.name for entry in tmp_path.rglob("*")] == ["results", str(number)]


def test_a_folder_that_cannot_be_written_replaces_nothing(tmp_path):
    storage = LocalStorage(tmp_path / "results")
    (storage / "which").put(b"old")
    with pytest.raises(FileNotFoundError), storage.replace_tree("which") as folder:
        (folder / "which").write_text("new")
    assert (storage / "which").get() == b"old"


KILLED = """
import os, signal, sys
from pathlib import Path
from natgrad.storage import LocalStorage

def kill(event, arguments):
    global left
    if event in ("os.rename", "os.rmdir", "os.remove", "open", "shutil.rmtree"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

for left in range(12):
    child = os.fork()
    if not child:
        with LocalStorage(Path(sys.argv[1]) / str(left) / "results").replace_tree("which") as folder:
            folder.mkdir()
            (folder / "which").write_text("new")
            sys.addaudithook(kill)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_results_are_readable_at_any_time_during_their_replacement(tmp_path):
    for left in range(12):
        LocalStorage(tmp_path / str(left) / "results" / "which").put(b"results")
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True, check=True)
    outcomes = {
        (int(code), (tmp_path / str(left) / "results" / "which").read_text())
        for left, code in enumerate(done.stdout.split())
    }
    assert outcomes == {(-signal.SIGKILL, "results"), (-signal.SIGKILL, "new"), (0, "new")}
